"""Predictions of image files: the run's own numbers, one line for what is broken, the rest all the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedmoe import export
from fedmoe.data import read_image
from fedmoe.errors import UsageError, UserError
from fedmoe.predict import Prediction, predictions
from fedmoe.predict import run as predict
from tests.serving import SHAPE, images, served
from tests.support import SMALL, Fedmoe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of the model's own shape, one of them further down, and what is none."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for name, image in zip(("b.png", "a.PNG", "below/c.bmp"), images(3), strict=True):
        Image.fromarray(image[0].numpy()).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_predictions_are_the_models(folder: Path) -> None:
    one = served("batch norms")
    made = list(predictions(one, [folder, folder / "b.png"], 2))
    with torch.no_grad():
        probabilities, weights = one.model(images(3))
    assert all(isinstance(answer, Prediction) for answer in made)
    rows = [answer for answer in made if isinstance(answer, Prediction)]
    assert [row.file for row in rows] == [folder / n for n in ("a.PNG", "b.png", "below/c.bmp", "b.png")]
    for row, index in zip(rows, (1, 0, 2, 0), strict=True):
        best = probabilities[index].sort(descending=True)
        assert [name for name, _ in row.top] == ["abcdefg"[i] for i in best.indices[:2].tolist()]
        assert [p for _, p in row.top] == pytest.approx(best.values[:2].tolist(), abs=1e-6)
        assert row.weights == pytest.approx(weights[index].tolist(), abs=1e-6)


def test_more_images_than_a_batch_and_more_classes_than_there_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.predict.BATCH", 2)
    made = list(predictions(served("local"), [folder], 100))
    assert len(made) == 3
    for row in made:
        assert isinstance(row, Prediction) and len(row.top) == 7 and row.weights == [0, 1]


def test_images_are_converted_to_the_models_mode_and_size(tmp_path: Path) -> None:
    colors = np.arange(3 * 8 * 10, dtype=np.uint8).reshape(8, 10, 3)
    Image.fromarray(colors).save(tmp_path / "rgb.png")
    Image.fromarray(colors[..., 0]).save(tmp_path / "gray.png")
    Image.fromarray(colors).convert("RGBA").save(tmp_path / "rgba.png")
    gray, rgb = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("gray", "rgb"))
    assert torch.equal(read_image(tmp_path / "gray.png", (1, 8, 10)), torch.from_numpy(gray)[None])
    for name in ("rgb", "rgba"):
        assert torch.equal(read_image(tmp_path / f"{name}.png", (3, 8, 10)), torch.from_numpy(rgb).permute(2, 0, 1))
    assert torch.equal(read_image(tmp_path / "gray.png", (3, 8, 10)), torch.from_numpy(gray).expand(3, 8, 10))
    as_gray = np.array(Image.fromarray(colors).convert("L"))
    assert torch.equal(read_image(tmp_path / "rgb.png", (1, 8, 10)), torch.from_numpy(as_gray)[None])
    small = np.array(Image.fromarray(colors[..., 0]).resize((5, 4), Image.Resampling.BILINEAR))
    assert torch.equal(read_image(tmp_path / "gray.png", (1, 4, 5)), torch.from_numpy(small)[None])


def test_what_is_broken_is_told_and_the_rest_predicted(folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "b.png").read_bytes()[:-30])
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "deep.png")
    (folder / "none").mkdir()
    (folder / "e\n\x1b[31m.png").write_bytes(b"")
    inputs = [folder / "nowhere", folder, folder / "none", folder / "notes.txt", Path("/dev/null")]
    made = list(predictions(served("static"), inputs, 1))
    told = [str(answer) for answer in made if isinstance(answer, UserError)]
    assert len(made) - len(told) == 3
    assert told[0] == f"{folder / 'nowhere'}: does not exist"
    assert told[1].startswith(f"{folder / 'cut.png'}: image cannot be decoded (")
    assert told[2] == f"{folder / 'deep.png'}: image cannot be decoded (mode I;16 has more than 8 bits a channel)"
    assert told[3] == rf"{folder}/e\n\x1b[31m.png: image cannot be decoded (unknown format)"
    assert told[4] == f"{folder / 'none'}: no image files in it"
    assert told[5] == f"{folder / 'notes.txt'}: image cannot be decoded (unknown format)"
    assert told[6] == "/dev/null: is neither a file nor a folder" and len(told) == 7


def test_a_model_that_has_diverged_says_so(folder: Path) -> None:
    one = served("local")
    with torch.no_grad():
        next(one.model.parameters()).fill_(torch.nan)
    for answer in predictions(one, [folder], 1):
        assert isinstance(answer, UserError) and "probabilities that are not finite" in str(answer)


def test_from_a_run_and_from_its_export(tmp_path: Path, folder: Path, fedmoe: Fedmoe) -> None:
    assert fedmoe("train", *SMALL, "--federation.rounds=1", "--run.dir=run").code == 0
    export.run(tmp_path / "run", 3, ["safetensors"], False, tmp_path / "model")
    (folder / "bad.png").touch()
    done = fedmoe("predict", "model", "images", "--top=2", "--json")
    assert done.code == 1
    assert done.err == "fedmoe: error: images/bad.png: image cannot be decoded (unknown format)\n"
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["file"] for line in lines] == ["images/a.PNG", "images/b.png", "images/below/c.bmp"]
    assert all(len(line["classes"]) == 2 and sum(line["weights"].values()) == pytest.approx(1) for line in lines)
    alone = json.loads(fedmoe("predict", "run", "images/b.png", "--client=3", "--top=2", "--json").out)
    assert alone["weights"] == pytest.approx(lines[1]["weights"], abs=1e-6)
    for ours, theirs in zip(alone["classes"], lines[1]["classes"], strict=True):
        assert ours["class"] == theirs["class"]
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-6)
    (folder / "bad.png").unlink()
    done = fedmoe("predict", "model", "images")
    assert done.code == 0 and not done.err
    assert "client 3, cnn-4, after round 1" in done.out
    first = lines[0]["classes"][0]
    assert "images/a.PNG" in done.out and f"{first['class']} {first['probability']:.3f}  " in done.out


def test_models_that_there_are_not(tmp_path: Path, folder: Path, fedmoe: Fedmoe) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for words, line in (
        ((folder,), "images is neither a run, with a config.toml, nor an export, with a config.json"),
        ((tmp_path / "model",), "config.json: does not describe an export (KeyError: 'format'): export it again"),
    ):
        with pytest.raises(UserError) as caught:
            predict(*words, [folder], 1, False, None)
        assert str(caught.value).endswith(line)
    for model, top, client in (("run", 1, None), ("model", 1, 2), ("model", 0, None)):
        with pytest.raises(UsageError):
            predict(tmp_path / model, [folder], top, False, client)
    assert "say which with --client" in fedmoe("predict", "run", "images").one_line(2)


def test_an_image_of_another_size_is_predicted_too(folder: Path) -> None:
    Image.new("RGB", (300, 7)).save(folder / "large.jpg")
    [made] = predictions(served("static"), [folder / "large.jpg"], 1)
    assert isinstance(made, Prediction) and made.weights == pytest.approx([0.3, 0.7])
    assert read_image(folder / "large.jpg", SHAPE).shape == SHAPE
