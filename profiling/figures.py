"""The plots of a profile's page, as Plotly takes them; colors that begin with var( are the page's own."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedmoe.profiling.markup import Figure, digits, label, percent, quantity, scaled, seconds
from fedmoe.profiling.profile import BatchSize, Range
from fedmoe.profiling.roofline import Ceilings, Point
from fedmoe.profiling.trace import Series

COLORS = {
    "round": "#8a96a3", "client": "#a58b73", "step": "#74839a", "evaluation": "#8f6f45", "averaging": "#b5475a",
    "transfer in": "#4f9d3a", "transfer out": "#98a51d", "batch": "#c98a12", "global": "#2f7fd6", "local": "#14a38b",
    "gate": "#a765c9", "header": "#d9679f", "backward": "#e0652d", "optimizer": "#7b6fe8",
}  # fmt: skip
"""Of the engine's phases: the same on every page, and visible on white and on black."""
OTHERS = ("#2f7fd6", "#e0652d", "#14a38b", "#a765c9", "#c98a12", "#d9679f", "#7b6fe8", "#4f9d3a")
"""Of phases of other programs, and of whatever else has names."""
NAMED = 7
"""Operators that have a color of their own in the roofline."""
POINTS = 800
"""Most of a quantity over time: a plot is that many pixels wide."""
AXIS = {"gridcolor": "var(--line)", "zeroline": False, "automargin": True}
LOG = {"type": "log", "tickformat": "~s"}
APART = {"ticks": "outside", "ticklen": 5, "tickcolor": "rgba(0,0,0,0)"}
"""Keeps the zeros of two axes from running into one another."""


def palette(phases: Iterable[str]) -> dict[str, str]:
    """A color for each phase, containers first, in the engine's order."""
    given = dict.fromkeys(phases)
    spare = itertools.cycle(OTHERS)
    known = {name: color for name, color in COLORS.items() if name in given}
    return known | {name: next(spare) for name in given if name not in COLORS}


def ranges(found: Sequence[Range], colors: Mapping[str, str]) -> Figure | None:
    """One bar, the observed rounds, in parts that add up; the table below is its legend. None where there are none."""
    own = [r for r in found if r.share > 0]
    if not own:
        return None
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": label(r.phase),
            "y": [""],
            "x": [100 * r.share],
            "marker": {"color": colors[r.phase], "line": {"width": 0}},
            "text": [f"{label(r.phase)}<br>{percent(r.share)}"],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "hovertemplate": "%{customdata}<extra></extra>",
            "customdata": [f"{label(r.phase)}<br>{percent(r.share)}, {seconds(r.seconds)} in {r.count:,}"],
        }
        for r in own
    ]
    layout = {
        "barmode": "stack",
        "margin": {"l": 10, "r": 24, "t": 8, "b": 30},
        "uniformtext": {"minsize": 10, "mode": "hide"},
        "xaxis": AXIS | {"range": [0, 100], "ticksuffix": "%", "fixedrange": True},
        "yaxis": {"visible": False, "fixedrange": True},
    }
    what = "Share of the observed rounds: " + ", ".join(f"{r.phase} {percent(r.share)}" for r in own)
    return Figure("ranges", what, 110, data, layout)


def roofline(points: Sequence[Point], roof: Ceilings) -> Figure | None:
    """Operators that compute, below what the hardware could do; None where none does."""
    points = [p for p in points if p.flops and p.bytes and p.seconds]
    if not points:
        return None
    longest = max(p.seconds for p in points)
    names = list(dict.fromkeys(p.name for p in points))
    groups = {
        name: [p for p in points if p.name == name] for name in names[: NAMED if len(names) > NAMED + 1 else None]
    }
    if others := [p for p in points if p.name not in groups]:
        groups[f"{len({p.name for p in others})} others"] = others
    data: list[dict[str, Any]] = []
    legend = []
    ridge = roof.flops_per_second / roof.bytes_per_second
    intensities = [p.flops / p.bytes for p in points]
    low, high = min(*intensities, ridge) / 3, max(*intensities, ridge) * 3
    copies = f"copy: {scaled(roof.bytes_per_second, 'B/s')}"
    products = f"product: {scaled(roof.flops_per_second, 'FLOP/s')}"
    ends = {copies: (low, ridge, "dash"), products: (ridge, high, "solid")}
    for name, (start, end, dash) in ends.items():
        legend.append((name, "var(--fg)"))
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": [start, end],
                "y": [min(roof.flops_per_second, at * roof.bytes_per_second) for at in (start, end)],
                "line": {"color": "var(--fg)", "width": 2, "dash": dash},
                "hoverinfo": "name",
                "hoverlabel": {"namelength": -1},
            }
        )
    spare = itertools.cycle(OTHERS)
    for name, group in groups.items():
        color = "#8a96a3" if group is others else next(spare)
        legend.append((name, color))
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label(name),
                "x": [p.flops / p.bytes for p in group],
                "y": [p.flops / p.seconds for p in group],
                "customdata": [_point(p) for p in group],
                "hovertemplate": "%{customdata}<extra></extra>",
                "marker": {
                    "color": color,
                    "size": [max(6.0, round(30 * (p.seconds / longest) ** 0.5, 1)) for p in group],
                    "opacity": 0.75,
                    "line": {"color": "var(--bg)", "width": 1},
                },
            }
        )
    logs: dict[str, Any] = AXIS | {"type": "log", "tickformat": "~s", "dtick": 1}
    layout = {
        "hovermode": "closest",
        "margin": {"l": 10, "r": 14, "t": 30, "b": 40},
        "xaxis": logs | {"title": {"text": "FLOPs a byte"}, "tickformat": "~g"},
        "yaxis": logs | {"title": {"text": "FLOP/s"}},
    }
    note = (
        "Larger circles took more time. The lines are what a large copy and a large product reached here; above them "
        "is what had its operands in a cache. Operators that compute no products are in the table, by bandwidth."
    )
    what = f"Roofline: {len(points)} operators by FLOPs a byte and FLOP/s, below {copies} and {products}"
    return Figure("roofline", what, 460, data, layout, note, legend)


def _point(p: Point) -> str:
    return (
        f"<b>{label(p.name)}</b><br>{label(p.shapes)}<br>{seconds(p.seconds)} in {p.calls:,} calls<br>"
        f"{scaled(p.flops / p.seconds, 'FLOP/s')}, {scaled(p.bytes / p.seconds, 'B/s')}<br>"
        f"{percent(p.share)} of the roof"
    )


def batches(found: Sequence[BatchSize]) -> Figure | None:
    """Samples a second with each size; None with less than two."""
    if len(found) < 2:
        return None
    own = found[0].size
    ordered = sorted(found, key=lambda batch: batch.size)
    data = {
        "type": "bar",
        "x": [str(batch.size) for batch in ordered],
        "y": [batch.rate for batch in ordered],
        "text": [digits(batch.rate) for batch in ordered],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": ["var(--accent)" if batch.size == own else "#8a96a3" for batch in ordered]},
        "customdata": [f"a step of {b.size:,}: {seconds(b.seconds)}<br>{digits(b.rate)} samples/s" for b in ordered],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    layout = {
        "margin": {"l": 10, "r": 10, "t": 30, "b": 40},
        "xaxis": {"type": "category", "title": {"text": "batch size"}, "automargin": True, "fixedrange": True},
        "yaxis": AXIS | {"title": {"text": "samples/s"}, "rangemode": "tozero", "tickformat": "~s", "fixedrange": True},
    }
    what = "Samples a second by batch size: " + ", ".join(f"{b.size}: {digits(b.rate)}" for b in ordered)
    return Figure("batches", what, 300, [data], layout, f"Blue: the size that was configured, {own:,}.")


def meter(number: int, name: str, series: Series, unit: str, zero: float) -> Figure | None:
    """A quantity over time; None where it has no value."""
    times, values = series
    known = [value for value in values if value is not None]
    if not known:
        return None
    x, y = _fewer([at - zero for at in times], list(values))
    data = {
        "type": "scatter",
        "mode": "lines" if len(known) > 1 else "markers",
        "x": [round(at, 4) for at in x],
        "y": y,
        "line": {"color": "var(--accent)", "width": 1.5},
        "marker": {"color": "var(--accent)"},
        "customdata": ["" if value is None else label(quantity(value, unit)) for value in y],
        "hovertemplate": "%{customdata}<br>%{x:.2f} s<extra></extra>",
    }
    top = max(known)
    layout = {
        "margin": {"l": 10, "r": 10, "t": 8, "b": 30},
        "xaxis": AXIS | APART | {"ticksuffix": " s"},
        "yaxis": AXIS
        | APART
        | {"rangemode": "tozero", "nticks": 5, "fixedrange": True, "tickformat": "~s" if top >= 1e4 else ""},
    }
    what = f"{name} over time: {quantity(min(known), unit)} to {quantity(top, unit)}"
    return Figure(f"meter-{number}", what, 170, [data], layout)


def _fewer(times: list[float], values: list[float | None]) -> tuple[list[float], list[float | None]]:
    """Of each part the least and the greatest, so that no peak is lost; and a gap where there is one."""
    if len(times) <= POINTS:
        return times, values
    width = -(-2 * len(times) // POINTS)
    kept: list[int] = []
    for start in range(0, len(times), width):
        part = range(start, min(start + width, len(times)))
        known = [i for i in part if values[i] is not None]
        gap = [i for i in part if values[i] is None][:1]
        ends = [min(known, key=lambda i: values[i] or 0.0), max(known, key=lambda i: values[i] or 0.0)] if known else []
        kept += sorted({*ends, *gap})
    return [times[i] for i in kept], [values[i] for i in kept]
