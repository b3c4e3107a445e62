"""What the hardware did while something ran: meters read in a thread, and what they showed between two times."""

import contextlib
import math
import statistics
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from fedmoe.profiling.timing import reason

Value = float | frozenset[str] | None
"""Of a gauge or a counter, a number; of flags, those that are set; None where it could not be read."""

HANG_SECONDS = 5.0
"""For how long the end of sampling waits for a reading under way: a driver whose GPU is lost may never answer."""
GAP = "not read over the whole of this time"


@dataclass(frozen=True, slots=True)
class Quantity:
    """Something that a meter reads."""

    name: str
    unit: str
    kind: Literal["gauge", "counter", "flags"]
    """A level, a sum that only grows, or conditions that hold or do not."""
    description: str
    rate: str = ""
    """Of a counter: the gauge whose integral over time it is, which stands in for it where it is missing."""


class Meter(Protocol):
    """Something that is read again and again."""

    @property
    def quantities(self) -> Sequence[Quantity]:
        """What it reads, in the order in which it does."""

    @property
    def missing(self) -> Mapping[str, str]:
        """By name, why the last `read()` gave None."""

    def read(self) -> dict[str, Value]:
        """The values now, by name. What takes long comes last: all are taken to be of when the reading began."""

    def close(self) -> None:
        """Let go of what reading needs."""


@dataclass(slots=True)
class _Track:
    """The readings of one quantity; of a counter only those that gave a value, which a gap does not invalidate."""

    quantity: Quantity
    times: list[float] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    reason: str = ""
    """Why the last reading gave None."""

    def add(self, stamp: float, value: Value, why: str) -> None:
        if isinstance(value, float | int) and not math.isfinite(value):
            value, why = None, f"read as {value}"
        self.reason = (why or "not read") if value is None else ""
        if value is not None or self.quantity.kind != "counter":
            self.values.append(value)
            self.times.append(stamp)  # last: whoever reads meanwhile looks here for how many there are

    def around(self, start: float, end: float) -> tuple[list[float], list[Value]]:
        """The readings between two times, and the nearest before and after."""
        low = max(0, bisect_right(self.times, start) - 1)
        high = bisect_left(self.times, end) + 1
        times = self.times[low:high]
        return times, self.values[low : low + len(times)]


class Sampler:
    """Reads meters when it is entered, every `interval_seconds` in a thread, and when it is left, which closes them.

    Nothing that a meter does ends the thread or what is measured: a value that cannot be read is None, and a gap.
    """

    def __init__(
        self,
        meters: Sequence[Meter],
        interval_seconds: float = 0.05,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._meters, self._interval, self._clock = list(meters), interval_seconds, clock
        quantities = [quantity for meter in meters for quantity in meter.quantities]
        self._tracks = {quantity.name: _Track(quantity) for quantity in quantities}
        assert len(self._tracks) == len(quantities), "two quantities have the same name"
        self._costs: list[tuple[float, float, float]] = []
        """Of each sample: when, seconds that it took, and seconds of the CPU."""
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._reading: Meter | None = None
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        self.sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(HANG_SECONDS)
        if self._thread.is_alive():
            for quantity in self._reading.quantities if self._reading else ():
                self._tracks[quantity.name].reason = "reading it does not end"
            return
        self.sample()
        for meter in self._meters:
            with contextlib.suppress(Exception):
                meter.close()

    @property
    def quantities(self) -> list[Quantity]:
        """What is read."""
        return [track.quantity for track in self._tracks.values()]

    @property
    def missing(self) -> dict[str, str]:
        """By name, why there was no value when it was last read."""
        return {name: track.reason for name, track in self._tracks.items() if track.reason}

    def sample(self) -> None:
        """Read all meters now."""
        with self._lock:
            began, worked = self._clock(), time.thread_time()
            for meter in self._meters:
                self._reading = meter
                stamp = self._clock()
                try:
                    values, missing = meter.read(), meter.missing
                except Exception as error:
                    values, missing = {}, dict.fromkeys((q.name for q in meter.quantities), reason(error))
                for quantity in meter.quantities:
                    name = quantity.name
                    self._tracks[name].add(stamp, values.get(name), missing.get(name, ""))
            self._reading = None
            self._costs.append((began, self._clock() - began, time.thread_time() - worked))

    def series(self, name: str) -> tuple[list[float], list[Value]]:
        """When a quantity was read, by `time.perf_counter`, and what it was."""
        track = self._tracks[name]
        times = list(track.times)
        return times, track.values[: len(times)]

    def summary(self, start: float, end: float) -> dict[str, Any]:
        """What was read between two times of `time.perf_counter`, fit for JSON.

        `quantities` has an entry for each name, None where nothing is known, and then the reason is in `missing`. An
        entry has the unit and
        - of a gauge `mean` over time, `min`, `max` and `median`, with straight lines between readings,
        - of a counter `increase`, `per_second`, and `source`: "counter", or "integrated from" its gauge,
        - of flags `shares` of the time, by name, for those that were ever set,
        and `note`, which names what is to be doubted; else it is "". `reading` is what sampling cost meanwhile.
        """
        if not end > start:
            raise ValueError(f"the time ends at {end}, which is not after its start at {start}")
        quantities: dict[str, dict[str, Any] | None] = {}
        missing: dict[str, str] = {}
        for name, track in self._tracks.items():
            found = _SUMMARIES[track.quantity.kind](track, start, end)
            if found is None and (gauge := self._tracks.get(track.quantity.rate)):
                found = _integrated(gauge, start, end)
            if found is None:
                missing[name] = track.reason or GAP
            quantities[name] = found and {"unit": track.quantity.unit, **found}
        costs = [cost for cost in list(self._costs) if start <= cost[0] <= end]
        reading = {
            "samples": len(costs),
            "seconds": sum(cost[1] for cost in costs),
            "cpu_seconds": sum(cost[2] for cost in costs),
        }
        return {"seconds": end - start, "reading": reading, "quantities": quantities, "missing": missing}

    def _run(self) -> None:
        while not self._stop.wait(max(0.0, self._interval - (self._costs[-1][1]))):
            self.sample()


def _gauge(track: _Track, start: float, end: float) -> dict[str, Any] | None:
    found = _line(*track.around(start, end), start, end)
    if found is None:
        return None
    area, known, values = found
    return {
        "mean": area / known,
        "min": min(values),
        "max": max(values),
        "median": statistics.median(values),
        "note": _partly(known, start, end, track.reason),
    }


def _counter(track: _Track, start: float, end: float) -> dict[str, Any] | None:
    times, values = track.around(start, end)
    if not times or times[0] > start or times[-1] < end:
        return None
    increase, backward = 0.0, 0
    for low, high, before, after, begun, ended in _spans(times, values, start, end):
        # One that goes back has lost what it had counted. What it counted since is not known, but is no less than 0.
        increase += max(0.0, after - before) * (high - low) / (ended - begun)
        backward += after < before
    note = f"went back {backward} times, each counted as no increase" if backward else ""
    return {"increase": increase, "per_second": increase / (end - start), "source": "counter", "note": note}


def _integrated(track: _Track, start: float, end: float) -> dict[str, Any] | None:
    found = _line(*track.around(start, end), start, end)
    if found is None or _partly(found[1], start, end, GAP):
        return None
    source = f"integrated from {track.quantity.name}"
    return {"increase": found[0], "per_second": found[0] / (end - start), "source": source, "note": ""}


def _flags(track: _Track, start: float, end: float) -> dict[str, Any] | None:
    times, values = track.around(start, end)
    sets = [value if isinstance(value, frozenset) else None for value in values]
    shares: dict[str, float] = {}
    found = _line(times, [None if value is None else 0.0 for value in sets], start, end)
    if found is None:
        return None
    for flag in sorted(frozenset().union(*(value or () for value in sets))):
        line = _line(times, [None if value is None else float(flag in value) for value in sets], start, end)
        if line is not None and line[0] > 0:
            shares[flag] = line[0] / line[1]
    return {"shares": shares, "note": _partly(found[1], start, end, track.reason)}


_SUMMARIES = {"gauge": _gauge, "counter": _counter, "flags": _flags}


def _line(
    times: Sequence[float], values: Sequence[Value], start: float, end: float
) -> tuple[float, float, list[float]] | None:
    """Under the straight lines between readings: the area, the seconds known, and the values at both ends and between.

    None where nothing is known.
    """
    area = known = 0.0
    points: dict[float, float] = {}
    for low, high, before, after, begun, ended in _spans(times, values, start, end):
        slope = (after - before) / (ended - begun)
        points[low], points[high] = before + slope * (low - begun), after - slope * (ended - high)
        area += (points[low] + points[high]) / 2 * (high - low)
        known += high - low
    return (area, known, list(points.values())) if known else None


def _spans(
    times: Sequence[float], values: Sequence[Value], start: float, end: float
) -> Iterator[tuple[float, float, float, float, float, float]]:
    """What lies within `start` and `end` of the time between each two readings that follow each other.

    (from, to, the value before, the value after, the time before, the time after)
    """
    for (begun, before), (ended, after) in pairwise(zip(times, values, strict=True)):
        low, high = max(begun, start), min(ended, end)
        if low < high and isinstance(before, float | int) and isinstance(after, float | int):
            yield low, high, before, after, begun, ended


def _partly(known: float, start: float, end: float, why: str) -> str:
    """A note on a value of a part of the time; empty on one of all of it."""
    whole = math.isclose(known, end - start, rel_tol=1e-6)
    return "" if whole else f"of {known:.3g} of {end - start:.3g} s: {why or GAP}"
