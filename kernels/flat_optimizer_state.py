"""What the flat optimizer step keeps on the device, and what both its implementations demand of their arguments."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedmoe.kernels.launch import fits

QUANTIZED = 256
"""Elements that share one absolute maximum in 8-bit moments; the last block of a row may be shorter."""

NORM_BLOCK, NORM_PROGRAMS = 2048, 1024
"""Elements a program adds at a time, and most programs a row, so that one program can add up what they leave."""


class Control(NamedTuple):
    """What a norm tells the updates after it: one element for [P], one a row for [K, P]. Scratch of one step."""

    norm: Tensor  # [] or [K] fp32, of the unscaled gradients before clipping; 0 for rows that are not live
    found_inf: Tensor  # [] or [K] fp32, 1 if the norm is not finite, else 0, as torch._amp_update_scale_ takes it
    factor: Tensor  # [] or [K] fp32, what gradients are multiplied by: the clip's factor over the scale
    partials: Tensor  # [K, parts] fp32, sums of squares

    @classmethod
    def empty(cls, gradients: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> "Control":
        """For the norm over these segments, each [P] or each [K, P]; their values do not matter."""
        rows, device = gradients[0].shape[:-1], gradients[0].device
        norm, found_inf, factor = (torch.empty(rows, dtype=dtype, device=device) for _ in range(3))
        return cls(norm, found_inf, factor, torch.empty(*partials_shape(gradients), dtype=dtype, device=device))


class Moments(NamedTuple):
    """AdamW's state: fp32, or 8-bit codes with a maximum for each block of QUANTIZED elements (blocks [⌈P/256⌉] a row).

    How codes are to be read is said by `flat_optimizer_oracle.decoded`. All zeros is the right beginning of either.
    """

    first: Tensor  # [P] or [K, P] fp32 or uint8, the gradient's running mean
    second: Tensor  # same shape and dtype, its square's
    first_absmax: Tensor | None = None  # [blocks] or [K, blocks] fp32; with uint8 only
    second_absmax: Tensor | None = None  # likewise

    @classmethod
    def zeros(cls, weights: Tensor, bits: int = 32) -> "Moments":
        """For weights [P] or [K, P], in their dtype (`bits=32`) or in 8 bits."""
        if bits not in (8, 32):
            raise ValueError(f"bits is {bits}, expected 8 or 32")
        if bits == 32:
            return cls(torch.zeros_like(weights), torch.zeros_like(weights))
        blocks = absmax_shape(weights)
        first, second = (torch.zeros_like(weights, dtype=torch.uint8) for _ in range(2))
        return cls(first, second, weights.new_zeros(blocks), weights.new_zeros(blocks))


def parts(size: int) -> int:
    """How many partial sums of squares a row of `size` elements gives."""
    return min(-(-size // NORM_BLOCK), NORM_PROGRAMS)


def partials_shape(gradients: Sequence[Tensor]) -> tuple[int, int]:
    """Of `Control.partials`: rows, and the partial sums of all segments."""
    return gradients[0].shape[:-1].numel(), sum(parts(g.shape[-1]) for g in gradients)


def absmax_shape(weights: Tensor) -> tuple[int, ...]:
    """Of each maximum in 8-bit `Moments`."""
    return (*weights.shape[:-1], -(-weights.shape[-1] // QUANTIZED))


def check_norm(
    gradients: Sequence[Tensor],
    scale: Tensor | None,
    max_norm: float | None,
    live: Tensor | None,
    step: Tensor | None,
    out: Control,
) -> None:
    """Raise ValueError for what no implementation of `flat_norm` takes."""
    if not gradients:
        raise ValueError("gradients has 0 segments, expected at least 1")
    rows, device = _rows("gradients", gradients[0])
    for k, gradient in enumerate(gradients):
        fits(f"gradients[{k}]", gradient, (*rows, gradient.shape[-1] if gradient.ndim else 1), None, device)
    if isinstance(max_norm, Tensor) or (max_norm is not None and not max_norm > 0):
        raise ValueError(f"max_norm is {max_norm}, expected a positive number or None")
    _check_scalars(rows, device, scale=scale)
    _check_live(live, rows, device)
    if step is not None:
        _check_count(step, rows, device)
    _check_control(out, rows, device)
    fits("partials", out.partials, partials_shape(gradients), None, device)


def check_sgd(
    weights: Tensor,
    gradients: Tensor,
    buffer: Tensor | None,
    lr: Tensor,
    momentum: float,
    nesterov: bool,
    low: Tensor | None,
    scale: Tensor | None,
    live: Tensor | None,
    control: Control | None,
) -> None:
    """Raise ValueError for what no implementation of `sgd_step` takes."""
    _check_step(weights, gradients, lr, low, scale, live, control, apart=True)
    if momentum < 0 or (nesterov and momentum == 0):
        raise ValueError(f"momentum is {momentum} with nesterov={nesterov}, expected positive, or 0 without")
    if (buffer is None) != (momentum == 0):
        given = "missing" if buffer is None else "given"
        raise ValueError(f"buffer is {given} with momentum {momentum}: it goes with a momentum, and only with one")
    if buffer is not None:
        _fits_rows("buffer", buffer, tuple(weights.shape), weights.device)
        if buffer.ndim == 2 and len(buffer) > 1 and buffer.stride(0) != weights.stride(0):
            found = f"buffer's rows are {buffer.stride(0)} elements apart, those of weights {weights.stride(0)}"
            raise ValueError(f"{found}: expected the same")


def check_adamw(
    weights: Tensor,
    gradients: Tensor,
    moments: Moments,
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    low: Tensor | None,
    scale: Tensor | None,
    live: Tensor | None,
    control: Control | None,
) -> None:
    """Raise ValueError for what no implementation of `adamw_step` takes."""
    _check_step(weights, gradients, lr, low, scale, live, control)
    rows, device = _rows("weights", weights)
    if not all(0 <= beta < 1 for beta in betas) or eps < 0:
        raise ValueError(f"betas are {betas} and eps {eps}, expected betas in [0, 1) and eps from 0 on")
    _check_count(step, rows if getattr(step, "ndim", 0) else (), device)
    first, second, *maxima = moments
    kind = torch.uint8 if first.dtype == torch.uint8 else None
    for name, moment in (("first", first), ("second", second)):
        fits(name, moment, tuple(weights.shape), kind, device)
    for name, absmax in zip(("first_absmax", "second_absmax"), maxima, strict=True):
        if (absmax is None) != (kind is None):
            given = "missing" if absmax is None else "given"
            raise ValueError(f"{name} is {given}, the first moment {first.dtype}: it goes with torch.uint8 only")
        if absmax is not None:
            fits(name, absmax, absmax_shape(weights), None, device)


def _check_step(
    weights: Tensor,
    gradients: Tensor,
    lr: Tensor,
    low: Tensor | None,
    scale: Tensor | None,
    live: Tensor | None,
    control: Control | None,
    apart: bool = False,  # whether the rows of weights may be
) -> None:
    rows, device = _rows("weights", weights)
    if apart:
        _fits_rows("weights", weights, tuple(weights.shape), device)
    for name, tensor in (("weights", None if apart else weights), ("gradients", gradients), ("low", low)):
        if tensor is not None:
            fits(name, tensor, tuple(weights.shape), None, device)
    _check_scalars(rows, device, lr=lr, scale=scale)
    _check_live(live, rows, device)
    if control is not None:
        _check_control(control, rows, device)
        if scale is not None:
            raise ValueError("scale and control are both given, expected one: control's factor holds the scale")


def _fits_rows(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """As `fits`, but rows, each contiguous, may lie apart."""
    apart = tensor.ndim == 2 and tensor.shape == shape and tensor.stride(1) == 1 and tensor.stride(0) > shape[1]
    fits(name, tensor[0] if apart else tensor, shape[1:] if apart else shape, None, device)


def _rows(name: str, tensor: Tensor) -> tuple[tuple[int, ...], torch.device]:
    if tensor.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [P] or [K, P]")
    return tuple(tensor.shape[:-1]), tensor.device


def _check_scalars(rows: tuple[int, ...], device: torch.device, **scalars: Tensor | None) -> None:
    for name, scalar in scalars.items():
        if scalar is not None:
            fits(name, scalar, rows if getattr(scalar, "ndim", 0) else (), None, device)


def _check_live(live: Tensor | None, rows: tuple[int, ...], device: torch.device) -> None:
    if live is not None:
        fits("live", live, rows, torch.int8 if getattr(live, "dtype", None) == torch.int8 else torch.bool, device)


def _check_count(step: Tensor, rows: tuple[int, ...], device: torch.device) -> None:
    fits("step", step, rows, torch.int32 if getattr(step, "dtype", None) == torch.int32 else None, device)


def _check_control(control: Control, rows: tuple[int, ...], device: torch.device) -> None:
    for name in ("norm", "found_inf", "factor"):
        fits(f"control's {name}", getattr(control, name), rows, None, device)
