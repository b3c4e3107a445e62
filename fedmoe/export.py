"""`fedmoe export`: a trained client as files to serve it from: safetensors, a program of torch.export, and ONNX.

A client of text is a folder of transformers, see `textexport`.
"""

import dataclasses
import importlib.util
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from fedmoe import checkpoint, serving, textexport, textserving
from fedmoe.config import EXPORTS
from fedmoe.display import Output, say, warn
from fedmoe.errors import UsageError, UserError, reason
from fedmoe.files import whole_folder, write
from fedmoe.serving import Card, Served
from fedmoe.signals import interrupting

PROGRAM, ONNX = "model.pt2", "model.onnx"


def run(folder: Path, client: int, formats: Sequence[str], aggregated: bool, out: Path | None) -> None:
    """Export a client of the run in `folder` to the folder `out`, in these formats, or in all that can be had.

    Raises UserError where there is nothing to export, nowhere to put it, or a format that was asked for fails.
    """
    one = serving.trained(folder, client, aggregated)
    text = one.config.data.kind == "text"
    if text and formats:
        raise UsageError("--format is for models of images: text is exported for transformers, leave it out")
    out = out or folder / "exports" / f"client-{client}.r{one.round}{'.aggregated' * aggregated}"
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"{out} is there already: remove it, or choose another --out")
    with interrupting(), whole_folder(out) as made:
        if text:
            textexport.write(textserving.from_trained(one), made, out.absolute())
        else:
            _images(serving.from_trained(one), formats, made)
        files = sorted(path for path in made.rglob("*") if path.is_file())
        sizes = {str(file.relative_to(made)): file.stat().st_size for file in files}
    for name, size in sizes.items():
        say(Output(), f"{out / name}  {size / 1e6:,.2f} MB")


def _images(served: Served, formats: Sequence[str], folder: Path) -> None:
    card = served.card
    for what in dict.fromkeys(formats or EXPORTS):
        try:
            card = _write(what, served, card, folder)
        except OSError:
            raise
        except Exception as error:  # whatever exporters, and a user's model in them, raise
            why = str(error) if isinstance(error, UserError) else reason(error)
            if formats:
                raise UserError(f"--format {what}: {why}") from error
            warn(f"no {what}: {why}")
    write(folder / serving.CARD, card.to_json().encode())


def _write(what: str, served: Served, card: Card, folder: Path) -> Card:
    """Write one format; the card, with what there is to tell of it."""
    if what == "safetensors":
        state = serving.copied(serving.tensors(served.model.model))
        return dataclasses.replace(card, weights=checkpoint.write_state(folder, serving.WEIGHTS, state))
    with serving.quiet():
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
