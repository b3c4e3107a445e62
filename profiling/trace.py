"""A timeline in Chrome's trace format, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedmoe.profiling.spans import Span

HOST, DEVICE, METERS = 1, 2, 3
"""Processes of the trace: a track a lane, a track a stream, a track a quantity."""

Series = tuple[Sequence[float], Sequence[float | None]]
"""Seconds, and values then."""


def events(spans: Iterable[Span], series: Mapping[str, Series] | None = None) -> str:
    """JSON of spans, and of quantities over time, all in seconds by one clock."""
    spans = sorted(spans, key=lambda span: span.start)
    zero = spans[0].start if spans else 0.0
    made: list[dict[str, Any]] = []
    lanes, streams = sorted({s.lane for s in spans}), sorted({s.stream for s in spans if s.device})
    names = [(HOST, lane, f"lane {lane}") for lane in lanes]
    names += [(DEVICE, i, f"stream {i}") for i in range(len(streams))]
    for process, title in ((HOST, "host"), (DEVICE, "device"), (METERS, "meters")):
        made.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}})
    for process, track, title in names:
        made.append({"ph": "M", "name": "thread_name", "pid": process, "tid": track, "args": {"name": title}})
    for span in spans:
        made.append(_complete(span.phase, HOST, span.lane, span.start - zero, span.seconds))
        if span.device:
            start, end = span.device
            made.append(_complete(span.phase, DEVICE, streams.index(span.stream), start - zero, end - start))
    for name, (seconds, values) in (series or {}).items():
        for at, value in zip(seconds, values, strict=True):
            if value is not None:
                args = {name: value}
                made.append({"ph": "C", "name": name, "pid": METERS, "ts": 1e6 * (at - zero), "args": args})
    return json.dumps({"traceEvents": made, "displayTimeUnit": "ms"})


def _complete(name: str, process: int, track: int, start: float, seconds: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": process, "tid": track, "ts": 1e6 * start, "dur": 1e6 * seconds}
