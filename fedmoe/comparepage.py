"""A comparison as one HTML page: curves, differences with their intervals, clients against each other, and tables."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from fedmoe.comparetable import COSTS, DIFFERENCES, against, cells, columns, difference_cells, title
from fedmoe.contrast import Difference, Report
from fedmoe.measure import ACCURACY, Measure
from fedmoe.profiling.figures import AXIS, LOG, OTHERS
from fedmoe.profiling.markup import Figure, label, sentence, table, text
from fedmoe.profiling.shell import Section, shell
from fedmoe.variants import Variant, pairs


def page(report: Report, variants: Sequence[Variant]) -> str:
    """All of a comparison; `variants` are those that it is of, in its order."""
    by = report.by
    plots = [
        ("curves", f"{by.name.capitalize()} by round", curves(variants, report.round, by)),
        ("differences", "Differences", forest(report)),
        ("clients", "Clients", clients(variants, report.round, by)),
    ]
    drawn = {name: figure for name, _, figure in plots if figure is not None}
    inner = {name: figure.html() for name, figure in drawn.items()}
    rows = [cells(row, report) for row in report.variants]
    inner["variants"] = _said(title(report)) + table("variants", (*columns(report), *COSTS), rows)
    if report.differences:
        caption, told = against(report), [difference_cells(difference, by) for difference in report.differences]
        below = table(caption, DIFFERENCES, told, words=(0, 5, 6))
        inner["differences"] = f"{_said(caption)}{inner['differences']}{below}"
    inner["differences" if report.differences else "variants"] += "".join(map(_said, report.notes))
    tables = [
        Section("variants", "Variants", inner["variants"]),
        *(Section(name, heading, inner.get(name, "")) for name, heading, _ in plots),
        Section("fields", "What differs", _fields(report)),
        Section("runs", "Runs", _runs(variants, report.round, by)),
    ]
    seeds = len({seed for row in report.variants for seed in row.seeds})
    runs = sum(len(row.seeds) for row in report.variants)
    where = f"{runs} runs · {len(variants)} variants · {seeds} seeds · compared after round {report.round}"
    heading = (
        f"{report.variants[0].name} and {len(variants) - 1} more" if len(variants) > 1 else report.variants[0].name
    )
    return shell(f"Comparison: {heading}", where, tables, drawn.values())


def _said(words: str) -> str:
    return f"<p>{text(sentence(words))}</p>"


def _fields(report: Report) -> str:
    if not report.fields:
        return ""
    head = ("variant", *report.fields)
    rows = ([row.name, *(row.values[name] or "no effect" for name in report.fields)] for row in report.variants)
    return table("fields of the configuration that differ", head, rows, words=range(len(head)))


def _runs(variants: Sequence[Variant], number: int, by: Measure) -> str:
    rows = [
        [
            str(run.folder),
            variant.name,
            str(seed),
            f"{len(run.rounds)} of {run.config.federation.rounds}",
            by.figure(by.level(statistics.fmean(scores.values())), 4) if (scores := run.scores[number]) else "none",
        ]
        for variant in variants
        for seed, run in variant.runs.items()
    ]
    return table("runs", ("folder", "variant", "seed", "rounds", f"{by.name}, round {number}"), rows, words=(0, 1))


def curves(variants: Sequence[Variant], number: int, by: Measure) -> Figure:
    """Means by round, with a band from the lowest seed to the highest, or with one seed, over its clients."""
    digits = "4" if by == ACCURACY else "2"
    lines: list[dict[str, Any]] = []
    bands: list[dict[str, Any]] = []
    legend = []
    for variant, color in zip(variants, itertools.cycle(OTHERS), strict=False):
        points = list(_points(variant, by))
        x, mean, low, high = ([point[i] for point in points] for i in range(4))
        lines.append(
            {
                "type": "scatter",
                "mode": "lines" if len(x) > 1 else "markers",
                "name": label(variant.name),
                "legendgroup": variant.name,
                "x": x,
                "y": mean,
                "line": {"color": color, "width": 2},
                "marker": {"color": color},
                "hovertemplate": "%{fullData.name}<br>round %{x}: %{y:,." + digits + "f}<extra></extra>",
            }
        )
        bands.append(
            {
                "type": "scatter",
                "mode": "lines",
                "legendgroup": variant.name,
                "x": [*x, *reversed(x)],
                "y": [*high, *reversed(low)],
                "line": {"width": 0},
                "fill": "toself",
                "fillcolor": f"rgba({', '.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))}, 0.16)",
                "hoverinfo": "skip",
            }
        )
        legend.append((variant.name, color))
    layout = {
        "margin": {"l": 10, "r": 14, "t": 10, "b": 40},
        "xaxis": AXIS | {"title": {"text": "round"}},
        "yaxis": AXIS | _scale(by) | {"title": {"text": by.name}},
        "shapes": [_line(number)],
    }
    note = (
        f"Mean over clients of personalized {by.name}, averaged over seeds. The band reaches from the lowest seed to "
        "the highest; of a variant with one seed, over the middle half of its clients. Dotted: the round compared."
    )
    what = f"Mean {by.name} by round: " + ", ".join(variant.name for variant in variants)
    return Figure("curves", what, 420, lines + bands, layout, note, legend)


def _points(variant: Variant, by: Measure) -> Iterator[tuple[int, float, float, float]]:
    """Round, mean, lower and upper end of the band, for each round that all runs of the variant have evaluated."""
    runs = list(variant.runs.values())
    for number in sorted(set.intersection(*(set(run.scores) for run in runs))):
        held = [sorted(run.scores[number].values()) for run in runs if run.scores[number]]
        if not held:
            continue
        means = [statistics.fmean(values) for values in held]
        low, high = min(means), max(means)
        if len(runs) == 1 and len(held[0]) > 1:
            low, _, high = statistics.quantiles(held[0], n=4, method="inclusive")
        yield number, by.level(statistics.fmean(means)), by.level(low), by.level(high)


def forest(report: Report) -> Figure | None:
    """Each variant's difference from the first with its interval; None where there is no other."""
    if not report.differences:
        return None
    by, differences = report.by, report.differences[::-1]  # the first on top
    y = list(range(len(differences)))

    def told(difference: Difference) -> str:
        return " ".join(difference_cells(difference, by)[1:3])

    estimates = [difference.estimate for difference in differences]
    at = [by.shift(e.mean) for e in estimates]
    points = {
        "type": "scatter",
        "mode": "markers",
        "x": at,
        "y": y,
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [0 if e.high is None else by.shift(e.high) - x for e, x in zip(estimates, at, strict=True)],
            "arrayminus": [0 if e.low is None else x - by.shift(e.low) for e, x in zip(estimates, at, strict=True)],
            "color": "var(--muted)",
            "thickness": 1.5,
        },
        "marker": {"size": 10, "color": ["#8a96a3" if d.better is None else "var(--accent)" for d in differences]},
        "customdata": [f"{label(d.name)}<br>{told(d)}<br>{label(d.verdict)}" for d in differences],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    ticks = {"tickformat": "+.3~f"} if by == ACCURACY else {"tickformat": "+,.2~f", "ticksuffix": " %"}
    layout = {
        "margin": {"l": 10, "r": 14, "t": 10, "b": 40},
        "xaxis": AXIS | {"title": {"text": f"difference of {by.name}"}} | ticks,
        "yaxis": AXIS
        | {"tickvals": y, "ticktext": [label(d.name, 24) for d in differences], "range": [-0.6, len(y) - 0.4]},
        "shapes": [_line(0)],
    }
    note = "With 95 % intervals. Blue: more than noise, all comparisons taken together. No bar: no telling."
    what = "; ".join(f"{d.name} {told(d)}, {d.verdict}" for d in report.differences)
    return Figure("forest", f"Differences of {by.name}: {what}", 90 + 52 * len(y), [points], layout, note)


def clients(variants: Sequence[Variant], number: int, by: Measure) -> Figure | None:
    """Of two variants, each client in one against itself in the other; None where there are no such pairs."""
    if len(variants) != 2:
        return None
    a, b = variants
    found = [(seed, client, by.level(x), by.level(y)) for seed, client, x, y in pairs(a, b, number)]
    if not found:
        return None
    ends = [choose(level for pair in found for level in pair[2:]) for choose in (min, max)]
    points = {
        "type": "scatter",
        "mode": "markers",
        "x": [p[2] for p in found],
        "y": [p[3] for p in found],
        "marker": {"color": "var(--accent)", "size": 8, "opacity": 0.7},
        "customdata": [f"seed {seed}, client {c}: {by.figure(x)}, {by.figure(y)}" for seed, c, x, y in found],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    equal = {
        "type": "scatter",
        "mode": "lines",
        "x": ends,
        "y": ends,
        "line": {"color": "var(--muted)", "width": 1, "dash": "dot"},
        "hoverinfo": "skip",
    }
    layout = {
        "margin": {"l": 10, "r": 14, "t": 10, "b": 40},
        "xaxis": AXIS | _scale(by) | {"title": {"text": label(a.name)}},
        "yaxis": AXIS | _scale(by) | {"title": {"text": label(b.name)}},
    }
    higher, lower = sum(y > x for _, _, x, y in found), sum(y < x for _, _, x, y in found)
    note = (
        f"{by.name.capitalize()} of each client of each seed. {b.name} is higher above the dotted line, {higher} of "
        f"{len(found)}, and lower below it, {lower}; {by.better} is better."
    )
    return Figure(
        "clients",
        f"{by.name.capitalize()} of clients, {a.name} against {b.name}. {note}",
        460,
        [points, equal],
        layout,
        note,
    )


def _scale(by: Measure) -> dict[str, Any]:
    """Of an axis: perplexities are apart by their ratios."""
    return {} if by == ACCURACY else LOG


def _line(at: float) -> dict[str, Any]:
    """A dotted line across the plot, upright."""
    style = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    return {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": style}
