"""`fedmoe sweep`: trains the runs of a grid one after the other, goes on where it was stopped, and compares them."""

import contextlib
import gc
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from fedmoe import checkpoint, configfile, experts
from fedmoe.comparetable import show
from fedmoe.config import Config
from fedmoe.contrast import contrast
from fedmoe.display import Output, say, warn
from fedmoe.errors import DiskError, OutputLost, UserError
from fedmoe.files import check_above, write_atomic
from fedmoe.grid import Grid, Planned
from fedmoe.models import language
from fedmoe.rounds import Stopped, Whole
from fedmoe.run import locked, resume, train
from fedmoe.signals import interrupting
from fedmoe.variants import Trained, read

FILE = "sweep.json"
"""In the sweep's folder: the grid, what became of its runs, and once all are through, the comparison."""
PAGE = "compare.html"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run."""

    name: str
    seed: int
    error: str | None
    """Why it failed."""


def run(grid: Grid, folder: Path, as_json: bool, said: str) -> int:
    """Train what is not finished of the grid in `folder`, print and write the comparison; 1 if a run failed, else 0.

    `said` are the words that call it. Raises UserError before the first begins where they cannot be, and
    KeyboardInterrupt, saying how to go on, where it is stopped.
    """
    for line in grid.idle():
        warn(line)
    folder, hint = folder.expanduser(), f"continue with: {said}"
    console, threads = Output(stderr=as_json), torch.get_num_threads()
    planned = grid.runs()
    for one in planned:
        check = language.check_name if one.config.data.kind == "text" else experts.check_name
        shared = () if one.config.method == "local" else (one.config.model.global_expert,)
        for name in (*one.config.model.local, *shared):
            check(name)
    outcomes: list[Outcome] = []
    finished: list[Trained] = []
    with interrupting(), _opened(folder, grid, said):
        for number, one in enumerate(planned, start=1):
            try:
                say(console, f"run {number} of {len(planned)}: {one.name}")
                torch.set_num_threads(threads)  # a run that asked for others has left them
                _take(one, folder / one.name, Whole(console, hint))
                finished.append(read(folder / one.name))
                error = None
            except DiskError:  # the next would fail, too
                raise
            except UserError as failed:
                error = str(failed)
                say(console, f"failed: {error}")
            except Stopped:
                raise
            except (KeyboardInterrupt, OutputLost) as stop:
                why = f" ({stop})" if isinstance(stop, OutputLost) else ""
                raise KeyboardInterrupt(f"stopped before {one.name} went on{why}; {hint}") from None
            outcomes.append(Outcome(one.name, one.config.seed, error))
            gc.collect()
            torch.cuda.empty_cache()  # the next plans with the memory that is free
        return _close(console, grid, folder, said, outcomes, finished, as_json)


def _take(one: Planned, folder: Path, whole: Whole) -> None:
    """Train a run, or what is left of it."""
    if not (folder / "config.toml").exists():
        train(replace(one.config, run=replace(one.config.run, dir=str(folder))), whole)
        return
    held = configfile.flat(configfile.read(folder / "config.toml"))
    for name, value in configfile.flat(one.config).items():
        if held[name] != value and name not in ("run.dir", "data.name"):  # the place of the data, in full
            raise UserError(f"{folder}: holds another run, its {name} is {held[name]!r}, not {value!r}: move it away")
    done = checkpoint.read_manifest(folder).round
    if done < one.config.federation.rounds:
        resume(folder, None, whole)
    else:
        say(whole.console, f"finished before, {done} rounds")


@contextlib.contextmanager
def _opened(folder: Path, grid: Grid, said: str) -> Iterator[None]:
    """The sweep's folder, for this process alone; UserError where it holds anything but this sweep."""
    content = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.exists() and (not folder.is_dir() or (FILE not in content and content - {".lock", f".{FILE}.tmp"})):
        raise UserError(f"{folder} exists and is not a sweep: choose another --dir")
    check_above(folder, "--dir")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if (folder / FILE).exists():
            _check_same(folder / FILE, grid.to_json())
        else:
            _write(folder, grid, said)
        yield


def _check_same(path: Path, now: dict[str, Any]) -> None:
    """Raise UserError unless the sweep was begun with the same grid."""
    try:
        held = json.loads(path.read_text())
        said, began = held["said"], held["grid"]
        fields = dict(began["config"]) | {"the alternatives": began["axes"], "the seeds": began["seeds"]}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({type(error).__name__}: {error}): restore it") from error
    ours = dict(now["config"]) | {"the alternatives": now["axes"], "the seeds": now["seeds"]}
    # A field that is newer than the sweep was then, in effect, what it is by default.
    fields = json.loads(json.dumps(configfile.flat(Config()))) | fields
    for name, value in ours.items():
        if fields.get(name) != value:
            differs = f"{name}: {json.dumps(value)}, began with {json.dumps(fields.get(name))}"
            raise UserError(
                f"{path.parent} is another sweep ({differs}), by: {said}: say that, or choose another --dir"
            )


def _close(
    console: Output,
    grid: Grid,
    folder: Path,
    said: str,
    outcomes: list[Outcome],
    finished: list[Trained],
    as_json: bool,
) -> int:
    """Compare what is finished, print it and write it to the folder; the exit code."""
    report = None
    if any(trained.scores for trained in finished):
        report, variants = contrast(finished)
        from fedmoe.comparepage import page

        write_atomic(folder / PAGE, page(report, variants).encode())
    made = _write(folder, grid, said, outcomes, None if report is None else report.to_json())
    if as_json:
        print(json.dumps(made, indent=1), flush=True)
    else:
        if report is not None:
            show(console, report)
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        if failed:
            table = Table("run", "why", title=f"{len(failed)} of {len(outcomes)} runs failed", title_justify="left")
            for outcome in failed:
                table.add_row(Text(outcome.name), Text(outcome.error or ""))
            console.print(table)
    say(console, f"written to {folder}: {FILE}" + f", {PAGE}" * (report is not None))
    return int(any(outcome.error is not None for outcome in outcomes))


def _write(
    folder: Path,
    grid: Grid,
    said: str,
    outcomes: list[Outcome] | None = None,
    comparison: dict[str, Any] | None = None,
) -> dict[str, Any]:
    made = {"said": said, "grid": grid.to_json(), "runs": list(map(asdict, outcomes or [])), "comparison": comparison}
    write_atomic(folder / FILE, json.dumps(made, indent=1, allow_nan=False).encode())
    return made
