"""Spans, what they add up to, and what other tools are told of phases."""

import json
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.engine.ranges import in_lane, observed, phase
from fedmoe.profiling import trace
from fedmoe.profiling.annotations import Annotations, Nvtx
from fedmoe.profiling.spans import ELSEWHERE, Recorder, Span, covered, overlap

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_moment_belongs_to_the_innermost_phase() -> None:
    recorder = Recorder(CPU, clock := Clock())
    with observed(recorder):
        with phase("round"):
            clock.now += 1
            with phase("client"):
                clock.now += 10
                with phase("step"):
                    clock.now += 100
                clock.now += 20
            clock.now += 2
        clock.now += 1000  # nobody's
        with phase("round"):
            clock.now += 4
    assert dict(recorder.exclusive) == {"round": 7, "client": 30, "step": 100}
    assert [(s.phase, s.seconds, s.within) for s in recorder.spans] == [
        ("step", 100, ("round", "client")),
        ("client", 130, ("round",)),
        ("round", 133, ()),
        ("round", 4, ()),
    ]


def test_lanes_that_take_turns_add_up_to_the_round() -> None:
    """Spans of two lanes overlap on the clock; where the host was is counted once."""
    recorder = Recorder(CPU, clock := Clock())

    def lane(number: int) -> Any:
        with phase("client"):
            for _ in range(3):
                clock.now += 1
                with phase("step"):
                    clock.now += 10
                yield

    with observed(recorder), phase("round"):
        works = [lane(0), lane(1)]
        for _ in range(4):
            for number, work in enumerate(works):
                with in_lane(number):
                    next(work, None)
        clock.now += 5
    assert sum(recorder.exclusive.values()) == clock.now == 71
    assert recorder.exclusive["step"] == 60
    clients = [(s.lane, s.start, s.end) for s in recorder.spans if s.phase == "client"]
    assert [lane for lane, _, _ in clients] == [0, 1] and clients[0][2] > clients[1][1]


def test_threads_are_told_apart() -> None:
    recorder = Recorder(CPU)

    def work() -> None:
        with phase("averaging"):
            pass

    with observed(recorder), phase("round"):
        other = threading.Thread(target=work)
        other.start()
        other.join()
    assert [s.within for s in recorder.spans] == [(), ()]
    assert ELSEWHERE not in recorder.exclusive


intervals = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda t: (t[0], t[0] + t[1])), max_size=8)


@given(intervals, intervals)
def test_coverage_counts_every_second_once(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    seconds = [{s for start, end in part for s in range(start, end)} for part in (first, second)]
    assert covered(first) == len(seconds[0])
    assert overlap(first, second) == len(seconds[0] & seconds[1])


def test_trace_has_a_track_for_each_lane_stream_and_quantity() -> None:
    spans = [
        Span("step", 1, ("client",), 12.0, 13.0, 7, (10.5, 11.5)),
        Span("client", 1, (), 10.0, 14.0, 7, (10.0, 12.0)),
        Span("averaging", 0, (), 15.0, 16.0),
    ]
    made = json.loads(trace.events(spans, {"power": ([11.0, 12.0], [250.0, None])}))["traceEvents"]
    complete = {(e["name"], e["pid"], e["tid"]): (e["ts"], e["dur"]) for e in made if e["ph"] == "X"}
    assert complete == {
        ("client", 1, 1): (0, 4e6),
        ("step", 1, 1): (2e6, 1e6),
        ("averaging", 1, 0): (5e6, 1e6),
        ("client", 2, 0): (0, 2e6),
        ("step", 2, 0): (0.5e6, 1e6),
    }
    assert [(e["ts"], e["args"]) for e in made if e["ph"] == "C"] == [(1e6, {"power": 250.0})]
    assert {e["args"]["name"] for e in made if e["ph"] == "M"} >= {"host", "device", "lane 0", "lane 1", "stream 0"}
    assert json.loads(trace.events([]))["traceEvents"]


class Ranges:
    def __init__(self) -> None:
        self.open: dict[int, str] = {}
        self.all: list[str] = []

    def range_start(self, name: str) -> int:
        self.all.append(name)
        self.open[len(self.all)] = name
        return len(self.all)

    def range_end(self, handle: int) -> None:
        del self.open[handle]


def test_nvtx_hears_of_phases_that_overlap() -> None:
    library = Ranges()
    with observed(Nvtx(library)):
        first = phase("client")
        first.__enter__()
        with in_lane(1), phase("client"):
            first.__exit__(None, None, None)
            assert list(library.open.values()) == ["client (lane 1)"]
    assert library.all == ["client", "client (lane 1)"] and not library.open


def test_annotations_appear_in_pytorchs_profiler() -> None:
    with torch.profiler.profile() as profiler, observed(Annotations()), phase("client"), phase("backward"):
        torch.ones(3).sum()
    names = {event.key for event in profiler.key_averages()}
    assert "fedmoe::backward" in names and "fedmoe::client" not in names


@pytest.mark.parametrize("fails", [False, True])
def test_a_phase_that_fails_ends(fails: bool) -> None:
    recorder = Recorder(CPU, clock := Clock())
    try:
        with observed(recorder), phase("step"):
            clock.now += 1
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    recorder.settle()
    assert [(s.phase, s.seconds, s.device) for s in recorder.spans] == [("step", 1, None)]
