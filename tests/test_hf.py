"""Models of transformers come by folder or name; what is wrong with one is told in one line; image classifiers too."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe.config import Config, Model
from fedmoe.errors import UserError
from fedmoe.experts import build
from fedmoe.meaning import ignored
from fedmoe.models import hf, language
from tests.hfmodels import VOCABULARY, save
from tests.support import Fedmoe, changed

transformers = pytest.importorskip("transformers", reason="the extra `lm` has it")
SHAPE = (1, 28, 28)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    above = tmp_path_factory.mktemp("models")
    for kind in ("llama", "vit", "resnet", "deit"):
        save(kind, above)
    return above


def make(name: str, **options: Any) -> language.Language:
    return language.make(name, Model(**options), VOCABULARY, 8)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_image_classifier_in_two_parts(models: Path, kind: str) -> None:
    extractor, header = build(f"hf/{models / kind}", SHAPE, 10)
    x = torch.randn(3, *SHAPE)
    whole = transformers.AutoModelForImageClassification.from_pretrained(models / kind)
    torch.testing.assert_close(header(extractor.eval()(x)), whole(pixel_values=x).logits)
    _, other = build(f"hf/{models / kind}", SHAPE, 7)
    assert other.out_features == 7
    fresh, header = build(f"hf/{models / kind}", (3, 42, 28), 10, Model(weights="random"))
    assert header(fresh(torch.randn(2, 3, 42, 28))).shape == (2, 10)


def test_what_of_an_image_classifier_trains(models: Path) -> None:
    for tune in ("lora", "frozen"):
        options = Model(tune=tune, frozen_dtype="bf16")
        extractor, header = build(f"hf/{models / 'vit'}", SHAPE, 7, options)
        header(extractor(torch.randn(2, *SHAPE))).sum().backward()
        trains = [name for name, p in extractor.named_parameters() if p.requires_grad]
        assert bool(trains) == (tune == "lora") and all("lora_" in name for name in trains)
        assert all(p.grad is not None for p in header.parameters())


def test_activation_checkpointing_of_an_image_classifier_is_as_asked_for(models: Path, fedmoe: Fedmoe) -> None:
    words = ("--data.limit", "60", "--federation.clients", "1", "--partition.kind", "iid", "--method", "local")
    for asked in ("auto", "on"):
        named = ("--model.local", f"hf/{models / 'vit'}", "--model.activation-checkpointing", asked)
        done = fedmoe("plan", *words, *named, "--json")
        assert done.code == 0, done
        made = json.loads(done.out)
        assert made["activation_checkpointing"] == (asked == "on")
        assert ("asked for" in made["reasons"]["activation_checkpointing"]) == (asked == "auto")


@pytest.mark.parametrize(
    ("kind", "shape", "options", "complaint"),
    [
        ("vit", (3, 28, 28), {}, "takes images of 1 channels, these have 3"),
        ("vit", (1, 32, 32), {}, "takes images of 28x28 pixels, these have 32x32: set data.image_size"),
        ("deit", SHAPE, {}, "does more than its layer"),
        ("llama", SHAPE, {}, "is not an image classifier"),
        ("resnet", SHAPE, {"tune": "lora"}, "has no linear layers that adapters could go into"),
    ],
)
def test_image_classifiers_that_do_not_fit(
    models: Path, kind: str, shape: tuple[int, int, int], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        build(f"hf/{models / kind}", shape, 10, Model(**options))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("hf/", "is neither a folder nor a name on the hub"),
        ("hf/nobody/nothing", "is neither a folder nor fetched already, and the hub cannot be reached"),
        ("hf/a b", "no such name can be on the hub"),
    ],
)
def test_names_that_nothing_has(name: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        make(name)


def test_an_old_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.3.9")
    with pytest.raises(UserError, match=r"^model 'hf/x' needs transformers 5.4 or newer, 5.3.9 is installed: pip"):
        hf.library("hf/x")
    monkeypatch.setattr(transformers, "__version__", "5.10rc1")
    assert hf.library("hf/x") is transformers


def test_folders_that_are_broken(models: Path, tmp_path: Path) -> None:
    def refused(file: str, content: bytes | None) -> str:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(models / "llama", folder)
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_bytes(content)
        with pytest.raises(UserError) as error:
            make(f"hf/{folder}")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "has no config.json" in refused("config.json", None)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no config.json: it holds adapters alone; name the folder of the model that"):
        make(f"hf/{tmp_path / 'adapters'}")
    assert "config.json cannot be used: " in refused("config.json", b"{")
    assert "cannot be used" in refused("config.json", b'{"model_type": "no_such"}')
    assert "has no weights in model.safetensors" in refused("model.safetensors", None)
    assert "cannot be made: SafetensorError" in refused("model.safetensors", b"x" * 100)
    config = json.loads((models / "llama" / "config.json").read_text())
    wider, deeper = ({**config, key: config[key] * 2} for key in ("intermediate_size", "num_hidden_layers"))
    assert "cannot be made" in refused("config.json", json.dumps(wider).encode())
    assert "lack 18 of its parameters, such as 'model.layers.2" in refused("config.json", json.dumps(deeper).encode())


def test_pickled_weights_are_not_read(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llama", tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(UserError, match="no other format is read"):
        make(f"hf/{tmp_path / 'a'}")
    assert make(f"hf/{tmp_path / 'a'}", weights="random").header.out_features == VOCABULARY


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, models: Path, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"needs {library}, which is not installed: pip install {library}"):
        make(f"hf/{models / 'llama'}", tune="lora")


def test_fields_without_effect() -> None:
    def told(**model: Any) -> list[str]:
        return [line.partition(" has no effect with ")[0] for line in ignored(changed(Config(), model=model))]

    assert sorted(told(attention="eager", tune="lora")) == ["model.attention = eager", "model.tune = lora"]
    text = changed(Config(), data={"kind": "text", "name": "stdlib"})
    only = changed(
        text, model={"tune": "lora", "weights": "random", "local": ("llama-tiny",), "global_expert": "llama-nano"}
    )
    assert [line.partition(" has")[0] for line in ignored(only)] == ["model.weights = random"]
    assert told(attention="eager", tune="lora", local=("hf/x",), lora_rank=2) == []
    assert told(tune="frozen", local=("hf/x",), lora_rank=2) == ["model.lora_rank = 2"]
