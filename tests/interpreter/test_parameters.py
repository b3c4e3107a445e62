"""Step entries take what an engine has: parameters, with gradients on, and their `.grad` to write into."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedmoe.kernels.accumulate import weighted_accumulate
from fedmoe.kernels.flat_optimizer import Control, Moments, adamw_step, flat_norm, sgd_step
from fedmoe.kernels.gated_lm_head_launch import Scratch
from fedmoe.kernels.gated_mix import MixGradients, gated_mix_backward_step, gated_mix_step
from tests.heads import FEW, MANY, Head, operands


def parameters(*tensors: Tensor) -> list[Any]:
    made: list[Any] = [nn.Parameter(t.clone()) for t in tensors]
    for parameter in made:
        parameter.grad = torch.full_like(parameter, 0.5)
    return made


def head(which: Head, slab_bytes: int = 0) -> Callable[[bool], list[Tensor]]:
    def step(trained: bool) -> list[Tensor]:
        given, targets = operands(18, 8, 70)
        taken = parameters(*given) if trained else given
        grads = [t.grad if trained else torch.full_like(t, 0.5) for t in taken]
        loss, correct, one = torch.empty(()), torch.tensor(0), torch.ones(())
        scratch = Scratch.empty(given[0], 70, slab_bytes) if slab_bytes else None
        for accumulate in (("d_weight", "d_bias"), ("loss", "correct", "d_local", "d_weight", "d_bias")):
            which.step(
                *taken, targets, scale=one, denominator=one, loss=loss, correct=correct,
                gradients=which.gradients(*grads), accumulate=accumulate, scratch=scratch,
            )  # fmt: skip
        return [loss, correct, *grads]

    return step


def mix(trained: bool) -> list[Tensor]:
    given, _ = operands(9, 8, 1)
    taken = parameters(*given[:3]) if trained else given[:3]
    grads = [t.grad if trained else torch.full_like(t, 0.5) for t in taken]
    mixed = torch.empty_like(given[0])
    gated_mix_step(*taken, mixed=mixed)
    gated_mix_backward_step(mixed, *taken, gradients=MixGradients(*grads), accumulate=("d_gate",))
    return [mixed, *grads]


def optimizer(trained: bool) -> list[Tensor]:
    torch.manual_seed(0)
    (weights,) = parameters(torch.randn(300)) if trained else [torch.randn(300)]
    gradients = weights.grad if trained else torch.full((300,), 0.5)
    assert gradients is not None
    control, count, rate = Control.empty([gradients]), torch.zeros(()), torch.tensor(0.1)
    flat_norm([gradients], max_norm=1.0, step=count, out=control)
    sgd_step(weights, gradients, None, lr=rate, control=control, zero=False)
    adamw_step(weights, gradients, Moments.zeros(weights, 32), step=count, lr=rate, control=control)
    weighted_accumulate(weights, weights, rate)
    return [weights.detach(), gradients]


STEPS = {
    "few classes": head(FEW),
    "vocabulary": head(MANY),
    "vocabulary in parts": head(MANY, 18 * 64 * 4),
    "mix": mix,
    "optimizer": optimizer,
}


@pytest.mark.parametrize("step", STEPS)
def test_parameters_give_the_same_bits(step: str) -> None:
    assert torch.is_grad_enabled()
    for ours, plain in zip(STEPS[step](True), STEPS[step](False), strict=True):
        assert torch.equal(ours, plain) and not ours.requires_grad
