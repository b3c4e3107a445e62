"""How far two variants differ, paired by seed and by client where they can be, and how sure that is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95
"""Of every interval; what a difference must reach, all comparisons together, to be more than noise."""

Scores = Mapping[int, Mapping[int, float]]
"""By seed, by client."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean difference, the second less the first, and where it lies."""

    mean: float
    low: float | None
    """With `CONFIDENCE`, the difference that was to be expected lies between `low` and `high`; None: no telling."""
    high: float | None
    p: float | None
    """How likely a difference at least as large is if none was to be expected (two-sided)."""
    unit: Literal["seed", "client"]
    """What the interval is over: another draw of these is what it covers."""
    counts: tuple[int, ...]
    """How many of them; of each variant, if they are not paired."""


def paired(first: Scores, second: Scores) -> Estimate:
    """From the seeds that both have, with the clients that both have in each.

    Clients of one seed share a global expert, so seeds are what repeats: differences are averaged over the clients of a
    seed, and the interval is Student's over the seeds. With one seed it is over its clients, and covers those alone.
    Raises ValueError where they have none in common.
    """
    both = {seed: [second[seed][c] - first[seed][c] for c in first[seed] if c in second[seed]] for seed in first
            if seed in second}  # fmt: skip
    found = [differences for differences in both.values() if differences]
    if not found:
        raise ValueError(f"no client in common: seeds {list(first)} and {list(second)}")
    if len(found) > 1:
        return _student([_mean(differences) for differences in found], "seed")
    return _student(found[0], "client")


def unpaired(first: Scores, second: Scores) -> Estimate:
    """From all there is, by Welch's interval: over seeds, or where each has one, over clients.

    No interval where one has a single seed and the other several. Raises ValueError where one has nothing at all.
    """
    means = [[_mean(list(clients.values())) for clients in scores.values() if clients] for scores in (first, second)]
    if not all(means):
        raise ValueError(f"nothing to compare: seeds {list(first)} and {list(second)}")
    a, b = means
    if len(a) == len(b) == 1:
        a, b = ([v for clients in scores.values() for v in clients.values()] for scores in (first, second))
        return _welch(a, b, "client")
    return _welch(a, b, "seed")


def holm(values: Sequence[float]) -> list[float]:
    """p values for all comparisons together (Holm 1979): the chance of one false difference among them is held."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, least = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = least
    return adjusted


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of what the values are drawn from (n − 1); None of a single one."""
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _student(values: Sequence[float], unit: Literal["seed", "client"]) -> Estimate:
    spread = deviation(values)
    error = None if spread is None else spread / math.sqrt(len(values))
    return _estimate(_mean(values), error, len(values) - 1, unit, (len(values),))


def _welch(first: Sequence[float], second: Sequence[float], unit: Literal["seed", "client"]) -> Estimate:
    mean, counts, spreads = (
        _mean(second) - _mean(first),
        (len(first), len(second)),
        (deviation(first), deviation(second)),
    )
    if spreads[0] is None or spreads[1] is None:
        return Estimate(mean, None, None, None, unit, counts)
    parts = [spread**2 / n for spread, n in zip(spreads, counts, strict=True) if spread is not None]
    total = sum(parts)
    freedom = total**2 / sum(part**2 / (n - 1) for part, n in zip(parts, counts, strict=True)) if total else 1.0
    return _estimate(mean, math.sqrt(total), freedom, unit, counts)


def _estimate(
    mean: float, error: float | None, freedom: float, unit: Literal["seed", "client"], counts: tuple[int, ...]
) -> Estimate:
    from scipy.special import stdtr, stdtrit  # not scipy.stats, which takes a second to import

    if error is not None and error <= 1e-12 and abs(mean) <= 1e-12:
        return Estimate(mean, 0.0, 0.0, 1.0, unit, counts)
    if error is None or error <= 1e-12:  # all alike: too few values to see any noise
        return Estimate(mean, None, None, None, unit, counts)
    half = error * float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
    return Estimate(mean, mean - half, mean + half, float(2 * stdtr(freedom, -abs(mean) / error)), unit, counts)
