"""What every kind of source gives, parts of a data set, and what the readers of all kinds share."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedmoe.errors import UserError

Rows: TypeAlias = npt.NDArray[np.int64]
Pixels: TypeAlias = npt.NDArray[np.uint8]  # [channels, height, width]
Picture: TypeAlias = bytes | Path | Pixels
"""An image: encoded, in a file, or its pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Samples that are read together: a file, or a split of one."""

    name: str
    """For people."""
    split: str
    labels: Rows
    """int64 [n], not yet checked against the classes."""
    classes: tuple[str, ...] = ()
    """Names of the labels; empty where the source has none."""
    images: Callable[[Rows], Iterator[Picture]]
    """Of these rows, which are sorted."""
    image_at: Callable[[int], str]
    """Where the image of a row is, for people."""
    label_at: Callable[[int], str]
    columns: Mapping[str, Callable[[], Sequence[object]]] = field(default_factory=dict)
    """What else is known of each sample, n values each."""


def rows_of(name: str) -> Callable[[int], str]:
    """Names rows of `name`, from 0."""
    return lambda row: f"{name}: row {row}"


def shown(path: Path) -> str:
    """A path for a message: in one line, whatever its name holds."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def line(error: BaseException) -> str:
    """What an exception of a library says, in one line."""
    text = (str(error).strip().splitlines() or [""])[0]
    return "".join(c if c.isprintable() else "?" for c in text) or type(error).__name__


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever a library raises within the block says that the file is not whole; `what` is it, with its article."""
    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{shown(path)}: cannot be read ({error.strerror}): make it readable") from error
    except Exception as error:
        raise UserError(f"{shown(path)}: not a whole {what} ({line(error)}): fetch it again") from error


def listed(folder: Path) -> list[Path]:
    """What is in a folder, sorted, hidden files left out. UserError for a name that is not UTF-8."""
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in found:
        printable(path)
    return found


def printable(path: Path) -> Path:
    """The path. UserError where it cannot be written down."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{shown(path)}: its name is not UTF-8: rename it") from None
    return path


def regular(path: Path) -> Path:
    """The path. UserError unless it is a file that can be read to its end."""
    if path.is_file():
        return path
    if path.is_symlink() and not path.exists():
        raise UserError(f"{shown(path)}: a link to {shown(path.readlink())}, which is not there: restore or remove it")
    what = "a folder" if path.is_dir() else "no regular file" if path.exists() else "not there"
    raise UserError(f"{shown(path)}: is {what}, a regular file is needed: replace it")


def begins(path: Path, magic: bytes) -> None:
    """ValueError unless the file begins so; its readers begin at the end and would not look."""
    with path.open("rb") as file:
        if (head := file.read(len(magic))) != magic:
            raise ValueError(f"begins with {head.hex() or 'nothing'}, not {magic.hex()}")


def choose(wanted: Sequence[str], existing: Collection[str], name: str) -> list[str]:
    """The splits to use, sorted; all that there are if none is wanted."""
    for split in wanted:
        if split not in existing:
            raise UserError(f"{name} has no split {split!r}: set data.splits to any of {', '.join(sorted(existing))}")
    return sorted(set(wanted) or existing)
