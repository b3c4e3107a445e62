"""`fedmoe partition`: what a partition would deal to each client, in numbers and as a picture; nothing is trained."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fedmoe import meaning, planning
from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.data import Dataset
from fedmoe.display import MANY, Output, say, warn, widen
from fedmoe.errors import UsageError
from fedmoe.files import check_page, write_atomic
from fedmoe.partition import Split
from fedmoe.partitionfigure import partition_figure

SHADES = " ░▒▓█"
ROWS, NAME = 40, 14
"""Lines of the picture in the terminal, and letters of a class's name there, at most."""


@dataclass(frozen=True)
class Preview:
    """A partition of a data set, counted."""

    title: str
    classes: Sequence[str]
    counts: Tensor  # int64 [N, C], samples of each class that each client has
    train: Tensor  # int64 [N], of them for training
    samples: int  # in the data set

    @classmethod
    def of(cls, config: Config, dataset: Dataset, split: Split) -> "Preview":
        """What `split` deals of the data set."""
        counts = split.counts(dataset.labels, len(dataset.classes))
        name = config.data.name.rstrip("/").rsplit("/")[-1]
        title = f"{name}, {config.partition.kind}, {len(split)} clients"
        return cls(title, dataset.classes, counts, split.train_counts, len(dataset.labels))

    @property
    def distances(self) -> Tensor:
        """fp64 [N], how far each client's distribution of classes is from that of all: total variation, 0 to 1."""
        own = self.counts / self.counts.sum(1, keepdim=True).double()
        everyone = self.counts.sum(0) / self.counts.sum().double()
        return (own - everyone).abs().sum(1) / 2

    def summary(self) -> dict[str, float | int]:
        """Numbers about the whole."""
        sizes, held = self.counts.sum(1), (self.counts > 0).sum(1)
        effective = 1 / (self.counts / sizes[:, None].double()).square().sum(1)
        return {
            "clients": len(sizes),
            "samples": int(sizes.sum()),
            "samples_left_out": self.samples - int(sizes.sum()),
            "train": int(self.train.sum()),
            "test": int(sizes.sum() - self.train.sum()),
            "classes": len(self.classes),
            "samples_least": int(sizes.min()),
            "samples_median": int(sizes.median()),
            "samples_most": int(sizes.max()),
            "classes_per_client_mean": held.double().mean().item(),
            "effective_classes_mean": effective.mean().item(),
            "total_variation_mean": self.distances.mean().item(),
            "total_variation_most": self.distances.max().item(),
        }

    def clients(self) -> list[dict[str, Any]]:
        """Numbers about each client, its classes by name, those with most samples first."""
        found = []
        for client, (row, train, distance) in enumerate(
            zip(self.counts.tolist(), self.train.tolist(), self.distances.tolist(), strict=True)
        ):
            held = sorted((c for c, n in enumerate(row) if n), key=lambda c: -row[c])
            classes = {self.classes[c]: row[c] for c in held}
            sizes = {"train": train, "test": sum(row) - train}
            found.append({"client": client, **sizes, "total_variation": distance, "classes": classes})
        return found


def run(config: Config, as_json: bool, out: Path | None) -> None:
    """Deal the configuration's data and show what each client gets; `out` is a page to write, which may exist.

    Raises UserError as the start of a run would.
    """
    if out is not None:
        if out.suffix != ".html":
            raise UsageError(f"--out {out}: the picture is a page: name it .html")
        check_page(out)
    meaning.check(config)
    for line in meaning.ignored(config):
        if line.startswith("partition."):
            warn(line)
    dataset = load_data(config.data, config.seed)
    preview = Preview.of(config, dataset, planning.deal(config, dataset))
    if out is not None:
        write_atomic(out, page(preview).encode())
    if as_json:
        print(json.dumps(preview.summary() | {"class_names": list(preview.classes), "by_client": preview.clients()}))
        return
    show(Output(), preview)
    if out is not None:
        say(Output(), f"picture: {out}")


def show(console: Console, preview: Preview) -> None:
    """Numbers and a picture in the terminal."""
    widen(console, 120)
    if len(preview.counts) <= MANY:
        console.print(_table(preview))
    console.print(_picture(preview, console.width))
    for sentence in sentences(preview):
        console.print(sentence, highlight=False, markup=False)


def sentences(preview: Preview) -> list[str]:
    """The summary in words."""
    s = preview.summary()
    left = f", {s['samples_left_out']:,} left out" if s["samples_left_out"] else ""
    return [
        f"{s['clients']:,} clients hold {s['samples']:,} samples, {s['train']:,} to train on and {s['test']:,} for "
        f"their tests{left}; from {s['samples_least']:,} to {s['samples_most']:,} each, median "
        f"{s['samples_median']:,}.",
        f"Of {s['classes']} classes a client has {s['classes_per_client_mean']:.1f} on average, as uneven as "
        f"{s['effective_classes_mean']:.1f} equal ones; the distance of its distribution from everybody's (total "
        f"variation: 0 is the same, 1 has nothing in common) is {s['total_variation_mean']:.2f} on average, at most "
        f"{s['total_variation_most']:.2f}.",
    ]


def page(preview: Preview) -> str:
    """All of it as a page that opens from disk and asks no network."""
    from fedmoe.profiling.markup import Cell, details, percent, table, text
    from fedmoe.profiling.shell import Section, shell

    figure = partition_figure(preview.counts, preview.classes)
    words = "".join(f"<p>{text(sentence)}</p>" for sentence in sentences(preview))
    rows: list[list[Cell | str]] = []
    for client in preview.clients():
        total = client["train"] + client["test"]
        names = ", ".join(f"{name} {percent(count / total)}" for name, count in list(client["classes"].items())[:8])
        more = f" and {len(client['classes']) - 8} more" if len(client["classes"]) > 8 else ""
        distance = Cell(f"{client['total_variation']:.2f}", bar=client["total_variation"])
        rows.append([str(client["client"]), f"{client['train']:,}", f"{client['test']:,}", distance, names + more])
    head = ["client", "train", "test", "total variation", "classes"]
    listed = table("Clients", head, rows, words=(0, 4))
    whole = len(rows) <= MANY
    sections = [
        Section("picture", "Classes of the clients", words + figure.html()),
        Section("clients", "Clients", listed if whole else details(f"All {len(rows):,} clients", listed)),
    ]
    return shell(f"Partition: {preview.title}", "", sections, [figure])


def _table(preview: Preview) -> Table:
    table = Table(title=Text(preview.title), title_justify="left")
    for name in ("client", "train", "test", "distance", "classes"):
        table.add_column(name, justify="left" if name == "classes" else "right")
    for client in preview.clients():
        held = ", ".join(f"{name}: {count}" for name, count in list(client["classes"].items())[:6])
        more = f" and {len(client['classes']) - 6} more" if len(client["classes"]) > 6 else ""
        numbers = [str(client[key]) for key in ("client", "train", "test")]
        table.add_row(*numbers, f"{client['total_variation']:.2f}", Text(held + more))
    return table


def _picture(preview: Preview, width: int) -> Text:
    """A line for each client, or for as many as ROWS lines take together; a column or more for each class.

    The darker, the larger the class's share; the color tells the same where there are colors.
    """
    shares = preview.counts / preview.counts.sum(1, keepdim=True)
    n, c = shares.shape
    per_line, margin = -(-n // ROWS), len(str(n)) * 2 + 3
    per_column = -(-c // max(1, width - margin))
    wide = max(1, min(4, (width - margin) // -(-c // per_column)))
    lines = torch.stack([part.mean(0) for part in shares.split(per_line)])
    cells = torch.stack([part.sum(1) for part in lines.split(per_column, dim=1)], dim=1)
    most = max(1e-9, cells.max().item())
    picture = Text(no_wrap=True)
    for number, line in enumerate(cells.tolist()):
        first, last = number * per_line, min(n, (number + 1) * per_line) - 1
        name = str(first) if first == last else f"{first}–{last}"
        picture.append(f"{name:>{margin - 2}} │", "dim")
        for share in line:
            level = round(share / most * (len(SHADES) - 1)) or (1 if share > 0 else 0)
            picture.append(SHADES[level] * wide, "cyan")
        picture.append("│\n", "dim")
    groups = f"{per_column} classes a column" if per_column > 1 else "a class a column"
    groups += f", the mean of {per_line} clients a line" if per_line > 1 else ""
    names = [name if len(name) <= NAME else name[: NAME - 1] + "…" for name in preview.classes]
    order = ", ".join(names[:12]) + (f", …, {names[-1]}" if len(names) > 12 else "")
    picture.append(f"{groups}, in order: {order}; █ is {most:.0%} of a client's samples", "dim")
    return picture
