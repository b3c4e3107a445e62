"""`fedmoe bench`: runs a checkout's benchmarks; a table, and JSON and Markdown of the same; `acceptance`: the verdicts.

Timing itself is `fedmoe.profiling.bench`'s; here is what a person asks for and sees.
"""

import importlib.util
import json
import time
from contextlib import ExitStack, closing
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedmoe.benchprocess import CHECKOUT, events
from fedmoe.benchtable import Report, environment, markdown, tables
from fedmoe.display import Output, say, widen
from fedmoe.errors import UsageError, UserError
from fedmoe.files import write_atomic
from fedmoe.profiling import acceptance
from fedmoe.profiling.bench_selection import Selection

LONGEST = 86_400.0
"""Seconds, the most that a budget may be."""
ACCEPTANCE = "acceptance"
"""The suite that takes benchmarks from all files: those that the targets are measured by."""


def run(
    suite: str | None,
    only: str,
    as_json: Path | None,
    as_markdown: Path | None,
    checkout: Path = CHECKOUT,
    budget: float | None = None,  # seconds
) -> int:
    """Run a suite, or all; 0, or 1 where a benchmark failed. Raises UserError where there is nothing to run.

    Benchmarks for which the budget is too short are left out, and named. A target that is missed is no failure.
    """
    start = time.monotonic()
    files = _files(checkout / "tests" / "bench", suite)
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise UserError("fedmoe bench needs pytest-benchmark: pip install --editable '.[bench]'")
    if budget is not None and not 0 < budget <= LONGEST:
        raise UsageError(f"--budget-seconds is {budget:g}, must be more than 0 and at most {LONGEST:g}, a day")
    for path in (as_json, as_markdown):  # before the minutes, not after
        if path and not path.parent.is_dir():
            raise UserError(f"{path}: the folder {path.parent} does not exist")
        if path and path.is_dir():
            raise UserError(f"{path} is a folder, expected the name of a file")
    limits = None
    if suite == ACCEPTANCE:
        limits, budget = acceptance.LIMITS, budget or acceptance.BUDGET
    console = Output()
    selection = Selection(only=only, limits=limits, ends=None if budget is None else start + budget)
    report = _collect(console, checkout, files, selection)
    report["suite"] = suite or "all"
    if suite == ACCEPTANCE:
        report["targets"] = acceptance.judged(report["device"], report["benchmarks"], bool(only))
    widen(console)
    for table in tables(report):
        console.print(table)
    say(console, environment(report))
    if as_json:  # after the table, which a full disk shall not cost
        write_atomic(as_json, json.dumps(report, indent=1, ensure_ascii=False).encode())
    if as_markdown:
        write_atomic(as_markdown, markdown(report).encode())
    failed = [f"{b['name']}: {b['reason']}" for b in report["benchmarks"] if b["outcome"] == "failed"]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(f"{len(failed)} of {len(report['benchmarks'])} benchmarks failed: {failed[0]}{more}")
    return 0


def suites(folder: Path) -> list[str]:
    """The suites in a folder of benchmarks: the word after `test_` in the names of its files."""
    return sorted({path.stem.split("_")[1] for path in folder.glob("test_*.py")})


def _files(folder: Path, suite: str | None) -> list[Path]:
    known = suites(folder)
    if not known:
        raise UserError(f"there are no benchmarks in {folder}: `fedmoe bench` works in a checkout, not from a wheel")
    if suite not in (None, ACCEPTANCE, *known):
        raise UsageError(f"unknown suite {suite!r}, expected one of: {', '.join([*known, ACCEPTANCE])}")
    every = suite in (None, ACCEPTANCE)
    return sorted(path for path in folder.glob("test_*.py") if every or suite == path.stem.split("_")[1])


def _collect(console: Output, checkout: Path, files: list[Path], selection: Selection) -> Report:
    """The report of a run, with its progress shown while it lasts."""
    report: Report = {"benchmarks": []}
    live = console.is_terminal and not console.is_dumb_terminal
    columns = MofNCompleteColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with ExitStack() as stack:
        bar = stack.enter_context(Progress(*columns, console=console, disable=not live, transient=True))
        task = bar.add_task("starting", total=None)
        for event in stack.enter_context(closing(events(checkout, files, selection))):
            kind = event.pop("event")
            if kind == "environment":
                report |= event
            elif kind == "collected":
                bar.update(task, total=len(event["chosen"]))
                if selection.only and not event["chosen"] and event["names"]:
                    raise UsageError(f"--only {selection.only!r} is in no name of: {', '.join(event['names'])}")
            elif kind == "begin":
                bar.update(task, description=event["name"])
            else:
                report["benchmarks"].append(event)
                bar.update(task, advance=1)
                if not live:
                    text = f"{event['name']}  {event['outcome']}{': ' * bool(event['reason'])}{event['reason']}"
                    say(console, text)
    return report
