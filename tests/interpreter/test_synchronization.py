"""No step entry makes the host wait for the device, which a CUDA graph could not capture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmoe.kernels import gated_head_launch, gated_lm_head_launch
from fedmoe.kernels.accumulate import weighted_accumulate
from fedmoe.kernels.flat_optimizer import Control, Moments, adamw_step, flat_norm, sgd_step
from fedmoe.kernels.gather import gather_augment_step
from tests.heads import FEW, MANY, Head, operands
from tests.synchronization import NoSynchronization


def step_of(head: Head, slab_bytes: int = 0) -> Callable[[], None]:
    given, targets = operands(18, 8, 70)
    buffers = head.gradients(*(torch.empty_like(t) for t in given))
    loss, correct, one = torch.empty(()), torch.tensor(0), torch.ones(())
    weights = {head.weights: torch.ones(70 if head is FEW else 18)}
    scratch = gated_lm_head_launch.Scratch.empty(given[0], 70, slab_bytes) if slab_bytes else None

    def step() -> None:
        for accumulate in ((), ("loss", "correct", "d_weight")):
            head.step(
                *given, targets, scale=one, denominator=head.denominator(targets, **weights), loss=loss,
                correct=correct, gradients=buffers, accumulate=accumulate, scratch=scratch, **weights,
            )  # fmt: skip

    return step


def optimizer() -> None:
    weights, gradients, buffer = torch.randn(3, 300)
    control, count, rate = Control.empty([gradients]), torch.zeros(()), torch.tensor(0.1)
    flat_norm([gradients], scale=rate, max_norm=1.0, step=count, out=control)
    sgd_step(weights, gradients, buffer, lr=rate, momentum=0.9, control=control)
    adamw_step(weights, gradients, Moments.zeros(weights, 8), step=count, lr=rate, control=control)
    weighted_accumulate(weights, gradients, rate)


def batch() -> None:
    images, labels = torch.zeros(5, 3, 4, 4, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64)
    half, out = torch.full((3,), 0.5), torch.empty(2, 3, 4, 4)
    drawn = torch.zeros(2, 3, dtype=torch.int32)
    gather_augment_step(images, labels, torch.tensor([0, 4]), half, half, drawn, out=out, targets=labels[:2].clone())


STEPS: dict[str, Callable[[], None]] = {
    "few classes": step_of(FEW),
    "vocabulary": step_of(MANY),
    "vocabulary in parts": step_of(MANY, 18 * 64 * 4),
    "optimizer": optimizer,
    "batch": batch,
}


@pytest.mark.parametrize("step", STEPS)
def test_steps_do_not_wait(step: str) -> None:
    with NoSynchronization():
        STEPS[step]()


@pytest.mark.parametrize("module", [gated_head_launch, gated_lm_head_launch])
def test_a_planted_item_is_noticed(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug by which fused losses break graphs: counting the targets that are not ignored, on the host."""
    name = "header_launch" if module is gated_head_launch else "losses_launch"
    right = getattr(module, name)

    def waiting(*args: Any, **options: Any) -> Any:
        (torch.arange(5) != 2).sum().item()
        return right(*args, **options)

    monkeypatch.setattr(module, name, waiting)
    if module is gated_head_launch:
        monkeypatch.setattr("fedmoe.kernels.gated_head.header_launch", waiting)
    with pytest.raises(AssertionError, match="_local_scalar_dense makes the host wait"), NoSynchronization():
        step_of(FEW if module is gated_head_launch else MANY)()


@pytest.mark.parametrize("waits", [lambda t: t[t > 0], lambda t: t.nonzero(), lambda t: bool(t.any()), torch.unique])
def test_other_ways_to_wait_are_noticed(waits: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError, match="makes the host wait"), NoSynchronization():
        waits(torch.ones(3))
