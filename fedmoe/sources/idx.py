"""Samples in IDX files, as MNIST and its relatives are published: a file of images, one of labels, for each split."""

import gzip
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from fedmoe.engine.facts import host_memory
from fedmoe.errors import UserError
from fedmoe.sources.part import Part, choose, reading, regular, rows_of, shown

NAME = re.compile(r"(?P<head>.*?)(?P<what>images|labels)[-.]idx[13][-.]ubyte(\.gz)?")
DIMENSIONS = {"images": 3, "labels": 1}
CHUNK = 2**20  # bytes


def is_idx(path: Path) -> bool:
    """Whether the file is named as one of such a data set."""
    return NAME.fullmatch(path.name) is not None


def parts(files: Iterable[Path], splits: tuple[str, ...], name: str) -> list[Part]:
    """A part for each split of the only data set that the files are of; `t10k` is the split `test`."""
    sets: dict[str, dict[str, dict[str, Path]]] = {}
    for file in sorted(files):
        match = NAME.fullmatch(file.name)
        assert match is not None
        pair = sets.setdefault(_family(file), {}).setdefault(_split(match["head"]), {})
        if other := pair.get(match["what"]):
            raise UserError(f"{shown(file)}: holds the same as {other.name}: remove one of them")
        pair[match["what"]] = file
    if len(sets) > 1:
        raise UserError(f"{name}: {len(sets)} data sets, {', '.join(sorted(sets))}: give a file of one in data.name")
    ((_, found),) = sets.items()
    return [_part(split, found[split], name) for split in choose(splits, set(found), name)]


def relatives(file: Path) -> list[Path]:
    """All files of the data set that this one is of."""
    beside = [path for path in file.parent.iterdir() if is_idx(path) and _family(path) == _family(file)]
    gzipped = file.suffix == ".gz"
    return [path for path in beside if (path.suffix == ".gz") == gzipped]


def _family(file: Path) -> str:
    """What stands before the split: `emnist-letters` for emnist-letters-train-images-idx3-ubyte."""
    match = NAME.fullmatch(file.name)
    assert match is not None
    return "-".join(re.split(r"[-_.]+", match["head"].rstrip("-_."))[:-1])


def _split(head: str) -> str:
    last = re.split(r"[-_.]+", head.rstrip("-_."))[-1]
    return "test" if last == "t10k" else last or "all"


def _part(split: str, pair: dict[str, Path], name: str) -> Part:
    for what in DIMENSIONS:
        if what not in pair:
            (other,) = pair.values()
            raise UserError(f"{name}: no {what} of split {split!r} beside {other.name}: add them, or set data.splits")
    pixels, labels = _read(pair["images"], "images"), _read(pair["labels"], "labels")
    if len(pixels) != len(labels):
        counts = f"{len(labels)} labels, but {len(pixels)} images are in {pair['images'].name}"
        raise UserError(f"{shown(pair['labels'])}: {counts}: fetch both again")
    return Part(
        name=shown(pair["images"]),
        split=split,
        labels=labels.astype(np.int64),
        images=lambda rows: iter(pixels[rows][:, None]),
        image_at=rows_of(shown(pair["images"])),
        label_at=rows_of(shown(pair["labels"])),
    )


def _read(path: Path, what: str) -> npt.NDArray[np.uint8]:
    """The array in a file, whose header is compared with its size before anything is allocated."""
    zipped = path.suffix == ".gz"
    with reading(regular(path), "IDX file"), gzip.open(path) if zipped else path.open("rb") as opened:
        file = cast(BinaryIO, opened)
        dimensions = DIMENSIONS[what]
        head = file.read(4 + 4 * dimensions)
        magic = bytes((0, 0, 8, dimensions))  # of unsigned bytes
        if head[:4] != magic:
            raise UserError(f"{shown(path)}: begins with {head[:4].hex() or 'nothing'}, IDX {what} with {magic.hex()}")
        if len(head) < 4 + 4 * dimensions:
            raise ValueError("its header is cut off")
        shape = np.frombuffer(head, dtype=">u4", offset=4).astype(int).tolist()
        size = int(np.prod(shape, dtype=object))
        if 0 in shape[1:]:
            raise UserError(f"{shown(path)}: images of {shape[2]} x {shape[1]} pixels: fetch it again")
        held = None if zipped else path.stat().st_size - len(head)
        if held is not None and held != size:
            raise UserError(f"{shown(path)}: its header says {size} bytes, the file holds {held}: fetch it again")
        if size > (free := host_memory()[1]):
            raise UserError(f"{shown(path)}: takes {size / 1e9:.1f} GB by its header, {free / 1e9:.1f} GB are free")
        content = bytearray()
        while len(content) <= size and (more := file.read(min(CHUNK, size + 1 - len(content)))):
            content += more
        if len(content) != size:
            found = f"{len(content)}" if len(content) < size else "more"
            raise UserError(f"{shown(path)}: its header says {size} bytes, the file holds {found}: fetch it again")
        return np.frombuffer(content, dtype=np.uint8).reshape(shape)
