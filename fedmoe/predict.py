"""`fedmoe predict`: what a trained client says of image files, as a table or as a line of JSON for each.

What a client of text goes on with after a prompt is `textpredict`'s.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from rich.text import Text

from fedmoe import serving, textpredict
from fedmoe.data import FORMATS, read_image
from fedmoe.display import Output, widen
from fedmoe.errors import UsageError, UserError
from fedmoe.serving import Served
from fedmoe.sources.part import shown
from fedmoe.textpredict import Wanted

BATCH = 64
"""Images that are decoded and predicted at a time."""
TOP = 3
"""Classes that are told of unless more or fewer are asked for."""


class Prediction(NamedTuple):
    """What the model says of one image."""

    file: Path
    top: list[tuple[str, float]]
    """The most probable classes by name, the most probable first, with their probabilities."""
    weights: list[float]
    """The experts', order [global, local]."""


def run(
    model: Path, inputs: Sequence[Path], top: int | None, as_json: bool, client: int | None, text: Wanted | None = None
) -> int:
    """Print what the model, an export or a client of a run, says of all images of `inputs`, files or folders.

    An image that cannot be predicted is told on the error stream, and the exit code, which this returns, is then 1.
    A model of text is asked for what `text` wants.
    """
    text = text or Wanted()
    if serving.kind(model, client) == "text":
        if top is not None:
            raise UsageError(f"--top is for models of images, {model} is one of text: leave it out")
        return textpredict.run(model, client, inputs, text, as_json)
    if given := text.given():
        raise UsageError(f"{given} is for models of text, {model} is one of images: leave it out")
    if not inputs:
        raise UsageError("no images: name image files, or folders of some")
    top = TOP if top is None else top
    if top < 1:
        raise UsageError(f"--top is {top}, must be at least 1")
    served = serving.from_export(model) if client is None else serving.from_run(model, client)
    made, failed = [], False
    for answer in predictions(served, inputs, top):
        if isinstance(answer, UserError):
            failed = True
            print(f"fedmoe: error: {answer}", file=sys.stderr)
        elif as_json:
            print(json.dumps(_line(answer)), flush=True)
        else:
            made.append(answer)
    if made:
        card = served.card
        _print(made, f"client {card.client}, {card.config.model.local[0]}, after round {card.round}")
    return int(failed)


def predictions(served: Served, inputs: Iterable[Path], top: int) -> Iterator[Prediction | UserError]:
    """The `top` most probable classes of every image, or why there are none."""
    card, found = served.card, _found(inputs)
    while some := list(islice(found, BATCH)):
        files, images = [], []
        for file in some:
            try:
                if isinstance(file, UserError):
                    raise file
                images.append(read_image(file, card.shape))
                files.append(file)
            except UserError as error:
                yield error
        if not images:
            continue
        with torch.no_grad():
            both = served.model(torch.stack(images))
        for file, probabilities, weights in zip(files, *both, strict=True):
            if not bool(torch.isfinite(probabilities).all()):
                yield UserError(f"{shown(file)}: the model gives probabilities that are not finite: it has diverged")
                continue
            best = probabilities.topk(min(top, len(card.classes)))
            names = [card.classes[index] for index in best.indices.tolist()]
            yield Prediction(file, list(zip(names, best.values.tolist(), strict=True)), weights.tolist())


def _found(inputs: Iterable[Path]) -> Iterator[Path | UserError]:
    """The files that `inputs` name; of folders, recursively and sorted, those that are called as images are."""
    from PIL import Image

    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    for path in inputs:
        try:
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
                yield from inside
                if not inside:
                    yield UserError(f"{shown(path)}: no image files in it")
            elif path.is_file():
                yield path
            else:
                yield UserError(
                    f"{shown(path)}: {'is neither a file nor a folder' if path.exists() else 'does not exist'}"
                )
        except OSError as error:
            yield UserError(f"{shown(path)}: {error.strerror}")


def _line(prediction: Prediction) -> dict[str, object]:
    classes = [{"class": name, "probability": probability} for name, probability in prediction.top]
    weights = dict(zip(("global", "local"), prediction.weights, strict=True))
    return {"file": str(prediction.file), "classes": classes, "weights": weights}


def _print(made: list[Prediction], title: str) -> None:
    console = Output()
    widen(console)
    table = Table(title=Text(title), title_justify="left")
    table.add_column("file", overflow="fold")
    for column in ("classes", "global", "local"):
        table.add_column(column, no_wrap=column != "classes", justify="left" if column == "classes" else "right")
    for prediction in made:
        classes = "  ".join(f"{name} {probability:.3f}" for name, probability in prediction.top)
        weights = [f"{weight:.3f}" for weight in prediction.weights]
        table.add_row(Text(shown(prediction.file)), Text(classes), *weights)
    console.print(table)
