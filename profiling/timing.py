"""Times callables against each other: interleaved; on a GPU without a starved stream's gaps, with L2 hot and cold."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

Call = Callable[[], object]
Meter = Callable[[], float]
"""Joules that the device has used up to now, from any beginning."""

LAP_SECONDS = 2e-3
"""What a lap should take: thousands of times the resolution of the clock (CUDA events: 0.5 µs)."""
MOST_CALLS = 20
"""Calls in a lap on a GPU: 30 kernels each, as in an eager step, are then 600 of the 1024 that a stream can queue."""
CYCLES = 2e9
"""A second, in what `torch.cuda._sleep` counts; at a lower clock it holds the stream back for longer, which is safe."""
SHORTEST_HOLD, LONGEST_HOLD = 2e-4, 0.1
GAPS = "waits for the GPU itself: its gaps are timed"
WRITE_SECONDS = 3e-5
"""What the host and two events take to have the L2 cache overwritten, generously."""
ENERGY_SECONDS = 0.5
"""Of calls whose energy is taken: a GPU's counter moves on every 20 to 100 ms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long to go on."""

    warm_seconds: float
    """Warm-up ends when every variant is steady, or after this."""
    seconds: float
    """No new round begins after this, once there are `min_rounds`."""
    min_rounds: int
    max_rounds: int


CPU = Limits(warm_seconds=0.05, seconds=0.2, min_rounds=5, max_rounds=30)
GPU = Limits(warm_seconds=3.0, seconds=5.0, min_rounds=10, max_rounds=100)
BOTH = Limits(warm_seconds=1.0, seconds=3.0, min_rounds=5, max_rounds=100)


@dataclass(slots=True)
class Times:
    """Seconds a call took, an entry for each lap."""

    calls: int = 1
    """Calls in a lap."""
    seconds: list[float] = field(default_factory=list)
    """On a GPU its time there, by events, with the work queued in advance; on a CPU the time of the call."""
    called: list[float] = field(default_factory=list)
    """On a GPU also what calls back to back take as the host makes them, launches included; empty on a CPU."""
    cold: list[float] = field(default_factory=list)
    """On a GPU also the time there of a call that finds nothing of its own in the L2 cache, a median of a lap's, each
    between events of its own, which add about a microsecond. Empty on a CPU, and for calls so long that it is the same.
    """
    note: str = ""


class Watch(Protocol):
    """Times one callable."""

    times: Times

    def lap(self) -> None:
        """Take the time of some calls, and keep it."""


class HostWatch:
    """By the host's monotonic clock: for work that is done when the call returns, or when the device is idle."""

    def __init__(self, call: Call, device: torch.device) -> None:
        self._call, self._device = call, device
        once = self._seconds(1)
        self.times = Times(max(1, min(1000, int(LAP_SECONDS / max(once, 1e-9)))))

    def lap(self) -> None:
        """Take the time of some calls, and keep it."""
        self.times.seconds.append(self._seconds(self.times.calls))

    def _seconds(self, calls: int) -> float:
        settle(self._device)
        start = time.perf_counter()
        for _ in range(calls):
            self._call()
        settle(self._device)
        return (time.perf_counter() - start) / calls


class DeviceWatch:
    """By CUDA events, on the current stream.

    The stream is held back while the host queues a lap, so that the device finds its work waiting: between two events
    around a starved stream lies the host's time and not the kernels'. What the host takes is measured apart, and so are
    calls before each of which `overwrite` has taken the L2 cache.
    """

    def __init__(self, call: Call, overwrite: Call | None = None) -> None:
        self._call, self._overwrite = call, overwrite
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.times = Times(1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        self._queued = time.perf_counter() - start
        torch.cuda.synchronize()
        self.times.calls = max(1, min(MOST_CALLS, int(LAP_SECONDS / (time.perf_counter() - start))))
        self._hold = self._first_hold()

    def lap(self) -> None:
        """Take the time of some calls, and keep it."""
        seconds, held = self._on_device()
        while not held and not self.times.note:
            if self._hold < LONGEST_HOLD:
                self._hold = min(4 * self._hold, LONGEST_HOLD)
            elif self.times.calls > 1:  # more kernels than a stream queues: there the host waits
                self.times.calls = 1
                self._hold = self._first_hold()
            else:
                self.times.note, self._hold = GAPS, 0.0
            seconds, held = self._on_device()
        self.times.seconds.append(seconds)
        self.times.called.append(self._as_called())
        # What a call of milliseconds reads again is gone from the cache, or is nothing beside the rest.
        if self._overwrite and not self.times.note and self.times.calls > 1:
            self._lap_cold(self._overwrite)

    def _lap_cold(self, overwrite: Call) -> None:
        """As `_on_device`; a lap whose host did not keep ahead is left out."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.times.calls)]
        torch.cuda.synchronize()
        torch.cuda._sleep(int((self._hold + 2 * WRITE_SECONDS * self.times.calls) * CYCLES))
        for start, end in pairs:
            overwrite()
            start.record()
            self._call()
            end.record()
        held = not pairs[0][0].query()
        pairs[-1][1].synchronize()
        if held:
            self.times.cold.append(statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3)

    def _first_hold(self) -> float:
        """Twice what the host took to queue a lap; no more than need be, for a device that idles clocks higher."""
        return min(max(2 * self._queued * self.times.calls, SHORTEST_HOLD), LONGEST_HOLD)

    def _on_device(self) -> tuple[float, bool]:
        """Seconds a call, and whether everything was queued before the device began with it."""
        torch.cuda.synchronize()
        torch.cuda._sleep(int(self._hold * CYCLES))
        self._start.record()
        for _ in range(self.times.calls):
            self._call()
        self._end.record()
        held = not self._start.query()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3 / self.times.calls, held

    def _as_called(self) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(self.times.calls):
            self._call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / self.times.calls


def interleave(
    calls: Mapping[str, Call], device: torch.device, limits: Limits | None = None, host: bool = False
) -> tuple[dict[str, Times], dict[str, str]]:
    """Times by name, and why those that are missing failed; every round takes a lap of each, in the order given.

    By the host's clock on a CPU, and elsewhere if `host` says so.
    """
    host = host or device.type != "cuda"
    overwrite = None if host else _overwriter(device)
    limits = limits or (CPU if device.type != "cuda" else BOTH if host else GPU)
    watches: dict[str, Watch] = {}
    failed: dict[str, str] = {}

    def attempt(name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a foreign baseline throws, the others are still timed
            failed[name] = reason(error)
            watches.pop(name, None)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # out of memory is the likeliest

    def laps() -> None:
        for name, made in list(watches.items()):
            attempt(name, made.lap)

    def watch(call: Call) -> Watch:
        return HostWatch(call, device) if host else DeviceWatch(call, overwrite)

    for name, call in calls.items():
        attempt(name, lambda name=name, call=call: watches.update({name: watch(call)}))  # type: ignore[misc]
    start = time.perf_counter()
    while time.perf_counter() - start < limits.warm_seconds:
        laps()
        if all(steady(made.times.seconds) for made in watches.values()):
            break
    for made in watches.values():
        for taken in (made.times.seconds, made.times.called, made.times.cold):
            taken.clear()
    start = time.perf_counter()
    for done in range(limits.max_rounds):
        if done >= limits.min_rounds and time.perf_counter() - start > limits.seconds:
            break
        laps()
    return {name: made.times for name, made in watches.items()}, failed


def steady(seconds: list[float], laps: int = 3, within: float = 0.03) -> bool:
    """Whether the last laps took what those before them did: clocks have settled, nothing is compiled any more."""
    if len(seconds) < 2 * laps:
        return False
    before, now = statistics.median(seconds[-2 * laps : -laps]), statistics.median(seconds[-laps:])
    return abs(now - before) <= within * before


def reason(error: BaseException) -> str:
    """An error in one line, of a length that a table takes."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
    return text if len(text) <= 160 else text[:159] + "…"


def memory(call: Call, device: torch.device) -> tuple[int, int] | None:
    """Bytes that a call has at its peak, above those before it, and bytes that its results keep; None on a CPU.

    Call it after a first call, whose compilers, libraries and autotuners allocate for themselves.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = call()
    torch.cuda.synchronize(device)
    kept = torch.cuda.memory_allocated(device) - before
    del results
    return torch.cuda.max_memory_allocated(device) - before, kept


def ceilings(dtype: torch.dtype, device: torch.device) -> tuple[float, float] | None:
    """Bytes and FLOPs a second that this device reaches: a large copy, and a large product; None on a CPU.

    Measured, because a data sheet's numbers are those of clocks that no real load keeps.
    """
    if device.type != "cuda":
        return None
    if (dtype, device) not in _ceilings:
        limits = Limits(warm_seconds=1.0, seconds=1.0, min_rounds=5, max_rounds=50)
        _ceilings[dtype, device] = reached(dtype, device, 2**30, 8192, limits)  # far more than any cache
    return _ceilings[dtype, device]


def reached(dtype: torch.dtype, device: torch.device, size: int, side: int, limits: Limits) -> tuple[float, float]:
    """Bytes a second, read and written, of a copy of `size` bytes, and FLOPs a second of a product of [side, side]."""
    source = torch.ones(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))  # zeros would flatter the clocks
    out = torch.empty_like(a)
    works = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)}
    times, failed = interleave(works, device, limits)
    assert not failed, failed
    copy, product = (statistics.median(times[name].seconds) for name in works)
    return 2 * source.nbytes / copy, 2 * side**3 / product


_ceilings: dict[tuple[torch.dtype, torch.device], tuple[float, float]] = {}


def joules(call: Call, seconds: float, meter: Meter, device: torch.device) -> float:
    """Joules a call, of calls back to back that take `seconds` each; the device's idle power is part of it."""
    calls = max(1, math.ceil(ENERGY_SECONDS / seconds))
    settle(device)
    before = meter()
    for _ in range(calls):
        call()
    settle(device)
    return (meter() - before) / calls


def settle(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _overwriter(device: torch.device) -> Call:
    """What writes twice as many bytes as the L2 cache holds, for which the device keeps them from now on."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device).zero_
