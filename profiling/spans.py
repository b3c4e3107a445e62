"""What the engine's phases took: every span on the host's clock, and on a GPU between events on its stream."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

ELSEWHERE = "elsewhere"
"""What is in no phase."""


@dataclass(slots=True)
class Span:
    """One phase, once."""

    phase: str
    lane: int
    within: tuple[str, ...]
    """The phases of its thread and lane that it is within, outermost first."""
    start: float
    """Seconds, by the recorder's clock."""
    end: float = 0.0
    stream: int = 0
    """Of the device, the one that was current; 0 is the default stream, or none."""
    device: tuple[float, float] | None = None
    """Begin and end there, in seconds by the recorder's clock, as near as that is known; None on a CPU."""

    @property
    def seconds(self) -> float:
        """On the host."""
        return self.end - self.start


class Recorder:
    """An observer (`fedmoe.engine.ranges.observed`) that keeps all spans.

    `exclusive` tells where the host was: every moment between the first begin and the last end of a thread belongs to
    one phase, the innermost of the lane that was last heard of. So its values add up to what passed.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.spans: list[Span] = []
        self.exclusive: defaultdict[str, float] = defaultdict(float)
        """Seconds, by phase."""
        self._clock, self._gpu = clock, device.type == "cuda"
        self._open: defaultdict[tuple[int, int], list[Span]] = defaultdict(list)  # by thread and lane
        self._last: dict[int, tuple[float, str]] = {}  # by thread: when it was last heard of, and in which phase it is
        self._events: dict[int, tuple[torch.cuda.Event, torch.cuda.Event]] = {}  # by the span's place
        self._lock = threading.Lock()
        if self._gpu:
            torch.cuda.synchronize()
            self._zero = torch.cuda.Event(enable_timing=True)
            self._zero.record()
        self._began = clock()

    def begin(self, phase: str, lane: int) -> None:
        """A phase begins."""
        now, thread = self._clock(), threading.get_ident()
        with self._lock:
            stack = self._open[thread, lane]
            stack.append(span := Span(phase, lane, tuple(outer.phase for outer in stack), now))
            self._pass(thread, now, phase)
            if self._gpu and not torch.cuda.is_current_stream_capturing():  # an event there would be the graph's
                stream = torch.cuda.current_stream()
                span.stream = stream.cuda_stream
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._events[id(span)] = start, end
                start.record(stream)

    def end(self, phase: str, lane: int) -> None:
        """It ends."""
        now, thread = self._clock(), threading.get_ident()
        with self._lock:
            stack = self._open[thread, lane]
            span = stack.pop()
            assert span.phase == phase, (span.phase, phase)
            span.end = now
            self._pass(thread, now, stack[-1].phase if stack else self._outer(thread))
            if id(span) in self._events:
                self._events[id(span)][1].record(torch.cuda.current_stream())
            self.spans.append(span)

    def settle(self) -> None:
        """Wait for the device, and take its times; phases that have not ended are left out."""
        if self._gpu:
            torch.cuda.synchronize()
        for span in self.spans:
            if id(span) in self._events:
                start, end = self._events.pop(id(span))
                passed = (self._zero.elapsed_time(event) / 1e3 for event in (start, end))
                span.device = (self._began + next(passed), self._began + next(passed))

    def _pass(self, thread: int, now: float, phase: str) -> None:
        """The thread is in `phase` from now on."""
        if thread in self._last:
            before, was = self._last[thread]
            self.exclusive[was] += now - before
        self._last[thread] = now, phase
        if phase == ELSEWHERE:
            del self._last[thread]  # what passes outside is nobody's

    def _outer(self, thread: int) -> str:
        """The innermost phase of another lane of the thread: that of lane 0, which holds the round, first."""
        for key in sorted(key for key in self._open if key[0] == thread):
            if self._open[key]:
                return self._open[key][-1].phase
        return ELSEWHERE


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds that at least one of the intervals covers."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def overlap(first: Iterable[tuple[float, float]], second: Iterable[tuple[float, float]]) -> float:
    """Seconds that both cover."""
    first, second = list(first), list(second)
    return covered(first) + covered(second) - covered([*first, *second])
