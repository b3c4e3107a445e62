"""Broken input of every kind: one line that names the file, and the row where there is one; nothing on disk changes."""

import gzip
import io
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmoe import data
from fedmoe.config import Data
from fedmoe.errors import UserError
from fedmoe.sources import idx, npz
from tests import sourcefiles
from tests.sourcefiles import LABELS, PIXELS, SOURCES, idx_bytes, png
from tests.support import Fedmoe

Break = Callable[[Path], str]
"""Breaks the data set in a folder; gives what the message must hold."""

FIRST = {  # the file of each kind that is broken in ways that suit all
    "parquet": "train-00000-of-00001.parquet",
    "arrow file": "train-00000-of-00001.arrow",
    "arrow stream": "train-00000-of-00001.arrow",
    "npz": "pets.npz",
    "idx": "train-images-idx3-ubyte",
    "idx gzipped": "t10k-images-idx3-ubyte.gz",
    "imagefolder": "dog/01.png",
    "imagefolder with splits": "test/owl/08.png",
}


def as_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: void(path.write_bytes(change(path.read_bytes())))


def void(_: object) -> None:
    """For lambdas."""


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in the file's place."""

    def act(path: Path) -> None:
        path.unlink()
        make(path)

    return act


ANYWHERE: dict[str, Callable[[Path], None]] = {
    "empty": as_bytes(lambda content: b""),
    "one byte": as_bytes(lambda content: content[:1]),
    "cut in half": as_bytes(lambda content: content[: len(content) // 2]),
    "end missing": as_bytes(lambda content: content[:-40]),
    "zeros": as_bytes(lambda content: bytes(len(content))),
    "text": as_bytes(lambda content: b"<!DOCTYPE html><title>404</title>" * 9),
    "first bytes changed": as_bytes(lambda content: b"\xff\xfe\xfd\xfc" + content[4:]),
    "another kind": as_bytes(lambda content: b"\x7fELF\x02\x01\x01" + content),
    "dangling link": replaced(lambda path: path.symlink_to("nowhere")),
    "link to itself": replaced(lambda path: path.symlink_to(path.name)),
    "folder": replaced(lambda path: path.mkdir()),
    "fifo": replaced(lambda path: os.mkfifo(path)),
    "device": replaced(lambda path: path.symlink_to("/dev/zero")),
}


def idx_file(**given: Any) -> Callable[[Path], None]:
    return lambda folder: void((folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(PIXELS[:8], **given)))


def labels_of(values: Any) -> Callable[[Path], None]:
    return lambda folder: void((folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.array(values))))


def bomb(path: Path) -> None:
    """An archive of a few kB whose header says that it holds a petabyte of pixels."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1024, 2**20, 2**20)}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(10**6))
        archive.writestr("y.npy", _npy(np.zeros(1024, np.uint8)))


def _npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)
    return stream.getvalue()


def archive(**members: bytes) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        with zipfile.ZipFile(folder / "pets.npz", "w") as made:
            for name, content in members.items():
                made.writestr(f"{name}.npy", content)

    return act


def twice(folder: Path) -> None:
    with pytest.warns(UserWarning), zipfile.ZipFile(folder / "pets.npz", "a") as made:
        made.writestr("x_train.npy", _npy(PIXELS))


def arrays(**given: Any) -> Callable[[Path], None]:
    return lambda folder: void(sourcefiles.npz(folder, **given))


def rows(**columns: Any) -> Callable[[Path], None]:
    return lambda folder: void(sourcefiles.parquet(folder, **columns))


def arrow_rows(**columns: Any) -> Callable[[Path], None]:
    return lambda folder: void(sourcefiles.arrow(folder, **columns))


def encoded(*images: bytes | None) -> Any:
    """A column whose last images are these."""
    given = [png(pixels) for pixels in PIXELS[: len(PIXELS) - len(images)]] + list(images)
    return pa.array([{"bytes": i, "path": None} for i in given], pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def declared(width: int, height: int) -> bytes:
    """A PNG whose header says this size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    whole = png(PIXELS[0])
    return whole[:8] + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + whole[33:]


def writes(name: str, content: bytes) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return act


def raw_name(folder: Path, name: bytes) -> None:
    (folder / "cat" / "00.png").rename(os.fsdecode(os.fsencode(folder) + b"/" + name))


def with_nan(row: int, value: float) -> Any:
    pixels = PIXELS[:8] / 255
    pixels[row, 0, 0] = value
    return pixels


OTHER = png(np.zeros((7, 7), np.uint8))
COLOR = png(np.zeros((5, 6, 3), np.uint8))

PARTICULAR: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "parquet: no label": ("parquet", rows(label=pa.array([None, *range(11)])), ".parquet: row 0: no label"),
    "parquet: label too high": (
        "parquet",
        rows(label=[0] * 11 + [9]),
        ".parquet: row 11: label 9 out of range, 0 to 2",
    ),
    "parquet: label below 0": ("parquet", rows(label=[0] * 11 + [-7]), "row 11: label -7 out of range"),
    "parquet: unlabeled": ("parquet", rows(label=[-1] * 12), "leave unlabeled splits out with data.splits"),
    "parquet: label beyond int64": (
        "parquet",
        rows(label=pa.array([2**63] * 12, pa.uint64())),
        f"label {2**63} out of",
    ),
    "parquet: labels that are names": ("parquet", rows(label=["a"] * 12), "no label column 'label' among"),
    "parquet: labels that are fractions": ("parquet", rows(label=[0.5] * 12), "no label column 'label' among"),
    "parquet: no image": ("parquet", rows(image=["a"] * 12), "0 image columns among"),
    "parquet: two images": ("parquet", rows(other=encoded()), "2 image columns among"),
    "parquet: an image of no bytes": ("parquet", rows(image=encoded(b"")), "row 11: image cannot be decoded (unknown"),
    "parquet: an image of none": ("parquet", rows(image=encoded(None)), "row 11: image cannot be decoded ("),
    "parquet: an image cut off": ("parquet", rows(image=encoded(png(PIXELS[0])[:40])), "row 11: image cannot be"),
    "parquet: an image of another size": ("parquet", rows(image=encoded(OTHER)), "7 x 7 gray pixels, but 6 x 5"),
    "parquet: an image of another mode": ("parquet", rows(image=encoded(COLOR)), "convert them to one mode"),
    "parquet: an image said to be huge": (
        "parquet",
        rows(image=encoded(declared(2**17, 2**17))),
        "row 11: image cannot",
    ),
    "parquet: one said to be large": ("parquet", rows(image=encoded(declared(10**4, 10**4))), "row 11: image cannot"),
    "parquet: one of no pixels": ("parquet", rows(image=encoded(declared(0, 5))), "row 11: image cannot be decoded"),
    "parquet: PostScript": (
        "parquet",
        rows(image=encoded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n")),
        "row 11",
    ),
    "parquet: no rows": (
        "parquet",
        lambda f: pa.parquet.write_table(sourcefiles.table()[:0], f / FIRST["parquet"]),
        "no samples",
    ),
    "parquet: another's columns": ("parquet", writes("x.parquet", b"PAR1"), "x.parquet: not a whole parquet file"),
    "arrow: no label": ("arrow file", arrow_rows(label=pa.array([None, *range(11)])), ".arrow: row 0: no label"),
    "arrow: label too high": ("arrow file", arrow_rows(label=[0] * 11 + [9]), ".arrow: row 11: label 9 out of range"),
    "arrow: an image of no bytes": ("arrow file", arrow_rows(image=encoded(b"")), ".arrow: row 11: image cannot be"),
    "arrow: another size": ("arrow file", arrow_rows(image=encoded(OTHER)), ".arrow: row 11: 7 x 7 gray pixels, but"),
    "arrow: no image": ("arrow file", arrow_rows(image=[1] * 12), "0 image columns among"),
    "arrow: huge header": (
        "arrow stream",
        writes(FIRST["arrow stream"], b"\xff\xff\xff\xff\xf0\xff\xff\x7f" + bytes(99)),
        "arrow file",
    ),
    "arrow: an end without a beginning": (
        "arrow stream",
        writes(FIRST["arrow stream"], b"\xff\xff\xff\xff\0\0\0\0"),
        "arrow file",
    ),
    "arrow: parquet by content": (
        "arrow file",
        lambda f: shutil.copy(sourcefiles.parquet(f.parent) / FIRST["parquet"], f / FIRST["arrow file"]),
        "not a whole arrow file",
    ),
    "npz: NaN": ("npz", arrays(x_train=with_nan(3, float("nan"))), "pets.npz: x_train: row 3: a pixel is not a finite"),
    "npz: infinity": (
        "npz",
        arrays(x_train=with_nan(5, float("inf"))),
        "x_train: row 5: a pixel is not a finite number",
    ),
    "npz: below 0": ("npz", arrays(x_train=with_nan(2, -0.5)), "x_train: row 2: pixels from -0.5 to 1, expected"),
    "npz: above 255": ("npz", arrays(x_train=PIXELS[:8].astype(int) + 1), "pixels from "),
    "npz: fractions above 1": ("npz", arrays(x_train=PIXELS[:8] / 10), "pixels are fractions up to 25."),
    "npz: 0 and 1 as integers": ("npz", arrays(x_train=PIXELS[:8] % 2), "pixels are 0 and 1 as uint8"),
    "npz: complex": ("npz", arrays(x_train=PIXELS[:8] * 1j), "pixels are complex128, expected whole numbers"),
    "npz: text for pixels": ("npz", arrays(x_train=PIXELS[:8].astype(str)), "pixels are <U3, expected"),
    "npz: dates for pixels": ("npz", arrays(x_train=PIXELS[:8].astype("M8[s]")), "pixels are datetime64[s], expected"),
    "npz: fields for pixels": (
        "npz",
        arrays(x_train=PIXELS[:8].view([("a", "u1")])),
        "x_train: pixels are [('a', 'u1')]",
    ),
    "npz: objects for pixels": ("npz", arrays(x_train=PIXELS[:8].astype(object)), "x_train: holds Python objects"),
    "npz: objects for labels": ("npz", arrays(y_train=LABELS[:8].astype(object)), "y_train: object of shape [8]"),
    "npz: objects for classes": (
        "npz",
        arrays(classes=np.array(["a", "b", "c"], object)),
        "classes: holds Python objects",
    ),
    "npz: classes that are not UTF-8": (
        "npz",
        arrays(classes=np.array([b"a", b"\xff", b"c"])),
        "classes: row 1: b'\\xff' is not UTF-8: save it as text",
    ),
    "npz: a class of half a letter": (
        "npz",
        arrays(classes=np.array(["a", "\ud800", "c"])),
        "class name '\\ud800' is no text",
    ),
    "npz: images flat": (
        "npz",
        arrays(x_train=PIXELS[:8].reshape(8, -1)),
        "x_train: shape [8, 30], expected [n, height",
    ),
    "npz: four channels": (
        "npz",
        arrays(x_train=np.zeros((8, 5, 6, 4), np.uint8)),
        "neither second nor last is 1 or 3",
    ),
    "npz: two ways to see channels": ("npz", arrays(x_train=np.zeros((8, 3, 6, 3), np.uint8)), "either of two may be"),
    "npz: images of no height": (
        "npz",
        arrays(x_train=np.zeros((8, 0, 6), np.uint8)),
        "x_train: shape [8, 0, 6], expected",
    ),
    "npz: five dimensions": (
        "npz",
        arrays(x_train=np.zeros((8, 5, 6, 3, 1), np.uint8)),
        "x_train: shape [8, 5, 6, 3, 1]",
    ),
    "npz: a scalar": ("npz", arrays(x_train=np.uint8(1)), "x_train: shape [], expected"),
    "npz: too few labels": ("npz", arrays(y_train=LABELS[:7]), "y_train: int64 of shape [7], but x_train has 8 images"),
    "npz: too many labels": ("npz", arrays(y_test=LABELS), "y_test: int64 of shape [12], but x_test has 4 images"),
    "npz: one-hot labels": (
        "npz",
        arrays(y_train=np.eye(3)[LABELS[:8]]),
        "y_train: float64 of shape [8, 3], but x_train",
    ),
    "npz: fractions for labels": ("npz", arrays(y_train=LABELS[:8] / 2), "y_train: float64 of shape [8], but"),
    "npz: names for labels": ("npz", arrays(y_train=np.array(["a"] * 8)), "y_train: <U1 of shape [8], but x_train has"),
    "npz: label too high": ("npz", arrays(y_train=LABELS[:8] + 1), "y_train: row 2: label 3 out of range, 0 to 2"),
    "npz: label below 0": ("npz", arrays(y_test=LABELS[8:] - 3), "y_test: row 0: label -1 out of range"),
    "npz: label beyond int64": (
        "npz",
        arrays(y_train=np.full(8, 2**64 - 1, np.uint64)),
        f"row 0: label {2**64 - 1} out",
    ),
    "npz: no labels": ("npz", arrays(y_train=None), "0 arrays may be the labels among"),
    "npz: no images": ("npz", arrays(x_train=None), "pets.npz: 0 arrays may be the images among"),
    "npz: a class named twice": ("npz", arrays(classes=np.array(["a", "b", "a"])), "two classes are named 'a'"),
    "npz: two sizes": (
        "npz",
        arrays(x_test=np.zeros((4, 9, 9), np.uint8)),
        "x_train: row 0: 6 x 5 gray pixels, but 9 x 9",
    ),
    "npz: gray and colors": ("npz", arrays(x_test=np.zeros((4, 5, 6, 3), np.uint8)), "convert them to one mode"),
    "npz: nothing in it": ("npz", archive(), "pets.npz: no arrays in it"),
    "npz: no array in it": ("npz", archive(x=b"hello"), "pets.npz: not a whole npz file"),
    "npz: pickled": ("npz", archive(x=b"\x80\x04K\x01.", y=b""), "pets.npz: not a whole npz file"),
    "npz: header that is code": (
        "npz",
        archive(x=b"\x93NUMPY\x01\x00\x10\x00exit(1)\n        "),
        "not a whole npz file",
    ),
    "npz: header of another version": ("npz", archive(x=b"\x93NUMPY\x09\x00\x10\x00"), "not a whole npz file"),
    "npz: header of 4 GB": ("npz", archive(x=b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}"), "not a whole npz file"),
    "npz: negative shape": (
        "npz",
        archive(x=_npy(PIXELS).replace(b"(12, 5, 6)", b"(-1, 5, 6)")),
        "has shape (-1, 5, 6)",
    ),
    "npz: more promised": (
        "npz",
        archive(x=_npy(PIXELS).replace(b"(12, 5", b"(13, 5"), y=_npy(LABELS)),
        "shape [12], but x has 13",
    ),
    "npz: data missing": (
        "npz",
        archive(x=_npy(PIXELS)[:-3], y=_npy(LABELS)),
        "x: its header says 360 bytes, the file holds 357",
    ),
    "npz: data to spare": (
        "npz",
        archive(x=_npy(PIXELS) + b"?", y=_npy(LABELS)),
        "x: its header says 360 bytes, the file holds 361",
    ),
    "npz: bomb": ("npz", lambda f: bomb(f / "pets.npz"), f"x: its header says {2**50} bytes, the file holds "),
    "npz: a name twice": ("npz", twice, "two arrays have one name"),
    "idx: other magic": (
        "idx",
        idx_file(magic=0x0D03),
        "train-images-idx3-ubyte: begins with 00000d03, IDX images with",
    ),
    "idx: labels for images": ("idx", idx_file(magic=0x0801), "begins with 00000801, IDX images with 00000803"),
    "idx: wrong end first": ("idx", idx_file(magic=0x03080000), "begins with 03080000"),
    "idx: more promised": ("idx", idx_file(shape=(9, 5, 6)), "its header says 270 bytes, the file holds 240"),
    "idx: less promised": ("idx", idx_file(shape=(7, 5, 6)), "its header says 210 bytes, the file holds 240"),
    "idx: huge header": (
        "idx",
        idx_file(shape=(2**32 - 1,) * 3),
        f"its header says {(2**32 - 1) ** 3} bytes, the file",
    ),
    "idx: no width": ("idx", idx_file(shape=(8, 5, 0)), "images of 0 x 5 pixels"),
    "idx: header alone": ("idx", writes("train-images-idx3-ubyte", bytes((0, 0, 8, 3, 0, 0))), "header is cut off"),
    "idx: too few labels": (
        "idx",
        labels_of(LABELS[:5]),
        "train-labels-idx1-ubyte: 5 labels, but 8 images are in train-im",
    ),
    "idx: label out of range": (
        "idx",
        labels_of([0] * 7 + [255]),
        "train-labels-idx1-ubyte: row 7: label 255 out of range",
    ),
    "idx: no labels": (
        "idx",
        lambda f: (f / "train-labels-idx1-ubyte").unlink(),
        "no labels of split 'train' beside train-",
    ),
    "idx: no images": (
        "idx",
        lambda f: (f / "t10k-images-idx3-ubyte").unlink(),
        "no images of split 'test' beside t10k-",
    ),
    "idx: both packed and not": ("idx", lambda f: sourcefiles.idx(f), "holds the same as"),
    "idx: packed under a plain name": (
        "idx",
        lambda f: writes("train-images-idx3-ubyte", gzip.compress(idx_bytes(PIXELS)))(f),
        "begins with 1f8b",
    ),
    "idx gzipped: plain under a packed name": (
        "idx gzipped",
        writes(FIRST["idx gzipped"], idx_bytes(PIXELS)),
        "not a whole IDX file",
    ),
    "idx gzipped: huge header": (
        "idx gzipped",
        writes(FIRST["idx gzipped"], gzip.compress(idx_bytes(PIXELS, shape=(2**32 - 1,) * 3))),
        "GB by its header",
    ),
    "idx gzipped: bomb": (
        "idx gzipped",
        writes(FIRST["idx gzipped"], gzip.compress(idx_bytes(PIXELS[8:]) + bytes(2 * 10**8), 1)),
        "the file holds more",
    ),
    "idx gzipped: less than promised": (
        "idx gzipped",
        writes(FIRST["idx gzipped"], gzip.compress(idx_bytes(PIXELS, shape=(99, 5, 6)))),
        "the file holds 360",
    ),
    "imagefolder: another size": (
        "imagefolder",
        writes("dog/01.png", OTHER),
        "dog/01.png: 7 x 7 gray pixels, but 6 x 5",
    ),
    "imagefolder: another mode": (
        "imagefolder",
        writes("dog/01.png", COLOR),
        "dog/01.png: 6 x 5 RGB pixels, but 6 x 5 gray",
    ),
    "imagefolder: empty class": ("imagefolder", lambda f: (f / "ant").mkdir(), "ant: no images in it"),
    "imagefolder: class of hidden files": ("imagefolder", writes("ant/.DS_Store", b""), "ant: no images in it"),
    "imagefolder: text among images": (
        "imagefolder",
        writes("dog/notes.txt", b"hello"),
        "dog/notes.txt: lies among a class's images",
    ),
    "imagefolder: an archive among images": ("imagefolder", writes("dog/more.zip", b"PK"), "dog/more.zip: lies among"),
    "imagefolder: a folder among images": (
        "imagefolder",
        lambda f: (f / "dog" / "more").mkdir(),
        "dog/more: lies among",
    ),
    "imagefolder: name of an image not UTF-8": (
        "imagefolder",
        lambda f: raw_name(f, b"cat/\xff.png"),
        r"cat/\xff.png: its name is not UTF-8",
    ),
    "imagefolder: name of a class not UTF-8": (
        "imagefolder",
        lambda f: (f / "cat").rename(os.fsdecode(os.fsencode(f) + b"/\xe9")),
        r"\xe9: its name is not UTF-8",
    ),
    "imagefolder: two lines in a name": (
        "imagefolder",
        writes("dog/a\nb.png", b"?"),
        r"dog/a\nb.png: image cannot be decoded",
    ),
    "imagefolder: escape in a class": (
        "imagefolder",
        writes("\x1b[31m/a.png", b"?"),
        r"\x1b[31m/a.png: image cannot be",
    ),
    "imagefolder: 16 bits": (
        "imagefolder",
        writes("dog/01.png", png(np.zeros((5, 6), np.uint16))),
        "has more than 8 bits",
    ),
    "imagefolder: said to be huge": (
        "imagefolder",
        writes("dog/01.png", declared(2**17, 2**17)),
        "dog/01.png: image cannot",
    ),
    "imagefolder: classes and splits": (
        "imagefolder",
        writes("train/cat/1.png", OTHER),
        "train has folders of images, cat has none",
    ),
    "imagefolder: images without a class": (
        "npz",
        lambda f: (f / "pets.npz").rename(f / "a.png"),
        "images lie in it without a class",
    ),
    "nothing": ("npz", lambda f: (f / "pets.npz").unlink(), "no parquet files in it or its data/, nor another kind"),
    "only an unknown kind": (
        "npz",
        lambda f: (f / "pets.npz").rename(f / "pets.mat"),
        "nor another kind: give parquet",
    ),
}


def refused(path: Path) -> str:
    """The one line that loading is refused with; asserts that nothing on disk has changed."""
    before = snapshot(path)
    with pytest.raises(UserError) as caught:
        data.load(Data(name=str(path)), seed=0)
    message = str(caught.value)
    assert message.isprintable() and message.encode()
    assert snapshot(path) == before
    return message


def snapshot(folder: Path) -> dict[str, object]:
    """What is in a folder; a device's content is left alone."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        readable = path.is_file() and not path.is_symlink()
        found[str(path)] = path.read_bytes() if readable else path.lstat().st_mode
    return found


@pytest.mark.filterwarnings("error")
@pytest.mark.timeout(30)
@pytest.mark.parametrize("how", ANYWHERE)
@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_file_broken_in_every_way(tmp_path: Path, kind: str, how: str) -> None:
    path = SOURCES[kind](tmp_path)
    ANYWHERE[how](path / FIRST[kind])
    assert refused(path).startswith(str(path / FIRST[kind])), refused(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.timeout(30)
@pytest.mark.parametrize("what", PARTICULAR)
def test_what_can_be_wrong_with_one_kind(tmp_path: Path, what: str) -> None:
    kind, act, expected = PARTICULAR[what]
    folder = tmp_path / "set"
    folder.mkdir()
    path = SOURCES[kind](folder)
    act(path)
    message = refused(path)
    assert expected in message and str(path) in message, message


def test_there_are_a_hundred_and_more() -> None:
    assert len(SOURCES) * len(ANYWHERE) > 100 and len(PARTICULAR) > 90


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("kind", SOURCES)
def test_what_may_not_be_read(tmp_path: Path, kind: str) -> None:
    path = SOURCES[kind](tmp_path)
    (path / FIRST[kind]).chmod(0)
    assert str(path / FIRST[kind]) in refused(path)


@pytest.mark.parametrize("kind", SOURCES)
def test_permission_is_named(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = SOURCES[kind](tmp_path)

    def deny(folder: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", deny)
    assert refused_without_looking(path) == f"{path}: Permission denied"


def refused_without_looking(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        data.load(Data(name=str(path)), seed=0)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent.npz", "the file or folder absent.npz does not exist"),
        ("set/dog/01.png", "is of no known kind by its name: give parquet"),
        ("set", "set/dog/01.png: image cannot be decoded (unknown format)"),
    ],
)
def test_from_the_command_line(fedmoe: Fedmoe, tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "set").mkdir()
    (sourcefiles.imagefolder(tmp_path / "set") / "dog/01.png").write_bytes(b"?")
    before = snapshot(tmp_path / "set")
    assert expected in fedmoe("train", f"--data.name={name}", "--run.dir=run").one_line()
    assert not (tmp_path / "run").exists()
    assert snapshot(tmp_path / "set") == before


@pytest.mark.parametrize(("kind", "module"), [("npz", npz), ("idx gzipped", idx)])
def test_nothing_is_unpacked_that_memory_has_no_room_for(
    tmp_path: Path, kind: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "host_memory", lambda: (2**30, 100))
    assert "0.0 GB are free" in refused(SOURCES[kind](tmp_path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A valid data set of each kind."""
    return {kind: make(tmp_path_factory.mktemp(kind.replace(" ", "-"))) for kind, make in SOURCES.items()}


@settings(
    max_examples=int(os.environ.get("FEDMOE_FUZZ", 150)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(drawn=st.data())
def test_mutated_files_are_read_or_refused(drawn: st.DataObject, whole: dict[str, Path]) -> None:
    kind = drawn.draw(st.sampled_from(sorted(SOURCES)))
    path = whole[kind] / FIRST[kind]
    content = path.read_bytes()
    changed = bytearray(content)
    for _ in range(drawn.draw(st.integers(1, 4))):
        at = drawn.draw(st.integers(0, len(changed)))
        change = drawn.draw(st.sampled_from(("set", "cut", "insert", "remove")))
        if change == "set":
            new = drawn.draw(st.binary(min_size=1, max_size=8))
            changed[at : at + len(new)] = new
        elif change == "insert":
            changed[at:at] = drawn.draw(st.binary(min_size=1, max_size=16))
        elif change == "remove":
            del changed[at : at + drawn.draw(st.integers(1, 16))]
        else:
            del changed[at:]
    try:
        path.write_bytes(changed)
        data.load(Data(name=str(whole[kind])), seed=0)
    except UserError as error:
        assert str(error).isprintable()
    finally:
        path.write_bytes(content)
