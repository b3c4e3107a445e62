"""Models of the library timm by name, `timm/NAME`, with untrained weights; timm is optional."""

import difflib
from typing import Any

import torch
from torch import nn

from fedmoe.errors import UserError

PREFIX = "timm/"


def make(name: str, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    """timm's model without its classifier, for images of this shape, and a linear header of its width.

    Raises UserError where timm is missing or does not know the name; whatever the model itself raises comes through.
    """
    timm, wanted = _library(name), name.removeprefix(PREFIX)
    if not timm.is_model(wanted):  # names of other places too, such as a hub's, which would be fetched
        near = difflib.get_close_matches(wanted, timm.list_models(), 1, 0.0)
        raise UserError(f"model {name!r}: timm {timm.__version__} has no {wanted!r}, the nearest is {near[0]!r}")
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": shape[0]}
    known = timm.get_pretrained_cfg(wanted)
    if known is not None and known.fixed_input_size:  # as transformers, which learn a vector for each place
        options["img_size"] = shape[1:]
    extractor: nn.Module = timm.create_model(wanted, **options)
    was_training = extractor.training
    with torch.no_grad():
        width = extractor.eval()(torch.zeros(2, *shape)).shape[-1]  # what timm tells of it is before some pools
    return extractor.train(was_training), nn.Linear(width, classes)


def _library(name: str) -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name == "timm":
            raise UserError(f"model {name!r} needs timm, which is not installed: pip install timm") from error
        raise UserError(f"model {name!r} needs timm, which needs {error.name}, which is not installed") from error
    except Exception as error:  # what libraries below it raise, as a torchvision that is not of this torch
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"model {name!r} needs timm, which cannot be imported here: {what}") from error
    return timm
