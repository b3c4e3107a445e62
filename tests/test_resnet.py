"""Residual networks have the published sizes, and a stem that small images survive."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmoe.experts import build, width
from fedmoe.models.resnet import Block, Extractor
from tests.support import size

IMAGENET, CIFAR = (3, 224, 224), (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet-18", 11_689_512), ("resnet-34", 21_797_672), ("resnet-50", 25_557_032)]
)
def test_published_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert size(*build(name, IMAGENET, 1000)) == parameters
        small = build(name, CIFAR, 1000)
    assert size(*small) == parameters - (7 * 7 - 3 * 3) * 3 * 64  # a stem of 3x3 in place of 7x7


@pytest.mark.parametrize(("shape", "side"), [(CIFAR, 4), ((1, 64, 64), 8), ((3, 65, 65), 3), ((3, 64, 96), 2)])
def test_stem_keeps_the_resolution_up_to_64_pixels(shape: tuple[int, int, int], side: int) -> None:
    extractor = build("resnet-18", shape, 10).extractor
    assert isinstance(extractor, Extractor)
    with torch.no_grad():
        features = extractor.eval().stages(extractor.stem(torch.zeros(1, *shape)))
    assert features.shape[:3] == (1, 512, side)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 8, 8), (2, 5, 70)])
def test_any_image_size_fits(shape: tuple[int, int, int]) -> None:
    assert width(build("resnet-18", shape, 10).extractor, shape) == 512


@pytest.mark.parametrize(("before", "stride"), [(64, 1), (32, 2)])
def test_bottleneck_is_written_out(before: int, stride: int) -> None:
    torch.manual_seed(0)
    block, x = Block(before, 16, stride, True), torch.randn(4, before, 6, 6)

    def layer(x: Tensor, conv: nn.Module, stride: int = 1, padding: int = 0) -> Tensor:
        assert isinstance(conv, nn.Conv2d)
        return F.batch_norm(F.conv2d(x, conv.weight, None, stride, padding), None, None, training=True)

    y = F.relu(layer(x, block.convs[0]))
    y = F.relu(layer(y, block.convs[1], stride, 1))
    y = layer(y, block.convs[2])
    around = x
    if stride == 2:
        assert isinstance(block.shortcut, nn.Sequential)
        around = layer(x, block.shortcut[0], 2)
    torch.testing.assert_close(block(x), F.relu(y + around))


def test_initialization_is_hes() -> None:
    torch.manual_seed(0)
    extractor = build("resnet-18", CIFAR, 10).extractor
    convs = [module for module in extractor.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs:
        fan = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert float(conv.weight.detach().std()) == pytest.approx((2 / fan) ** 0.5, rel=0.1)
        assert conv.bias is None
