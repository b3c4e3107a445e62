"""`fedmoe export`: a trained client as files to serve it from: safetensors, a program of torch.export, and ONNX."""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from fedmoe import checkpoint, serving
from fedmoe.config import EXPORTS
from fedmoe.display import Output, say, warn
from fedmoe.errors import UserError
from fedmoe.experts import reason
from fedmoe.files import whole_folder, write
from fedmoe.serving import Card, Served
from fedmoe.signals import interrupting

PROGRAM, ONNX = "model.pt2", "model.onnx"


def run(folder: Path, client: int, formats: Sequence[str], aggregated: bool, out: Path | None) -> None:
    """Export a client of the run in `folder` to the folder `out`, in these formats, or in all that can be had.

    Raises UserError where there is nothing to export, nowhere to put it, or a format that was asked for fails.
    """
    served = serving.from_run(folder, client, aggregated)
    card = served.card
    out = out or folder / "exports" / f"client-{client}.r{card.round}{'.aggregated' * (card.theta == 'aggregated')}"
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"{out} is there already: remove it, or choose another --out")
    with interrupting(), whole_folder(out) as made:
        for what in dict.fromkeys(formats or EXPORTS):
            try:
                card = _write(what, served, card, made)
            except OSError:
                raise
            except Exception as error:  # whatever exporters, and a user's model in them, raise
                why = str(error) if isinstance(error, UserError) else reason(error)
                if formats:
                    raise UserError(f"--format {what}: {why}") from error
                warn(f"no {what}: {why}")
        write(made / serving.CARD, card.to_json().encode())
        sizes = {file.name: file.stat().st_size for file in sorted(made.iterdir())}
    for name, size in sizes.items():
        say(Output(), f"{out / name}  {size / 1e6:,.2f} MB")


def _write(what: str, served: Served, card: Card, folder: Path) -> Card:
    """Write one format; the card, with what there is to tell of it."""
    if what == "safetensors":
        tensors = serving.tensors(served.model.model)
        state = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        return dataclasses.replace(card, weights=checkpoint.write_state(folder, serving.WEIGHTS, state))
    with _quiet():
        if what == "torch.export":
            content = io.BytesIO()  # PyTorch says of a full disk only that it failed
            torch.export.save(_program(served), content)
            write(folder / PROGRAM, content.getvalue())
        else:
            _onnx(served, folder / ONNX)
    return card


@lru_cache(maxsize=1)
def _program(served: Served) -> ExportedProgram:
    """uint8 images [N, channels, height, width], any N -> probabilities [N, C] and weights [N, 2]."""
    images = torch.zeros(3, *served.card.shape, dtype=torch.uint8)  # 3: exporters take a 0 or 1 for a constant
    return torch.export.export(served.model, (images,), dynamic_shapes={"images": {0: Dim("N")}})


def _onnx(served: Served, path: Path) -> None:
    """Of more than 2 GB of tensors, ONNX has the rest in `model.onnx.data`."""
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise UserError(f"{missing[0]} is not installed: pip install onnx onnxscript")
    made = torch.onnx.export(
        _program(served),
        input_names=["images"],
        output_names=["probabilities", "weights"],
        dynamo=True,
        verbose=False,
    )
    assert made is not None
    made.save(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of their own deprecations, of operators that nobody has asked for, and print what they tried."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        nowhere = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
