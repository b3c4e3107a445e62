"""Samples in NumPy's archives (.npz): which arrays are images and labels of which split; nothing is unpickled."""

import math
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe.engine.facts import host_memory
from fedmoe.errors import UserError
from fedmoe.sources.arrays import channels_first, frames
from fedmoe.sources.part import Part, Pixels, Rows, begins, reading, regular, rows_of, shown

SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "extra")
IMAGES = ("images", "image", "x", "imgs", "img", "data", "pixels", "inputs", "samples")
LABELS = ("labels", "label", "y", "targets", "target")
CLASSES = ("classes", "class_names", "label_names", "names")


@dataclass(frozen=True)
class _Array:
    """What the header of an archive's member says."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int  # bytes of the header
    bytes: int  # of the member, as the archive's directory has it


def parts(path: Path, image: str, label: str) -> dict[str, Callable[[], Part]]:
    """What gives the part of each split: x_train and y_train, train_images and train_labels, or images and labels.

    `image` and `label` name the arrays, with or without the split; if empty they are found by their names, or else as
    the only ones that fit. Raises UserError.
    """
    name = shown(path)
    with reading(regular(path), "npz file"):
        begins(path, b"PK")
        arrays = {array.name: array for array in _headers(path)}
    if not arrays:
        raise UserError(f"{name}: no arrays in it: fetch it again")
    names = [a for key, a in arrays.items() if key.lower() in CLASSES and a.dtype.kind in "USO" and len(a.shape) == 1]
    classes = tuple(map(str, _column(path, names[0]))) if len(names) == 1 else ()
    splits: dict[str, dict[str, _Array]] = {}
    for array in arrays.values():
        if array not in names:
            split, rest = _split(array.name)
            splits.setdefault(split, {})[rest] = array
    if len(splits) > 1 and not splits.get("", {}).keys() & {*IMAGES, image}:
        splits.pop("", None)  # what is said of the whole
    own = path.stem.split("-")[0]
    return {s or own: partial(_part, path, name, s or own, g, image, label, classes) for s, g in splits.items()}


def _part(
    path: Path, name: str, split: str, group: dict[str, _Array], image: str, label: str, classes: tuple[str, ...]
) -> Part:
    pictures = _chosen(name, "image", group, image, IMAGES, lambda a: len(a.shape) in (3, 4))
    rest = {key: array for key, array in group.items() if array is not pictures}
    targets = _chosen(name, "label", rest, label, LABELS, lambda a: a.dtype.kind in "iu" and len(a.shape) == 1)
    at, to = f"{name}: {pictures.name}", f"{name}: {targets.name}"
    channels_first(pictures.shape, at)
    n = pictures.shape[0]
    if targets.shape not in ((n,), (n, 1)) or targets.dtype.kind not in "iu":
        raise UserError(
            f"{to}: {targets.dtype} of shape {list(targets.shape)}, but {pictures.name} has {n} images: expected as "
            "many whole numbers"
        )
    labels = _read(path, targets).reshape(n)
    if n and labels.max() > np.iinfo(np.int64).max:
        row = int(labels.argmax())
        raise UserError(f"{to}: row {row}: label {labels[row]} out of range: repair or remove the row")

    def images(rows: Rows) -> Iterator[Pixels]:
        return frames(_read(path, pictures), at, rows)

    columns = {
        key: partial(_column, path, array)
        for key, array in rest.items()
        if array is not targets and array.shape in ((n,), (n, 1)) and array.dtype.kind in "iuUS"
    }
    return Part(
        name=at,
        split=split,
        labels=labels.astype(np.int64),
        classes=classes,
        images=images,
        image_at=rows_of(at),
        label_at=rows_of(to),
        columns=columns,
    )


def _split(name: str) -> tuple[str, str]:
    """The split that an array's name tells, or none, and the rest of the name."""
    words = re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    found = [word for word in words if word in SPLITS][:1]
    return "".join(found), "_".join(word for word in words if word not in found)


def _chosen(
    name: str, what: str, group: dict[str, _Array], wanted: str, known: Sequence[str], fits: Callable[[_Array], bool]
) -> _Array:
    """The array of a split that `wanted` names; if empty, the one of a known name, or else the only one that fits."""
    if wanted:
        found = [array for rest, array in group.items() if wanted in (rest, array.name)]
    else:
        found = [group[rest] for rest in known if rest in group] or [array for array in group.values() if fits(array)]
    if len(found) == 1:
        return found[0]
    listing = ", ".join(f"{a.name} {a.dtype}{list(a.shape)}" for a in group.values()) or "none"
    raise UserError(f"{name}: {len(found)} arrays may be the {what}s among {listing}: name one in data.{what}")


def _headers(path: Path) -> Iterator[_Array]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        if len({member.filename for member in members}) < len(members):
            raise ValueError("two arrays have one name")
        for member in members:
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                if version not in read:
                    raise ValueError(f"{member.filename} is of version {version}")
                shape, _, dtype = read[version](file)
                if any(type(n) is not int or n < 0 for n in shape):
                    raise ValueError(f"{member.filename} has shape {shape}")
                yield _Array(member.filename[:-4], shape, dtype, file.tell(), member.file_size)


def _read(path: Path, array: _Array) -> npt.NDArray[Any]:
    """The array, of which nothing is allocated before its size has been compared with the file's and the memory's."""
    at = f"{shown(path)}: {array.name}"
    if array.dtype.hasobject:
        raise UserError(f"{at}: holds Python objects, which would have to be unpickled: save it as numbers or as text")
    needed, held = math.prod(array.shape) * array.dtype.itemsize, array.bytes - array.start
    if needed != held:
        raise UserError(f"{at}: its header says {needed} bytes, the file holds {held}: fetch it again")
    if needed > (free := host_memory()[1]):
        raise UserError(f"{at}: takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: use a machine with more")
    with reading(path, "npz file"), zipfile.ZipFile(path) as archive, archive.open(f"{array.name}.npy") as file:
        result: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError("an array is longer than its header says")
        return result


def _column(path: Path, array: _Array) -> list[object]:
    values: list[object] = _read(path, array).reshape(-1).tolist()
    for row, value in enumerate(values):
        if isinstance(value, bytes):
            try:
                values[row] = value.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{shown(path)}: {array.name}: row {row}: {value!r} is not UTF-8: save it as text"
                ) from error
    return values
