"""Writing files so that a kill or a full disk at any moment leaves the old content or the new, never a mixture."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedmoe.errors import UserError


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError within the block names `path`; those of a write or a flush name no file of themselves."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_above(folder: Path, option: str) -> Path:
    """The folder in which `folder` lies or would be made. UserError, naming the option that says where, if it cannot.

    Before the work, not after.
    """
    above = next(place for place in [folder, *folder.absolute().parents] if place.exists())
    if not _writable(above):
        raise UserError(
            f"{folder} cannot be made: {above} is not a folder that can be written to: choose another {option}"
        )
    return above


def check_page(out: Path) -> None:
    """Raise UserError unless a page can be written to `out`, over an older one but nothing else: before the work."""
    above, why = out.absolute().parent, None
    if out.exists() and not (out.is_file() and _head(out) in (b"", b"<!DOCTYPE")):
        why = "it is there and no page"
    elif not _writable(above):
        why = f"{above} is not a folder that can be written to"
    if why is not None:
        raise UserError(f"{out} cannot be written: {why}: choose another --out")


def _writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(9)


def write(path: Path, content: bytes) -> None:
    """Write a file that nothing names yet; it is on disk when this returns. Raises OSError naming it."""
    with naming(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, on disk when this returns. Raises OSError, with `path` as it was, if it cannot."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary, content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill within the block; at its end it is `path`, on disk, all at once, or if that raises, nothing.

    Raises FileExistsError where `path` is there and is not an empty folder, and other OSErrors, each naming a file.
    """
    path = path.absolute()  # "." has no name
    above = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        for inside in temporary.rglob("*"):
            if inside.is_dir():
                sync_folder(inside)
                continue
            with naming(inside), inside.open("rb") as handle:
                os.fsync(handle.fileno())
        sync_folder(temporary)
        temporary.chmod(0o777 & ~_umask())  # made for its owner alone
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # others may have put something there meanwhile
            for folder in above:
                folder.rmdir()
        raise
    sync_folder(path.parent)


def _umask() -> int:
    """The bits that new files are made without; there is no other way to ask."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is only on disk once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(handle)
    finally:
        os.close(handle)
