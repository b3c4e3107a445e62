"""The gated mix alone, for headers that are not linear.

`gated_mix` is differentiable and functional; `gated_mix_step` and `gated_mix_backward_step` write into given buffers,
without autograd; `gated_mix_supported` says whether they take given tensors; `oracle.gated_mix` is the plain statement.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedmoe.kernels.batching import one_by_one
from fedmoe.kernels.gated_head_launch import strides, too_far, unmultiplied
from fedmoe.kernels.launch import FLOATS, Launch, fits, is_fake, load, not_dense, refusal

_kernels = load("gated_mix_kernels")


class MixGradients(NamedTuple):
    """The buffers that gradients go to, each contiguous and of its operand's shape; dtypes may differ."""

    d_global: Tensor  # [B, D]
    d_local: Tensor  # [B, D]
    d_gate: Tensor  # [B, 2]


def gated_mix(
    global_: Tensor,  # [B, D]
    local: Tensor,  # [B, D]
    gate: Tensor,  # [B, 2] logits, order [global, local]
) -> Tensor:  # [B, D]
    """What `oracle.gated_mix` says, mixed in fp32 and rounded once to the representations' dtype; differentiable.

    Raises ValueError where shapes differ, or with the reason of `gated_mix_supported`.
    """
    _check(global_, local, gate)
    out: Tensor = _forward(global_, local, gate)
    return out


def gated_mix_step(
    global_: Tensor,  # [B, D]
    local: Tensor,  # [B, D]
    gate: Tensor,  # [B, 2] logits, order [global, local]
    *,
    mixed: Tensor,  # [B, D] out
) -> None:
    """The mix, into a given buffer, which may have a dtype of its own. Raises ValueError as `gated_mix` does."""
    _check(global_, local, gate)
    fits("mixed", mixed, tuple(global_.shape), None, global_.device)
    forward_launch(global_, local, gate, mixed).run()


def gated_mix_backward_step(
    upstream: Tensor,  # [B, D] gradient of the mix, contiguous
    global_: Tensor,  # [B, D]
    local: Tensor,  # [B, D]
    gate: Tensor,  # [B, 2]
    *,
    gradients: MixGradients,  # out
    accumulate: Collection[str] = (),  # those of MixGradients' names that are added to instead of written
) -> None:
    """All three gradients, into given buffers; from an fp32 `upstream`, the gate's is taken before any rounding.

    Raises ValueError as `gated_mix` does, or where a buffer does not fit.
    """
    _check(global_, local, gate)
    for name, buffer, operand in zip(
        ("upstream", *MixGradients._fields), (upstream, *gradients), (global_, global_, local, gate), strict=True
    ):
        fits(name, buffer, tuple(operand.shape), None, global_.device)
    if unknown := set(accumulate) - set(MixGradients._fields):
        raise ValueError(f"accumulate names {sorted(unknown)}, expected some of {MixGradients._fields}")
    backward_launch(upstream, global_, local, gate, gradients, accumulate).run()


def gated_mix_supported(
    global_: Tensor,  # [B, D]
    local: Tensor,  # [B, D]
    gate: Tensor,  # [B, 2]
) -> tuple[bool, str]:
    """Whether `gated_mix` takes these tensors, and if not, why; of fake ones, whether it would on a GPU."""
    reason = _misfit(global_, local, gate)
    if not reason:
        tensors = (("global", global_, FLOATS), ("local", local, (global_.dtype,)), ("gate", gate, FLOATS))
        reason = (
            ("" if is_fake(global_) else refusal(tensors))
            or unmultiplied(global_)
            or too_far(("global", global_, 1), ("local", local, 1))
        )
    return not reason, reason


def _misfit(global_: Tensor, local: Tensor, gate: Tensor) -> str:
    for name, tensor in (("global", global_), ("local", local), ("gate", gate)):
        if reason := not_dense(name, tensor):
            return reason
    if global_.ndim != 2 or local.shape != global_.shape:
        return f"global has shape {tuple(global_.shape)}, local {tuple(local.shape)}, expected equal [B, D]"
    if gate.shape != (len(global_), 2):
        return f"gate has shape {tuple(gate.shape)}, expected {(len(global_), 2)}"
    return ""


def _check(global_: Tensor, local: Tensor, gate: Tensor) -> None:
    supported, reason = gated_mix_supported(global_, local, gate)
    if not supported:
        raise ValueError(f"gated_mix: {reason}")


def forward_launch(global_: Tensor, local: Tensor, gate: Tensor, mixed: Tensor) -> Launch:
    """The mix of all rows."""
    assert _kernels is not None
    return _launch(_kernels.mix_kernel, global_, local, gate, {"mixed": mixed}, {})


def backward_launch(
    upstream: Tensor,
    global_: Tensor,
    local: Tensor,
    gate: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    add: Collection[str] = (),
) -> Launch:
    """The gradients of all three operands."""
    assert _kernels is not None
    out = dict(zip(MixGradients._fields, gradients, strict=True))
    flags = {"ADD_GLOBAL": "d_global" in add, "ADD_LOCAL": "d_local" in add, "ADD_GATE": "d_gate" in add}
    return _launch(_kernels.mix_backward_kernel, global_, local, gate, {"upstream": upstream, **out}, flags)


def _launch(
    kernel: Any, global_: Tensor, local: Tensor, gate: Tensor, others: dict[str, Tensor], flags: dict[str, bool]
) -> Launch:
    assert _kernels is not None
    block_b, block_d, warps, stages = _kernels.MIX_TILE
    constants = {**strides(global_, local, gate), **flags, "BLOCK_B": block_b, "BLOCK_D": block_d}
    tensors: dict[str, Tensor | None] = {"global_": global_, "local": local, "gate": gate, **others}
    rows = len(global_)
    return Launch(kernel, (-(-rows // block_b),), tensors, constants, {"B": rows}, warps, stages)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@torch.library.custom_op("fedmoe::gated_mix", mutates_args=())
def _forward(global_: Tensor, local: Tensor, gate: Tensor) -> Tensor:
    mixed = _empty(global_)
    forward_launch(global_, local, gate, mixed).run()
    return mixed


@torch.library.custom_op("fedmoe::gated_mix_backward", mutates_args=())
def _backward(upstream: Tensor, global_: Tensor, local: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = _empty(global_), _empty(local), _empty(gate)
    backward_launch(upstream.contiguous(), global_, local, gate, out).run()
    return out


@_forward.register_fake
def _(global_: Tensor, local: Tensor, gate: Tensor) -> Tensor:
    return _empty(global_)


@_backward.register_fake
def _(upstream: Tensor, global_: Tensor, local: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(global_), _empty(local), _empty(gate)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, upstream: Tensor) -> Any:
    return _backward(upstream, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)
_forward.register_vmap(one_by_one(_forward))
_backward.register_vmap(one_by_one(_backward))
