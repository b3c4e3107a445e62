"""Weighted accumulation on the device: what a client returns is added onto θ as it comes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fedmoe.kernels.launch import FLOATS, Launch, fits, load, refusal

_kernels = load("accumulate_kernels")


def weighted_accumulate(
    theta: Tensor,  # [P] fp32, contiguous, in and out
    update: Tensor,  # [P] fp32, bf16 or fp16, contiguous
    weight: Tensor,  # [] fp32
) -> None:
    """θ ← θ + weight · update in place, multiplied and added in fp32, rounded once, without autograd.

    Nothing is read back to the host, so a graph can be captured of it. `update` may be `theta` itself, but may not
    overlap it partly. Raises ValueError where shapes are wrong, or with the reason of `accumulate_supported`.
    """
    if theta.ndim != 1 or update.shape != theta.shape:
        raise ValueError(f"theta has shape {tuple(theta.shape)}, update {tuple(update.shape)}, expected equal [P]")
    supported, reason = accumulate_supported(theta, update, weight)
    if not supported:
        raise ValueError(f"weighted_accumulate: {reason}")
    fits("weight", weight, (), torch.float32, theta.device)
    accumulate_launch(theta, update, weight).run()


def accumulate_supported(
    theta: Tensor,  # [P]
    update: Tensor,  # [P]
    weight: Tensor,  # []
) -> tuple[bool, str]:
    """Whether `weighted_accumulate` takes these tensors, and if not, why."""
    fp32 = (torch.float32,)
    reason = refusal((("theta", theta, fp32), ("update", update, FLOATS), ("weight", weight, fp32)))
    for name, tensor in (("theta", theta), ("update", update)):
        if not reason and not tensor.is_contiguous():
            reason = f"{name} is not contiguous: shape {tuple(tensor.shape)}, strides {tensor.stride()}"
    return not reason, reason


def accumulate_launch(theta: Tensor, update: Tensor, weight: Tensor) -> Launch:
    """All elements."""
    assert _kernels is not None
    block, warps = _kernels.ACCUMULATE_TILE
    tensors: dict[str, Tensor | None] = {"theta": theta, "update": update, "weight": weight}
    size = theta.numel()
    return Launch(_kernels.accumulate_kernel, (-(-size // block),), tensors, {"BLOCK": block}, {"P": size}, warps, 1)


def shipped() -> Iterator[tuple[str, str, Launch]]:
    """Kernel, configuration and launch of what is shipped; one size passes 2³¹ elements."""
    for dtype, size in (*((dtype, 665_048) for dtype in FLOATS), (torch.float32, 2**31 + 1)):
        theta, update = torch.empty(size), torch.empty(size, dtype=dtype)
        text = f"{str(dtype).removeprefix('torch.')} P={size}"
        yield "weighted_accumulate", text, accumulate_launch(theta, update, torch.empty(()))
