"""Two runs measured in turns: which of their differences exceed the noise."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
FEWEST = 6
"""Pairs with which an interval of that confidence exists at all: 1 − 2 · 2⁻⁶ = 0.97."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One quantity of both, measured in pairs, each soon after the other, so that what drifts hits both alike."""

    name: str
    first: float
    """Median."""
    second: float
    ratio: float
    """Median of the pairs' ratios, the second over the first."""
    low: float
    """The median of such ratios lies between `low` and `high` with at least 95 % confidence."""
    high: float

    @property
    def exceeds_noise(self) -> bool:
        """Whether no difference at all can be ruled out."""
        return not self.low <= 1 <= self.high


def differences(first: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]]) -> list[Difference]:
    """Of every quantity that all measurements of both have, and that is never 0; the i-th of each are a pair.

    Raises ValueError for too few pairs.
    """
    if len(first) != len(second) or len(first) < FEWEST:
        raise ValueError(f"{len(first)} and {len(second)} measurements, expected as many of each, at least {FEWEST}")
    names = [name for name in first[0] if all(found.get(name) for found in (*first, *second))]
    return [_difference(name, [f[name] for f in first], [s[name] for s in second]) for name in names]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of what the values are drawn from lies; by order, so whatever their distribution is."""
    ordered, n = sorted(values), len(values)
    rank = 0  # how many may be left out at either end
    outside = 0.5**n
    while 2 * (outside + math.comb(n, rank + 1) * 0.5**n) <= 1 - CONFIDENCE:
        rank += 1
        outside += math.comb(n, rank) * 0.5**n
    return ordered[rank], ordered[n - 1 - rank]


def _difference(name: str, first: list[float], second: list[float]) -> Difference:
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    return Difference(
        name, statistics.median(first), statistics.median(second), statistics.median(ratios), *interval(ratios)
    )
