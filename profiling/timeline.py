"""Draws the last observed round on a page: a row for each depth of a lane on the host, of a stream on the device."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedmoe.profiling.markup import Figure, digits, label, seconds
from fedmoe.profiling.spans import Span

MOST = 4000
"""Bars that a browser, on a phone too, draws and moves without delay."""
FINEST = 4096
"""Parts of the round in one of which short spans are joined: more than a screen has pixels."""
CLOCK = 2e-6
"""Seconds by which neighbors on a stream may seem to overlap: CUDA events are that exact."""
ROW = 15
"""Pixels."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A span, or several short ones of a phase."""

    phase: str
    start: float
    """Seconds since the round began."""
    seconds: float
    count: int = 1

    @property
    def end(self) -> float:
        """Likewise."""
        return self.start + self.seconds


Track = tuple[str, list[list[Bar]]]
"""Name, and bars by depth."""


def last_round(spans: Sequence[Span]) -> tuple[list[Track], list[Track]]:
    """Of the host and of the device; by each one's own clock, from when the round began there."""
    rounds = [span for span in spans if span.phase == "round"]
    last = max(rounds, key=lambda span: span.start, default=None)
    if last is not None:
        spans = [span for span in spans if span.end > last.start and span.start < last.end]
    begin = last.start if last else min((span.start for span in spans), default=0.0)
    end = last.end if last else float("inf")
    devices = [span.device[0] for span in ([last] if last and last.device else spans) if span.device]
    there = min(devices, default=0.0)
    host, device = defaultdict(list), defaultdict(list)
    for span in spans:
        # What a lane began before, or goes on with after, is of another round to that extent.
        start = max(span.start, begin)
        host[span.lane].append(Bar(span.phase, start - begin, min(span.end, end) - start))
        if span.device and span.device[1] > there:
            start = max(span.device[0], there)
            device[span.stream].append(Bar(span.phase, start - there, span.device[1] - start))
    return (
        [(f"lane {lane}", _levels(host[lane])) for lane in sorted(host)],
        [(f"stream {number}", _levels(device[stream])) for number, stream in enumerate(sorted(device))],
    )


def _levels(bars: Iterable[Bar]) -> list[list[Bar]]:
    """Each bar on the first level that is free, so that what is within another is below it."""
    levels: list[list[Bar]] = []
    for bar in sorted(bars, key=lambda bar: (bar.start, -bar.seconds)):
        level = next((level for level in levels if level[-1].end <= bar.start + CLOCK), None)
        if level is None:
            levels.append(level := [])
        level.append(bar)
    return levels


def thinned(tracks: Sequence[Track], most: int = MOST) -> tuple[list[Track], float]:
    """At most about so many bars, and the seconds below which those that follow one another were joined; 0 for none.

    Joined bars are one a phase, as long as they were together: what is busy stays so, by the same phases.
    """
    rows = [row for _, levels in tracks for row in levels]
    if sum(map(len, rows)) <= most:
        return list(tracks), 0.0
    longest = max(row[-1].end for row in rows)
    short, made, joined = longest / FINEST, list(tracks), 0.0
    while sum(len(row) for _, levels in made for row in levels) > most and short < longest:
        made = [(name, [_joined(row, short) for row in levels]) for name, levels in tracks]
        joined, short = short, short * 1.5
    return made, joined


def _joined(row: Sequence[Bar], short: float) -> list[Bar]:
    parts: defaultdict[int, dict[str, Bar]] = defaultdict(dict)
    made: list[Bar] = []
    for bar in row:
        if bar.seconds >= short:
            made.append(bar)
            continue
        part = parts[int(bar.start / short)]
        first = part.get(bar.phase, replace(bar, seconds=0.0, count=0))
        part[bar.phase] = replace(first, seconds=first.seconds + bar.seconds, count=first.count + 1)
    for part in parts.values():
        at = min(bar.start for bar in part.values())
        for bar in part.values():
            made.append(replace(bar, start=at))
            at += bar.seconds
    return sorted(made, key=lambda bar: bar.start)


def figure(spans: Sequence[Span], colors: Mapping[str, str]) -> Figure | None:
    """The plot; None without spans."""
    host, device = last_round(spans)
    count = sum(len(row) for _, levels in (*host, *device) for row in levels)
    if not count:
        return None
    tracks, short = thinned([*host, *device])
    places: defaultdict[str, list[tuple[float, Bar]]] = defaultdict(list)
    ticks, names, lines, y = [], [], [], 0.0
    for number, (name, levels) in enumerate(tracks):
        where = "host" if number < len(host) else "device"
        lines.append(y - 0.9)
        ticks.append(y + (len(levels) - 1) / 2)
        names.append(f"{where}<br>{name}")
        for row in levels:
            for bar in row:
                places[bar.phase].append((y, bar))
            y += 1
        y += 0.8
    data: list[dict[str, object]] = []
    legend = []
    for phase in (phase for phase in colors if phase in places):
        legend.append((phase, colors[phase]))
        data.append(_trace(phase, colors[phase], places[phase]))
    shapes = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": at, "y1": at, "line": {"color": "var(--line)"}}
        for at in lines[1:]
    ]
    notes = []
    if short:
        bars = sum(len(row) for _, levels in tracks for row in levels)
        notes.append(
            f"{count:,} spans, drawn as {bars:,} bars: those below {seconds(short)} that follow one another are "
            "joined to one bar a phase, as long as they are together; the trace has each of them."
        )
    if device:
        notes.append("Host and device each by their own clock, from the moment the round began there.")
    layout = {
        "barmode": "overlay",
        "bargap": 0,
        "margin": {"l": 10, "r": 16, "t": 30, "b": 40},
        "xaxis": {
            "title": {"text": "ms since the round began"},
            "range": [0, 1e3 * max(row[-1].end for _, levels in tracks for row in levels)],
            "gridcolor": "var(--line)",
            "zeroline": False,
        },
        "yaxis": {
            "tickvals": ticks,
            "ticktext": names,
            "range": [y - 0.3, -0.8],
            "fixedrange": True,
            "showgrid": False,
            "zeroline": False,
            "automargin": True,
            "tickfont": {"size": 10},
            "ticks": "outside",
            "ticklen": 5,
            "tickcolor": "rgba(0,0,0,0)",
        },
        "shapes": shapes,
    }
    what = f"Timeline of the last observed round: {count} spans in {len(tracks)} lanes and streams"
    return Figure("timeline", what, int(80 + ROW * (y + 1)), data, layout, " ".join(notes), legend)


def _trace(phase: str, color: str, places: Sequence[tuple[float, Bar]]) -> dict[str, object]:
    """All bars of a phase."""
    texts = []
    for _, bar in places:
        times = f"×{bar.count}" if bar.count > 1 else ""
        texts.append(f"{label(phase)} {times}<br>{seconds(bar.seconds)}, from {digits(1e3 * bar.start)} ms")
    return {
        "type": "bar",
        "orientation": "h",
        "name": label(phase),
        "y": [y for y, _ in places],
        "base": [round(1e3 * bar.start, 4) for _, bar in places],
        "x": [round(1e3 * bar.seconds, 4) for _, bar in places],
        "width": 0.86,
        "marker": {"color": color},
        "meta": "spans",  # the page draws them as areas
        "customdata": texts,
        "hovertemplate": "%{customdata}<extra></extra>",
    }
