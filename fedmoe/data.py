"""Loads an image data set into memory as uint8: the embedded digits, a folder of parquet files, or one from the hub.

All three are read as arrow batches of encoded images and labels, so that one path checks and decodes them.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmoe import config as settings
from fedmoe.engine.seeds import generator
from fedmoe.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    from PIL import Image

BATCH = 1024  # rows held in encoded form at a time

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Of image files. Others that Pillow knows are no pictures, or start programs."""

Pixels: TypeAlias = npt.NDArray[np.uint8]  # [channels, height, width]
Frames: TypeAlias = Iterable[tuple[str, Pixels]]  # each with the place it comes from
Rows: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and their labels, all splits pooled."""

    images: Tensor  # uint8 [n, channels, height, width]
    labels: Tensor  # int64 [n], each 0 to len(classes) - 1
    classes: tuple[str, ...]
    fingerprint: str  # SHA-256 of images, labels and class names


@dataclass(frozen=True)
class _Table:
    """Rows that are read together: a parquet file, or a whole split from the hub."""

    name: str
    schema: "pyarrow.Schema"
    read: Callable[[str], Iterator["pyarrow.Array"]]  # the batches of one column


def load(config: settings.Data, seed: int) -> Dataset:
    """The data set that `config` names, its splits pooled in sorted order.

    `seed` decides only which samples `limit` keeps; they stay in order. Raises UserError, naming the file and the row
    (from 0) where there is one, for anything that cannot be found, read or decoded.
    """
    for name, value in (("limit", config.limit), ("image_size", config.image_size)):
        if value < 0:
            raise UserError(f"data.{name} is {value}, it must be at least 0")
    path, size = Path(config.name).expanduser(), config.image_size
    if config.name == "digits":
        tables, size = _digits(config.splits), size or 28
    elif config.name.startswith((".", "/", "~")) or path.exists():
        tables = _folder(path, config.splits)
    else:
        tables = _hub(config.name, config.splits)
    image, label, names = _columns(tables, config.image, config.label)
    columns = [_labels(table, label) for table in tables]
    classes = _classes(tables, columns, names)
    labels = torch.from_numpy(np.concatenate(columns))
    keep = torch.arange(len(labels))
    if 0 < config.limit < len(labels):
        keep = torch.randperm(len(labels), generator=generator(seed, "data"))[: config.limit].sort().values
    images = _stack(_images(tables, np.cumsum([0, *map(len, columns)]), image, keep.numpy(), size), len(keep))
    return Dataset(images, labels[keep], classes, _fingerprint(images, labels[keep], classes))


def normalize(images: Tensor, mean: float, std: float) -> Tensor:
    """uint8 pixels of any shape, scaled to [0, 1], less `mean`, divided by `std`; fp32, same shape and device."""
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """The image in a file, converted and resized as one of a data set of this shape; uint8 [channels, height, width].

    Raises UserError naming the file and what is wrong with it.
    """
    from PIL import Image, UnidentifiedImageError

    channels, height, width = shape
    try:
        with Image.open(path, formats=FORMATS) as image:
            return torch.from_numpy(_pixels(image, (width, height), "L" if channels == 1 else "RGB").copy())
    except Exception as error:  # whatever Pillow's many decoders raise
        cause = "unknown format" if isinstance(error, UnidentifiedImageError) else _line(error)
        raise UserError(f"{path}: image cannot be decoded ({cause})") from error


def _fingerprint(images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> str:
    digest = hashlib.sha256(json.dumps([list(images.shape), classes]).encode())
    digest.update(images.numpy().data)  # 0.1 s for the 184 MB of CIFAR-10, half of what BLAKE2b takes
    digest.update(labels.numpy().astype("<i8").data)
    return digest.hexdigest()


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


def _digits(splits: tuple[str, ...]) -> list[_Table]:
    import pyarrow
    from sklearn.datasets import load_digits

    _choose(splits, {"train"}, "digits")
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], from 0 to 16
    images = [{"bytes": b"P5 8 8 255\n" + image.tobytes()} for image in pixels]  # as PGM, which is just a header
    table = pyarrow.table({"image": images, "label": digits.target})
    return [_Table("digits", table.schema, lambda column: iter(table[column].chunks))]


def _choose(wanted: tuple[str, ...], existing: set[str], name: str) -> list[str]:
    """The splits to use, sorted."""
    for split in wanted:
        if split not in existing:
            raise UserError(f"{name} has no split {split!r}: set data.splits to any of {', '.join(sorted(existing))}")
    return sorted(set(wanted) or existing)


def _folder(folder: Path, splits: tuple[str, ...]) -> list[_Table]:
    """The parquet files of a folder in the hub's layout, `train-00000-of-00005.parquet`, maybe in `data/`."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data.name: the folder {folder} {what}: give a folder of parquet files or a data set's name")
    files = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    if not files:
        raise UserError(f"{folder}: no parquet files in it or its data/: give the folder that holds them")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(file.stem.split("-")[0], []).append(file)
    return [_parquet(file) for split in _choose(splits, set(by_split), str(folder)) for file in by_split[split]]


def _parquet(path: Path) -> _Table:
    import pyarrow.parquet

    @contextmanager
    def readable() -> Iterator[None]:
        try:
            yield
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a whole parquet file ({_line(error)}): fetch it again") from error

    def read(column: str) -> Iterator["pyarrow.Array"]:
        with readable(), pyarrow.parquet.ParquetFile(path) as file:
            yield from (batch.column(0) for batch in file.iter_batches(BATCH, columns=[column]))

    with readable():
        return _Table(str(path), pyarrow.parquet.read_schema(path), read)


def _hub(name: str, splits: tuple[str, ...]) -> list[_Table]:
    import datasets  # here, not above: it takes a second to import

    print(f"fedmoe: fetching {name!r} from the Hugging Face hub, or from its cache on this machine", file=sys.stderr)
    retries = logging.getLogger("huggingface_hub")  # logs two lines for each of its six attempts, 23 s when offline
    level = retries.level
    retries.setLevel(logging.ERROR)
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # whatever the library, its network stack and its file formats raise
        raise UserError(
            f"data.name: {name!r} is no folder here and cannot be had from the Hugging Face hub ({_line(error)}): "
            "check the name and the network, or give a folder of parquet files"
        ) from error
    finally:
        retries.setLevel(level)

    def read(split: str, column: str) -> Iterator["pyarrow.Array"]:
        for table in found[split].select_columns([column]).with_format("arrow").iter(BATCH):
            yield table[column].combine_chunks()

    chosen = _choose(splits, set(found), name)
    return [_Table(f"{name}/{split}", found[split].features.arrow_schema, partial(read, split)) for split in chosen]


def _features(schema: "pyarrow.Schema") -> dict[str, dict[str, Any]]:
    """The column types that the `datasets` library left in a schema; empty where it did not."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}  # lists: sequences


def _columns(tables: list[_Table], image: str, label: str) -> tuple[str, str, list[str]]:
    """Image column, label column and class names (if stated): those wanted, or if empty the only ones possible."""
    names: list[str] = []
    for table in tables:
        image, label = _column(table, "image", image), _column(table, "label", label)
        found = _features(table.schema).get(label, {}).get("names") or []
        if table is not tables[0] and names != found:
            raise UserError(f"{table.name}: other class names than in {tables[0].name}: keep files that agree")
        names = found
    return image, label, names


def _column(table: _Table, what: Literal["image", "label"], wanted: str) -> str:
    from pyarrow.types import is_integer, is_struct

    kinds = dict(zip(table.schema.names, table.schema.types, strict=True))
    if what == "image":
        fit = [name for name, kind in kinds.items() if is_struct(kind) and kind.get_field_index("bytes") >= 0]
        candidates = fit
    else:
        fit = [name for name, kind in kinds.items() if is_integer(kind)]
        typed = [name for name, feature in _features(table.schema).items() if feature.get("_type") == "ClassLabel"]
        candidates = [name for name in ("label", "labels", "fine_label") if name in kinds][:1] or typed
    chosen = [wanted] if wanted else candidates
    if len(chosen) == 1 and chosen[0] in fit:
        return chosen[0]
    found = f"no {what} column {chosen[0]!r}" if len(chosen) == 1 else f"{len(chosen)} {what} columns"
    listing = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    raise UserError(f"{table.name}: {found} among {listing}: name one in data.{what}")


def _labels(table: _Table, column: str) -> Rows:
    parts = [np.empty(0, dtype=np.int64)]
    for batch in table.read(column):
        if batch.null_count:
            row = sum(map(len, parts)) + int(np.flatnonzero(batch.is_null())[0])
            raise UserError(f"{table.name}: row {row}: no label: repair or remove the row")
        parts.append(batch.to_numpy().astype(np.int64))
    return np.concatenate(parts)


def _classes(tables: list[_Table], columns: list[Rows], names: list[str]) -> tuple[str, ...]:
    """The class names, every label checked against them; their numbers if they are not stated."""
    total = sum(map(len, columns))
    if not total:
        raise UserError(f"{', '.join(table.name for table in tables)}: no samples in it: give a data set that has some")
    # A label beyond the number of samples is damage, not a class; it would only cost the memory of that many classes.
    highest = max(int(column.max(initial=-1)) for column in columns)
    classes = tuple(names or map(str, range(min(highest + 1, total))))
    for table, column in zip(tables, columns, strict=True):
        for row in np.flatnonzero((column < 0) | (column >= len(classes)))[:1]:
            remedy = "leave unlabeled splits out with data.splits" if column[row] == -1 else "repair or remove the row"
            raise UserError(
                f"{table.name}: row {row}: label {column[row]} out of range, 0 to {len(classes) - 1}: {remedy}"
            )
    return classes


def _images(tables: list[_Table], starts: Rows, column: str, keep: Rows, size: int) -> Frames:
    """The images of the samples `keep`, sorted; table i begins at sample starts[i].

    On one thread: with PNG of 32 x 32 pixels Pillow hardly lets go of the GIL, two threads took 1.6 times as long.
    """
    from PIL import Image, UnidentifiedImageError

    for table, start, end in zip(tables, starts, starts[1:], strict=False):
        rows = keep[np.searchsorted(keep, start) : np.searchsorted(keep, end)] - start
        done = 0
        for batch in table.read(column) if len(rows) else ():
            here = rows[np.searchsorted(rows, done) : np.searchsorted(rows, done + len(batch))]
            for row, value in zip(here, batch.take(here - done).to_pylist(), strict=True):
                place = f"{table.name}: row {row}"
                try:
                    content = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
                    with Image.open(BytesIO(content)) as image:
                        pixels = _pixels(image, size)
                except Exception as error:  # whatever Pillow's many decoders raise
                    cause = "unknown format" if isinstance(error, UnidentifiedImageError) else _line(error)
                    raise UserError(f"{place}: image cannot be decoded ({cause}): repair or remove the row") from error
                yield place, pixels
            done += len(batch)


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


def _line(error: Exception) -> str:
    """What an exception of a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
