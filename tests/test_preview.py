"""`fedmoe partition`: numbers, names and pictures of what clients would get; nothing is trained or left behind."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.planning import deal
from fedmoe.preview import ROWS, Preview, page, show
from tests import sourcefiles
from tests.support import Fedmoe, changed


def preview(counts: torch.Tensor, classes: list[str]) -> Preview:
    return Preview("pets, iid", classes, counts, counts.sum(1) // 2, int(counts.sum()) + 3)


def shown(given: Preview, width: int = 80) -> str:
    console = Console(record=True, width=width, force_terminal=True, file=io.StringIO())
    show(console, given)
    return console.export_text()


def test_numbers_are_those_of_the_split_that_a_run_would_have(config: Config) -> None:
    config = changed(config, partition={"classes_per_client": 3})
    dataset = load_data(config.data, config.seed)
    split = deal(config, dataset)
    found = Preview.of(config, dataset, split)
    for client, line in enumerate(found.clients()):
        assert (line["train"], line["test"]) == (len(split.train(client)), len(split.test(client)))
        own = dataset.labels[torch.cat([split.train(client), split.test(client)])].tolist()
        assert line["classes"] == {name: own.count(dataset.classes.index(name)) for name in line["classes"]}
        assert sum(line["classes"].values()) == len(own)
    assert found.summary()["samples"] == 300 and found.summary()["samples_left_out"] == 0


def test_skew_by_hand() -> None:
    found = preview(torch.tensor([[8, 0], [0, 8], [4, 4]]), ["cat", "dog"])
    assert found.distances.tolist() == [0.5, 0.5, 0.0]
    summary = found.summary()
    assert summary["total_variation_mean"] == pytest.approx(1 / 3)
    assert summary["effective_classes_mean"] == pytest.approx(4 / 3)
    assert summary["classes_per_client_mean"] == pytest.approx(4 / 3)
    assert (summary["samples"], summary["samples_left_out"], summary["train"]) == (24, 3, 12)


@pytest.mark.parametrize(("clients", "classes"), [(3, 2), (25, 10), (1000, 100), (1, 1), (41, 300)])
def test_the_picture_fits_the_terminal(clients: int, classes: int) -> None:
    text = shown(preview(torch.ones(clients, classes, dtype=torch.int64), [f"class-{c}" for c in range(classes)]), 60)
    lines = [line for line in text.splitlines() if "│" in line and line.rstrip().endswith("│") and "█" in line]
    assert 1 <= len(lines) <= ROWS
    assert max(map(len, lines)) <= 60
    assert "class-0" in text


def test_names_that_look_like_markup_stay_names() -> None:
    found = preview(torch.tensor([[2, 3]]), ["[red]cat[/red]", "<script>alert(1)</script>"])
    assert "[red]cat[/red]: 2" in shown(found, 200)
    assert "<script>alert" not in page(found)


def test_pages_name_classes_and_load_nothing() -> None:
    made = page(preview(torch.tensor([[8, 0], [0, 8]]), ["cat", "dog"]))
    assert made.count("<h1>") == 1 and "dog 100%" in made and 'id="plot-partition"' in made
    assert "src=" not in made.partition("<script>")[0]
    many = page(preview(torch.ones(300, 3, dtype=torch.int64), ["a", "b", "c"]))
    assert "All 300 clients" in many


def test_from_the_command_line(fedmoe: Fedmoe, tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    sourcefiles.npz(tmp_path / "pets")
    options = ("--data.name=pets", "--partition.kind=natural", "--partition.column=writer", "--partition.min_samples=2")
    before = {path for path in tmp_path.rglob("*") if not path.name.startswith(".")}
    done = fedmoe("partition", *options, "--federation.clients=4", "--out=p.html")
    assert done.code == 0 and not done.err, done
    for expected in ("pets, natural, 4 clients", "cat: 1", "owl: 1", "4 clients hold 12 samples", "picture: p.html"):
        assert expected in done.out, done.out
    assert {path for path in tmp_path.rglob("*") if not path.name.startswith(".")} - before == {tmp_path / "p.html"}
    found = json.loads(fedmoe("partition", *options, "--federation.clients=2", "--json").out)
    assert found["samples_left_out"] == 6 and found["class_names"] == ["cat", "dog", "owl"]
    assert [client["train"] + client["test"] for client in found["by_client"]] == [3, 3]
    too_many = fedmoe("partition", *options, "--federation.clients=5").one_line()
    assert too_many.startswith("partition.column 'writer' has 4 values, federation.clients is 5: lower it to 4")
    assert "name it .html" in fedmoe("partition", "--out=p.png").one_line(2)
    assert "/no is not a folder that can be written to" in fedmoe("partition", "--out=no/p.html").one_line()


def test_a_partition_that_cannot_be_leaves_the_page_as_it_was(fedmoe: Fedmoe, tmp_path: Path) -> None:
    (tmp_path / "p.html").write_text("<!DOCTYPE html>mine")
    assert "10000 clients of at least" in fedmoe("partition", "--federation.clients=10000", "--out=p.html").one_line()
    assert (tmp_path / "p.html").read_text() == "<!DOCTYPE html>mine"
    (tmp_path / "p.html").write_text("mine")
    assert "it is there and no page" in fedmoe("partition", "--out=p.html").one_line()
