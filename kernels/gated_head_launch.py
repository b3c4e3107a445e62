"""Launchers of the gated head's kernels: which arguments, constants and tiles a call takes, and what they refuse."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from fedmoe.kernels.launch import FLOATS, INTERPRETED, Launch, load, not_dense, refusal

_kernels = load("gated_head_kernels")

MAX_CLASSES = 1024

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]
"""global_ [B, D], local [B, D], gate [B, 2], weight [C, D], bias [C], targets [B], class_weights [C]."""


class Options(NamedTuple):
    """What the kernels are compiled for; a softcap of 0 is none."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0


class Scratch(NamedTuple):
    """What the first kernel leaves for the second; its contents mean nothing between calls."""

    d_logits: Tensor  # [B, C] fp32
    losses: Tensor  # [B] fp32
    row_weights: Tensor  # [B] fp32
    hits: Tensor  # [B] int32

    @classmethod
    def empty(cls, rows: int, classes: int, device: torch.device | str) -> "Scratch":
        """Scratch for B rows and C classes."""
        losses = torch.empty(rows, device=device)
        hits = torch.empty(rows, dtype=torch.int32, device=device)
        return cls(losses.new_empty(rows, classes), losses, torch.empty_like(losses), hits)


def rows_launch(
    inputs: Inputs,
    options: Options,
    scratch: Scratch,
    scale: Tensor | None = None,  # [] or [B]
    denominator: Tensor | None = None,  # []
    gradients: tuple[Tensor | None, ...] = (None, None, None),  # of global_, local and gate
    add: Collection[str] = (),
) -> Launch:
    """Losses and hits of all rows and, with a denominator, the gradients of everything that has rows."""
    assert _kernels is not None
    global_, _, _, weight, bias, targets, class_weights = inputs
    rows, classes = len(global_), len(weight)
    block_c = _power_of_two(classes)
    bytes_, tiles = global_.element_size(), _kernels.ROW_TILES
    block_b, block_d, warps, stages = tiles[min(key for key in tiles if key[0] == bytes_ and key[1] >= block_c)]
    backward = denominator is not None
    return Launch(
        _kernels.rows_kernel,
        (-(-rows // block_b),),
        {
            **_named(inputs),
            "weight": weight,
            "bias": bias,
            "targets": targets,
            "class_weights": class_weights,
            "scale": scale,
            "denominator": denominator,
            "losses": scratch.losses,
            "row_weights": None if backward else scratch.row_weights,
            "hits": scratch.hits,
            "d_logits": scratch.d_logits if backward else None,
            **dict(zip(("d_global", "d_local", "d_gate"), gradients, strict=True)),
        },
        {
            **strides(*inputs[:3]),
            "SCALE_B": _scale_stride(scale),
            "C": classes,
            "WEIGHT_C": weight.stride(0),
            "WEIGHT_D": weight.stride(1),
            "BIAS_C": 0 if bias is None else bias.stride(0),
            "TARGETS_B": targets.stride(0),
            "CLASS_WEIGHTS_C": 0 if class_weights is None else class_weights.stride(0),
            "IGNORE": options.ignore_index,
            "SMOOTHING": options.label_smoothing,
            "Z_LOSS": options.z_loss,
            "SOFTCAP": options.softcap,
            "ADD_GLOBAL": "d_global" in add,
            "ADD_LOCAL": "d_local" in add,
            "ADD_GATE": "d_gate" in add,
            "BLOCK_B": block_b,
            "BLOCK_C": block_c,
            "BLOCK_D": block_d,
        },
        {"B": rows},
        warps,
        stages,
    )


def header_launch(
    inputs: Inputs,
    scratch: Scratch,
    scale: Tensor,  # [] or [B]
    denominator: Tensor,  # []
    loss: Tensor | None,  # []
    correct: Tensor | None,  # []
    gradients: tuple[Tensor | None, ...],  # of weight and bias
    add: Collection[str] = (),
) -> Launch:
    """The header's gradients and, with a loss, the totals, from what `rows_launch` left in `scratch`."""
    assert _kernels is not None
    (rows, width), classes = inputs[0].shape, len(inputs[3])
    block_b, block_c, block_d, warps, stages = _kernels.HEADER_TILES[inputs[0].element_size()]
    block_c = min(block_c, _power_of_two(classes))
    return Launch(
        _kernels.header_kernel,
        (-(-width // block_d), -(-classes // block_c)),
        {
            **_named(inputs),
            "d_logits": scratch.d_logits,
            "scale": scale,
            "denominator": denominator,
            "losses": scratch.losses,
            "hits": scratch.hits,
            "loss": loss,
            "correct": correct,
            **dict(zip(("d_weight", "d_bias"), gradients, strict=True)),
        },
        {
            **strides(*inputs[:3]),
            "SCALE_B": _scale_stride(scale),
            "C": classes,
            "ADD_LOSS": "loss" in add,
            "ADD_CORRECT": "correct" in add,
            "ADD_WEIGHT": "d_weight" in add,
            "ADD_BIAS": "d_bias" in add,
            "BLOCK_B": block_b,
            "BLOCK_C": block_c,
            "BLOCK_D": block_d,
        },
        {"B": rows},
        warps,
        stages,
    )


def totals_launch(scratch: Scratch, loss: Tensor | None, correct: Tensor, denominator: Tensor, mean: bool) -> Launch:
    """Loss, correct predictions and denominator of a forward pass without gradients."""
    assert _kernels is not None
    tensors = {
        "losses": scratch.losses,
        "row_weights": scratch.row_weights,
        "hits": scratch.hits,
        "loss": loss,
        "correct": correct,
        "denominator": denominator,
    }
    return Launch(_kernels.totals_kernel, (1,), tensors, {"MEAN": mean}, {"B": len(scratch.losses)}, 4, 1)


def unsupported(
    global_: Tensor,
    local: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weights: Tensor | None,
) -> str:
    """Why the kernels do not take these tensors; empty if they do."""
    operands = global_, local, gate, weight, bias, targets
    if reason := misfit(*operands, ("class_weights", class_weights, 0)):
        return reason
    tensors = (
        ("global", global_, FLOATS),
        ("local", local, (global_.dtype,)),
        ("gate", gate, FLOATS),
        ("weight", weight, (global_.dtype,)),
        ("bias", bias, FLOATS),
        ("targets", targets, (torch.int64, torch.int32)),
        ("class_weights", class_weights, FLOATS),
    )
    if reason := refusal(tensors) or unmultiplied(global_):
        return reason
    if len(weight) > MAX_CLASSES:
        return f"{len(weight)} classes are more than {MAX_CLASSES}"
    if len(weight) == 0:
        return "there are no classes"
    if weight.numel() > 2**31:
        return f"weight has {weight.numel()} elements, more than 2³¹"
    header = ("weight", weight, 0), ("bias", bias, 0), ("class_weights", class_weights, 0)
    return too_far(("global", global_, 1), ("local", local, 1), *header)


def misfit(
    global_: Tensor,  # [B, D]
    local: Tensor,  # [B, D]
    gate: Tensor,  # [B, 2]
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    targets: Tensor,  # [B]
    weights: tuple[str, Tensor | None, int],  # a loss's: name, tensor, and whether its size is C (0) or B (1)
) -> str:
    """Why a head's operands do not fit together; empty if they do."""
    for name, tensor in (("global", global_), ("weight", weight)):
        if reason := not_dense(name, tensor):
            return reason
        if tensor.ndim != 2:
            return f"{name} has shape {tuple(tensor.shape)}, expected two dimensions"
    (rows, width), classes = global_.shape, len(weight)
    for name, given, shape in (
        ("local", local, (rows, width)),
        ("gate", gate, (rows, 2)),
        ("weight", weight, (classes, width)),
        ("bias", bias, (classes,)),
        ("targets", targets, (rows,)),
        (*weights[:2], ((classes, rows)[weights[2]],)),
    ):
        if given is None:
            continue
        if reason := not_dense(name, given):
            return reason
        if given.shape != shape:
            return f"{name} has shape {tuple(given.shape)}, expected {shape}"
    return ""


def too_far(*tensors: tuple[str, Tensor | None, int]) -> str:
    """Why 32 bits do not reach all elements of a tensor's dimensions from the one given on; empty if they do.

    Kernels compute offsets of rows in 64 bits, of features and classes in 32: half the registers.
    """
    for name, tensor, first in tensors:
        if tensor is not None:
            strides = tensor.stride()
            if sum((n - 1) * step for n, step in zip(tensor.shape[first:], strides[first:], strict=True)) >= 2**31:
                return f"{name} has strides {strides}, which take it beyond 2³¹ elements: use {name}.contiguous()"
    return ""


def unmultiplied(global_: Tensor) -> str:
    """Why no representation [B, D] like this is multiplied by a header; empty if it is."""
    if global_.dtype == torch.bfloat16 and INTERPRETED:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if global_.numel() == 0:
        return f"there is nothing to do for shape {tuple(global_.shape)}"
    return ""


def _power_of_two(classes: int) -> int:
    return int(max(16, 1 << (classes - 1).bit_length()))


def _named(inputs: Inputs) -> dict[str, Tensor | None]:
    return {"global_": inputs[0], "local": inputs[1], "gate": inputs[2]}


def strides(global_: Tensor, local: Tensor, gate: Tensor) -> dict[str, int]:
    """D and the strides of what every kernel here reads."""
    return {
        "D": global_.shape[1],
        "GLOBAL_B": global_.stride(0),
        "GLOBAL_D": global_.stride(1),
        "LOCAL_B": local.stride(0),
        "LOCAL_D": local.stride(1),
        "GATE_B": gate.stride(0),
        "GATE_E": gate.stride(1),
    }


def _scale_stride(scale: Tensor | None) -> int:
    return 1 if scale is not None and scale.ndim else 0
