"""What a run's metrics say: its rounds as checked numbers, and what it took to reach an accuracy or perplexity."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmoe.errors import UserError
from fedmoe.measure import ACCURACY, LARGEST, Measure
from fedmoe.metrics import Line


@dataclass(frozen=True, slots=True)
class Over:
    """A number over the evaluated clients; None where it was not finite."""

    mean: float | None
    std: float | None
    clients: list[float | None]


@dataclass(frozen=True, slots=True)
class Round:
    """One round."""

    number: int
    loss: float | None
    """Training loss; None where every client was rolled back."""
    bytes_up: int
    bytes_down: int
    flops: float
    seconds: float
    train_seconds: float
    samples: int
    """Trained on."""
    energy: float | None
    """Joules, where they are known."""
    sampled: list[int]
    rolled_back: list[int]
    rejected: dict[int, str] = field(default_factory=dict)
    """Clients whose result the server did not take, and why."""
    kept: str = ""
    """Why the global expert stayed as it was, where it did."""
    not_finite: list[int] = field(default_factory=list)
    """Clients whose test loss is not."""
    parts: dict[int, int] = field(default_factory=dict)
    """Clients whose batches are taken in parts, and in how many."""
    skipped: int = 0
    """Steps of fp16 whose gradients overflowed."""
    evaluated: list[int] = field(default_factory=list)
    accuracy: Over | None = None
    """On held-out samples, with the client's own global expert (personalized)."""
    accuracy_aggregated: Over | None = None
    """With the newly aggregated one."""
    test_loss: Over | None = None
    """Of text, of a token."""
    test_loss_aggregated: Over | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """What the first rounds of a run took."""

    round: int
    """The last of them."""
    bytes: int
    """Up and down, of all clients: rounds × bytes a round."""
    flops: float
    seconds: float
    """Of whole rounds, evaluation included."""
    energy: float | None


def rounds(path: Path, lines: Sequence[Line], clients: int, done: int) -> list[Round]:
    """The first `done` rounds from `lines` of the file `path`, of a run with so many clients.

    Raises UserError naming the file, the round and what is wrong with its line.
    """
    lines = lines[:done]
    held = [line["round"] for line in lines]
    if held != list(range(1, done + 1)):
        missing = min(set(range(1, done + 1)) - set(held), default=0)
        what = f"has no line of round {missing} of {done}" if missing else "its rounds are not in order"
        raise UserError(f"{path}: {what}: restore it")
    made = []
    for line in lines:
        try:
            made.append(_round(line, clients))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: the line of round {line['round']} is damaged ({why}): restore it") from error
    return made


def tested(r: Round, by: Measure, aggregated: bool = False) -> Over | None:
    """What the measure's values are taken from, with each client's own global expert or the newly aggregated one."""
    if by == ACCURACY:
        return r.accuracy_aggregated if aggregated else r.accuracy
    return r.test_loss_aggregated if aggregated else r.test_loss


def held(r: Round, by: Measure, aggregated: bool = False) -> dict[int, float]:
    """The measure's value of each client that has one; none where the round was not evaluated so."""
    if (over := tested(r, by, aggregated)) is None:
        return {}
    return {
        c: value for c, value in zip(r.evaluated, over.clients, strict=True) if value is not None and value < LARGEST
    }


def mean(r: Round, by: Measure, aggregated: bool = False) -> float | None:
    """Of these values over clients; None where none has one."""
    values = held(r, by, aggregated).values()
    return statistics.fmean(values) if values else None


def best(found: Sequence[Round], by: Measure) -> tuple[Round, float] | None:
    """The first round whose mean is best, and the mean; None where none has one."""
    known = [(r, value) for r in found if (value := mean(r, by)) is not None]
    return max(known, key=lambda pair: by.gain(pair[1]), default=None)


def last(found: Sequence[Round]) -> Round | None:
    """The last that was evaluated."""
    return next((r for r in reversed(found) if r.accuracy is not None), None)


def reached(found: Sequence[Round], target: float, by: Measure) -> Taken | None:
    """What it took until the level of the mean first was `target` or better; None where no evaluated round's was."""
    means = ((r.number, mean(r, by)) for r in found)
    hit = next((n for n, value in means if value is not None and by.gain(by.level(value)) >= by.gain(target)), None)
    return None if hit is None else taken(found[:hit])


def taken(found: Sequence[Round]) -> Taken:
    """What a run's first rounds took."""
    return Taken(
        len(found),
        sum(r.bytes_up + r.bytes_down for r in found),
        math.fsum(r.flops for r in found),
        math.fsum(r.seconds for r in found),
        energy(found),
    )


def energy(found: Sequence[Round]) -> float | None:
    """Joules of the rounds; None where one of them is not known."""
    known = [r.energy for r in found if r.energy is not None]
    return sum(known) if known and len(known) == len(found) else None


def _round(line: Line, clients: int) -> Round:
    seconds, each = line["seconds"], line["clients"]
    evaluated = _ids(line.get("evaluated", []), clients)
    joules, rejected = line.get("energy_j"), line.get("rejected", {})
    return Round(
        number=line["round"],
        loss=_maybe(line["loss"]),
        bytes_up=int(_number(line["bytes_up"])),
        bytes_down=int(_number(line["bytes_down"])),
        flops=_number(line["flops"]),
        seconds=_number(seconds["round"]),
        train_seconds=_number(seconds["train"]),
        samples=int(sum(map(_number, each["samples"]))),
        energy=joules if isinstance(joules, int | float) else None,
        sampled=_ids(line["sampled"], clients),
        rolled_back=_ids(line["rolled_back"], clients),
        rejected=dict(zip(_ids(list(map(int, rejected)), clients), map(str, rejected.values()), strict=True)),
        kept=str(line.get("kept", "")),
        not_finite=_ids(line.get("not_finite", []), clients),
        parts={int(client): int(parts) for client, parts in line.get("parts", {}).items()},
        skipped=int(_number(line.get("skipped", 0))),
        evaluated=evaluated,
        accuracy=_over(line, "accuracy", evaluated),
        accuracy_aggregated=_over(line, "accuracy_aggregated", evaluated),
        test_loss=_over(line, "test_loss", evaluated),
        test_loss_aggregated=_over(line, "test_loss_aggregated", evaluated),
    )


def _over(line: Line, name: str, evaluated: list[int]) -> Over | None:
    if name not in line:
        return None
    found = line[name]
    values = [_maybe(value) for value in found["clients"]]
    if len(values) != len(evaluated):
        raise ValueError(f"{name} is of {len(values)} clients, {len(evaluated)} were evaluated")
    if name.startswith("accuracy") and not all(0 <= value <= 1 for value in values if value is not None):
        raise ValueError(f"{name} is not from 0 to 1")
    return Over(_maybe(found["mean"]), _maybe(found["std"]), values)


def _ids(values: Any, clients: int) -> list[int]:
    if not isinstance(values, list) or not all(isinstance(v, int) and 0 <= v < clients for v in values):
        raise ValueError(f"{str(values)[:40]} are not clients of 0 to {clients - 1}")
    return values


def _maybe(value: Any) -> float | None:
    return None if value is None else _number(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return value
