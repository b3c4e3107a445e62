"""Residual networks (He et al., arXiv 1512.03385), with the stem for small images up to 64 pixels."""

from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

SMALL = 64
"""Pixels a side up to which the stem keeps the resolution; the usual one would leave 2x2 of 64x64 pixels."""


class Layers(NamedTuple):
    """Blocks of each stage, and whether they are bottlenecks."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool


RESNETS = {
    "resnet-18": Layers((2, 2, 2, 2), False),
    "resnet-34": Layers((3, 4, 6, 3), False),
    "resnet-50": Layers((3, 4, 6, 3), True),
}
NAMES = tuple(RESNETS)

conv = partial(nn.Conv2d, bias=False)  # a normalization follows, which has one


class Block(nn.Module):
    """Convolutions with a shortcut around them: two 3x3, or 1x1, 3x3 and 1x1 with four times the channels after.

    A bottleneck's stride is in its 3x3 convolution, as nearly everyone has it since; the paper has it in the first.
    """

    def __init__(self, before: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        after = _after(width, bottleneck)
        if bottleneck:
            layers = [conv(before, width, 1), conv(width, width, 3, stride, 1), conv(width, after, 1)]
        else:
            layers = [conv(before, width, 3, stride, 1), conv(width, after, 3, 1, 1)]
        self.convs = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.BatchNorm2d(layer.out_channels) for layer in layers)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(conv(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, height, width] -> [B, after, height / stride, width / stride]."""
        *first, last = zip(self.convs, self.norms, strict=True)
        y = x
        for layer, norm in first:
            y = F.relu(norm(layer(y)))
        layer, norm = last
        return F.relu(norm(layer(y)) + self.shortcut(x))


class Extractor(nn.Module):
    """Stem, four stages, mean over all positions."""

    def __init__(self, shape: tuple[int, int, int], layers: Layers) -> None:
        super().__init__()
        channels, height, width = shape
        small = max(height, width) <= SMALL
        stem = conv(channels, 64, 3, 1, 1) if small else conv(channels, 64, 7, 2, 3)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(64), nn.ReLU())
        if not small:
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        self.stages, before = nn.Sequential(), 64
        for i, count in enumerate(layers.blocks):
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                self.stages.append(Block(before, 64 << i, stride, layers.bottleneck))
                before = _after(64 << i, layers.bottleneck)
        self.width = before
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, D]."""
        out: Tensor = self.stages(self.stem(x)).mean((2, 3))
        return out


def make(name: str, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    """D = 512, of resnet-50 2048. Images may have any size."""
    extractor = Extractor(shape, RESNETS[name])
    return extractor, nn.Linear(extractor.width, classes)


def _after(width: int, bottleneck: bool) -> int:
    """Channels after a block."""
    return 4 * width if bottleneck else width
