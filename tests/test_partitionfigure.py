"""The plot of a partition: what Plotly is given is valid, names are safe, and many clients fit."""

import json
from typing import Any

import plotly.graph_objects
import torch

from fedmoe.partitionfigure import LEAST, MOST, partition_figure
from fedmoe.profiling.markup import Figure, script_json


def valid(figure: Figure) -> None:
    """Plotly takes it, once the page's colors are in place."""
    text = script_json({"data": figure.data, "layout": figure.layout}).replace("var(--card)", "#fff")
    plotly.graph_objects.Figure(json.loads(text.replace("var(--accent)", "#00f")))


def test_shares_and_counts_of_every_client() -> None:
    figure = partition_figure(torch.tensor([[1, 3], [0, 0]]), ["cat", "<b>dog</b>"])
    valid(figure)
    data: dict[str, Any] = figure.data[0]
    assert data["z"] == [[0.25, 0.75], [0.0, 0.0]]
    assert data["text"] == [[1, 3], [0, 0]]
    assert data["y"] == ["0", "1"]
    assert data["x"] == ["cat", "&lt;b&gt;dog&lt;/b&gt;"]
    assert partition_figure(torch.ones(1, 1), ["a"], ["Bern"]).data[0]["y"] == ["Bern"]


def test_a_thousand_clients_of_a_hundred_classes_fit() -> None:
    figure = partition_figure(torch.ones(1000, 100, dtype=torch.int64), [f"a long class name {i}" for i in range(100)])
    valid(figure)
    assert figure.height == MOST
    assert len(figure.layout["xaxis"]["tickvals"]) <= 25 and len(figure.layout["yaxis"]["tickvals"]) <= 40
    assert max(map(len, figure.layout["xaxis"]["ticktext"])) <= 16
    assert len(script_json(figure.data)) < 2e6
    assert partition_figure(torch.ones(2, 2), ["a", "b"]).height == LEAST
