"""An export is read back as it was, and what is wrong with one is told in one line that names the file."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe import export
from fedmoe.errors import UserError
from fedmoe.serving import Card, from_export
from tests.serving import CONFIGS, images, served


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export."""
    one = served("batch norms")
    card = export._write("safetensors", one, one.card, tmp_path)
    (tmp_path / "config.json").write_text(card.to_json())
    return tmp_path


@pytest.mark.parametrize("kind", CONFIGS)
def test_read_back_it_is_the_same_to_the_bit(tmp_path: Path, kind: str) -> None:
    one = served(kind)
    card = export._write("safetensors", one, one.card, tmp_path)
    (tmp_path / "config.json").write_text(card.to_json())
    again = from_export(tmp_path)
    assert dataclasses.replace(again.card, config=card.config) == card
    assert again.card.to_json() == card.to_json()
    with torch.no_grad():
        for ours, theirs in zip(again.model(images(4)), one.model(images(4)), strict=True):
            assert torch.equal(ours, theirs)


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """The card with something in it changed."""

    def write(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return write


def flipped(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (flipped, r"model.safetensors: SHA-256 is \w+\.\.\., config.json says \w+\.\.\.: restore it"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: size is 0 bytes, config.json says"),
        (lambda f: (f / "model.safetensors").unlink(), r"model.safetensors: cannot be read \(No such file"),
        (lambda f: (f / "config.json").write_text("{"), r"config.json: does not describe an export \(JSONDecodeError"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: does not describe an export"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json: does not describe an export"),
        (rewritten(lambda c: c.update(format=2)), "config.json: format 2, this version reads 1"),
        (rewritten(lambda c: c.pop("width")), "config.json: does not describe an export .*'width'"),
        (rewritten(lambda c: c.update(more=1)), "config.json: does not describe an export .*'more'"),
        (rewritten(lambda c: c.update(shape=[1, 16])), "config.json: does not describe an export"),
        (rewritten(lambda c: c.update(shape=[1, 16, -2])), "config.json: does not describe an export"),
        (rewritten(lambda c: c.update(shape="abc")), "config.json: does not describe an export"),
        (rewritten(lambda c: c.update(classes=[])), "config.json: does not describe an export"),
        (rewritten(lambda c: c.update(classes=[1])), "config.json: does not describe an export"),
        (rewritten(lambda c: c.update(classes="abcdefg")), "config.json: does not describe an export"),
        (rewritten(lambda c: c.update(weights=[])), "config.json: does not describe an export"),
        (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json: does not describe an export .*Recursion"),
        (rewritten(lambda c: c.update(classes=["a"])), "model.safetensors: tensor 'header.bias' is .* have .*: export"),
        (rewritten(lambda c: c["config"]["gate"].update(norm="x")), "config.json: gate.norm is"),
        (rewritten(lambda c: c["config"]["gate"].update(nrm="x")), "config.json: unknown key 'gate.nrm'"),
        (rewritten(lambda c: c["config"]["gate"].update(norm="none")), "is torch.float32 .*, its models have missing"),
        (rewritten(lambda c: c["config"]["model"].update(local=["cnn-9"])), "model 'cnn-9' is none of cnn-1"),
        (rewritten(lambda c: c["weights"].update(file="../x")), "config.json: does not describe an export"),
        (rewritten(lambda c: c.update(weights=None)), "has no model.safetensors: export it again with --format"),
    ],
)
def test_damage(folder: Path, damage: Callable[[Path], object], line: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=line) as caught:
        from_export(folder)
    assert "\n" not in str(caught.value)


def test_a_card_says_what_the_model_is(folder: Path) -> None:
    card = Card.read(folder)
    assert (card.client, card.round, card.theta, card.shape, card.width) == (3, 7, "own", (1, 16, 20), 50)
    assert card.classes == tuple("abcdefg")
    assert (card.config.gate.norm, card.config.model.local[0]) == ("paper", "cnn-1")
