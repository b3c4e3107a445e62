"""The plots of a run's report, as Plotly takes them; colors that begin with var( are the page's own."""

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fedmoe import outcome
from fedmoe.insight import Gated, Pictured
from fedmoe.measure import ACCURACY, Measure
from fedmoe.outcome import Round
from fedmoe.partitionfigure import tick_places
from fedmoe.profiling.figures import APART, AXIS, LOG, OTHERS
from fedmoe.profiling.markup import Figure, digits, label, percent

POINTS = 800
"""Most rounds in a plot, evenly apart, the last among them."""
FEW = 60
"""Clients up to which each has its name in a plot."""
BANDS = {(10, 90): "rgba(47,127,214,0.16)", (25, 75): "rgba(47,127,214,0.30)"}
"""Percentiles of clients between which a band lies."""
GRAY = "#8a96a3"
KINDS = {"global": "global expert", "local": "local expert", "mixed": "mixed by the gate"}
MARGIN = {"l": 10, "r": 14, "t": 10, "b": 40}


def measured(found: Sequence[Round], by: Measure) -> Figure | None:
    """The measure's mean over clients by round, with bands of percentiles; None where no round has one."""
    known = [r for r in found if outcome.held(r, by)]
    if not known:
        return None
    known = _thinned(known)
    x = [r.number for r in known]
    data: list[dict[str, Any]] = []
    legend = []
    if max(len(r.evaluated) for r in known) > 1:
        for (low, high), color in BANDS.items():
            edges = [np.percentile(list(outcome.held(r, by).values()), [low, high]) for r in known]
            lower, upper = ([round(by.level(float(edge[i])), 4) for edge in edges] for i in (0, 1))
            area = {"x": [*x, *reversed(x)], "y": [*lower, *reversed(upper)]}
            name = f"{low}th to {high}th percentile of clients"
            line = {"width": 0}
            data.append(
                {"type": "scatter", "mode": "lines", "fill": "toself", "fillcolor": color, "line": line, **area}
                | {"name": name, "hoverinfo": "skip"}
            )
            legend.append((name, color))
    for name, color, dash, aggregated in (
        ("mean, personalized", "var(--accent)", "solid", False),
        ("mean, with aggregated θ", "#e0652d", "dash", True),
    ):
        values = [outcome.mean(r, by, aggregated) for r in known]
        means = [None if value is None else _short(by.level(value)) for value in values]
        if any(mean is not None for mean in means):
            said = [_said(r, by, aggregated) for r in known]
            data.append(_line(name, x, means, color, dash) | {"customdata": said})
            legend.append((name, color))
    scale = {} if by == ACCURACY else LOG
    layout = {"margin": MARGIN, "xaxis": _rounds(x), "yaxis": AXIS | APART | scale | {"title": {"text": by.name}}}
    what = f"Mean {by.name} by round: {_last(known[-1], by)} after round {x[-1]}"
    return Figure(by.name, what, 340, data, layout, legend=legend)


def loss(found: Sequence[Round]) -> Figure | None:
    """Training and test loss by round; None where there is neither."""
    shown = _thinned(found)
    x = [r.number for r in shown]
    series = {
        ("training", "var(--accent)", "solid"): [r.loss for r in shown],
        ("test, mean of clients", "#e0652d", "dash"): [r.test_loss.mean if r.test_loss else None for r in shown],
    }
    data, legend = [], []
    for (name, color, dash), values in series.items():
        if any(value is not None for value in values):
            # A round without evaluation is no gap.
            kept = [i for i, value in enumerate(values) if value is not None or dash == "solid"]
            line = _line(name, [x[i] for i in kept], [_short(values[i]) for i in kept], color, dash)
            data.append(line | {"customdata": [_lost(x[i], name, values[i]) for i in kept]})
            legend.append((name, color))
    if not data:
        return None
    positive = [value for values in series.values() for value in values if value is not None]
    wide = min(positive) > 0 and max(positive) / min(positive) > 50
    scale = {"type": "log", "dtick": 1, "tickformat": "~g"} if wide else {"rangemode": "tozero"}
    layout = {"margin": MARGIN, "xaxis": _rounds(x), "yaxis": AXIS | APART | scale | {"title": {"text": "loss"}}}
    return Figure("loss", f"Loss by round, {', '.join(name for name, _ in legend)}", 340, data, layout, legend=legend)


def clients(line: Round, models: Sequence[str], by: Measure) -> Figure | None:
    """The measure of each evaluated client, the worst first, a color for each model; None where none has one."""
    values, other = (
        {c: by.level(value) for c, value in outcome.held(line, by, aggregated).items()} for aggregated in (False, True)
    )
    ordered = sorted(values, key=lambda c: (by.gain(values[c]), c))
    if not ordered:
        return None
    place = {client: i for i, client in enumerate(ordered)}
    data: list[dict[str, Any]] = []
    legend = []
    spare = itertools.cycle(OTHERS)
    for model in dict.fromkeys(models):
        own = [c for c in ordered if models[c % len(models)] == model]
        if own:
            color = next(spare)
            legend.append((model, color))
            bars = {"x": [place[c] for c in own], "y": [_short(values[c]) for c in own], "marker": {"color": color}}
            bars["width"] = 0.8 if len(ordered) <= FEW else 1
            said = [_client(c, model, values[c], other.get(c), by) for c in own]
            data.append({"type": "bar", "name": label(model), "customdata": said} | HOVER | bars)
    if other:
        marks = {"x": list(place.values()), "y": [_short(other.get(c)) for c in ordered]}
        marker = {"color": "var(--fg)", "symbol": "line-ew-open" if len(ordered) <= FEW else "circle", "size": 9}
        marker |= {} if len(ordered) <= FEW else {"size": 3}
        data.append({"type": "scatter", "mode": "markers", "marker": marker, "hoverinfo": "skip"} | marks)
        legend.append(("with aggregated θ", "var(--fg)"))
    named = len(ordered) <= FEW
    ticks = {"tickvals": list(place.values()), "ticktext": [str(c) for c in ordered]} if named else {}
    title = f"client, by {by.name}" if named else f"{len(ordered):,} clients, by {by.name}"
    span = {"range": [0, 1.02]} if by == ACCURACY else {"rangemode": "tozero"}
    layout = {
        "margin": MARGIN,
        "barmode": "overlay",  # each has a place of its own
        "xaxis": {"title": {"text": title}, "showgrid": False, "zeroline": False, "automargin": True, **ticks}
        | {"showticklabels": named, "range": [-0.6, len(ordered) - 0.4]},
        "yaxis": AXIS | {"title": {"text": by.name}, "fixedrange": True} | span,
    }
    worst, top = ordered[0], ordered[-1]
    ends = f"from {_short(values[worst])} (client {worst}) to {_short(values[top])} (client {top})"
    what = f"{by.name.capitalize()} by client: {ends}"
    return Figure("clients", what, 360, data, layout, legend=legend)


def gates(found: Sequence[Gated]) -> Figure | None:
    """How the weight of the global expert is spread over each client's samples; None of none."""
    found = [one for one in found if one.weights]
    if not found:
        return None
    spread = np.array([np.percentile(one.weights, [5, 25, 50, 75, 95]) for one in found]).round(5)
    names = [str(one.client) for one in found]
    data = {
        "type": "box",
        "x": names,
        **{key: spread[:, i].tolist() for i, key in enumerate(("lowerfence", "q1", "median", "q3", "upperfence"))},
        "mean": [round(float(np.mean(one.weights)), 5) for one in found],
        "line": {"color": "var(--accent)", "width": 1.5},
        "whiskerwidth": 0.5,
        "name": "",
    }
    names_of = {"type": "category", "title": {"text": "client"}, "showgrid": False, "automargin": True}
    layout = {
        "margin": MARGIN,
        "xaxis": names_of,
        "yaxis": AXIS | APART | {"rangemode": "tozero", "title": {"text": "weight of the global expert"}},
    }
    note = "Box: the middle half of the client's samples and their median; whiskers: 5% to 95%; dashed: the mean."
    what = f"Weight of the global expert by client, medians from {spread[:, 2].min()} to {spread[:, 2].max()}"
    return Figure("gates", what, 320, [data], layout, note)


def gates_by_class(found: Sequence[Gated], classes: Sequence[str]) -> Figure | None:
    """The mean weight by client and class; None of none."""
    seen = sorted({one for gated in found for one in gated.labels})
    if not seen:
        return None
    weights, counts = [], []
    for one in found:
        own = {c: [w for w, y in zip(one.weights, one.labels, strict=True) if y == c] for c in seen}
        weights.append([round(math.fsum(w) / len(w), 4) if w else None for w in own.values()])
        counts.append([len(w) for w in own.values()])
    drawn = [w for row in weights for w in row if w is not None]
    low, top = min(drawn), max(drawn)
    names = [label(classes[c]) for c in seen]
    data = {
        "type": "heatmap",
        "y": [str(one.client) for one in found],
        "z": weights,
        "text": [names] * len(found),
        "customdata": counts,
        "zmin": low,
        "zmax": max(top, low + 1e-3),
        "colorscale": [[0, "#c98a12"], [1, "#2f7fd6"]],
        "xgap": 1 if len(seen) <= 40 else 0,
        "ygap": 1,
        "hoverongaps": False,
        "hovertemplate": "client %{y}<br>%{text}<br>%{z:.4f}, mean of %{customdata} samples<extra></extra>",
        "colorbar": {"thickness": 10, "len": 1, "outlinewidth": 0, "x": 1.01, "xpad": 0, "nticks": 5},
    }
    axis = {"showgrid": False, "zeroline": False, "automargin": True}
    ticks = tick_places(len(seen), 25)
    short = {"tickvals": ticks, "ticktext": [label(classes[seen[i]], 14, 1) for i in ticks]}
    layout = {
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "xaxis": axis | short | {"title": {"text": "class"}},
        "yaxis": axis | {"type": "category", "title": {"text": "client"}, "autorange": "reversed"},
    }
    what = f"Mean weight of the global expert by client and class, from {digits(low)} to {digits(top)}"
    note = "Color: the mean weight of the global expert; empty where the client has no such sample."
    return Figure("gates-by-class", what, min(900, max(180, 100 + 16 * len(found))), [data], layout, note)


def pictures(found: Sequence[Pictured], classes: Sequence[str]) -> Iterator[tuple[int, str, Figure]]:
    """For each client and kind of representation: client, kind and plot, on axes of equal range."""
    colors = class_colors(label for one in found for label in one.labels)
    for one in found:
        every = np.concatenate(list(one.places.values()))
        low, high = every.min(axis=0), every.max(axis=0)
        pad = 0.06 * (high - low) + 1e-6
        ends = np.stack([low - pad, high + pad]).round(2)
        blank = {"showticklabels": False, "showgrid": False, "zeroline": False, "fixedrange": True}
        line = {"linecolor": "var(--line)", "showline": True, "mirror": True}
        for kind, places in one.places.items():
            data = {
                "type": "scatter",
                "mode": "markers",
                "x": places[:, 0].round(2).tolist(),
                "y": places[:, 1].round(2).tolist(),
                "marker": {"color": [colors.get(y, GRAY) for y in one.labels], "size": 7, "opacity": 0.8},
                "customdata": [label(classes[y]) for y in one.labels],
            } | HOVER
            layout = {
                "margin": {"l": 6, "r": 6, "t": 6, "b": 6},
                "xaxis": blank | line | {"range": ends[:, 0].tolist()},
                "yaxis": blank | line | {"range": ends[:, 1].tolist()},
            }
            what = f"t-SNE of client {one.client}'s samples as the {KINDS[kind]} represents them"
            if kind == "mixed":
                what = f"t-SNE of client {one.client}'s samples as the mixture of both experts represents them"
            yield one.client, KINDS[kind], Figure(f"tsne-{one.client}-{kind}", what, 240, [data], layout)


def class_colors(labels: Iterable[int]) -> dict[int, str]:
    """A color for each of the most frequent classes; the others are gray."""
    counted: dict[int, int] = {}
    for one in labels:
        counted[one] = counted.get(one, 0) + 1
    named = sorted(sorted(counted, key=lambda c: (-counted[c], c))[: len(OTHERS)])
    return dict(zip(named, OTHERS, strict=False))


HOVER: dict[str, Any] = {"hovertemplate": "%{customdata}<extra></extra>"}


def _line(name: str, x: list[int], y: Sequence[float | None], color: str, dash: str) -> dict[str, Any]:
    alone = sum(value is not None for value in y) == 1
    line = {"color": color, "width": 2, "dash": dash}
    marks: dict[str, Any] = {"mode": "markers", "marker": {"color": color}} if alone else {"mode": "lines"}
    return {"type": "scatter", "name": name, "x": x, "y": list(y), "line": line} | marks | HOVER


def _rounds(x: Sequence[int]) -> dict[str, Any]:
    few = {"dtick": 1, "tick0": 0} if len(x) <= 6 else {"nticks": 7}
    return AXIS | {"title": {"text": "round"}, "tickformat": "d", **few}


def _thinned(found: Sequence[Round]) -> list[Round]:
    step = -(-len(found) // POINTS) if found else 1
    return list(found[::-1][::step])[::-1]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _said(r: Round, by: Measure, aggregated: bool) -> str:
    values = outcome.held(r, by, aggregated).values()
    if not values:
        return ""
    level = by.figure(by.level(statistics.fmean(values)))
    return f"round {r.number}<br>{level} {by.spread(statistics.pstdev(values))}<br>{len(values)} clients"


def _lost(number: int, name: str, value: float | None) -> str:
    return f"round {number}<br>{name}: {'none' if value is None else digits(value)}"


def _last(r: Round, by: Measure) -> str:
    mean = outcome.mean(r, by)
    assert mean is not None
    return percent(mean) if by == ACCURACY else by.figure(by.level(mean))


def _client(client: int, model: str, level: float, other: float | None, by: Measure) -> str:
    said = f"client {client}<br>{label(model)}<br>{by.name} {by.figure(level)}"
    return said if other is None else f"{said}<br>with aggregated θ {by.figure(other)}"
