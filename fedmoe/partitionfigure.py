"""The plot of a partition: clients × classes, how much of each client's samples is of each class."""

from collections.abc import Sequence

from torch import Tensor

from fedmoe.profiling.markup import Figure, label

LEAST, MOST = 160, 900  # pixels
ROW = 16
"""Pixels of a client, as long as all fit into MOST; below that a client is told by pointing at it."""


def partition_figure(counts: Tensor, classes: Sequence[str], clients: Sequence[str] = ()) -> Figure:
    """A row for each client, a column for each class; the color is the class's share of the client's samples.

    `counts` int64 [N, C] are samples, as `Split.counts` gives them; `clients` names the rows, by number if left out.
    """
    n, c = counts.shape
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    rows = [label(name, 24, 1) for name in clients or map(str, range(n))]
    data = [
        {
            "type": "heatmap",
            "x": [label(name) for name in classes],
            "y": rows,
            "z": [[round(share, 3) for share in row] for row in shares.tolist()],
            "text": counts.tolist(),
            "zmin": 0,
            "zmax": round(_large(shares), 3),
            "colorscale": [[0, "var(--card)"], [1, "var(--accent)"]],
            "xgap": 1 if c <= 40 else 0,
            "ygap": 1 if n <= 60 else 0,
            "hovertemplate": "client %{y}<br>%{x}<br>%{text} samples, %{z:.1%} of the client's<extra></extra>",
            "colorbar": {"tickformat": ".0%", "thickness": 10, "len": 1, "outlinewidth": 0, "x": 1.01, "xpad": 0},
        }
    ]
    # Or Plotly takes names that are numbers for places.
    axis = {"type": "category", "showgrid": False, "zeroline": False, "automargin": True, "tickmode": "array"}
    across, down = tick_places(c, 25), tick_places(n, 40)
    short = [label(name, 14, 1) for name in classes]
    layout = {
        "margin": {"l": 10, "r": 10, "t": 34, "b": 10},
        "xaxis": axis | {"tickvals": across, "ticktext": [short[i] for i in across], "title": {"text": "class"}},
        "yaxis": axis
        | {"tickvals": down, "ticktext": [rows[i] for i in down], "autorange": "reversed"}
        | {"title": {"text": "client"}},
    }
    note = "The fuller the color, the larger the class's share of the client's samples."
    what = f"Share of each of {c} classes among the samples of each of {n} clients"
    height = min(MOST, max(LEAST, 114 + ROW * n))
    return Figure("partition", what, height, data, layout, note=note)


def _large(shares: Tensor) -> float:
    """The share whose color is full: few cells have more, so that among many clients all others are seen."""
    some = shares[shares > 0].sort().values
    return max(0.001, some[round(0.99 * (len(some) - 1))].item()) if len(some) else 1.0


def tick_places(count: int, most: int) -> list[int]:
    """Up to `most` places, evenly apart."""
    return list(range(0, count, -(-count // most)))
