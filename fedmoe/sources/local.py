"""A path on this machine as parts of a data set: of which kind it is, by what is there."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedmoe.config import Data
from fedmoe.errors import UserError
from fedmoe.sources import columnar, idx, imagefolder, npz
from fedmoe.sources.part import Part, choose, listed, printable, regular, shown

ARROW = (".arrow", ".feather", ".ipc")
KINDS = "parquet, arrow, npz or IDX files, or a folder of images for each class"


def is_file_name(name: str) -> bool:
    """Whether a data set's name can only be that of a file here."""
    path = Path(name)
    return path.suffix in (".parquet", *ARROW, ".npz") or idx.is_idx(path)


def parts(path: Path, config: Data) -> list[Part]:
    """The parts of what `path` names, sorted by split. Raises UserError where that is nothing, or not of one kind."""
    printable(path)
    if not path.exists() and not path.is_symlink():
        raise UserError(f"data.name: the file or folder {shown(path)} does not exist: give one that holds {KINDS}")
    if not path.is_dir():
        return _file(regular(path), config)
    top = listed(path)
    found: dict[str, Callable[[], list[Part]]] = {
        kind: partial(_tables, path, files, config) for kind, files in table_files(path).items()
    }
    if files := [file for file in top if file.suffix == ".npz"]:
        found["npz files"] = partial(_archives, path, files, config)
    if files := [file for file in top if idx.is_idx(file)]:
        found["IDX files"] = partial(idx.parts, files, config.splits, shown(path))
    if imagefolder.is_imagefolder(path):
        found["folders of images"] = partial(imagefolder.parts, path, config.splits)
    if len(found) > 1:
        raise UserError(f"{shown(path)}: {' and '.join(found)} in it: give a folder that has one kind, or one file")
    for read in found.values():
        return read()
    if any(file.suffix.lower() in imagefolder.SUFFIXES for file in top):
        raise UserError(f"{shown(path)}: images lie in it without a class: put them into a folder for each class")
    raise UserError(f"{shown(path)}: no parquet files in it or its data/, nor another kind: give {KINDS}")


def table_files(folder: Path) -> dict[str, list[Path]]:
    """The parquet files and the arrow files of a folder, by what they are; without any that there are none of."""
    top = listed(folder)
    data = listed(folder / "data") if (folder / "data").is_dir() else []
    inner = sorted(map(printable, folder.glob("*/*.arrow")))
    found = {
        "parquet files": [f for f in top if f.suffix == ".parquet"] or [f for f in data if f.suffix == ".parquet"],
        "arrow files": [f for f in top if f.suffix in ARROW] or inner,
    }
    return {kind: files for kind, files in found.items() if files}


def tables(path: Path, files: list[Path], splits: tuple[str, ...]) -> list[columnar.Table]:
    """Files in the hub's layout, `train-00000-of-00005.parquet`, or in a folder for each split."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        apart = file.parent != path and file.parent.name != "data" and file != path
        by_split.setdefault(file.parent.name if apart else file.stem.split("-")[0], []).append(file)
    chosen = choose(splits, set(by_split), shown(path))
    read = columnar.parquet if files[0].suffix == ".parquet" else columnar.arrow
    return [read(file, split) for split in chosen for file in by_split[split]]


def _file(path: Path, config: Data) -> list[Part]:
    if path.suffix in (".parquet", *ARROW):
        return _tables(path, [path], config)
    if path.suffix == ".npz":
        return _archives(path, [path], config)
    if idx.is_idx(path):
        return idx.parts(idx.relatives(path), config.splits, shown(path))
    raise UserError(f"data.name: {shown(path)} is of no known kind by its name: give {KINDS}")


def _tables(path: Path, files: list[Path], config: Data) -> list[Part]:
    return columnar.parts(tables(path, files, config.splits), config.image, config.label)


def _archives(path: Path, files: list[Path], config: Data) -> list[Part]:
    by_split: dict[str, list[Callable[[], Part]]] = {}
    for file in files:
        for split, part in npz.parts(file, config.image, config.label).items():
            by_split.setdefault(split, []).append(part)
    return [part() for split in choose(config.splits, set(by_split), shown(path)) for part in by_split[split]]
