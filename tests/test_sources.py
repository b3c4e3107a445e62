"""Sources of every kind: found by what is there, read alike, with class names; what is ambiguous is asked about."""

import gzip
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from fedmoe import data
from fedmoe.config import Data
from fedmoe.errors import UserError
from tests import sourcefiles
from tests.sourcefiles import CLASSES, LABELS, PIXELS, SOURCES, WRITERS, idx_bytes, png


def load(path: Path, **config: Any) -> data.Dataset:
    return data.load(Data(name=str(path), **config), seed=0)


def complaint(path: Path, **config: Any) -> str:
    """The one line that is refused with."""
    with pytest.raises(UserError) as caught:
        load(path, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_pairs(found: data.Dataset) -> list[tuple[bytes, str]]:
    """Images with their classes' names, in an order of their own."""
    names = ((image.numpy().tobytes(), found.classes[y]) for image, y in zip(found.inputs, found.labels, strict=True))
    return sorted(names)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_gives_the_same_samples(tmp_path: Path, kind: str) -> None:
    found = load(SOURCES[kind](tmp_path))
    assert found.inputs.shape == (12, 1, 5, 6) and found.inputs.dtype == torch.uint8
    named = "idx" not in kind  # which has no names
    assert found.classes == (CLASSES if named else ("0", "1", "2"))
    expected = [(p.tobytes(), CLASSES[y] if named else str(y)) for p, y in zip(PIXELS, LABELS, strict=True)]
    assert as_pairs(found) == sorted(expected)


@pytest.mark.parametrize("kind", SOURCES)
def test_limit_splits_and_sizes_work_for_every_kind(tmp_path: Path, kind: str) -> None:
    path = SOURCES[kind](tmp_path)
    part = load(path, limit=5, image_size=4)
    assert part.inputs.shape == (5, 1, 4, 4)
    assert load(path, splits=("train",)).labels.bincount().tolist() in ([3, 3, 2], [4, 4, 4])
    assert "has no split 'dev': set data.splits to any of" in complaint(path, splits=("dev",))


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "npz", "idx gzipped"])
def test_a_file_may_be_named_itself(tmp_path: Path, kind: str) -> None:
    path = SOURCES[kind](tmp_path)
    for file in sorted(path.iterdir())[:1]:
        assert len(load(file).labels) == 12
    assert "is of no known kind by its name" in complaint(Path(shutil.copy(file, tmp_path / "some.bin")))


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {"image": [{"bytes": png(p), "path": None} for p in PIXELS], "label": LABELS.tolist()}
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.disable_progress_bars()
    datasets.DatasetDict(train=whole.select(range(8)), test=whole.select(range(8, 12))).save_to_disk(tmp_path / "both")
    whole.save_to_disk(tmp_path / "one")
    expected = [(p.tobytes(), CLASSES[y]) for p, y in zip(PIXELS, LABELS, strict=True)]
    for name in ("both", "one"):
        assert as_pairs(load(tmp_path / name)) == sorted(expected)
        assert load(tmp_path / name).classes == CLASSES
    assert len(load(tmp_path / "both", splits=("test",)).labels) == 4


@pytest.mark.parametrize(
    "names",
    ["train_images train_labels", "images_train labels_train", "trainImages trainLabels", "X_train Y_train", "a b"],
)
def test_arrays_are_found_by_their_names_or_as_the_only_ones(tmp_path: Path, names: str) -> None:
    x, y = names.split()
    given: dict[str, Any] = {x: PIXELS, y: LABELS[:, None] if "train" in x else LABELS}
    np.savez(tmp_path / "a.npz", **given)
    found = load(tmp_path / "a.npz")
    assert found.labels.tolist() == LABELS.tolist()
    assert torch.equal(found.inputs[:, 0], torch.from_numpy(PIXELS))


def test_bytes_are_text(tmp_path: Path) -> None:
    path = sourcefiles.npz(tmp_path, classes=np.array([name.encode() for name in CLASSES]))
    assert load(path).classes == CLASSES


def test_arrays_that_may_be_meant_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=PIXELS, b=255 - PIXELS, c=LABELS, d=LABELS)
    said = complaint(path)
    assert "2 arrays may be the images among a uint8[12, 5, 6], b " in said and said.endswith("name one in data.image")
    assert complaint(path, image="a").endswith("name one in data.label")
    assert torch.equal(load(path, image="b", label="c").inputs[:, 0], torch.from_numpy(255 - PIXELS))
    assert "0 arrays may be the images" in complaint(path, image="z")


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (PIXELS / np.float32(255), PIXELS),
        (PIXELS.astype(np.float64), PIXELS),
        (PIXELS.astype(np.int64), PIXELS),
        (PIXELS.astype(">i2"), PIXELS),
        (PIXELS > 128, np.uint8(255) * (PIXELS > 128)),
        (np.asfortranarray(PIXELS), PIXELS),
    ],
)
def test_numbers_are_pixels_where_their_meaning_is_plain(tmp_path: Path, pixels: Any, expected: Any) -> None:
    np.savez(tmp_path / "a.npz", x=pixels, y=LABELS)
    assert torch.equal(load(tmp_path / "a.npz").inputs[:, 0], torch.from_numpy(expected.astype(np.uint8)))


def test_channels_may_be_last_or_second(tmp_path: Path) -> None:
    colors = np.stack([PIXELS, 255 - PIXELS, PIXELS // 2], -1)
    np.savez(tmp_path / "last.npz", x=colors, y=LABELS)
    np.savez(tmp_path / "second.npz", x=colors.transpose(0, 3, 1, 2), y=LABELS)
    last, second = load(tmp_path / "last.npz"), load(tmp_path / "second.npz")
    assert last.fingerprint == second.fingerprint
    assert last.inputs.shape == (12, 3, 5, 6)
    assert load(tmp_path / "last.npz", image_size=9).inputs.shape == (12, 3, 9, 9)


def test_idx_files_of_several_data_sets_are_told_apart(tmp_path: Path) -> None:
    sourcefiles.idx(tmp_path, prefix="emnist-letters-")
    assert len(load(tmp_path).labels) == 12
    sourcefiles.idx(tmp_path, prefix="emnist-digits-")
    assert "2 data sets, emnist-digits, emnist-letters: give a file of one in data.name" in complaint(tmp_path)
    found = load(tmp_path / "emnist-letters-train-images-idx3-ubyte.gz", splits=("test",))
    assert found.labels.tolist() == LABELS[8:].tolist()
    (tmp_path / "dots").mkdir()
    for what, array in (("images.idx3", PIXELS), ("labels.idx1", LABELS)):
        (tmp_path / "dots" / f"train-{what}-ubyte").write_bytes(idx_bytes(array))
    assert len(load(tmp_path / "dots").labels) == 12
    (tmp_path / "dots" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(PIXELS)))
    assert "holds the same as train-images" in complaint(tmp_path / "dots")


@pytest.mark.parametrize("name", ["./absent", "train-images-idx3-ubyte", "absent.parquet"])
def test_names_of_files_are_never_looked_for_on_the_hub(name: str) -> None:
    assert complaint(Path(name) if name[0] != "." else Path.cwd() / name).startswith("data.name: the file or folder ")


def test_folders_of_two_kinds_are_ambiguous(tmp_path: Path) -> None:
    sourcefiles.npz(sourcefiles.parquet(tmp_path))
    assert "parquet files and npz files in it: give a folder that has one kind" in complaint(tmp_path)
    sourcefiles.imagefolder(tmp_path)
    assert "npz files and folders of images" in complaint(tmp_path)


def test_classes_that_a_split_lacks_keep_their_numbers(tmp_path: Path) -> None:
    path = sourcefiles.imagefolder(tmp_path, splits=True)
    shutil.rmtree(path / "test" / "cat")
    found = load(path)
    assert found.classes == CLASSES
    assert found.labels.bincount().tolist() == [3, 4, 4]


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "npz"])
def test_other_columns_are_at_hand(tmp_path: Path, kind: str) -> None:
    found = load(SOURCES[kind](tmp_path), limit=7)
    whole = {p.tobytes(): w for p, w in zip(PIXELS, WRITERS, strict=True)}
    assert found.column("writer") == [whole[image.numpy().tobytes()] for image in found.inputs]
    assert set(found.column("split")) <= {"train", "test"}
    with pytest.raises(UserError, match=r"no column 'hand' of names or whole numbers among .*writer.*split"):
        found.column("hand")


def test_the_folder_above_classes_is_a_column(tmp_path: Path) -> None:
    found = load(sourcefiles.imagefolder(tmp_path, splits=True))
    assert found.column("split") == ["test"] * 4 + ["train"] * 8
