"""Launches of the flat optimizer's kernels: grids, tiles and compile-time constants, for arguments already checked."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fedmoe.kernels.flat_optimizer_state import NORM_BLOCK, QUANTIZED, Control, Moments, parts
from fedmoe.kernels.launch import Launch, load

_norms = load("flat_norm_kernels")
_kernels = load("flat_optimizer_kernels")


def norm_launches(
    gradients: Sequence[Tensor],
    scale: Tensor | None,
    max_norm: float | None,
    live: Tensor | None,
    step: Tensor | None,
    out: Control,
) -> list[Launch]:
    """A norm kernel for each segment, then the one that reads what all of them left."""
    assert _norms is not None
    rows, total = out.partials.shape
    shared = {"scale": scale, "live": live, "partials": out.partials}
    launches, first = [], 0
    for gradient in gradients:
        size, programs = gradient.shape[-1], parts(gradient.shape[-1])
        constants = {"SCALE_K": _a_row(scale), "ALIGN": _alignment(gradient), "BLOCK": NORM_BLOCK}
        sizes = {"P": size, "FIRST": first, "PARTS": total, "PROGRAMS": programs}
        tensors = {"gradients": gradient, **shared}
        launches.append(Launch(_norms.norm_kernel, (programs, rows), tensors, constants, sizes, _norms.NORM_WARPS, 1))
        first += programs
    block, warps = _norms.CONTROL_TILE
    results = {"norm": out.norm, "found_inf": out.found_inf, "factor": out.factor, "step": step}
    verdict: dict[str, Any] = {"SCALE_K": _a_row(scale), "MAX_NORM": max_norm or 0.0, "BLOCK": block}
    sizes = {"PARTS": total}
    launches.append(Launch(_norms.control_kernel, (1, rows), {**shared, **results}, verdict, sizes, warps, 1))
    return launches


def sgd_launch(
    weights: Tensor,
    gradients: Tensor,
    buffer: Tensor | None,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    low: Tensor | None,
    scale: Tensor | None,
    live: Tensor | None,
    control: Control | None,
    zero: bool,
) -> Launch:
    """The update of one segment."""
    assert _kernels is not None
    tensors = {"buffer": buffer, "lr": lr, "scale": scale}
    constants = {"LR_K": _a_row(lr), "SCALE_K": _a_row(scale)}
    numbers = {"MOMENTUM": momentum, "WEIGHT_DECAY": weight_decay, "NESTEROV": nesterov, "ZERO": zero}
    tile = _kernels.SGD_TILE
    pitch = weights.stride(0) if weights.ndim == 2 else weights.shape[0]
    call = {**constants, **numbers}
    return _update(_kernels.sgd_kernel, weights, gradients, low, live, control, tensors, call, tile, pitch)


def adamw_launch(
    weights: Tensor,
    gradients: Tensor,
    moments: Moments,
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    low: Tensor | None,
    scale: Tensor | None,
    live: Tensor | None,
    control: Control | None,
    zero: bool,
) -> Launch:
    """The update of one segment."""
    assert _kernels is not None
    quantized = moments.first_absmax is not None
    tile = _kernels.ADAMW8_TILE if quantized else _kernels.ADAMW_TILE
    tensors = {**moments._asdict(), "step": step, "lr": lr, "scale": scale}
    constants = {"STEP_K": _a_row(step), "LR_K": _a_row(lr), "SCALE_K": _a_row(scale)}
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    numbers = {"BETA1": betas[0], "BETA2": betas[1], "LOG_BETA1": logs[0], "LOG_BETA2": logs[1], "EPS": eps}
    how = {"WEIGHT_DECAY": weight_decay, "ZERO": zero, "WIDTH": QUANTIZED if quantized else tile[0]}
    return _update(
        _kernels.adamw_kernel, weights, gradients, low, live, control, tensors, {**constants, **numbers, **how}, tile
    )


def _update(
    kernel: Any,
    weights: Tensor,
    gradients: Tensor,
    low: Tensor | None,
    live: Tensor | None,
    control: Control | None,
    others: dict[str, Tensor | None],
    constants: dict[str, Any],
    tile: tuple[int, int],
    pitch: int | None = None,  # elements from row to row of the weights, for a kernel whose weights' rows may be apart
) -> Launch:
    block, warps = tile
    tensors = {"weights": weights, "gradients": gradients, "low": low, "live": live, **others}
    tensors["factor"] = control.factor if control else None
    tensors["found_inf"] = control.found_inf if control else None
    size, rows = weights.shape[-1], weights.shape[:-1].numel()
    constants = {**constants, "ALIGN": _alignment(weights, pitch or size), "BLOCK": block}
    sizes = {"P": size} if pitch is None else {"P": size, "PITCH": pitch}
    return Launch(kernel, (-(-size // block), rows), tensors, constants, sizes, warps, 1)


def _alignment(rows: Tensor, pitch: int | None = None) -> int:
    """The largest power of two up to 16, vectors of any dtype, that divides where each row begins, in elements."""
    size = rows.shape[-1] | (pitch or 0)
    return 16 if rows.shape[:-1].numel() == 1 else max(1, min(16, size & -size))


def _a_row(scalar: Tensor | None) -> int:
    return int(scalar is not None and scalar.ndim == 1)
