"""Data sets: what is read from parquet, the hub and scikit-learn, and what each kind of damage is called."""

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedmoe import data
from fedmoe.config import Data
from fedmoe.errors import UserError
from fedmoe.sources import columnar

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"


def picture(value: int, size: tuple[int, int] = (6, 4), mode: str = "RGB", kind: str = "PNG") -> bytes:
    """An encoded image of noise that `value` determines."""
    rng = np.random.default_rng(value)
    channels = {"RGB": (3,), "RGBA": (4,), "CMYK": (4,)}.get(mode, ())
    dtype = np.uint16 if mode == "I;16" else np.uint8
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], *channels)).astype(dtype))
    if image.mode != mode:
        image = Image.frombytes(mode, image.size, image.tobytes()) if channels else image.convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def write(
    path: Path,
    labels: Sequence[int | None],
    images: Sequence[bytes] | None = None,
    classes: Sequence[str] = ("cat", "dog", "owl"),
    columns: dict[str, Any] | None = None,
) -> Path:
    """A parquet file in the hub's layout; without class names in its metadata if `classes` is empty."""
    images = images if images is not None else [picture(row) for row in range(len(labels))]
    encoded = pa.array(
        [{"bytes": image, "path": None} for image in images], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    table = pa.table({"img": encoded, "label": pa.array(labels, pa.int64())} if columns is None else columns)
    if classes:
        features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(classes)}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)
    return path


def complaint(**config: Any) -> str:
    """The one line that `load` refuses this configuration with."""
    with pytest.raises(UserError) as caught:
        data.load(Data(**config), seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_are_resized_to_28_gray_pixels() -> None:
    digits = data.load(Data(), seed=0)
    assert digits.inputs.shape == (1797, 1, 28, 28)
    assert digits.inputs.dtype == torch.uint8
    assert digits.labels.dtype == torch.int64
    assert digits.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.classes == tuple("0123456789")
    assert digits.inputs.amax() == 255
    assert data.load(Data(image_size=8), seed=0).inputs[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def test_splits_are_pooled_in_sorted_order_and_pixels_survive(tmp_path: Path) -> None:
    write(tmp_path / "train-00001-of-00002.parquet", [2, 2], [picture(5), picture(6)])
    write(tmp_path / "train-00000-of-00002.parquet", [0, 1], [picture(3), picture(4)])
    write(tmp_path / "test-00000-of-00001.parquet", [1, 0, 1], [picture(0), picture(1), picture(2)])
    found = data.load(Data(name=str(tmp_path)), seed=0)
    assert found.labels.tolist() == [1, 0, 1, 0, 1, 2, 2]
    assert found.classes == ("cat", "dog", "owl")
    assert found.inputs.shape == (7, 3, 4, 6)
    for row in range(7):
        expected = np.random.default_rng(row).integers(0, 256, (4, 6, 3)).astype(np.uint8)
        assert np.array_equal(found.inputs[row].numpy().transpose(1, 2, 0), expected)
    train = data.load(Data(name=str(tmp_path), splits=("train",)), seed=0)
    assert torch.equal(train.inputs, found.inputs[3:])


def test_a_data_subfolder_and_a_file_without_shard_numbers_are_found(tmp_path: Path) -> None:
    write(tmp_path / "data" / "validation.parquet", [0, 2, 1])
    assert data.load(Data(name=str(tmp_path), splits=("validation",)), seed=0).labels.tolist() == [0, 2, 1]


def test_batches_and_row_groups_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "train.parquet", [row % 3 for row in range(11)])
    whole = [data.load(Data(name=str(tmp_path), limit=limit), seed=0).fingerprint for limit in (0, 5)]
    monkeypatch.setattr(columnar, "BATCH", 3)
    assert [data.load(Data(name=str(tmp_path), limit=limit), seed=0).fingerprint for limit in (0, 5)] == whole
    write(path, [0] * 11, [picture(0)] * 9 + [b"?"] * 2)
    assert "row 9: image cannot be decoded" in complaint(name=str(tmp_path))
    write(path, [0] * 9 + [None] * 2)
    assert "row 9: no label" in complaint(name=str(tmp_path))


def test_limit_keeps_a_seeded_subset_in_order(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", [0] * 10, [picture(row) for row in range(10)])
    write(tmp_path / "train.parquet", [1] * 20, [picture(row) for row in range(10, 30)])
    whole = data.load(Data(name=str(tmp_path)), seed=0)
    number = {bytes(image.numpy().tobytes()): row for row, image in enumerate(whole.inputs)}
    drawn = []
    for seed in (0, 0, 1):
        part = data.load(Data(name=str(tmp_path), limit=12), seed=seed)
        rows = [number[image.numpy().tobytes()] for image in part.inputs]
        assert len(set(rows)) == 12
        assert rows == sorted(rows)
        assert torch.equal(part.labels, whole.labels[rows])
        drawn.append(rows)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(data.load(Data(name=str(tmp_path), limit=31), seed=0).labels) == 30


@pytest.mark.parametrize(
    ("mode", "kind", "channels"),
    [("L", "PNG", 1), ("1", "PNG", 1), ("RGB", "JPEG", 3), ("RGBA", "PNG", 3), ("P", "PNG", 3), ("CMYK", "JPEG", 3)],
)
def test_gray_stays_gray_and_the_rest_becomes_rgb(tmp_path: Path, mode: str, kind: str, channels: int) -> None:
    write(tmp_path / "train.parquet", [0], [picture(0, mode=mode, kind=kind)])
    assert data.load(Data(name=str(tmp_path)), seed=0).inputs.shape == (1, channels, 4, 6)


def test_image_size_resizes_whatever_the_size(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1], [picture(0, (6, 4)), picture(1, (9, 9))])
    assert data.load(Data(name=str(tmp_path), image_size=5), seed=0).inputs.shape == (2, 3, 5, 5)


def test_columns_can_be_named_and_labels_need_no_names(tmp_path: Path) -> None:
    table = pq.read_table(write(tmp_path / "a.parquet", [0, 1, 4, 0, 0]))
    pq.write_table(table.rename_columns(["picture", "kind"]).replace_schema_metadata(), tmp_path / "a.parquet")
    found = data.load(Data(name=str(tmp_path), image="picture", label="kind"), seed=0)
    assert found.classes == ("0", "1", "2", "3", "4")
    assert "0 label columns among picture" in complaint(name=str(tmp_path))
    assert "no label column 'sort' among" in complaint(name=str(tmp_path), label="sort")
    assert "no image column 'kind' among" in complaint(name=str(tmp_path), image="kind")


def test_the_only_class_label_column_is_found(tmp_path: Path) -> None:
    table = pq.read_table(write(tmp_path / "a.parquet", [2, 1]))
    features = {"species": {"_type": "ClassLabel", "names": ["x", "y", "z"]}}
    table = table.rename_columns(["img", "species"]).append_column("weight", pa.array([7, 8]))
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "a.parquet")
    found = data.load(Data(name=str(tmp_path)), seed=0)
    assert (found.labels.tolist(), found.classes) == ([2, 1], ("x", "y", "z"))


def test_the_fingerprint_changes_with_pixels_labels_and_names(tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"images": [picture(0), picture(2)]},
        {"labels": [0, 2]},
        {"classes": ("cat", "dog", "elk")},
        {"images": [picture(0, (4, 6)), picture(1, (4, 6))]},
    ]
    prints = []
    for number, variant in enumerate(variants):
        write(tmp_path / str(number) / "train.parquet", **({"labels": [0, 1]} | variant))
        prints.append(data.load(Data(name=str(tmp_path / str(number))), seed=0).fingerprint)
    write(tmp_path / "again" / "test.parquet", [0, 1])
    assert len(set(prints)) == len(variants)
    assert data.load(Data(name=str(tmp_path / "again")), seed=0).fingerprint == prints[0]


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "label too high": ({"labels": [0, 1, 2, 0, 1, 3]}, "row 5: label 3 out of range, 0 to 2: repair"),
    "unlabeled": ({"labels": [0, -1]}, "row 1: label -1 out of range, 0 to 2: leave unlabeled splits out with data.sp"),
    "absurd label": ({"labels": [0, 2**40], "classes": ()}, f"row 1: label {2**40} out of range, 0 to 1: repair"),
    "no label": ({"labels": [0, 1, 2, 0, None]}, "row 4: no label: repair"),
    "no image": ({"labels": [0] * 5, "images": [picture(0)] * 4 + [b"?"]}, "row 4: image cannot be decoded (unknown f"),
    "cut image": ({"labels": [0], "images": [picture(0, (60, 40))[:900]]}, "row 0: image cannot be decoded (image fi"),
    "deep image": ({"labels": [0], "images": [picture(0, mode="I;16")]}, "(mode I;16 has more than 8 bits a channel)"),
    "sizes": (
        {"labels": [0, 1], "images": [picture(0), picture(1, (5, 4))]},
        "row 1: 5 x 4 RGB pixels, but 6 x 4 RGB pixels in the first: set data.image_size",
    ),
    "modes": (
        {"labels": [0, 1], "images": [picture(0), picture(1, mode="L")]},
        "row 1: 6 x 4 gray pixels, but 6 x 4 RGB pixels in the first: convert them to one mode",
    ),
    "no image column": (
        {"labels": [], "columns": {"text": ["a"], "label": [0]}},
        "0 image columns among text (string), label (int64): name one in data.image",
    ),
    "words as labels": (
        {"labels": [], "columns": {"img": [{"bytes": picture(0)}], "label": ["cat"]}},
        "no label column 'label' among img (struct<bytes: binary>), label (string): name one in data.label",
    ),
    "empty": ({"labels": []}, "no samples in it"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_its_file(tmp_path: Path, damage: str) -> None:
    content, expected = DAMAGE[damage]
    path = write(tmp_path / "train-00000-of-00001.parquet", **content)
    message = complaint(name=str(tmp_path))
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_a_truncated_or_overwritten_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "train-00000-of-00001.parquet", [0, 1, 2] * 20)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4] + bytes(56) + whole[60:], b""):
        assert len(data.load(Data(name=str(tmp_path)), seed=0).labels) == 60
        path.write_bytes(content)
        assert complaint(name=str(tmp_path)).startswith(f"{path}: not a whole parquet file (")
        path.write_bytes(whole)


def test_files_that_disagree_are_named(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", [0])
    other = write(tmp_path / "train.parquet", [0], classes=("cat", "dog", "elk"))
    assert complaint(name=str(tmp_path)).startswith(f"{other}: other class names than in {tmp_path / 'test.parquet'}")
    write(other, [], columns={"image": [{"bytes": picture(0)}], "label": [0]})
    assert complaint(name=str(tmp_path)).startswith(f"{other}: no image column 'img' among image")


def test_folders_and_splits_that_are_not_there(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert f"the file or folder {absent} does not exist" in complaint(name=str(absent))
    assert "the file or folder ../absent-folder does not exist" in complaint(name="../absent-folder")
    assert f"{tmp_path}: no parquet files in it" in complaint(name=str(tmp_path))
    file = write(tmp_path / "train.parquet", [0])
    write(tmp_path / "test.parquet", [0])
    assert data.load(Data(name=str(file)), seed=0).labels.tolist() == [0]
    assert "has no split 'dev': set data.splits to any of test, train" in complaint(name=str(tmp_path), splits=("dev",))
    assert "digits has no split 'test': set data.splits to any of train" in complaint(splits=("test",))
    assert "data.limit is -1" in complaint(limit=-1)
    assert "data.image_size is -8" in complaint(image_size=-8)


def test_the_hub_takes_the_same_path_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lone.png").write_bytes(picture(2))
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])})
    images = [{"bytes": picture(0), "path": None}, {"bytes": picture(1), "path": None}]
    on_disk = [{"bytes": None, "path": str(tmp_path / "lone.png")}]  # as an image folder comes
    found = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"img": on_disk, "label": [2]}, features=features),
        test=datasets.Dataset.from_dict({"img": images, "label": [0, 1]}, features=features),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"someone/pets": found}[name])
    write(tmp_path / "folder" / "train.parquet", [0, 1, 2])
    expected = data.load(Data(name=str(tmp_path / "folder")), seed=0)
    assert data.load(Data(name="someone/pets"), seed=0).fingerprint == expected.fingerprint
    assert "someone/pets has no split 'dev'" in complaint(name="someone/pets", splits=("dev",))


def test_a_failing_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> None:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = complaint(name="someone/pets")
    assert message.startswith("data.name: 'someone/pets' is no file or folder here")
    assert "(Couldn't reach 'someone/pets' on the Hub)" in message


def test_normalize() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    result = data.normalize(images, mean=0.2, std=0.4)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor([-0.5, 0.0, 2.0]).view(1, 1, 1, 3))
    assert images.flatten().tolist() == [0, 51, 255]


def test_importing_the_module_imports_no_reader() -> None:
    program = "import fedmoe.data, sys; print({'datasets', 'sklearn', 'pyarrow', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 in parquet is not beside the checkout")
def test_cifar10() -> None:
    found = data.load(Data(name=str(CIFAR10), splits=("test",), limit=500), seed=0)
    assert found.inputs.shape == (500, 3, 32, 32)
    assert found.classes[0] == "airplane"
    assert found.labels.bincount(minlength=10).min() > 20
    assert found.inputs.float().mean().item() == pytest.approx(121, abs=4)
