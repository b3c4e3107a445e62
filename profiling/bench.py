"""The `gpu_benchmark` fixture: variants of one piece of work, checked against each other, then timed interleaved.

It stands on pytest-benchmark, where each variant becomes an entry of its own, and tests with it are skipped where that
is absent. Until it is registered as a plugin, a `conftest.py` imports the fixture and the two hooks from here.
"""

import gc
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import pytest
import torch

from fedmoe.profiling.timing import Call as Call
from fedmoe.profiling.timing import Times, ceilings, interleave, memory, reason

Function = TypeVar("Function", bound=Callable[..., None])
Check = Callable[[Any, Any], None]
"""Given the first variant's output and another's; raises AssertionError where they do not agree."""

PROPERTY = "gpu_benchmark"
"""The name under which a test's report carries its rows, as dictionaries, to whoever listens to pytest."""


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
    """Seconds a call as the host makes it, launches included; None on a CPU, where `median` is just that."""
    rounds: int = 0
    calls: int = 0
    """Calls in a round."""
    relative: float | None = None
    """`median` as a multiple of the first variant's, if that was timed."""
    peak_bytes: int | None = None
    """Device memory at its peak above that before the call."""
    kept_bytes: int | None = None
    """Of it, what the call's results keep."""
    gb_per_s: float | None = None
    """The floor's bytes over the time, not the traffic that there was."""
    tflop_per_s: float | None = None
    floor_share: float | None = None
    """The least time that the floor takes at this device's measured ceilings, as a share of `median`."""


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
        vars(function)[_SIZES] = (names, list(full), list(tiny))
        return function

    return mark


_SIZES = "_benchmark_sizes"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Hand out what `sizes` was given."""
    if given := vars(metafunc.function).get(_SIZES):
        names, full, tiny = given
        metafunc.parametrize(names, full if _full(metafunc.config) else tiny)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have pytest-benchmark, if it is there, take our tests for its own: for --benchmark-only and --benchmark-skip."""
    for item in items if config.pluginmanager.hasplugin("benchmark") else []:
        names = getattr(item, "fixturenames", [])
        if "gpu_benchmark" in names and "benchmark" not in names:
            names.append("benchmark")


@pytest.fixture
def gpu_benchmark(request: pytest.FixtureRequest) -> "Bench":
    """Compares variants of one piece of work; see `Bench.__call__`."""
    if not request.config.pluginmanager.hasplugin("benchmark"):
        pytest.skip("needs pytest-benchmark: pip install '.[bench]'")
    return Bench(request.getfixturevalue("benchmark"), request.node, _full(request.config))


class Bench:
    """One benchmark."""

    def __init__(self, benchmark: Any, node: pytest.Item, full: bool) -> None:
        self.full = full
        """Whether it is timed on a GPU: worth compiling and tuning for."""
        self.timed = bool(benchmark.enabled)
        """Whether it is timed at all; without, once is enough, and the less the better."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._benchmark, self._node = benchmark, node

    def __call__(
        self,
        variants: Mapping[str, Call | Absent],
        *,
        floor: Floor | None = None,
        check: Check | None = None,
    ) -> list[Row]:
        """A row for each variant, in the order given.

        Each variant is called once, and what it returns, unless that is None, is checked against what the first one
        did. Without timing, one that fails the check or raises fails the benchmark. With it, only one of ours (its name
        begins with "ours") that fails the check does, before anything is timed; another's may compute less on purpose,
        and is timed with a note. One that raises is named in its row. A callable with an attribute `peak_bytes` is
        believed: what a CUDA graph allocated when it was captured, no replay shows.
        """
        self._benchmark._mode = "gpu_benchmark"  # or pytest-benchmark warns that it was not used
        rows = {name: Row(variant=name, status="ran") for name in variants}
        calls: dict[str, Call] = {}
        for name, variant in variants.items():
            if isinstance(variant, Absent):
                rows[name] = Row(variant=name, status="absent", reason=variant.reason)
            else:
                calls[name] = variant
        try:
            self._first(calls, rows, check)
            self._tidy()
            if self._benchmark.enabled:
                self._time(calls, rows, floor)
        finally:
            self._node.user_properties.append((PROPERTY, [asdict(row) for row in rows.values()]))
        return list(rows.values())

    def _first(self, calls: dict[str, Call], rows: dict[str, Row], check: Check | None) -> None:
        """Call each once; leaves in `calls` what is worth timing."""
        reference: tuple[str, Any] | None = None
        wrong = ""
        for name, call in list(calls.items()):
            try:
                output = call()
                _synchronize(self.device)
            except Exception as error:
                rows[name] = Row(variant=name, status="failed", reason=reason(error))
                if not self._benchmark.enabled:
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
                if self._benchmark.enabled and not name.startswith("ours"):
                    rows[name] = replace(rows[name], note=text)
                else:
                    rows[name] = Row(variant=name, status="wrong", reason=text)
                    wrong = wrong or f"{name} {text}"
            del output
        if wrong:
            raise AssertionError(wrong)

    def _time(self, calls: dict[str, Call], rows: dict[str, Row], floor: Floor | None) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the only count at which a CPU that is shared gives the same time twice
        try:
            times, failed = interleave(calls, self.device)
            used = {name: memory(calls[name], self.device) for name in times}
            reached = ceilings(floor.dtype, self.device) if floor and times else None
        finally:
            torch.set_num_threads(threads)
        for name, why in failed.items():
            rows[name] = Row(variant=name, status="failed", reason=why)
        first = times.get(next(iter(rows)))
        for name, taken in times.items():
            row = _row(name, taken, floor, reached)
            rows[name] = replace(row, note="; ".join(filter(None, (rows[name].note, row.note))))
            if first is not None:
                rows[name] = replace(rows[name], relative=_median(taken.seconds) / _median(first.seconds))
            peak = getattr(calls[name], "peak_bytes", None)
            if peak is not None:
                rows[name] = replace(rows[name], peak_bytes=peak)
            elif (bytes_ := used[name]) is not None:
                rows[name] = replace(rows[name], peak_bytes=bytes_[0], kept_bytes=bytes_[1])
            self._hand_over(name, taken, rows[name], floor)

    def _hand_over(self, name: str, times: Times, row: Row, floor: Floor | None) -> None:
        """Make the variant an entry of pytest-benchmark's, which has no public way to take times that it did not take.

        An entry takes its name and `extra_info` from the fixture when it is made.
        """
        fixture = self._benchmark
        fixture.name, fixture.group, own = f"{self._node.name} {name}", self._node.name, fixture.name
        fixture.extra_info = {k: v for k, v in asdict(row).items() if k != "variant"}
        if floor:
            fixture.extra_info |= {"floor_bytes": floor.bytes, "floor_flops": floor.flops}
        entry = fixture._make_stats(1)
        fixture.name = own
        for seconds in times.seconds:
            entry.update(seconds)

    def _tidy(self) -> None:
        """Give back what a first call, or one that ran out of memory, leaves in caches."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _row(name: str, times: Times, floor: Floor | None, reached: tuple[float, float] | None) -> Row:
    median = _median(times.seconds)
    low, _, high = statistics.quantiles(times.seconds, n=4) if len(times.seconds) > 1 else [median] * 3
    row = Row(
        variant=name,
        status="timed",
        note=times.note,
        median=median,
        quartiles=(low, high),
        called=_median(times.called) if times.called else None,
        rounds=len(times.seconds),
        calls=times.calls,
    )
    if floor is None:
        return row
    row = replace(row, gb_per_s=floor.bytes / median / 1e9, tflop_per_s=floor.flops / median / 1e12 or None)
    if reached is None:
        return row
    return replace(row, floor_share=max(floor.bytes / reached[0], floor.flops / reached[1]) / median)


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def _full(config: pytest.Config) -> bool:
    """Whether benchmarks are timed, and on a GPU."""
    enabled = config.getoption("benchmark_enable", False) or not config.getoption("benchmark_disable", True)
    return bool(enabled) and torch.cuda.is_available()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
