"""What the fixture `gpu_benchmark` gives: variants of one piece of work, checked against each other, timed in turns.

It stands on pytest-benchmark, where each variant becomes an entry of its own; `fedmoe.profiling.plugin` is what pytest
loads.
"""

import gc
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import pytest
import torch

from fedmoe.profiling import nvml, nvml_device
from fedmoe.profiling.plugin import PROPERTY, SIZES
from fedmoe.profiling.timing import Call as Call
from fedmoe.profiling.timing import Meter, Times, ceilings, interleave, joules, memory, reason, settle

Function = TypeVar("Function", bound=Callable[..., None])
V = TypeVar("V")
Check = Callable[[Any, Any], None]
"""Given the first variant's output and another's; raises AssertionError where they do not agree."""


@dataclass(frozen=True, slots=True)
class Absent:
    """A variant that cannot be had here, and why."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """What the work cannot do without: each operand read and each result written once, and its products."""

    bytes: int
    flops: int
    dtype: torch.dtype
    """Of the products' operands, which decides how fast they can be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What is known of one variant; None where this machine does not tell."""

    variant: str
    status: Literal["timed", "ran", "absent", "failed", "wrong"]
    reason: str = ""
    """Why it was not timed."""
    note: str = ""
    median: float | None = None
    """Seconds a call; on a GPU there, without gaps between kernels."""
    quartiles: tuple[float, float] | None = None
    called: float | None = None
    """Seconds a call as the host makes it, launches included; None where `median` is just that."""
    called_quartiles: tuple[float, float] | None = None
    cold: float | None = None
    """Seconds a call on a GPU, as `median`, which finds nothing of its own in the L2 cache; None for long calls."""
    rounds: int = 0
    calls: int = 0
    """Calls in a round."""
    relative: float | None = None
    """`median` as a multiple of the first variant's, if that was timed and took any time."""
    peak_bytes: int | None = None
    """Device memory at its peak above that before the call."""
    kept_bytes: int | None = None
    """Of it, what the call's results keep."""
    gb_per_s: float | None = None
    """The floor's bytes, not the traffic that there was, over the time: `cold` where it is known, since bytes that are
    in the cache need no memory, else `median`."""
    tflop_per_s: float | None = None
    """The floor's FLOPs over the same time."""
    floor_share: float | None = None
    """The least time that the floor takes at this device's measured ceilings, as a share of the same time."""
    energy_j: float | None = None
    """Joules a call, with the device's idle power."""


class Unavailable(Exception):
    """Raised by the set-up of a variant that cannot be had here; says why."""


def attempt(make: Callable[[], Call]) -> Call | Absent:
    """The variant that `make` sets up, or why there is none: a missing library, a refused shape, too little memory."""
    try:
        return make()
    except Unavailable as error:
        return Absent(str(error))
    except Exception as error:
        return Absent(reason(error))


def sizes(names: str, *, full: Iterable[Any], tiny: Iterable[Any]) -> Callable[[Function], Function]:
    """Parametrize a benchmark: `full` where it is timed on a GPU, else `tiny`, which only shows that it works."""

    def mark(function: Function) -> Function:
        vars(function)[SIZES] = (names, list(full), list(tiny))
        return function

    return mark


def energy() -> Meter | None:
    """What tells the joules that the GPU has used; None where nothing does."""
    return nvml.energy_counter(torch.device("cuda")) if torch.cuda.is_available() else None


class Bench:
    """One benchmark: call it with variants, or have it `record` times that were taken otherwise."""

    def __init__(self, benchmark: Any, node: pytest.Item, timed: bool, meter: Meter | None = None) -> None:
        self.timed = timed
        """Whether it is timed at all; without, once is enough, and the less the better."""
        self.full = timed and torch.cuda.is_available()
        """Whether it is timed on a GPU: worth compiling and tuning for."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._benchmark, self._node, self._meter = benchmark, node, meter
        self._told: list[dict[str, Any]] = []
        """The rows of all calls in the test, as its report has them."""
        node.user_properties.append((PROPERTY, self._told))

    def __call__(
        self,
        variants: Mapping[str, Call | Absent],
        *,
        floor: Floor | None = None,
        check: Check | None = None,
        host: bool = False,
    ) -> list[Row]:
        """A row for each variant, in the order given.

        Each variant is called once, and what it returns, unless that is None, is checked against what the first one
        did. Without timing, one that fails the check or raises fails the benchmark. With it, only one of ours (its name
        begins with "ours") that fails the check does, before anything is timed; another's may compute less on purpose,
        and is timed with a note. One that raises is named in its row, and fails the benchmark, once the others are
        timed, if it is ours or all do. A callable with an attribute `peak_bytes` is
        believed: what a CUDA graph allocated when it was captured, no replay shows.

        `host`: by the host's clock on a GPU too, from idle device to idle device: for work of the host, or of both.
        """
        rows, calls = self._begin(variants)
        try:
            self._first(calls, rows, check)
            self._tidy()
            if self.timed:
                self._time(calls, rows, floor, host)
        finally:
            self._end(rows)
        failed = {name: row.reason for name, row in rows.items() if row.status == "failed"}
        ours = [name for name in failed if name.startswith("ours") or len(failed) == len(rows)]
        if ours:
            raise RuntimeError(f"{ours[0]} failed: {failed[ours[0]]}")
        return list(rows.values())

    def record(self, variants: Mapping[str, Sequence[float] | Absent]) -> list[Row]:
        """A row for each variant of which the benchmark took the times itself, in seconds: for whole runs."""
        rows, taken = self._begin(variants)
        if self.timed:
            times = {name: Times(seconds=list(seconds)) for name, seconds in taken.items()}
            for name in times:
                self._fill(name, times, rows, None, None)
        self._end(rows)
        return list(rows.values())

    def _begin(self, variants: Mapping[str, V | Absent]) -> tuple[dict[str, Row], dict[str, V]]:
        """A row for each, and those that are there."""
        self._benchmark._mode = "gpu_benchmark"  # or pytest-benchmark warns that it was not used
        if again := {row["variant"] for row in self._told} & variants.keys():
            raise ValueError(f"variant {min(again)!r} was given in an earlier call of the same test: name it otherwise")
        rows: dict[str, Row] = {}
        there: dict[str, V] = {}
        for name, variant in variants.items():
            if isinstance(variant, Absent):
                rows[name] = Row(variant=name, status="absent", reason=variant.reason)
            else:
                rows[name], there[name] = Row(variant=name, status="ran"), variant
        return rows, there

    def _end(self, rows: dict[str, Row]) -> None:
        self._told.extend(asdict(row) for row in rows.values())

    def _first(self, calls: dict[str, Call], rows: dict[str, Row], check: Check | None) -> None:
        """Call each once; leaves in `calls` what is worth timing."""
        reference: tuple[str, Any] | None = None
        wrong = ""
        for name, call in list(calls.items()):
            try:
                output = call()
                settle(self.device)
            except Exception as error:
                rows[name] = Row(variant=name, status="failed", reason=reason(error))
                if not self.timed:
                    raise
                del calls[name]
                self._tidy()
                continue
            if output is None or check is None:
                continue
            if reference is None:
                reference = name, output
                continue
            try:
                check(reference[1], output)
            except AssertionError as error:
                text = f"differs from {reference[0]}: {reason(error)}"
                if self.timed and not name.startswith("ours"):
                    rows[name] = replace(rows[name], note=text)
                else:
                    rows[name] = Row(variant=name, status="wrong", reason=text)
                    wrong = wrong or f"{name} {text}"
            del output
        if wrong:
            raise AssertionError(wrong)

    def _time(self, calls: dict[str, Call], rows: dict[str, Row], floor: Floor | None, host: bool) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the only count at which a CPU that is shared gives the same time twice
        try:
            times, failed = interleave(calls, self.device, host=host)
            used = {name: memory(calls[name], self.device) for name in times}
            spent = {name: self._energy(calls[name], taken) for name, taken in times.items()}
            reached = ceilings(floor.dtype, self.device) if floor and times and not host else None
        finally:
            torch.set_num_threads(threads)
        for name, why in failed.items():
            rows[name] = Row(variant=name, status="failed", reason=why)
        for name in times:
            peak, kept = used[name] or (None, None)
            believed = getattr(calls[name], "peak_bytes", None)
            if believed is not None:
                peak, kept = believed, None
            rows[name] = replace(rows[name], peak_bytes=peak, kept_bytes=kept, energy_j=spent[name])
            self._fill(name, times, rows, floor, reached)

    def _energy(self, call: Call, times: Times) -> float | None:
        if self._meter is None:
            return None
        try:
            return joules(call, _median(times.called or times.seconds), self._meter, self.device)
        except nvml_device.Unavailable:  # it was there before
            return None

    def _fill(
        self,
        name: str,
        times: Mapping[str, Times],
        rows: dict[str, Row],
        floor: Floor | None,
        reached: tuple[float, float] | None,
    ) -> None:
        """Put the variant's times into its row, and make that an entry of pytest-benchmark's.

        pytest-benchmark has no public way to take times that it did not take. An entry gets its names and `extra_info`
        from the fixture when it is made; by `fullname`, saved runs are compared.
        """
        known, row = rows[name], _row(name, times[name], floor, reached)
        found = {f: getattr(known, f) for f in ("peak_bytes", "kept_bytes", "energy_j")}
        row = replace(row, note="; ".join(filter(None, (known.note, row.note))), **found)
        if (first := times.get(next(iter(rows)))) is not None and (one := _median(first.seconds)):
            row = replace(row, relative=_median(times[name].seconds) / one)
        rows[name] = row
        fixture, node = self._benchmark, self._node
        own = fixture.name, fixture.fullname
        fixture.name, fixture.fullname, fixture.group = f"{node.name} {name}", f"{node.nodeid} {name}", node.name
        fixture.extra_info = {k: v for k, v in asdict(row).items() if k != "variant"} | {"device": self._name()}
        if floor:
            fixture.extra_info |= {"floor_bytes": floor.bytes, "floor_flops": floor.flops}
        entry = fixture._make_stats(1)
        fixture.name, fixture.fullname = own
        for seconds in times[name].seconds:
            entry.update(seconds)

    def _name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine()

    def _tidy(self) -> None:
        """Give back what a first call, or one that ran out of memory, leaves in caches."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _row(name: str, times: Times, floor: Floor | None, reached: tuple[float, float] | None) -> Row:
    median = _median(times.seconds)
    cold = _median(times.cold) if times.cold else None
    row = Row(
        variant=name,
        status="timed",
        note=times.note,
        median=median,
        quartiles=_quartiles(times.seconds),
        called=_median(times.called) if times.called else None,
        called_quartiles=_quartiles(times.called) if times.called else None,
        cold=cold,
        rounds=len(times.seconds),
        calls=times.calls,
    )
    took = cold or median
    if floor is None or not took:
        return row
    row = replace(row, gb_per_s=floor.bytes / took / 1e9, tflop_per_s=floor.flops / took / 1e12 or None)
    if reached is None:
        return row
    return replace(row, floor_share=max(floor.bytes / reached[0], floor.flops / reached[1]) / took)


def _median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def _quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return low, high
