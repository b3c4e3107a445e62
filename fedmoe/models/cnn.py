"""The paper's two families of CNNs (arXiv 2402.01350, section 4), for images from 16x16 pixels."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from fedmoe.errors import UserError


class Layers(NamedTuple):
    """Widths of one of the CNNs."""

    conv1: int
    conv2: int
    fc1: int
    fc2: int


CIFAR = {
    "cnn-1": Layers(16, 32, 2000, 500),
    "cnn-2": Layers(16, 16, 2000, 500),
    "cnn-3": Layers(16, 32, 1000, 500),
    "cnn-4": Layers(16, 32, 800, 500),
    "cnn-5": Layers(16, 32, 500, 500),
}
MNIST = {f"cnn-{i}": Layers(20, 20, width, 50) for i, width in enumerate((300, 200, 150, 100, 50), start=1)}
NAMES = tuple(CIFAR)

MOST = 100_000_000
"""Parameters of fc1, which grow with the image's area; at 224x224 pixels CNN-1 would have 180 M there."""


class Extractor(nn.Module):
    """conv5x5, pool2, conv5x5, pool2, fc1, fc2, without padding, ReLU after each.

    The pooling comes before the ReLU: the two commute, and the ReLU then touches a quarter of the elements.
    """

    def __init__(self, shape: tuple[int, int, int], layers: Layers) -> None:
        super().__init__()
        channels, height, width = shape
        self.conv1 = nn.Conv2d(channels, layers.conv1, 5)
        self.conv2 = nn.Conv2d(layers.conv1, layers.conv2, 5)
        self.fc1 = nn.Linear(layers.conv2 * _pooled(height) * _pooled(width), layers.fc1)
        self.fc2 = nn.Linear(layers.fc1, layers.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, D]."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        return F.relu(self.fc2(x))


def make(name: str, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    """Of the MNIST-size family up to 28 pixels, D = 50, and of the CIFAR family above, D = 500.

    Raises UserError for images that are too small, or so large that nearly all parameters would be in one layer.
    """
    _, height, width = shape
    layers = (MNIST if max(height, width) <= 28 else CIFAR)[name]
    if min(height, width) < 16:
        raise UserError(f"model {name!r} needs images of at least 16x16 pixels, not {height}x{width}: {_REMEDY}")
    if (size := layers.conv2 * _pooled(height) * _pooled(width) * layers.fc1) > MOST:
        raise UserError(
            f"model {name!r} would have {size / 1e6:,.0f} M parameters in one layer for images of {height}x{width} "
            f"pixels, at most {MOST / 1e6:.0f} M are sensible: {_REMEDY}, or choose another model, such as resnet-18"
        )
    return Extractor(shape, layers), nn.Linear(layers.fc2, classes)


_REMEDY = "set data.image_size"


def _pooled(side: int) -> int:
    """Side of the feature map after both convolutions and poolings."""
    return ((side - 4) // 2 - 4) // 2
