"""The gated head for few classes: mix, header and cross-entropy with all gradients in two kernels.

`gated_head` is differentiable and functional; `gated_head_step` writes loss and gradients into given buffers, without
autograd; `gated_head_supported` says whether both take given tensors; `oracle.gated_head` is the plain statement.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedmoe.kernels.batching import one_by_one
from fedmoe.kernels.gated_head_launch import (
    Inputs,
    Options,
    Scratch,
    header_launch,
    rows_launch,
    totals_launch,
    unsupported,
)
from fedmoe.kernels.launch import fits

BUFFERS = ("loss", "correct", "d_global", "d_local", "d_gate", "d_weight", "d_bias")
REDUCTIONS = ("mean", "sum", "none")


class Gradients(NamedTuple):
    """The buffers that gradients go to, each contiguous and of its operand's shape; dtypes may differ."""

    d_global: Tensor  # [B, D]
    d_local: Tensor  # [B, D]
    d_gate: Tensor  # [B, 2]
    d_weight: Tensor  # [C, D]
    d_bias: Tensor | None  # [C]


def gated_head(
    global_: Tensor,  # [B, D]
    local: Tensor,  # [B, D]
    gate: Tensor,  # [B, 2] logits, order [global, local]
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    targets: Tensor,  # [B] integer
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weights: Tensor | None = None,  # [C]
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:  # fp32 [] or, for "none", [B]; int64 []
    """What `oracle.gated_head` says, loss and correct predictions, differentiable in all but targets and class weights.

    The backward pass computes the logits again rather than keep gradients: the upstream gradient, fp16's loss scale
    included, is then applied in fp32 before anything is rounded, and without gradients no work is done for them.
    Works under `torch.func.vmap`, one call after another, with `backward` outside; `torch.func.grad` does not take
    `torch.library` ops. A target out of range makes the loss NaN. Raises ValueError where shapes or options are wrong,
    or with the reason of `gated_head_supported`.
    """
    _check(global_, local, gate, weight, bias, targets, class_weights)
    options = Options(ignore_index, label_smoothing, z_loss, softcap or 0.0)
    check_options(options, softcap, reduction)
    out = _forward(global_, local, gate, weight, bias, targets, class_weights, *options, reduction)
    return out[0], out[1]


def gated_head_step(
    global_: Tensor,  # [B, D]
    local: Tensor,  # [B, D]
    gate: Tensor,  # [B, 2] logits, order [global, local]
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    targets: Tensor,  # [B] integer
    *,
    scale: Tensor,  # [] fp32, factor of the gradients, not of the loss
    denominator: Tensor,  # [] fp32, divisor of both: `gated_head_denominator` of the whole step, or 1 for a sum
    loss: Tensor,  # [] fp32 out
    correct: Tensor,  # [] int64 out
    gradients: Gradients,  # out
    accumulate: Collection[str] = (),  # those of BUFFERS that are added to instead of written
    scratch: Scratch | None = None,  # `Scratch.empty`; made here where None
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weights: Tensor | None = None,  # [C]
) -> None:
    """Loss, correct predictions and all gradients of a step or micro-batch, in two kernels, without autograd.

    Nothing is read back to the host. Raises ValueError as `gated_head` does, or where a buffer does not fit.
    """
    _check(global_, local, gate, weight, bias, targets, class_weights)
    options = Options(ignore_index, label_smoothing, z_loss, softcap or 0.0)
    check_options(options, softcap, "sum")
    if unknown := set(accumulate) - set(BUFFERS):
        raise ValueError(f"accumulate names {sorted(unknown)}, expected some of {BUFFERS}")
    if (bias is None) != (gradients.d_bias is None):
        raise ValueError("bias and d_bias must be given together or left out together")
    scratch = scratch or Scratch.empty(len(global_), len(weight), global_.device)
    fp32, rows, classes = torch.float32, len(global_), len(weight)
    for name, tensor, shape, dtype in (
        ("scale", scale, (), fp32),
        ("denominator", denominator, (), fp32),
        ("loss", loss, (), fp32),
        ("correct", correct, (), torch.int64),
        ("d_global", gradients.d_global, global_.shape, None),
        ("d_local", gradients.d_local, local.shape, None),
        ("d_gate", gradients.d_gate, gate.shape, None),
        ("d_weight", gradients.d_weight, weight.shape, None),
        ("d_bias", gradients.d_bias, (classes,), None),
        ("scratch.d_logits", scratch.d_logits, (rows, classes), fp32),
        ("scratch.losses", scratch.losses, (rows,), fp32),
        ("scratch.hits", scratch.hits, (rows,), torch.int32),
    ):
        if tensor is not None:
            fits(name, tensor, tuple(shape), dtype, global_.device)
    inputs = (global_, local, gate, weight, bias, targets, class_weights)
    _gradients(inputs, options, scale, denominator, gradients, scratch, loss, correct, frozenset(accumulate))


def gated_head_supported(
    global_: Tensor,  # [B, D]
    local: Tensor,  # [B, D]
    gate: Tensor,  # [B, 2]
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    targets: Tensor,  # [B]
    class_weights: Tensor | None = None,  # [C]
) -> tuple[bool, str]:
    """Whether `gated_head` and `gated_head_step` take these tensors, and if not, why."""
    reason = unsupported(global_, local, gate, weight, bias, targets, class_weights)
    return not reason, reason


def gated_head_denominator(
    targets: Tensor,  # [B]
    class_weights: Tensor | None = None,  # [C]
    ignore_index: int = -100,
) -> Tensor:  # [] fp32
    """What `mean` divides by: the summed class weights, or the number, of the rows that count. On the device.

    With class weights a target out of range makes it NaN.
    """
    kept = targets != ignore_index
    if class_weights is None:
        return kept.sum().float()
    known = (targets >= 0) & (targets < len(class_weights))
    rows = class_weights.float()[targets.where(known, 0).long()]
    return rows.where(known, float("nan")).where(kept, 0).sum()


def _check(
    global_: Tensor,
    local: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weights: Tensor | None,
) -> None:
    if reason := unsupported(global_, local, gate, weight, bias, targets, class_weights):
        raise ValueError(f"gated_head: {reason}")


def check_options(options: Options, softcap: float | None, reduction: str) -> None:
    """Raise ValueError where an option is out of its range."""
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {options.label_smoothing}, expected 0 to 1")
    if not 0 <= options.z_loss < math.inf:
        raise ValueError(f"z_loss is {options.z_loss}, expected finite and not negative")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}, expected finite and positive, or None")
    ignored = options.ignore_index
    if not isinstance(ignored, int | torch.SymInt) or not -(2**63) <= ignored < 2**63:
        raise ValueError(f"ignore_index is {ignored!r}, expected an integer of 64 bits")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, expected one of {REDUCTIONS}")


def _gradients(
    inputs: Inputs,
    options: Options,
    scale: Tensor,  # [] or [B]
    denominator: Tensor,
    gradients: Gradients,
    scratch: Scratch,
    loss: Tensor | None,
    correct: Tensor | None,
    add: frozenset[str],
) -> None:
    given = tuple(gradients)
    rows_launch(inputs, options, scratch, scale, denominator, given[:3], add).run()
    header_launch(inputs, scratch, scale, denominator, loss, correct, given[3:], add).run()


@torch.library.custom_op("fedmoe::gated_head", mutates_args=())
def _forward(
    global_: Tensor,
    local: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:  # loss, correct, denominator
    inputs = (global_, local, gate, weight, bias, targets, class_weights)
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    scratch = Scratch.empty(len(global_), 0, global_.device)
    rows_launch(inputs, options, scratch).run()
    loss, correct, denominator = _outputs(global_, reduction)
    totals_launch(scratch, loss if loss.ndim == 0 else None, correct, denominator, reduction == "mean").run()
    return (scratch.losses if reduction == "none" else loss), correct, denominator


def _outputs(global_: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    loss = global_.new_empty(global_.shape[:1] if reduction == "none" else (), dtype=torch.float32)
    return loss, loss.new_empty((), dtype=torch.int64), loss.new_empty(())


@_forward.register_fake
def _(global_: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(global_, others[-1])


@torch.library.custom_op("fedmoe::gated_head_backward", mutates_args=())
def _backward(
    upstream: Tensor,  # [] or [B] fp32
    denominator: Tensor,  # []
    global_: Tensor,
    local: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> list[Tensor]:  # Gradients, without d_bias where there is no bias
    inputs = (global_, local, gate, weight, bias, targets, class_weights)
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    out = _empty_gradients(inputs[:5])
    scratch = Scratch.empty(len(global_), len(weight), global_.device)
    gradients = Gradients(*out, *([None] if bias is None else []))
    _gradients(inputs, options, upstream.contiguous(), denominator, gradients, scratch, None, None, frozenset())
    return out


def _empty_gradients(operands: Sequence[Tensor | None]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in operands if t is not None]


@_backward.register_fake
def _(upstream: Tensor, denominator: Tensor, *others: Any) -> list[Tensor]:
    return _empty_gradients(others[:5])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:7], inputs[7:11]
    _, correct, denominator = output
    ctx.mark_non_differentiable(correct, denominator)
    ctx.save_for_backward(denominator, *tensors)


def _differentiate(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    denominator, *inputs = ctx.saved_tensors
    out = _backward(upstream, denominator, *inputs, *ctx.options)
    d_bias = out[4] if len(out) == 5 else None
    return (*out[:4], d_bias, None, None, *[None] * 5)


_forward.register_autograd(_differentiate, setup_context=_save)


_forward.register_vmap(one_by_one(_forward))
_backward.register_vmap(one_by_one(_backward))
