"""Small data sets of every kind that can be read, all of the same twelve images in three classes."""

import gzip
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
from PIL import Image

CLASSES = ("cat", "dog", "owl")
N, HEIGHT, WIDTH = 12, 5, 6
LABELS = np.arange(N) % len(CLASSES)
PIXELS: npt.NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (N, HEIGHT, WIDTH), dtype=np.uint8)
WRITERS = [f"w{i % 4}" for i in range(N)]


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def table(**columns: Any) -> pa.Table:
    """Of all images, with class names and writers; `columns` replace or add."""
    images = [{"bytes": png(pixels), "path": None} for pixels in PIXELS]
    kinds = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    made = {"image": pa.array(images, kinds), "label": pa.array(LABELS), "writer": pa.array(WRITERS)} | columns
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(CLASSES)}}
    return pa.table(made).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def parquet(folder: Path, **columns: Any) -> Path:
    pa.parquet.write_table(table(**columns), folder / "train-00000-of-00001.parquet")
    return folder


def arrow(folder: Path, file: bool = True, **columns: Any) -> Path:
    """In the format for files, or for streams."""
    made = table(**columns)
    new = pa.ipc.new_file if file else pa.ipc.new_stream
    with new(folder / "train-00000-of-00001.arrow", made.schema) as writer:
        writer.write_table(made, max_chunksize=5)
    return folder


def npz(folder: Path, **arrays: Any) -> Path:
    """x_train and so on; `arrays` replace, add, or if None leave out."""
    given: dict[str, Any] = {
        "x_train": PIXELS[:8],
        "y_train": LABELS[:8],
        "x_test": PIXELS[8:],
        "y_test": LABELS[8:],
        "writer_train": np.array(WRITERS[:8]),
        "writer_test": np.array(WRITERS[8:]),
        "classes": np.array(CLASSES),
    } | arrays
    np.savez_compressed(folder / "pets.npz", **{name: array for name, array in given.items() if array is not None})
    return folder


def idx_bytes(array: npt.NDArray[Any], magic: int | None = None, shape: tuple[int, ...] | None = None) -> bytes:
    head = struct.pack(">I", 0x0800 + array.ndim if magic is None else magic)
    return head + struct.pack(f">{array.ndim}I", *(shape or array.shape)) + array.astype(np.uint8).tobytes()


def idx(folder: Path, zipped: bool = True, prefix: str = "") -> Path:
    for split, rows in (("train", slice(0, 8)), ("t10k", slice(8, N))):
        for what, array in (("images-idx3", PIXELS[rows]), ("labels-idx1", LABELS[rows])):
            content = idx_bytes(array)
            name = f"{prefix}{split}-{what}-ubyte{'.gz' if zipped else ''}"
            (folder / name).write_bytes(gzip.compress(content) if zipped else content)
    return folder


def imagefolder(folder: Path, splits: bool = False) -> Path:
    for i, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        split = ("train" if i < 8 else "test") if splits else ""
        path = folder / split / CLASSES[label] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels))
    return folder


SOURCES: dict[str, Callable[[Path], Path]] = {
    "parquet": parquet,
    "arrow file": arrow,
    "arrow stream": lambda folder: arrow(folder, file=False),
    "npz": npz,
    "idx": lambda folder: idx(folder, zipped=False),
    "idx gzipped": idx,
    "imagefolder": imagefolder,
    "imagefolder with splits": lambda folder: imagefolder(folder, splits=True),
}
