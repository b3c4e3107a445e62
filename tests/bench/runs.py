"""Whole runs, as `fedmoe train` takes them, and how long their rounds were."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch

from fedmoe import metrics, run
from fedmoe.config import Config
from fedmoe.engine.ranges import observed
from tests.support import changed


@dataclass
class Taken:
    """What runs of one configuration took, but for each run's first round, which warms up and captures."""

    rounds: list[float] = field(default_factory=list)
    """Seconds from a round's beginning to the next one's: training, averaging, evaluation, metrics, checkpoint."""
    held_up: list[float] = field(default_factory=list)
    """Of these, seconds in which a checkpoint held training up."""
    lines: list[metrics.Line] = field(default_factory=list)
    """Of metrics, of the last run."""


class Clock:
    """Notes when rounds begin; see `fedmoe.engine.ranges.Observer`."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def begin(self, phase: str, lane: int) -> None:
        """By the host's clock; the round before has given its results."""
        if phase == "round":
            self.begun.append(time.perf_counter())

    def end(self, phase: str, lane: int) -> None:
        """Not of interest: commit, metrics and checkpoint come after it."""


def rounds_of(config: Config, folder: Path) -> tuple[float, list[float], list[metrics.Line]]:
    """Train in a folder: the start, seconds up to the first round; from each round's beginning to the next one's (the
    last has no next); and the metrics.
    """
    clock, start = Clock(), time.perf_counter()
    with observed(clock):
        run.train(changed(config, run={"dir": str(folder), "threads": 1}))
    return clock.begun[0] - start, [later - earlier for earlier, later in pairwise(clock.begun)], metrics.read(folder)


def in_turns(ways: Mapping[str, Config], folder: Path, times: int) -> dict[str, Taken]:
    """Train in each way, one after the other, so many times over; all must do the same work, to much the same effect.

    A way called "…, fused SGD" is given PyTorch's fused optimizer, for which the plain loop has no option.
    """
    taken = {name: Taken() for name in ways}
    for number in range(times):
        for i, (name, config) in enumerate(ways.items()):
            with _fused() if name.endswith("fused SGD") else _as_it_is():
                _, seconds, lines = rounds_of(config, folder / f"{number}-{i}")
            own = taken[name]
            own.rounds += seconds[1:]
            own.held_up += [line["seconds"]["checkpoint"] for line in lines[2:]]
            own.lines = lines
    first, *others = (own.lines for own in taken.values())
    for lines in others:
        for one, other in zip(first, lines, strict=True):
            for key in ("sampled", "evaluated", "flops", "bytes_up"):
                assert one[key] == other[key], f"round {one['round']}: {key} is {other[key]}, not {one[key]}"
            assert one["clients"]["samples"] == other["clients"]["samples"]
            assert abs(one["loss"] - other["loss"]) <= 0.05 * one["loss"], (one["loss"], other["loss"])
    return taken


@contextmanager
def _fused() -> Iterator[None]:
    with mock.patch("torch.optim.SGD", partial(torch.optim.SGD, fused=True)):
        yield


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield
