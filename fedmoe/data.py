"""Loads an image data set into memory as uint8, wherever it comes from: checked, decoded and stacked in one place."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedmoe import config as settings
from fedmoe.engine.member import input_shape
from fedmoe.engine.seeds import generator
from fedmoe.errors import UserError
from fedmoe.sources import arrays, columnar, local, text
from fedmoe.sources.part import Part, Picture, Pixels, Rows, choose, line, regular, shown

if TYPE_CHECKING:
    from PIL import Image

    from fedmoe.tokenizer import Tokenizer

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Of images. Others that Pillow knows are no pictures, or start programs."""

Frames: TypeAlias = Iterable[tuple[str, Pixels]]  # each with the place it comes from


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and their labels, or windows of text and where they come from; all splits pooled."""

    inputs: Tensor  # images, uint8 [n, channels, height, width], or tokens, int32 [n, T + 1]
    labels: Tensor  # int64 [n], each 0 to len(classes) - 1
    classes: tuple[str, ...]  # of images, or the sources of text
    fingerprint: str  # SHA-256 of inputs, labels and class names
    column: Callable[[str], list[str | int]]
    """What another column of the source, or `split`, says of each sample; UserError where there is no such column."""
    tokenizer: "Tokenizer | None" = None
    """Of text."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a model's input: (channels, height, width), or (T,)."""
        return input_shape(self.inputs)

    @property
    def outputs(self) -> int:
        """What a model predicts: how many classes, or tokens."""
        return len(self.classes) if self.tokenizer is None else self.tokenizer.size


def load(config: settings.Data, seed: int) -> Dataset:
    """The data set that `config` names, its splits pooled in sorted order.

    `seed` decides only which samples `limit` keeps; they stay in order. Raises UserError, naming the file and the row
    (from 0) where there is one, for anything that cannot be found, read or decoded.
    """
    for name, value in (("limit", config.limit), ("image_size", config.image_size)):
        if value < 0:
            raise UserError(f"data.{name} is {value}, it must be at least 0")
    try:
        return _text(config, seed) if config.kind == "text" else _load(config, seed)
    except OSError as error:
        place = shown(Path(os.fsdecode(error.filename or config.name)))
        raise UserError(f"{place}: {error.strerror or line(error)}") from error


def normalize(images: Tensor, mean: float, std: float) -> Tensor:
    """uint8 pixels of any shape, scaled to [0, 1], less `mean`, divided by `std`; fp32, same shape and device."""
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """The image in a file, converted and resized as one of a data set of this shape; uint8 [channels, height, width].

    Raises UserError naming the file and what is wrong with it.
    """
    channels, height, width = shape
    with _quiet():
        pixels = _decoded(path, shown(path), "", (width, height), "L" if channels == 1 else "RGB")
    return torch.from_numpy(pixels.copy())


def _load(config: settings.Data, seed: int) -> Dataset:
    size = config.image_size or (28 if config.name == "digits" else 0)
    parts = _parts(config)
    classes = _classes(parts)
    labels = torch.from_numpy(np.concatenate([part.labels for part in parts]))
    starts = np.cumsum([0, *(len(part.labels) for part in parts)])
    keep = _kept(len(labels), config.limit, seed)
    with _quiet():
        images = _stack(_images(parts, starts, keep.numpy(), size), len(keep))
    parts = [replace(part, images=lambda _: iter(())) for part in parts]  # what these hold is not needed any more

    def column(name: str) -> list[str | int]:
        values = [value for part in parts for value in _column(part, name)]
        return [values[row] for row in keep.tolist()]

    return Dataset(images, labels[keep], classes, _fingerprint(images, labels[keep], classes), column)


def _text(config: settings.Data, seed: int) -> Dataset:
    found = text.load(config)
    keep = _kept(len(found.labels), config.limit, seed)
    windows, labels = found.windows[keep], found.labels[keep]

    def column(name: str) -> list[str | int]:
        values = found.column(name)
        return [values[row] for row in keep.tolist()]

    return Dataset(windows, labels, found.classes, found.fingerprint, column, found.tokenizer)


def _kept(count: int, limit: int, seed: int) -> Tensor:
    """Which of so many samples are kept, in order."""
    if not 0 < limit < count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator(seed, "data"))[:limit].sort().values


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's warnings about odd files are nobody's business, but one of a bomb is an error."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _parts(config: settings.Data) -> list[Part]:
    if config.name == "digits":
        choose(config.splits, {"train"}, "digits")
        return [arrays.digits()]
    path = Path(config.name).expanduser()
    if config.name.startswith((".", "/", "~")) or local.is_file_name(config.name) or path.exists():
        return local.parts(path, config)
    return columnar.parts(columnar.hub(config.name, config.splits), config.image, config.label)


def _fingerprint(images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> str:
    digest = hashlib.sha256(json.dumps([list(images.shape), classes]).encode())
    digest.update(images.numpy().data)  # 0.1 s for the 184 MB of CIFAR-10, half of what BLAKE2b takes
    digest.update(labels.numpy().astype("<i8").data)
    return digest.hexdigest()


def _classes(parts: Sequence[Part]) -> tuple[str, ...]:
    """The class names, every label checked against them; their numbers if they are not stated."""
    names = parts[0].classes
    for part in parts:
        if part.classes != names:
            raise UserError(f"{part.name}: other class names than in {parts[0].name}: keep files that agree")
    if odd := [name for name in names if any("\ud800" <= c <= "\udfff" for c in name)]:
        raise UserError(f"{parts[0].name}: class name {odd[0]!r} is no text that can be written down: rename the class")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{parts[0].name}: two classes are named {twice[0]!r}: give each its own name")
    total = sum(len(part.labels) for part in parts)
    if not total:
        raise UserError(f"{', '.join(part.name for part in parts)}: no samples in it: give a data set that has some")
    # A label beyond the number of samples is damage, not a class; it would only cost the memory of that many classes.
    highest = max(int(part.labels.max(initial=-1)) for part in parts)
    classes = names or tuple(map(str, range(min(highest + 1, total))))
    for part in parts:
        for row in np.flatnonzero((part.labels < 0) | (part.labels >= len(classes)))[:1]:
            label = part.labels[row]
            remedy = "leave unlabeled splits out with data.splits" if label == -1 else "repair or remove the row"
            raise UserError(f"{part.label_at(row)}: label {label} out of range, 0 to {len(classes) - 1}: {remedy}")
    return classes


def _column(part: Part, name: str) -> list[str | int]:
    """What a column says of each of a part's samples."""
    if name in part.columns:
        values = part.columns[name]()
    elif name == "split":
        values = [part.split] * len(part.labels)
    else:
        listing = ", ".join([*part.columns, "split"])
        raise UserError(f"{part.name}: no column {name!r} of names or whole numbers among {listing}: name one of these")
    assert len(values) == len(part.labels)
    checked = [value for value in values if isinstance(value, str | int)]
    if len(checked) < len(values):
        row, value = next((row, value) for row, value in enumerate(values) if not isinstance(value, str | int))
        raise UserError(f"{part.name}: row {row}: {name} is {value!r}, not a name or a whole number: repair the row")
    return checked


def _images(parts: Sequence[Part], starts: Rows, keep: Rows, size: int) -> Frames:
    """The images of the samples `keep`, sorted; part i begins at sample starts[i].

    On one thread: with PNG of 32 x 32 pixels Pillow hardly lets go of the GIL, two threads took 1.6 times as long.
    """
    for part, start, end in zip(parts, starts, starts[1:], strict=False):
        rows = keep[np.searchsorted(keep, start) : np.searchsorted(keep, end)] - start
        if len(rows):
            for row, picture in zip(rows, part.images(rows), strict=True):
                place = part.image_at(row)
                yield place, _frame(picture, size, place)


def _frame(picture: Picture, size: int, place: str) -> Pixels:
    from PIL import Image

    if isinstance(picture, np.ndarray):
        if not size:
            return picture
        return _pixels(Image.fromarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)), size)
    return _decoded(picture, place, ": repair or remove it", size)


def _decoded(source: bytes | Path, place: str, remedy: str, size: int | tuple[int, int], mode: str = "") -> Pixels:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else regular(source), formats=FORMATS) as image:
            return _pixels(image, size, mode)
    except Exception as error:  # whatever Pillow's many decoders raise
        cause = "unknown format" if isinstance(error, UnidentifiedImageError) else line(error)
        raise UserError(f"{place}: image cannot be decoded ({cause}){remedy}") from error


def _stack(frames: Frames, count: int) -> Tensor:
    """All images as one tensor, uint8 [count, channels, height, width]; UserError if they are not of one shape."""
    images: Pixels | None = None
    for index, (place, pixels) in enumerate(frames):
        if images is None:
            try:
                images = np.empty((count, *pixels.shape), dtype=np.uint8)
            except MemoryError as error:
                raise UserError(f"{count} images of {_size(pixels.shape)} exceed memory: set data.limit") from error
        elif pixels.shape != images.shape[1:]:
            remedy = "set data.image_size" if pixels.shape[0] == images.shape[1] else "convert them to one mode"
            raise UserError(f"{place}: {_size(pixels.shape)}, but {_size(images.shape[1:])} in the first: {remedy}")
        images[index] = pixels
    assert images is not None
    return torch.from_numpy(images)


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width} x {height} {'gray' if channels == 1 else 'RGB'} pixels"


def _pixels(image: "Image.Image", size: int | tuple[int, int], mode: str = "") -> Pixels:
    """Gray or RGB pixels of an image, in `mode` if given, resized to `size` (width, height; or square) unless 0."""
    from PIL.Image import Resampling

    if image.mode[0] in "IF":
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if mode and image.mode != mode:
        image = image.convert(mode)
    if size:
        image = image.resize(size if isinstance(size, tuple) else (size, size), Resampling.BILINEAR)
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
