"""`fedmoe profile --compare A B`: rounds of two configurations in turns, and which differences exceed the noise."""

import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from fedmoe import configfile, planning
from fedmoe.config import Config
from fedmoe.display import Output, say, widen
from fedmoe.engine.device import allow_tf32
from fedmoe.engine.ranges import observed
from fedmoe.errors import UsageError
from fedmoe.profiler import Subject, check, measuring, subject
from fedmoe.profiling.compare import FEWEST, Difference, differences
from fedmoe.profiling.spans import ELSEWHERE, Recorder

NAMES = ("A", "B")


def run(configs: tuple[Config, Config], rounds: int, warmup: int, as_json: bool) -> None:
    """Measure both, print what differs."""
    if rounds < FEWEST or warmup < 0:
        raise UsageError(f"--rounds is {rounds} and --warmup {warmup}, expected at least {FEWEST} to compare, and 0")
    for config in configs:
        check(config)
    console = Output(stderr=as_json)
    found: tuple[list[dict[str, float]], list[dict[str, float]]] = [], []
    here = Path.cwd() if os.access(Path.cwd(), os.W_OK) else Path(tempfile.gettempdir())
    with measuring(console, here) as (folder, progress), ExitStack() as stack:
        both = [
            stack.enter_context(subject(config, folder / name)) for config, name in zip(configs, NAMES, strict=True)
        ]
        task = progress.add_task("warming up", total=warmup + rounds)
        for number in range(warmup + rounds):
            # The one that goes first may find caches cold or clocks high: each in turn.
            for k in (0, 1) if number % 2 else (1, 0):
                taken = _round(both[k], (number - warmup + 1) % both[k].config.evaluation.every == 0)
                if number >= warmup:
                    found[k].append(taken)
            progress.update(task, description=f"round {number + 1 - warmup} of {rounds}", advance=1)
    made = differences(*found)
    changed = list(_changes(*configs))
    alone = {name: _alone(found[k], found[1 - k]) for k, name in enumerate(NAMES)}
    if as_json:
        rows = [asdict(row) | {"exceeds_noise": row.exceeds_noise} for row in made]
        told = {"configuration": changed, "rounds": rounds, "differences": rows, "only_in": alone}
        print(json.dumps(told, indent=1))
        return
    _print(console, changed, made, rounds)
    for name, seconds in alone.items():
        if seconds:
            words = ", ".join(f"{phase.removeprefix('in ')} ({1e3 * took:,.1f} ms)" for phase, took in seconds.items())
            say(console, f"in {name} only: {words}")


def _round(one: Subject, evaluated: bool) -> dict[str, float]:
    """The next round of it: seconds by name, and samples a second."""
    planning.device(one.config, one.config.run.threads)  # threads and determinism are the whole process's
    allow_tf32(one.engine.site.how.precision == "tf32")
    recorder = Recorder(one.device)
    with observed(recorder):
        line = one.round(evaluated)
    if one.device.type == "cuda":
        torch.cuda.synchronize()
    seconds, samples = line["seconds"], sum(line["clients"]["samples"])
    taken = {"round": seconds["round"], "train": seconds["train"], "evaluate": seconds["evaluate"]}
    inside = {f"in {phase}": took for phase, took in recorder.exclusive.items() if phase != ELSEWHERE}
    return taken | {"samples/s": samples / seconds["train"]} | inside


def _alone(mine: list[dict[str, float]], others: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds of the phases that are in every round of the one and in none of the other, without a ratio."""
    names = [name for name in mine[0] if all(name in round for round in mine)]
    return {
        name: statistics.median(round[name] for round in mine)
        for name in names
        if not any(name in round for round in others)
    }


def _changes(first: Config, second: Config) -> Iterator[tuple[str, str, str]]:
    """Fields of the configuration that differ, with both values."""
    ours, theirs = configfile.flat(first), configfile.flat(second)
    for name, value in ours.items():
        if theirs[name] != value and name != "run.dir":
            yield name, str(value), str(theirs[name])


def _print(console: Output, changed: list[tuple[str, str, str]], made: list[Difference], rounds: int) -> None:
    widen(console, 120)
    table = Table("configuration", "A", "B", title="what was changed", title_justify="left")
    for words in changed:
        table.add_row(*map(Text, words))
    if changed:
        console.print(table)
    else:
        console.print("A and B are configured alike: what differs is noise, or the measurement is wrong")
    table = Table(
        "median of", "A", "B", "B / A", "95 % interval", "", title=f"{rounds} rounds each", title_justify="left"
    )
    for row in sorted(made, key=lambda row: row.name.startswith("in ")):
        unit, scale = ("", 1.0) if row.name == "samples/s" else (" ms", 1e3)
        cells = [f"{scale * value:,.1f}{unit}" for value in (row.first, row.second)]
        verdict = f"{'more' if row.ratio > 1 else 'less'} in B" if row.exceeds_noise else "within the noise"
        table.add_row(row.name, *cells, f"{row.ratio:.3f}", f"{row.low:.3f} to {row.high:.3f}", verdict)
    console.print(table)
    console.print(
        "of intervals like these, one in twenty misses: of many rows, one may differ by chance", highlight=False
    )
