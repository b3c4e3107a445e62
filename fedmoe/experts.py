"""The registry of image models: families, libraries', and any factory of the user's; each an extractor and a header."""

import copy
import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedmoe import config as settings
from fedmoe.engine.seeds import globals_kept
from fedmoe.errors import UserError, reason
from fedmoe.models import cnn, hf, resnet, timm, vit

FAMILIES = {name: family for family in (cnn, resnet, vit) for name in family.NAMES}

DEFAULTS = settings.Model()


class Split(NamedTuple):
    """A model in two parts: `header(extractor(x))` are the logits."""

    extractor: nn.Module  # [B, channels, height, width] -> [B, D], or tokens [B, T] -> [B, T, D]
    header: nn.Module  # [..., D] -> [..., C]


def build(name: str, shape: tuple[int, int, int], classes: int, options: settings.Model = DEFAULTS) -> Split:
    """The model called `name` for images of `shape` (channels, height, width), before any training here.

    It is one of the families', one of timm's as `timm/NAME`, or of transformers' as `hf/NAME`, the only ones that
    `options` are for. `package.module:factory` is called as
    `factory(shape, classes)` and returns an (extractor, header) pair or a module with those two attributes.
    Raises UserError for an unknown name, a factory that cannot be imported, or a model that does not fit.
    """
    check_name(name)
    if name in FAMILIES:
        return Split(*FAMILIES[name].make(name, shape, classes))
    make: Callable[[tuple[int, int, int], int], object]
    if name.startswith(timm.PREFIX):
        make = partial(timm.make, name)
    else:
        make = partial(hf.make, name, options=options) if name.startswith(hf.PREFIX) else _factory(name)
    try:
        # A copy: a factory that hands out one object again and again would have clients share their weights.
        made = copy.deepcopy(make(shape, classes))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's factory, or a library, raises
        raise UserError(f"model {name!r} cannot be made for images of {list(shape)}: {reason(error)}") from error
    return _checked(name, made, shape, classes)


def check_name(name: str) -> None:
    """Raise UserError for what cannot be the name of a model."""
    if name not in FAMILIES and ":" not in name and not name.startswith((timm.PREFIX, hf.PREFIX)):
        raise UserError(
            f"model {name!r} is none of {', '.join(FAMILIES)}, nor `timm/NAME`, `hf/NAME` or `package.module:factory`"
        )


def width(extractor: nn.Module, shape: tuple[int, ...]) -> int:
    """D, the width of `extractor`'s representation, found by running it on two blank images."""
    return _probe(extractor, torch.zeros(2, *shape)).shape[-1]


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
