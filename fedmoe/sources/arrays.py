"""Samples that are arrays of pixels: what their numbers mean, and the digits that come with scikit-learn."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmoe.errors import UserError
from fedmoe.sources.part import Part, Pixels, Rows, rows_of

Array: TypeAlias = npt.NDArray[Any]

CHUNK = 4096  # rows looked at at a time
EXPECTED = "expected whole numbers 0 to 255, or floats in [0, 1]"


def digits() -> Part:
    """1797 handwritten digits, 8 x 8 pixels of 17 levels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)[:, None]  # [1797, 1, 8, 8]
    return Part(
        name="digits",
        split="train",
        labels=found.target.astype(np.int64),
        images=lambda rows: iter(pixels[rows]),
        image_at=rows_of("digits"),
        label_at=rows_of("digits"),
    )


def frames(array: Array, name: str, rows: Rows) -> Iterator[Pixels]:
    """The images `rows` of an array, uint8 [channels, height, width] each.

    `array` is [n, height, width], or with 1 or 3 channels last or second. Raises UserError, naming the row where there
    is one, for shapes or numbers whose meaning is not plain: colors are whole numbers 0 to 255, floats in [0, 1], or
    boolean. Whole numbers that never exceed 1 could be either.
    """
    first = channels_first(array.shape, name)
    convert = _conversion(array, name)
    for start in range(0, len(rows), CHUNK):
        pixels = convert(array[rows[start : start + CHUNK]])
        if pixels.ndim == 3:
            pixels = pixels[:, None]
        elif not first:
            pixels = pixels.transpose(0, 3, 1, 2)
        yield from pixels


def channels_first(shape: tuple[int, ...], name: str) -> bool:
    """Whether an image's channels come before its height and width. UserError where `shape` is not one of images."""
    if len(shape) not in (3, 4) or 0 in shape[1:]:
        raise UserError(f"{name}: shape {list(shape)}, expected [n, height, width] or that with 1 or 3 channels")
    if len(shape) == 3:
        return True
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first == last:
        which = "either of two may be its channels" if first else "neither second nor last is 1 or 3 channels"
        raise UserError(f"{name}: shape {list(shape)}: {which}: save it as [n, height, width, 1 or 3]")
    return first


def _conversion(array: Array, name: str) -> Callable[[Array], npt.NDArray[np.uint8]]:
    """What makes uint8 pixels of the array's numbers, every one of which has been looked at."""
    kind = array.dtype.kind
    if kind not in "biuf":
        raise UserError(f"{name}: pixels are {array.dtype}, {EXPECTED}")
    if kind == "b":
        return lambda part: part.astype(np.uint8) * np.uint8(255)
    least, most, whole = 0.0, 0.0, True
    for start in range(0, len(array), CHUNK):
        part = array[start : start + CHUNK]
        if kind == "f":
            bad = np.flatnonzero(~np.isfinite(part).reshape(len(part), -1).all(1))
            if len(bad):
                raise UserError(f"{name}: row {start + bad[0]}: a pixel is not a finite number: repair the row")
            whole = whole and bool((part == np.rint(part)).all())
        low, high = float(part.min()), float(part.max())
        least, most = min(least, low), max(most, high)
        if low < 0 or high > 255:
            flat = part.reshape(len(part), -1)
            row = start + int(np.flatnonzero((flat.min(1) < 0) | (flat.max(1) > 255))[0])
            raise UserError(f"{name}: row {row}: pixels from {low:g} to {high:g}, {EXPECTED}: rescale them")
    if kind == "f" and most <= 1:
        return lambda part: np.rint(part.astype(np.float64) * 255).astype(np.uint8)
    if not whole:
        raise UserError(f"{name}: pixels are fractions up to {most:g}, {EXPECTED}: rescale them")
    if most == 1:
        raise UserError(f"{name}: pixels are 0 and 1 as {array.dtype}, which may be black or white: save them as bool")
    return lambda part: part.astype(np.uint8)
