"""`fedmoe bench`: runs a checkout's benchmarks in a process of its own; a table, and JSON and Markdown of the same.

Timing itself is `fedmoe.profiling.bench`'s; here is what a person asks for and sees.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import fedmoe
from fedmoe.display import Output
from fedmoe.errors import UsageError, UserError
from fedmoe.files import write_atomic
from fedmoe.signals import handling

Row = dict[str, Any]
"""A variant's, as `fedmoe.profiling.bench.Row` has it."""
Report = dict[str, Any]
"""What the JSON file holds."""

CHECKOUT = Path(fedmoe.__file__).parents[1]
TINY = "CPU: kernels at tiny sizes, which shows that they work and no more; rounds on one thread, for their ratios"
COLUMNS = (
    "variant",
    "time",
    "± half IQR",
    "as called",
    "× first",
    "peak memory",
    "GB/s",
    "TFLOP/s",
    "of floor",
    "note",
)

# The project's own settings for its tests (a time limit, strictness about plugins that only tests need) are not these.
PYTEST = ("-o", "addopts=", "-o", "timeout=0", "--import-mode=importlib", "-p", "no:cacheprovider", "--benchmark-only")


def run(suite: str | None, only: str, as_json: Path | None, markdown: Path | None, checkout: Path = CHECKOUT) -> int:
    """Run a suite, or all; 0, or 1 where a benchmark failed. Raises UserError where there is nothing to run."""
    folder = checkout / "tests" / "bench"
    files = _files(folder, suite)
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise UserError("fedmoe bench needs pytest-benchmark: pip install '.[bench]'")
    for path in (as_json, markdown):  # before the minutes, not after
        if path and not path.parent.is_dir():
            raise UserError(f"{path}: the folder {path.parent} does not exist")
        if path and path.is_dir():
            raise UserError(f"{path} is a folder, expected the name of a file")
    console = Output()
    report = _collect(console, checkout, files, only)
    report["suite"] = suite or "all"
    if not console.is_terminal:  # a file has no width that the table must keep
        console.width = max(console.width, 160)
    console.print(_table(report))
    console.print(_environment(report), markup=False, highlight=False, soft_wrap=True)
    if as_json:  # after the table, which a full disk shall not cost
        write_atomic(as_json, json.dumps(report, indent=1, ensure_ascii=False).encode())
    if markdown:
        write_atomic(markdown, _markdown(report).encode())
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
    if suite is not None and suite not in known:
        raise UsageError(f"unknown suite {suite!r}, expected one of: {', '.join(known)}")
    return sorted(path for path in folder.glob("test_*.py") if suite in (None, path.stem.split("_")[1]))


def _collect(console: Output, checkout: Path, files: list[Path], only: str) -> Report:
    """The report of a pytest run, with its progress shown while it lasts."""
    report: Report = {"benchmarks": []}
    live = console.is_terminal and not console.is_dumb_terminal
    columns = MofNCompleteColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with ExitStack() as stack:
        bar = stack.enter_context(Progress(*columns, console=console, disable=not live, transient=True))
        task = bar.add_task("starting", total=None)
        for event in stack.enter_context(closing(_events(checkout, files, only))):
            kind = event.pop("event")
            if kind == "environment":
                report |= event
            elif kind == "collected":
                bar.update(task, total=event["chosen"])
                if only and not event["chosen"] and event["names"]:
                    raise UsageError(f"--only {only!r} is in no name of: {', '.join(event['names'])}")
            elif kind == "begin":
                bar.update(task, description=event["name"])
            else:
                report["benchmarks"].append(event)
                bar.update(task, advance=1)
                if not live:
                    text = f"{event['name']}  {event['outcome']}{': ' * bool(event['reason'])}{event['reason']}"
                    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return report


def _events(checkout: Path, files: list[Path], only: str) -> Generator[dict[str, Any]]:
    """What the process that runs pytest tells; raises UserError with its last words if it ends before its work."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "fedmoe.profiling.bench_events", str(writer), str(checkout), only]
    command += [*PYTEST, *map(str, files)]
    # What pytest prints goes to a file: a pipe that nobody empties would stop it.
    with tempfile.TemporaryFile("w+") as said, os.fdopen(reader) as lines:
        path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])  # this fedmoe, no other
        # Neither a user's habits with pytest, nor what pytest tells its workers, where one of those runs this.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        env["PYTHONPATH"] = path
        child = subprocess.Popen(command, cwd=checkout, env=env, stdout=said, stderr=said, pass_fds=[writer])
        os.close(writer)

        def stop(number: int, frame: object) -> None:
            raise KeyboardInterrupt

        try:
            with handling(stop):
                told = False
                for line in lines:
                    told = True
                    yield json.loads(line)
                code = child.wait()
        finally:
            child.kill()  # it may be minutes from its next line
            child.wait()
        # Done; some failed, which Python's own failures give as well; a file cannot be read; nothing is chosen.
        if not told or code not in (0, 1, 2, 5):
            said.seek(0)
            words = [line.strip() for line in said if line.strip()] or ["it said nothing"]
            errors = [line for line in words if "error: " in line.lower()]  # where it was started comes after
            raise UserError(f"pytest ended with code {code}: {(errors or words)[-1]}")


def _table(report: Report) -> Table:
    """One table; a column that nothing here fills is left out."""
    lines = [(benchmark, [_cells(row) for row in benchmark["rows"]]) for benchmark in report["benchmarks"]]
    kept = [i for i in range(len(COLUMNS)) if any(cells[i] for _, rows in lines for cells in rows) or i == 0]
    table = Table(title=Text(_title(report)), title_justify="left")
    for i in kept:
        left = COLUMNS[i] in ("variant", "note")
        table.add_column(COLUMNS[i], justify="left" if left else "right", no_wrap=COLUMNS[i] != "note")
    for benchmark, rows in lines:
        table.add_row(Text(benchmark["name"], "bold"), *[""] * (len(kept) - 2), Text(_outcome(benchmark)))
        for cells in rows:
            table.add_row(*(Text(cells[i]) for i in kept))
        table.add_section()
    return table


def _markdown(report: Report) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = [f"# {_title(report)}", "", _environment(report)]
    for benchmark in report["benchmarks"]:
        outcome = _outcome(benchmark)
        lines += ["", f"## {benchmark['name']}", "", *([outcome, ""] if outcome else [])]
        if benchmark["rows"]:
            lines += [line(COLUMNS), line(["---"] * len(COLUMNS)), *(line(_cells(row)) for row in benchmark["rows"])]
    return "\n".join(lines) + "\n"


def _title(report: Report) -> str:
    title = f"Benchmarks: {report['suite']}"
    return title if report.get("device") == "cuda" else f"{title} ({TINY})"


def _environment(report: Report) -> str:
    facts = {k: v for k, v in report.get("environment", {}).items() if v is not None}
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _outcome(benchmark: dict[str, Any]) -> str:
    return "" if benchmark["outcome"] == "passed" else f"{benchmark['outcome']}: {benchmark['reason']}"


def _cells(row: Row) -> list[str]:
    """A variant's row of the table; what is not known is empty."""

    def shown(key: str, form: Callable[[Any], str]) -> str:
        return "" if row[key] is None else form(row[key])

    note = row["note"] if row["status"] == "timed" else f"{row['status']}: {row['reason']}".removesuffix(": ")
    return [
        row["variant"],
        shown("median", _seconds),
        shown("quartiles", lambda q: f"{50 * (q[1] - q[0]) / row['median']:.1f}%"),
        shown("called", _seconds),
        shown("relative", "{:.2f}".format),
        shown("peak_bytes", _bytes),
        shown("gb_per_s", "{:,.1f}".format),
        shown("tflop_per_s", "{:,.3g}".format),
        shown("floor_share", "{:.1%}".format),
        note,
    ]


def _seconds(seconds: float) -> str:
    for unit, name in ((1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit:
            return f"{seconds / unit:,.2f} {name}"
    return f"{seconds / 1e-9:,.0f} ns"


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
