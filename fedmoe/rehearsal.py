"""Mixtures tried out before they are used: blank inputs, copies to try with, and a step that shows what fails."""

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fedmoe import optimizer
from fedmoe.config import Config
from fedmoe.engine.pretend import pretended
from fedmoe.engine.seeds import globals_kept
from fedmoe.errors import UserError, reason
from fedmoe.mixture import Mixture


def blank(count: int, shape: tuple[int, ...], outputs: int) -> tuple[Tensor, Tensor]:
    """So many blank inputs and their targets: fp32 [B, C, H, W] and int64 [B], or int64 [B, T] both."""
    y = torch.arange(count) % outputs
    if len(shape) > 1:
        return torch.zeros(count, *shape), y
    return torch.zeros(count, *shape, dtype=torch.int64), y[:, None].expand(count, *shape)


def trial(model: Mixture, shape: tuple[int, ...]) -> AbstractContextManager[Mixture]:
    """A copy to try things with; a language model's, which may be large, has no memory, nor has what it computes."""
    return pretended(model) if len(shape) == 1 else nullcontext(copy.deepcopy(model))


def rehearse(config: Config, model: Mixture, shape: tuple[int, ...], outputs: int, batch: int, who: str) -> None:
    """Take a training step and evaluate on `batch` blank inputs, on a copy; raise UserError about `who` if that fails.

    A model that cannot train, or whose state is not all in parameters and buffers that exist from the start, is found
    here, before anything is written.
    """
    for module in model.modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            kind = type(module).__name__
            raise UserError(f"{who}: {kind} keeps state outside of tensors, which would be lost: use buffers")
    before, made = _tensors(model), model
    with trial(made, shape) as model:
        fixed = {name: model.get_parameter(name) for name in model.constants()}
        versions = {name: parameter._version for name, parameter in fixed.items()}
        model.head = "plain"  # the kernels do not run on the CPU, where this is
        x, y = blank(batch, shape, outputs)
        try:
            with globals_kept():
                model.train().join(model.program().run(x), y)[0].backward()
                optimizer.make(config.training, model.parameters()).step()
                model.eval()(x)
        except (Exception, SystemExit) as error:  # whatever a user's model raises
            fix = "; raise training.batch_size or partition.min_samples, or choose other norms" if batch == 1 else ""
            raise UserError(f"{who}: a training step with {batch} samples fails: {reason(error)}{fix}") from error
    if odd := sorted(set(before.items()) ^ set(_tensors(model).items())):
        raise UserError(
            f"{who}: tensor {odd[0][0]!r} appears or changes shape or type in training: fix it at the start"
        )
    for name, parameter in fixed.items() if len(shape) > 1 else ():  # what has no memory is of a library
        same = torch.allclose(parameter, made.get_parameter(name), rtol=0, atol=0, equal_nan=True)
        if parameter._version != versions[name] or not same:
            raise UserError(f"{who}: parameter {name!r} has no gradient, but its module changes it: use a buffer")


def _tensors(model: nn.Module) -> dict[str, str]:
    """Type and shape of every parameter and buffer by name."""
    return {name: f"{t.dtype} {list(t.shape)}" for name, t in [*model.named_parameters(), *model.named_buffers()]}
