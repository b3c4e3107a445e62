"""Sampling: what was read between two times, what was not, and that no meter ends the thread or the run."""

import json
import threading
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.profiling import sampler as module
from fedmoe.profiling.sampler import GAP, Quantity, Sampler, Value

POWER = Quantity("power", "W", "gauge", "a gauge")
ENERGY = Quantity("energy", "J", "counter", "a counter", rate="power")
BYTES = Quantity("bytes", "bytes", "counter", "a counter that no gauge stands in for")
FLAGS = Quantity("flags", "", "flags", "flags")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Meter:
    """Says what it is told to, and takes `seconds` of a clock to do so."""

    def __init__(self, *quantities: Quantity, clock: Clock | None = None, seconds: float = 0.0) -> None:
        self.quantities = quantities
        self.missing: dict[str, str] = {}
        self.values: dict[str, Value] = {}
        self.error: Exception | None = None
        self.reads = self.closed = 0
        self.clock, self.seconds = clock, seconds

    def read(self) -> dict[str, Value]:
        self.reads += 1
        if self.clock:
            self.clock.now += self.seconds
        if self.error:
            raise self.error
        return dict(self.values)

    def close(self) -> None:
        self.closed += 1
        if self.error:
            raise self.error


def sampled(readings: Iterable[tuple[float, dict[str, Value]]], *quantities: Quantity) -> Sampler:
    """One that has read these values at these times."""
    clock, meter = Clock(), Meter(*quantities)
    sampler = Sampler([meter], clock=clock)
    for clock.now, meter.values in readings:
        meter.missing = {name: "it was off" for name, value in meter.values.items() if value is None}
        sampler.sample()
    return sampler


def of(quantity: Quantity, times: Sequence[float], values: Sequence[Any]) -> Sampler:
    return sampled([(t, {quantity.name: v}) for t, v in zip(times, values, strict=True)], quantity)


def entry(sampler: Sampler, name: str, start: float, end: float) -> Any:
    summary = sampler.summary(start, end)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert set(summary["missing"]) == {name for name, found in summary["quantities"].items() if found is None}
    return summary["quantities"][name]


def area(values: Sequence[float], times: Sequence[float]) -> float:
    corners = zip(times, values, strict=True)
    return sum((v + w) / 2 * (t - s) for (s, v), (t, w) in pairwise(corners))


def test_a_gauge_counts_by_time_and_not_by_readings() -> None:
    sampler = of(POWER, [0, 1, 3, 4], [0, 10, 10, 0])
    found = entry(sampler, "power", 0, 4)
    assert found == {"unit": "W", "mean": (5 + 20 + 5) / 4, "min": 0, "max": 10, "median": 5, "note": ""}


@pytest.mark.parametrize(("start", "end"), [(0, 4), (0.5, 1), (0.25, 3.5), (1.5, 2.5), (1, 3), (3.2, 3.3)])
def test_a_gauge_between_any_two_times(start: float, end: float) -> None:
    times, values = [0.0, 1.0, 1.5, 3.0, 4.0], [2.0, 10.0, 4.0, 4.0, -6.0]
    found = entry(of(POWER, times, values), "power", start, end)
    at = [start, *(t for t in times if start < t < end), end]
    points = np.interp(at, times, values)
    assert found["mean"] == pytest.approx(area(points.tolist(), at) / (end - start))
    assert (found["min"], found["max"]) == pytest.approx((points.min(), points.max()))
    assert found["median"] == pytest.approx(np.median(points))


def test_a_gap_is_neither_0_nor_guessed() -> None:
    sampler = of(POWER, [0, 1, 2, 3, 4, 5], [4, 4, None, None, 8, 8])
    found = entry(sampler, "power", 0, 5)  # known from 0 to 1 and from 4 to 5
    assert (found["mean"], found["min"], found["note"]) == (6, 4, f"of 2 of 5 s: {GAP}")
    assert entry(sampler, "power", 1, 4) is None
    assert sampler.summary(1, 4)["missing"] == {"power": GAP}
    assert sampler.missing == {}
    assert sampler.series("power") == ([0, 1, 2, 3, 4, 5], [4, 4, None, None, 8, 8])


def test_what_never_was_read_is_missing_with_its_reason() -> None:
    sampler = sampled([(t, {"power": None, "energy": None, "flags": None}) for t in range(3)], POWER, ENERGY, FLAGS)
    summary = sampler.summary(0, 2)
    assert summary["quantities"] == {"power": None, "energy": None, "flags": None}
    assert summary["missing"] == sampler.missing == dict.fromkeys(("power", "energy", "flags"), "it was off")
    silent = sampled([(t, {}) for t in range(3)], POWER)
    assert silent.summary(0, 2)["missing"] == {"power": "not read"}


def test_outside_of_what_was_sampled() -> None:
    sampler = sampled([(1, {"power": 5, "bytes": 0}), (2, {"power": 5, "bytes": 8})], POWER, BYTES)
    assert sampler.summary(3, 4)["missing"] == {"power": GAP, "bytes": GAP}
    assert entry(sampler, "power", 0, 2)["note"] == f"of 1 of 2 s: {GAP}"
    assert entry(sampler, "bytes", 0, 2) is None  # a part of it would look like all of it
    assert entry(sampler, "bytes", 1, 3) is None
    assert Sampler([Meter(POWER)]).summary(0, 1)["missing"] == {"power": GAP}
    for start, end in ((1, 1), (2, 1)):
        with pytest.raises(ValueError, match=rf"ends at {end}, which is not after its start at {start}"):
            sampler.summary(start, end)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_missing(value: float) -> None:
    assert of(POWER, [0, 1], [value, value]).missing == {"power": f"read as {value}"}


def test_a_counter_between_readings() -> None:
    sampler = of(BYTES, [0, 1, 3], [100, 110, 150])
    found = entry(sampler, "bytes", 0.5, 2)
    assert found == {"unit": "bytes", "increase": 25, "per_second": 25 / 1.5, "source": "counter", "note": ""}


def test_a_counter_knows_what_it_counted_in_a_gap() -> None:
    sampler = of(BYTES, [0, 1, 2, 3], [0, None, None, 30])
    assert entry(sampler, "bytes", 0, 3)["increase"] == 30
    assert entry(sampler, "bytes", 1, 2)["increase"] == pytest.approx(10)


def test_a_counter_that_goes_back() -> None:
    sampler = of(BYTES, [0, 1, 2, 3], [1000, 1010, 5, 12])
    found = entry(sampler, "bytes", 0, 3)
    assert found["increase"] == 10 + 0 + 7
    assert found["note"] == "went back 1 times, each counted as no increase"
    assert entry(sampler, "bytes", 2, 3)["note"] == ""


@given(
    steps=st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 1e6)), min_size=1, max_size=20),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_counter_adds_up(steps: list[tuple[float, float]], cuts: tuple[float, float]) -> None:
    times, values = np.cumsum([(0.0, 0.0), *steps], axis=0).T.tolist()
    sampler, end = of(BYTES, times, values), times[-1]
    marks = sorted({0.0, *(cut * end for cut in cuts), end})
    parts = [entry(sampler, "bytes", a, b)["increase"] for a, b in pairwise(marks)]
    assert sum(parts) == pytest.approx(values[-1], rel=1e-6, abs=1e-6)
    assert min(parts) >= 0


def test_flags_have_shares_of_time() -> None:
    hot, cap = frozenset({"hot"}), frozenset({"cap"})
    sampler = of(FLAGS, [0, 1, 3, 4, 8], [frozenset(), hot, hot | cap, cap, None])
    # A flag that is set at one of two readings counts for half of the time between.
    expected = {"cap": (1 + 1) / 4, "hot": (0.5 + 2 + 0.5) / 4}
    assert entry(sampler, "flags", 0, 4) == {"unit": "", "shares": expected, "note": ""}
    assert entry(sampler, "flags", 3.5, 8)["shares"] == {"cap": 1, "hot": pytest.approx(0.25)}
    assert "0.5 of 4.5 s: it was off" in entry(sampler, "flags", 3.5, 8)["note"]
    assert entry(sampler, "flags", 5, 8) is None
    assert entry(of(FLAGS, [0, 1], [frozenset()] * 2), "flags", 0, 1)["shares"] == {}  # none was set, and that is known


def test_energy_is_the_counters_where_there_is_one() -> None:
    readings: list[tuple[float, dict[str, Value]]] = [(t, {"power": 100, "energy": 7 * t}) for t in (0, 1, 3)]
    found = entry(sampled(readings, POWER, ENERGY), "energy", 0, 3)
    assert (found["increase"], found["per_second"], found["source"]) == (21, 7, "counter")


def test_energy_is_integrated_from_power_where_there_is_none() -> None:
    times, watts = [0.0, 1.0, 3.0, 3.5], [100.0, 200.0, 50.0, 50.0]
    sampler = sampled([(t, {"power": w, "energy": None}) for t, w in zip(times, watts, strict=True)], POWER, ENERGY)
    found = entry(sampler, "energy", 0, 3.5)
    joules = area(watts, times)
    assert found["increase"] == pytest.approx(joules) and found["per_second"] == pytest.approx(joules / 3.5)
    assert (found["unit"], found["source"]) == ("J", "integrated from power")
    assert entry(sampler, "energy", 0, 4) is None  # power is not known for all of it
    assert sampler.summary(0, 4)["missing"] == {"energy": "it was off"}


def test_a_meter_that_begins_to_fail_and_recovers() -> None:
    clock, good, bad = Clock(), Meter(POWER), Meter(BYTES, FLAGS)
    sampler = Sampler([bad, good], clock=clock)
    for clock.now in range(6):
        good.values = {"power": clock.now}
        bad.values = {"bytes": 10 * clock.now, "flags": frozenset({"hot"})}
        bad.error = OSError("it broke\nin two lines") if 2 <= clock.now <= 3 else None
        sampler.sample()
        assert sampler.missing == (dict.fromkeys(("bytes", "flags"), "OSError: it broke") if bad.error else {})
    assert entry(sampler, "power", 0, 5)["mean"] == 2.5
    assert entry(sampler, "bytes", 0, 5)["increase"] == 50
    assert entry(sampler, "flags", 0, 5)["note"] == f"of 2 of 5 s: {GAP}"


def test_each_meter_is_stamped_as_its_reading_begins() -> None:
    clock = Clock()
    slow, fast = Meter(POWER, clock=clock, seconds=0.04), Meter(BYTES)
    slow.values, fast.values = {"power": 1}, {"bytes": 1}
    sampler = Sampler([slow, fast], clock=clock)
    sampler.sample()
    assert sampler.series("power")[0] == [0] and sampler.series("bytes")[0] == [0.04]


def test_reading_is_accounted_for() -> None:
    clock = Clock()
    meter = Meter(POWER, clock=clock, seconds=0.25)
    sampler = Sampler([meter], clock=clock)
    for clock.now in (0, 1, 2, 3):
        sampler.sample()
    reading = sampler.summary(0.5, 2.5)["reading"]
    assert (reading["samples"], reading["seconds"]) == (2, 0.5)
    assert reading["cpu_seconds"] >= 0


def test_names_are_unique() -> None:
    with pytest.raises(AssertionError, match="same name"):
        Sampler([Meter(POWER), Meter(POWER)])


class Waited(Meter):
    """Lets a test wait for its readings."""

    def __init__(self, *quantities: Quantity) -> None:
        super().__init__(*quantities)
        self.enough = threading.Event()
        self.threads: list[threading.Thread] = []

    def read(self) -> dict[str, Value]:
        self.threads.append(threading.current_thread())
        if len(self.threads) >= 5:
            self.enough.set()
        return super().read()


def test_the_thread_reads_from_begin_to_end() -> None:
    meter = Waited(POWER)
    meter.values = {"power": 3}
    with Sampler([meter], interval_seconds=0.001) as sampler:
        assert meter.threads[0] is threading.current_thread()
        assert meter.enough.wait(30)
        times, _ = sampler.series("power")
        assert entry(sampler, "power", times[0], times[-1])["mean"] == 3
    assert meter.threads[-1] is threading.current_thread()
    assert meter.threads[1] is not threading.current_thread() and meter.threads[1].daemon
    assert not meter.threads[1].is_alive()
    assert meter.closed == 1
    assert len(sampler.series("power")[0]) == meter.reads


def test_failures_end_neither_the_thread_nor_the_run() -> None:
    bad, good = Waited(BYTES), Waited(POWER)
    bad.error = RuntimeError("lost")
    with Sampler([bad, good], interval_seconds=0.001) as sampler:
        assert bad.enough.wait(30) and good.enough.wait(30)
    assert sampler.missing == {"bytes": "RuntimeError: lost", "power": "not read"}
    assert (bad.closed, good.closed) == (1, 1)  # though the first to be closed raises


def test_errors_of_what_is_measured_pass() -> None:
    meter = Meter(POWER)
    with pytest.raises(KeyError, match="mine"), Sampler([meter]):
        raise KeyError("mine")
    assert meter.closed == 1


def test_a_reading_that_never_ends_does_not_hold_up_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANG_SECONDS", 0.01)
    begun, release = threading.Event(), threading.Event()

    class Hanging(Meter):
        def read(self) -> dict[str, Value]:
            if threading.current_thread() is not threading.main_thread():
                begun.set()
                release.wait(60)
            return {"power": 1}

    meter = Hanging(POWER)
    with Sampler([meter, Meter(BYTES)], interval_seconds=0.001) as sampler:
        assert begun.wait(30)
    assert sampler.missing == {"power": "reading it does not end", "bytes": "not read"}
    assert meter.closed == 0  # it is in use
    release.set()
