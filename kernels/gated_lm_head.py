"""The gated head for a vocabulary: mix, header and cross-entropy without ever holding all logits.

Logits exist only in a slab of some rows, where one kernel turns them into loss and gradients between cuBLAS products;
the header's gradient is summed over the chunks in fp32. Each chunk costs a pass over that gradient, so they are few and
large; where even eight leave the slab too large, logits are computed twice instead. `gated_lm_head` is differentiable
and functional; `gated_lm_head_step` writes into given buffers, without autograd; `oracle.gated_lm_head` is the plain
statement. fp32 products follow `torch.backends.cuda.matmul`.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fedmoe.kernels.batching import one_by_one
from fedmoe.kernels.gated_head import BUFFERS, check_options
from fedmoe.kernels.gated_head_launch import Inputs, Options, misfit, too_far, unmultiplied
from fedmoe.kernels.gated_lm_head_launch import SLAB_BYTES, Gradients, Scratch, slab_shape, sweep
from fedmoe.kernels.launch import FLOATS, fits, is_fake, refusal


def gated_lm_head(
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
    token_weights: Tensor | None = None,  # [B]
    reduction: str = "mean",
    slab_bytes: int = SLAB_BYTES,
) -> tuple[Tensor, Tensor]:  # fp32 [] or, for "none", [B]; int64 []
    """What `oracle.gated_lm_head` says, loss and correct predictions, differentiable in the first five.

    For `mean` and `sum` the gradients are made with the loss, from the same logits, and the backward pass only
    multiplies them by the upstream gradient. For `none`, whose upstream gradient differs by row, and in fp16, whose
    loss scale must be applied before rounding, it computes the logits again. Without gradients no work is done for
    them. `slab_bytes` bounds the logits held at a time. Raises ValueError as `gated_head` does.
    """
    inputs = (global_, local, gate, weight, bias, targets, token_weights)
    _check(inputs)
    options = Options(ignore_index, label_smoothing, z_loss, softcap or 0.0)
    check_options(options, softcap, reduction)
    slab_shape(len(global_), len(weight), global_.element_size(), slab_bytes)
    now = reduction != "none" and global_.dtype != torch.float16 and torch.is_grad_enabled()
    differentiable = [t is not None and t.requires_grad for t in inputs[:5]]
    out = _forward(
        *inputs, *options, reduction, slab_bytes, now and any(differentiable), now and any(differentiable[3:])
    )
    return out[0], out[1]


@torch.no_grad()  # products into given buffers are refused where an operand is a parameter
def gated_lm_head_step(
    global_: Tensor,  # [B, D]
    local: Tensor,  # [B, D]
    gate: Tensor,  # [B, 2] logits, order [global, local]
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    targets: Tensor,  # [B] integer
    *,
    scale: Tensor,  # [] fp32, factor of the gradients, not of the loss
    denominator: Tensor,  # [] fp32, divisor of both: `gated_lm_head_denominator` of the whole step, or 1 for a sum
    loss: Tensor,  # [] fp32 out
    correct: Tensor,  # [] int64 out
    gradients: Gradients,  # out
    accumulate: Collection[str] = (),  # those of BUFFERS that are added to instead of written
    scratch: Scratch | None = None,  # `Scratch.empty`; made here where None
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,  # [B]
) -> None:
    """Loss, correct predictions and gradients of a step or micro-batch, without autograd.

    Nothing is read back to the host. Raises ValueError as `gated_lm_head` does, or where a buffer does not fit.
    """
    inputs = (global_, local, gate, weight, bias, targets, token_weights)
    _check(inputs)
    options = Options(ignore_index, label_smoothing, z_loss, softcap or 0.0)
    check_options(options, softcap, "sum")
    if unknown := set(accumulate) - set(BUFFERS):
        raise ValueError(f"accumulate names {sorted(unknown)}, expected some of {BUFFERS}")
    if bias is None and gradients.d_bias is not None:
        raise ValueError("d_bias is given, but no bias")
    (rows, width), classes, fp32 = global_.shape, len(weight), torch.float32
    scratch = scratch or Scratch.empty(global_, classes)
    scratch.check(global_, classes)
    buffers: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype | None]] = [
        ("scale", scale, (), fp32),
        ("denominator", denominator, (), fp32),
        ("loss", loss, (), fp32),
        ("correct", correct, (), torch.int64),
        ("d_global", gradients.d_global, (rows, width), None),
        ("d_local", gradients.d_local, (rows, width), None),
        ("d_gate", gradients.d_gate, (rows, 2), None),
        ("d_weight", gradients.d_weight, (classes, width), fp32),
        ("d_bias", gradients.d_bias, (classes,), fp32),
    ]
    for name, tensor, shape, dtype in buffers:
        if tensor is not None:
            fits(name, tensor, shape, dtype, global_.device)
    sweep(inputs, options, scratch, scale, denominator, gradients, accumulate)
    _total(loss, scratch.losses.sum() / denominator.where(denominator != 0, 1), "loss" in accumulate)
    _total(correct, scratch.hits.sum(), "correct" in accumulate)


def gated_lm_head_supported(
    global_: Tensor,  # [B, D]
    local: Tensor,  # [B, D]
    gate: Tensor,  # [B, 2]
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    targets: Tensor,  # [B]
    token_weights: Tensor | None = None,  # [B]
) -> tuple[bool, str]:
    """Whether `gated_lm_head` and `gated_lm_head_step` take these tensors, and if not, why.

    Of fake ones whether the first would take such on a GPU.
    """
    operands = global_, local, gate, weight, bias, targets
    kinds = (
        ("global", global_, FLOATS),
        ("local", local, (global_.dtype,)),
        ("gate", gate, FLOATS),
        ("weight", weight, (global_.dtype,)),
        ("bias", bias, FLOATS),
        ("targets", targets, (torch.int64, torch.int32)),
        ("token_weights", token_weights, FLOATS),
    )
    reason = misfit(*operands, ("token_weights", token_weights, 1)) or ("" if is_fake(global_) else refusal(kinds))
    reason = reason or unmultiplied(global_) or too_far(("global", global_, 1), ("local", local, 1), ("bias", bias, 0))
    if not reason and not 0 < len(weight) < 2**31:
        reason = f"there are {len(weight)} classes"
    return not reason, reason


def gated_lm_head_denominator(
    targets: Tensor,  # [B]
    token_weights: Tensor | None = None,  # [B]
    ignore_index: int = -100,
) -> Tensor:  # [] fp32
    """What `mean` divides by: the summed weights, or the number, of the rows that count. On the device."""
    kept = targets != ignore_index
    return kept.sum().float() if token_weights is None else token_weights.float().where(kept, 0).sum()


def _check(inputs: Inputs) -> None:
    supported, reason = gated_lm_head_supported(*inputs)
    if not supported:
        raise ValueError(f"gated_lm_head: {reason}")


def _total(out: Tensor, value: Tensor, add: bool) -> None:
    if add:
        out.add_(value)
    else:
        out.copy_(value)


@torch.library.custom_op("fedmoe::gated_lm_head", mutates_args=())
def _forward(
    global_: Tensor,
    local: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    slab_bytes: int,
    with_gradients: bool,
    with_header: bool,  # its gradient too
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # loss, correct, denominator, Gradients
    inputs = (global_, local, gate, weight, bias, targets, token_weights)
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    scratch = Scratch.empty(global_, len(weight), slab_bytes, with_gradients)
    denominator = global_.new_ones((), dtype=torch.float32)
    if reduction == "mean":
        denominator = gated_lm_head_denominator(targets, token_weights, ignore_index)
    gradients = _empty_gradients(inputs, with_gradients, with_header)
    one = torch.ones_like(denominator)
    sweep(inputs, options, scratch, one, denominator, _given(gradients) if with_gradients else None)
    loss = scratch.losses
    if reduction != "none":
        loss = loss.sum() / denominator.where(denominator != 0, 1)
    return loss, scratch.hits.sum(), denominator, *gradients


@_forward.register_fake
def _(global_: Tensor, *others: Any) -> tuple[Tensor, ...]:
    reduction, _, with_gradients, with_header = others[-4:]
    loss = global_.new_empty(global_.shape[:1] if reduction == "none" else (), dtype=torch.float32)
    gradients = _empty_gradients((global_, *others[:6]), with_gradients, with_header)
    return loss, loss.new_empty((), dtype=torch.int64), loss.new_empty(()), *gradients


def _empty_gradients(
    inputs: Inputs, rows: bool = True, header: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Buffers of five gradients, the header's in fp32; empty ones for those that are not computed."""
    wanted = (rows, rows, rows, header, header)
    shapes = [(0,) if t is None or not want else t.shape for t, want in zip(inputs[:5], wanted, strict=True)]
    dtypes = [*(t.dtype for t in inputs[:3]), torch.float32, torch.float32]
    made = [inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return made[0], made[1], made[2], made[3], made[4]


def _given(made: tuple[Tensor, ...]) -> Gradients:
    return Gradients(*made[:3], *(t if t.numel() else None for t in made[3:]))


@torch.library.custom_op("fedmoe::gated_lm_head_backward", mutates_args=())
def _backward(
    upstream: Tensor,  # [] or [B] fp32
    denominator: Tensor,  # []
    global_: Tensor,
    local: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    slab_bytes: int,
    with_header: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (global_, local, gate, weight, bias, targets, token_weights)
    gradients = _empty_gradients(inputs, header=with_header)
    scratch = Scratch.empty(global_, len(weight), slab_bytes)
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    sweep(inputs, options, scratch, upstream.contiguous(), denominator, _given(gradients))
    return gradients


@_backward.register_fake
def _(upstream: Tensor, denominator: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _empty_gradients(others[:7], header=others[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options, ctx.slab_bytes, ctx.done = inputs[7:11], inputs[12], inputs[13]
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:5]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2], *(output[3:] if ctx.done else inputs[:7]))


def _differentiate(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    denominator, *saved = ctx.saved_tensors
    if ctx.done:
        if torch.is_grad_enabled():  # create_graph: what is made already depends on nothing that autograd knows
            raise RuntimeError("gated_lm_head has no second derivative")
        # In fp32, because PyTorch would first round a 0-dimensional factor to the gradient's dtype.
        gradients = [g.float() * upstream for g in saved]
    else:
        header = any(ctx.needs_input_grad[3:5])
        gradients = _backward(upstream, denominator, *saved, *ctx.options, ctx.slab_bytes, header)
    out = [g.to(dtype) if g.numel() else None for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
    return (*out, *[None] * 10)


_forward.register_autograd(_differentiate, setup_context=_save)


_forward.register_vmap(one_by_one(_forward))
_backward.register_vmap(one_by_one(_backward))
