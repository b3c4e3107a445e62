"""The flat optimizer step in plain PyTorch: in place, in any dtype, on any device, without a host synchronization.

It says what the kernels of `flat_optimizer` compute, and is what runs where they do not. Arithmetic is in the weights'
dtype. [K, P] are K clients, a row each, and rows know nothing of each other: K calls with [P] give the same.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmoe.kernels.flat_optimizer_state import QUANTIZED, Control, Moments, check_adamw, check_norm, check_sgd


def flat_norm(
    gradients: Sequence[Tensor],  # each [P] or each [K, P], of one step; any floating dtypes
    *,
    scale: Tensor | None = None,  # [] or [K], the loss's, which gradients are divided by
    max_norm: float | None = None,
    live: Tensor | None = None,  # [] or [K] bool or int8
    step: Tensor | None = None,  # [] or [K] floating or int32, steps taken; in place
    out: Control,
) -> None:
    """Prepare the updates of all segments: their common norm, whether it is finite, and the factor that clips it.

    The norm is that of the gradients divided by `scale`; `factor` is min(1, max_norm / (norm + 1e-6)) / scale, as
    torch.nn.utils.clip_grad_norm_ has it. `step` grows by 1 where the step will be taken: where live and finite.
    Raises ValueError for shapes, devices or dtypes that do not fit.
    """
    check_norm(gradients, scale, max_norm, live, step, out)
    dtype = out.norm.dtype
    inverse = torch.ones_like(out.norm) if scale is None else scale.to(dtype).reciprocal().expand_as(out.norm)
    squares = [(g.to(dtype) * _column(inverse)).square().sum(-1) for g in gradients]
    norm = torch.stack(squares).sum(0).sqrt()
    if live is not None:
        norm = norm.where(live != 0, 0)
    finite = norm.isfinite()
    out.norm.copy_(norm)
    out.found_inf.copy_(~finite)
    out.factor.copy_(inverse if max_norm is None else inverse * (max_norm / (norm + 1e-6)).clamp(max=1))
    if step is not None:
        step.add_(finite if live is None else finite & (live != 0))


def sgd_step(
    weights: Tensor,  # [P] or [K, P], in place; rows may lie apart
    gradients: Tensor,  # same shape, any floating dtype; zeroed
    buffer: Tensor | None,  # shape and strides as weights, the momentum's, in place; None without momentum
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
    """One step of torch.optim.SGD (dampening 0), on the gradients unscaled and, with `control`, clipped.

    The buffer begins as zeros.

    Rows that are not live, and rows that `control` found not finite, keep weights, buffer and low copy to the bit;
    their gradients are zeroed like all others. Raises ValueError for shapes, devices, dtypes or numbers that do not
    fit.
    """
    check_sgd(weights, gradients, buffer, lr, momentum, nesterov, low, scale, live, control)
    going = _going(live, control)
    g = _unscaled(gradients, weights, scale, control)
    if weight_decay:
        g = g.add(weights, alpha=weight_decay)
    if buffer is not None:
        velocity = g.add(buffer, alpha=momentum)
        _put(buffer, velocity, going)
        g = g.add(velocity, alpha=momentum) if nesterov else velocity
    _put(weights, weights - _column(lr) * g, going)
    _finish(weights, gradients, low, going, zero)


def adamw_step(
    weights: Tensor,  # [P] or [K, P], in place
    gradients: Tensor,  # same shape, any floating dtype; zeroed
    moments: Moments,  # in place
    *,
    step: Tensor,  # [] or [K] floating or int32, from 1: this step's number
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
    """One step of torch.optim.AdamW, on the gradients unscaled and, with `control`, clipped.

    `step` is only read, since several segments share it: `flat_norm` advances it, or, without, the caller beforehand.
    8-bit moments are rounded when stored; the step itself uses them before. Rows are skipped as in `sgd_step`.
    Raises ValueError for shapes, devices, dtypes or numbers that do not fit.
    """
    check_adamw(weights, gradients, moments, step, lr, betas, eps, low, scale, live, control)
    going = _going(live, control)
    g = _unscaled(gradients, weights, scale, control)
    quantized = moments.first_absmax is not None
    first, second = decoded(moments, weights.dtype) if quantized else moments[:2]
    first = first.lerp(g, 1 - betas[0])
    second = (second * betas[1]).addcmul(g, g, value=1 - betas[1])
    count = _column(step).to(weights.dtype)
    # −expm1 is 1 − βᵗ without cancellation, which in fp32 costs four digits of 1 − 0.999.
    correction1, correction2 = (-torch.expm1(count * (math.log(b) if b else -math.inf)) for b in betas)
    rate = _column(lr).to(weights.dtype)
    update = first / ((second / correction2).sqrt() + eps)
    _put(weights, weights * (1 - rate * weight_decay) - rate / correction1 * update, going)
    made = encoded(first, second, step) if quantized else Moments(first, second)
    for kept, new in zip(moments, made, strict=True):
        if kept is not None and new is not None:
            _put(kept, new, going)
    _finish(weights, gradients, low, going, zero)


def decoded(moments: Moments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """First and second moment, [P] or [K, P], of their 8-bit codes.

    Block by block relative to the block's largest, as in 8-bit Optimizers via Block-wise Quantization (arXiv
    2110.02861), but the code is a tiny floating-point number in place of the paper's table, so that a few integer
    operations give it: 3 bits of mantissa, so 8 values an octave; the top code is 1, the block's largest element
    itself; code 0 is 0. The second moment has 255 codes, down to 1.25 · 2⁻³² (1.7e-5 of the largest gradient); the
    first a sign and 127 codes, down to 1.25 · 2⁻¹⁶. A stored value is off by less than 1/8 of itself, by 0 on average.
    """
    assert moments.first_absmax is not None and moments.second_absmax is not None
    first = _magnitude(moments.first & 127, moments.first_absmax, 127, dtype)
    second = _magnitude(moments.second, moments.second_absmax, 255, dtype)
    return first.where(moments.first < 128, -first), second


def encoded(first: Tensor, second: Tensor, step: Tensor) -> Moments:
    """Both moments in the code of `decoded`, rounded at random but reproducibly: by a hash of (element, step).

    Rounding to nearest would lose every change of less than 1/16: with β₂ = 0.999 a second moment would not grow before
    the squared gradient is 63 times as large. At random, the average is right. What is below the lowest code becomes 0
    or the lowest code in the first moment, always the lowest in the second, which therefore never vanishes.
    """
    element = torch.arange(first.shape[-1], device=first.device)
    noise = _hash(element + (_column(step).long() * 0x9E3779B9))
    m, first_absmax = _relative(first.abs())
    v, second_absmax = _relative(second)
    high, low = noise >> 12, noise & 0xFFFFF  # 20 bits each: what a code leaves of a mantissa
    vanishing = (m * (2**20 / _lowest(127)) > high).to(torch.uint8)
    m_code = _code(m, high, 127).where(m >= _lowest(127), vanishing)
    v_code = _code(v, low, 255).where(v >= _lowest(255), (second > 0).to(torch.uint8))
    return Moments(m_code | ((first < 0).to(torch.uint8) << 7), v_code, first_absmax, second_absmax)


def _relative(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values [.., P] over their block's largest, in fp32, and the largest themselves."""
    size = values.shape[-1]
    blocks = F.pad(values, (0, -size % QUANTIZED)).unflatten(-1, (-1, QUANTIZED))
    largest = blocks.amax(-1)
    tiny = torch.finfo(torch.float32).tiny  # the inverse of less would overflow
    relative = blocks * largest.clamp(min=tiny).reciprocal()[..., None]
    return relative.flatten(-2)[..., :size].float(), largest


def _code(relative: Tensor, noise: Tensor, top: int) -> Tensor:
    bits = (relative.contiguous().view(torch.int32) + noise.int()) >> 20
    return (bits - (1016 - top)).clamp(0, top).to(torch.uint8)  # 1016: of 1.0


def _magnitude(code: Tensor, absmax: Tensor, top: int, dtype: torch.dtype) -> Tensor:
    bits = ((code.int() + (1016 - top)) << 20).where(code > 0, 0)
    return bits.view(torch.float32).to(dtype) * absmax.repeat_interleave(QUANTIZED, -1)[..., : code.shape[-1]].to(dtype)


def _lowest(top: int) -> float:
    """The least value above 0, relative to the block's largest: code 1."""
    exponent, eighths = divmod(1016 - top + 1, 8)
    return float((1 + eighths / 8) * 2.0 ** (exponent - 127))


def _hash(x: Tensor) -> Tensor:
    """32 bits that look random, of the low 32 bits of x (lowbias32 of C. Wellons' hash-prospector)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _column(scalar: Tensor) -> Tensor:
    return scalar[:, None] if scalar.ndim else scalar


def _going(live: Tensor | None, control: Control | None) -> Tensor | None:
    """[] or [K, 1]: whether a row takes the step; None if all do."""
    if control is None:
        return None if live is None else _column(live != 0)
    finite = control.found_inf == 0
    return _column(finite if live is None else finite & (live != 0))


def _unscaled(gradients: Tensor, weights: Tensor, scale: Tensor | None, control: Control | None) -> Tensor:
    g = gradients.to(weights.dtype)
    if control is not None:
        return g * _column(control.factor).to(weights.dtype)
    return g if scale is None else g * _column(scale).to(weights.dtype).reciprocal()


def _put(out: Tensor, value: Tensor, going: Tensor | None) -> None:
    out.copy_(value if going is None else value.to(out.dtype).where(going, out))


def _finish(weights: Tensor, gradients: Tensor, low: Tensor | None, going: Tensor | None, zero: bool) -> None:
    if low is not None:
        _put(low, weights, going)
    if zero:
        gradients.zero_()
