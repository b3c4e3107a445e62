"""The models: the paper's two CNN families, and any factory of the user's as a local model."""

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmoe.engine.seeds import globals_kept
from fedmoe.errors import UserError


class Split(NamedTuple):
    """A model in two parts: `header(extractor(x))` are the logits."""

    extractor: nn.Module  # [B, channels, height, width] -> [B, D]
    header: nn.Module  # [B, D] -> [B, C]


class Layers(NamedTuple):
    """Widths of one of the paper's CNNs."""

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


class Extractor(nn.Module):
    """conv5x5, pool2, conv5x5, pool2, fc1, fc2, without padding, ReLU after each (arXiv 2402.01350, section 4).

    The pooling comes before the ReLU: the two commute, and the ReLU then touches a quarter of the elements.
    """

    def __init__(self, shape: tuple[int, int, int], layers: Layers) -> None:
        super().__init__()
        channels, height, width = shape
        rows, columns = _pooled(height), _pooled(width)
        self.conv1 = nn.Conv2d(channels, layers.conv1, 5)
        self.conv2 = nn.Conv2d(layers.conv1, layers.conv2, 5)
        self.fc1 = nn.Linear(layers.conv2 * rows * columns, layers.fc1)
        self.fc2 = nn.Linear(layers.fc1, layers.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, D]."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        return F.relu(self.fc2(x))


def _pooled(side: int) -> int:
    """Side of the feature map after both convolutions and poolings."""
    return ((side - 4) // 2 - 4) // 2


def build(name: str, shape: tuple[int, int, int], classes: int) -> Split:
    """The model called `name` for images of `shape` (channels, height, width).

    `cnn-1` to `cnn-5` are the paper's, of its MNIST-size family up to 28 pixels and of its CIFAR family above.
    `package.module:factory` is called as `factory(shape, classes)` and returns an (extractor, header) pair or a module
    with those two attributes. Raises UserError for an unknown name, a factory that cannot be imported or whose model
    does not fit.
    """
    if ":" in name:
        factory = _factory(name)
        try:
            # A copy: a factory that hands out one object again and again would have clients share their weights.
            made = copy.deepcopy(factory(shape, classes))
        except (Exception, SystemExit) as error:  # whatever a user's factory raises
            raise UserError(f"model {name!r} cannot be made for images of {list(shape)}: {reason(error)}") from error
        return _checked(name, made, shape, classes)
    check_name(name)
    family = MNIST if max(shape[1:]) <= 28 else CIFAR
    if min(shape[1:]) < 16:
        raise UserError(
            f"model {name!r} needs images of at least 16x16 pixels, not {shape[1]}x{shape[2]}: set data.image_size"
        )
    layers = family[name]
    return Split(Extractor(shape, layers), nn.Linear(layers.fc2, classes))


def check_name(name: str) -> None:
    """Raise UserError for what cannot be the name of a model."""
    if ":" not in name and name not in CIFAR:
        raise UserError(f"model {name!r} is none of {', '.join(CIFAR)}, nor `package.module:factory`")


def width(extractor: nn.Module, shape: tuple[int, int, int]) -> int:
    """D, the width of `extractor`'s representation, found by running it on two blank images."""
    return _probe(extractor, torch.zeros(2, *shape)).shape[-1]


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _factory(name: str) -> Callable[[tuple[int, int, int], int], object]:
    module_name, _, attribute = name.partition(":")
    # A console script does not have the working directory on its path, where a user's own module usually lies.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # whatever a user's module raises
        raise UserError(f"model {name!r} cannot be imported: {reason(error)}") from error
    if not callable(factory):
        raise UserError(f"model {name!r} is a {type(factory).__name__}, must be a callable taking (shape, classes)")
    return factory


def _checked(name: str, made: object, shape: tuple[int, int, int], classes: int) -> Split:
    parts = made if isinstance(made, tuple) else (getattr(made, "extractor", None), getattr(made, "header", None))
    if len(parts) != 2 or not all(isinstance(part, nn.Module) for part in parts):
        raise UserError(
            f"model {name!r} gave {type(made).__name__}, must give (extractor, header) or a module with those two"
        )
    model = Split(*parts)
    try:
        features = _probe(model.extractor, torch.zeros(2, *shape))
        logits = _probe(model.header, features)
        shapes = list(features.shape), list(logits.shape)
    except Exception as error:  # whatever a user's model raises
        raise UserError(f"model {name!r} does not run on images of {list(shape)}: {reason(error)}") from error
    if len(shapes[0]) != 2 or shapes[1] != [2, classes]:
        raise UserError(
            f"model {name!r} gives representations {shapes[0]} and logits {shapes[1]} for 2 images, "
            f"must give [2, D] and [2, {classes}]"
        )
    return model


def _probe(module: nn.Module, x: Tensor) -> Tensor:
    was_training = module.training
    with torch.no_grad(), globals_kept():
        out: Tensor = module.eval()(x)
    module.train(was_training)
    return out
