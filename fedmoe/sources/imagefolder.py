"""Samples in image files, a folder for each class: `root/class/*.png`, or `root/split/class/*.png`."""

from functools import partial
from pathlib import Path

import numpy as np

from fedmoe.errors import UserError
from fedmoe.sources.part import Part, Picture, Rows, choose, listed, printable, regular, shown

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}


def is_imagefolder(root: Path) -> bool:
    """Whether an image lies in one of its folders, or in one of theirs."""
    return any(_holds_images(folder) or any(map(_holds_images, _folders(folder))) for folder in _folders(root))


def parts(root: Path, splits: tuple[str, ...]) -> list[Part]:
    """A part for each split; `train` if there are none. Classes are in the order of their names."""
    above = _folders(root)
    nested = [folder for folder in above if not _holds_images(folder) and any(map(_holds_images, _folders(folder)))]
    if nested and len(nested) < len(above):
        other = next(folder for folder in above if folder not in nested)
        raise UserError(
            f"{shown(root)}: {nested[0].name} has folders of images, {other.name} has none: either all folders are "
            "classes, or all are splits with a folder for each class"
        )
    by_split = {folder.name: folder for folder in nested} or {"train": root}
    chosen = {split: _folders(by_split[split]) for split in choose(splits, set(by_split), shown(root))}
    classes = sorted({folder.name for folders in chosen.values() for folder in folders})
    return [_part(root, split, folders, classes) for split, folders in chosen.items()]


def _part(root: Path, split: str, folders: list[Path], classes: list[str]) -> Part:
    files: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        images = [_image(path) for path in listed(folder)]
        if not images:
            raise UserError(f"{shown(folder)}: no images in it: add some, or remove the folder")
        files += images
        labels += [classes.index(folder.name)] * len(images)
    return Part(
        name=shown(root if not folders else folders[0].parent),
        split=split,
        labels=np.array(labels, dtype=np.int64),
        classes=tuple(classes),
        images=partial(_images, files),
        image_at=lambda row: shown(files[row]),
        label_at=lambda row: shown(files[row]),
    )


def _images(files: list[Path], rows: Rows) -> "map[Picture]":
    return map(files.__getitem__, rows)


def _image(path: Path) -> Path:
    if path.suffix.lower() not in SUFFIXES:
        known = " ".join(sorted(SUFFIXES))
        raise UserError(f"{shown(path)}: lies among a class's images and is none by its name ({known}): remove it")
    return regular(path)


def _holds_images(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in folder.iterdir() if not path.name.startswith("."))


def _folders(folder: Path) -> list[Path]:
    """Those in it, sorted."""
    found = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [printable(path) for path in sorted(found)]
