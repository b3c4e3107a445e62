"""Models of timm come by name, sized for the images; what is missing is told in one line. timm is a stand-in here."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedmoe.errors import UserError
from fedmoe.experts import build

SHAPE = (3, 32, 48)


class Pooled(nn.Module):
    """Gives more features than it says, as models with a layer behind the pool do."""

    num_features = 5

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        self.conv = nn.Conv2d(options["in_chans"], 7, 3)
        self.norm = nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)).mean((2, 3))
        return out


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What of timm is used."""
    fake, names = ModuleType("timm"), ["mobilenetv3_small_050", "vit_tiny_patch16_224", "broken"]

    def create_model(name: str, **options: Any) -> nn.Module:
        if name == "broken":
            raise RuntimeError("no such layer\nsecond line")
        return Pooled(options)

    def config(name: str) -> SimpleNamespace | None:
        return None if name == "broken" else SimpleNamespace(fixed_input_size=name.startswith("vit"))

    fake.__dict__.update(
        __version__="1.0.99",
        is_model=names.__contains__,
        list_models=lambda: names,
        create_model=create_model,
        get_pretrained_cfg=config,
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    return fake


def test_untrained_features_of_the_width_that_comes_out(timm: ModuleType) -> None:
    extractor, header = build("timm/mobilenetv3_small_050", SHAPE, 10)
    assert isinstance(extractor, Pooled)
    assert extractor.options == {"pretrained": False, "num_classes": 0, "in_chans": 3}
    assert extractor.training and not extractor.get_buffer("norm.running_mean").any()
    assert header(extractor(torch.zeros(2, *SHAPE))).shape == (2, 10)


def test_models_of_a_fixed_input_size_are_told_it(timm: ModuleType) -> None:
    extractor, _ = build("timm/vit_tiny_patch16_224", SHAPE, 10)
    assert isinstance(extractor, Pooled) and extractor.options["img_size"] == (32, 48)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("timm/mobilenetv3_smal", "timm 1.0.99 has no 'mobilenetv3_smal', the nearest is 'mobilenetv3_small_050'$"),
        ("timm/hf-hub:timm/x", "timm 1.0.99 has no 'hf-hub:timm/x', the nearest is "),
        ("timm/broken", r"cannot be made for images of \[3, 32, 48\]: RuntimeError: no such layer$"),
    ],
)
def test_what_timm_cannot_make(timm: ModuleType, name: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build(name, SHAPE, 10)


@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        ("import no_such_thing", "needs timm, which needs no_such_thing, which is not installed$"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "cannot be imported here: RuntimeError: op"),
    ],
)
def test_timm_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, complaint: str
) -> None:
    (tmp_path / "timm.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(UserError, match=complaint):
        build("timm/mobilenetv3_small_050", SHAPE, 10)


def test_timm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(UserError, match=r"'timm/x' needs timm, which is not installed: pip install timm$"):
        build("timm/x", SHAPE, 10)
