"""The flat optimizer step in Triton: SGD or AdamW over a whole arena at once, in place, nothing read by the host.

What each function computes is said by the function of the same name and signature in `flat_optimizer_oracle`. A step:

    control = Control.empty(segments)                                          # once
    flat_norm(segments, scale=scale, max_norm=1.0, step=step, out=control)     # only for a clip or a finite check
    for each segment: adamw_step(..., step=step, control=control)              # or sgd_step

Segments are what differs in the gradients' dtype; they share one norm. Every call can be captured in a CUDA graph. The
kernels want fp32 for everything but gradients, the low copy, 8-bit moments, `step` and `live`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmoe.kernels.flat_optimizer_launch import adamw_launch, norm_launches, sgd_launch
from fedmoe.kernels.flat_optimizer_state import Control, Moments, check_adamw, check_norm, check_sgd
from fedmoe.kernels.launch import FLOATS, refusal

__all__ = ["Control", "Moments", "adamw_step", "flat_norm", "flat_optimizer_supported", "sgd_step"]

_FP32 = (torch.float32,)
_COUNTS = (torch.float32, torch.int32)
_MOST_ROWS = 65535  # the second dimension of a grid


def flat_norm(
    gradients: Sequence[Tensor],  # each [P] or each [K, P], of one step; fp32, bf16 or fp16
    *,
    scale: Tensor | None = None,  # [] or [K], the loss's, which gradients are divided by
    max_norm: float | None = None,
    live: Tensor | None = None,  # [] or [K] bool or int8
    step: Tensor | None = None,  # [] or [K] fp32 or int32, steps taken; in place
    out: Control,
) -> None:
    """What `oracle.flat_norm` says, by a kernel a segment and one for the scalars.

    The same bits each time: sums of squares are added in an order that depends on the sizes alone. Raises ValueError
    for what does not fit, or with the reason of `flat_optimizer_supported`.
    """
    check_norm(gradients, scale, max_norm, live, step, out)
    segments = [(f"gradients[{k}]", g, FLOATS) for k, g in enumerate(gradients)]
    scalars = [("scale", scale, _FP32), ("step", step, _COUNTS)]
    results = [(f"control's {name}", tensor, _FP32) for name, tensor in out._asdict().items()]
    _demand("flat_norm", refusal([*segments, *scalars, *results]) or _too_many(gradients[0]))
    for launch in norm_launches(gradients, scale, max_norm, live, step, out):
        launch.run()


def sgd_step(
    weights: Tensor,  # [P] or [K, P] fp32, in place; rows may lie apart
    gradients: Tensor,  # same shape, fp32, bf16 or fp16; zeroed
    buffer: Tensor | None,  # shape and strides as weights, fp32, the momentum's, in place; None without momentum
    *,
    lr: Tensor,  # [] or [K]
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    low: Tensor | None = None,  # same shape, bf16 or fp16: the new weights, rounded
    scale: Tensor | None = None,  # [] or [K], the loss's, which gradients are divided by; without `control` only
    live: Tensor | None = None,  # [] or [K] bool or int8
    control: Control | None = None,  # from flat_norm
    zero: bool = True,
) -> None:
    """What `oracle.sgd_step` says, in one kernel that reads and writes every element once.

    Raises ValueError for what does not fit, or with the reason of `flat_optimizer_supported`.
    """
    check_sgd(weights, gradients, buffer, lr, momentum, nesterov, low, scale, live, control)
    _, reason = flat_optimizer_supported(weights, gradients, low)
    scalars = (("weights", weights, _FP32), ("buffer", buffer, _FP32), ("lr", lr, _FP32), ("scale", scale, _FP32))
    _demand("sgd_step", reason or refusal(scalars) or _of(control))
    sgd_launch(weights, gradients, buffer, lr, momentum, weight_decay, nesterov, low, scale, live, control, zero).run()


def adamw_step(
    weights: Tensor,  # [P] or [K, P] fp32, in place
    gradients: Tensor,  # same shape, fp32, bf16 or fp16; zeroed
    moments: Moments,  # in place
    *,
    step: Tensor,  # [] or [K] fp32 or int32, from 1: this step's number
    lr: Tensor,  # [] or [K]
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    low: Tensor | None = None,  # same shape, bf16 or fp16: the new weights, rounded
    scale: Tensor | None = None,  # [] or [K], the loss's, which gradients are divided by; without `control` only
    live: Tensor | None = None,  # [] or [K] bool or int8
    control: Control | None = None,  # from flat_norm
    zero: bool = True,
) -> None:
    """What `oracle.adamw_step` says, in one kernel that reads and writes every element once.

    `step` is advanced by `flat_norm` or, without, by the caller beforehand; at 0 the weights become NaN. Raises
    ValueError for what does not fit, or with the reason of `flat_optimizer_supported`.
    """
    check_adamw(weights, gradients, moments, step, lr, betas, eps, low, scale, live, control)
    _, reason = flat_optimizer_supported(weights, gradients, low)
    kinds = (torch.float32, torch.uint8)
    state = [(name, t, kinds if "absmax" not in name else _FP32) for name, t in moments._asdict().items()]
    scalars = [("step", step, _COUNTS), ("lr", lr, _FP32), ("scale", scale, _FP32)]
    _demand("adamw_step", reason or refusal([*state, *scalars]) or _of(control))
    adamw_launch(weights, gradients, moments, step, lr, betas, eps, weight_decay, low, scale, live, control, zero).run()


def flat_optimizer_supported(
    weights: Tensor,  # [P] or [K, P]
    gradients: Tensor,  # same shape
    low: Tensor | None = None,  # same shape
) -> tuple[bool, str]:
    """Whether the kernels take such buffers, and if not, why."""
    lows = (torch.bfloat16, torch.float16)
    tensors = (("weights", weights, _FP32), ("gradients", gradients, FLOATS), ("low", low, lows))
    reason = refusal(tensors) or _too_many(weights)
    return not reason, reason


def _too_many(tensor: Tensor) -> str:
    rows = tensor.shape[:-1].numel()
    return f"{rows} rows are more than {_MOST_ROWS}" if rows > _MOST_ROWS else ""


def _of(control: Control | None) -> str:
    if control is None:
        return ""
    return refusal([(f"control's {name}", tensor, _FP32) for name, tensor in control._asdict().items()])


def _demand(name: str, reason: str) -> None:
    if reason:
        raise ValueError(f"{name}: {reason}")
