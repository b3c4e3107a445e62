"""Triton kernels of the flat optimizer step: SGD and AdamW; shapes and names as in flat_norm_kernels.

Full blocks are read and written without a mask: one that may end anywhere would keep accesses from being 128 bits wide.
"""

import triton
import triton.language as tl

from fedmoe.kernels.flat_norm_kernels import _begin, _factor, _read, _stays, _write

SGD_TILE = (1024, 4)
"""BLOCK and warps: two accesses of 128 bits a thread and fp32 tensor. No tile here has been timed."""

ADAMW_TILE = (1024, 4)

ADAMW8_TILE = (2048, 8)
"""BLOCK is a multiple of the 256 elements that share a maximum."""


@triton.jit
def _tile(BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """0 to BLOCK − 1: [BLOCK], or [BLOCK / WIDTH, WIDTH]."""
    if WIDTH == BLOCK:
        tile = tl.arange(0, BLOCK)
    else:
        tile = tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tile


@triton.jit
def _sgd(weights, gradients, buffer, low, mask, factor, rate, MOMENTUM, WEIGHT_DECAY, NESTEROV, ZERO):
    w = _read(weights, mask)
    g = _read(gradients, mask) * factor + WEIGHT_DECAY * w
    if buffer is not None:
        velocity = MOMENTUM * _read(buffer, mask) + g
        _write(buffer, velocity, mask)
        g = g + MOMENTUM * velocity if NESTEROV else velocity
    w -= rate * g
    _write(weights, w, mask)
    if low is not None:
        _write(low, w, mask)
    if ZERO:
        _write(gradients, tl.zeros_like(w), mask)


@triton.jit(do_not_specialize=["P", "PITCH"])
def sgd_kernel(
    weights,  # [K, P] fp32, in place; its rows and those of buffer begin PITCH elements apart
    gradients,  # [K, P], zeroed if ZERO
    buffer,  # [K, P] fp32, the momentum's, in place, or None
    low,  # [K, P] bf16 or fp16 out, or None
    lr,  # [] or [K] fp32
    scale,  # [] or [K] fp32, the gradients' divisor, or None
    factor,  # [K] fp32, from control_kernel, or None: the gradients' factor
    found_inf,  # [K] fp32, likewise: rows with other than 0 are left as they are, but for their gradients
    live,  # [K] bool or int8, or None: rows with 0 likewise
    P,
    PITCH,
    LR_K: tl.constexpr,
    SCALE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    MOMENTUM: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK elements of one row, in every tensor."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    tile = start + tl.arange(0, BLOCK)
    at = _begin(P, ALIGN) + tile
    far = _begin(PITCH, ALIGN) + tile
    w, g = weights + far, gradients + at
    b = buffer + far if buffer is not None else None
    c = low + at if low is not None else None
    if _stays(found_inf, live):
        if ZERO:
            _write(g, tl.zeros([BLOCK], tl.float32), tile < P)
    else:
        rate, times = tl.load(lr + tl.program_id(1) * LR_K), _factor(factor, scale, SCALE_K)
        if start + BLOCK <= P:
            _sgd(w, g, b, c, None, times, rate, MOMENTUM, WEIGHT_DECAY, NESTEROV, ZERO)
        else:
            _sgd(w, g, b, c, tile < P, times, rate, MOMENTUM, WEIGHT_DECAY, NESTEROV, ZERO)


@triton.jit
def _correction(step, LOG_BETA):
    """1 − βᵗ as −expm1(t log β): by its series near 0, where 1 − exp would cancel."""
    x = step * LOG_BETA
    series = 1.0 + x / 9
    for k in tl.static_range(8, 1, -1):
        series = 1.0 + x / k * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _noise(element, step):
    """32 bits that look random, of a row's element and the step: lowbias32, as in the oracle."""
    x = element.to(tl.uint32) + step.to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _decode(code, absmax, TOP: tl.constexpr):
    """The magnitude of a code from 0 to TOP, relative to 1.0, whose three leading bits of mantissa end in 1016."""
    bits = tl.where(code > 0, (code + (1016 - TOP)) << 20, 0)
    return bits.to(tl.float32, bitcast=True) * absmax[:, None]


@triton.jit
def _relative(values):
    """Values from 0 on over their row's largest, and the largest."""
    largest = tl.max(values, 1)
    # The inverse of less would overflow.
    return values * tl.div_rn(1.0, tl.maximum(largest, 1.1754943508222875e-38))[:, None], largest


@triton.jit
def _encode(relative, noise, below, LOWEST: tl.constexpr, TOP: tl.constexpr):
    """The code of `_decode`, rounded up by the chance that 20 bits of noise give; `below`: that of less than LOWEST."""
    code = ((relative.to(tl.int32, bitcast=True) + noise) >> 20) - (1016 - TOP)
    return tl.where(relative < LOWEST, below.to(tl.int32), tl.minimum(code, TOP))


@triton.jit
def _adamw(
    weights, gradients, first, second, first_absmax, second_absmax, low, mask, blocks, tile, step, factor, rate,
    correction1, correction2, BETA1, BETA2, EPS, WEIGHT_DECAY, ZERO,
):  # fmt: skip
    w = _read(weights, mask)
    g = _read(gradients, mask) * factor
    if first_absmax is not None:
        code = _read(first, mask).to(tl.int32)
        m = _decode(code & 127, _read(first_absmax, blocks), 127)
        m = tl.where(code > 127, -m, m)
        v = _decode(_read(second, mask).to(tl.int32), _read(second_absmax, blocks), 255)
    else:
        m = _read(first, mask)
        v = _read(second, mask)
    m += (1 - BETA1) * (g - m)
    v = BETA2 * v + (1 - BETA2) * g * g
    w = w * (1 - rate * WEIGHT_DECAY) - rate / correction1 * (m / (tl.sqrt(v / correction2) + EPS))
    _write(weights, w, mask)
    if low is not None:
        _write(low, w, mask)
    if first_absmax is not None:
        noise = _noise(tile, step)
        share, largest = _relative(tl.abs(m))
        high = (noise >> 12).to(tl.int32)
        code = _encode(share, high, share * (2**36 / 1.25) > high, 1.25 / 2**16, 127)
        _write(first, code + tl.where(m < 0, 128, 0), mask)
        _write(first_absmax, largest, blocks)
        share, largest = _relative(v)
        code = _encode(share, (noise & 0xFFFFF).to(tl.int32), v > 0, 1.25 / 2**32, 255)
        _write(second, code, mask)
        _write(second_absmax, largest, blocks)
    else:
        _write(first, m, mask)
        _write(second, v, mask)
    if ZERO:
        _write(gradients, tl.zeros_like(w), mask)


@triton.jit(do_not_specialize=["P"])
def adamw_kernel(
    weights,  # [K, P] fp32, in place
    gradients,  # [K, P], zeroed if ZERO
    first,  # [K, P] fp32, or uint8 codes, in place
    second,  # [K, P] likewise
    first_absmax,  # [K, ceil(P / WIDTH)] fp32, in place, or None: not quantized
    second_absmax,  # likewise
    low,  # [K, P] bf16 or fp16 out, or None
    step,  # [] or [K] fp32 or int32, from 1
    lr,  # [] or [K] fp32
    scale,  # [] or [K] fp32, the gradients' divisor, or None
    factor,  # [K] fp32, from control_kernel, or None: the gradients' factor
    found_inf,  # [K] fp32, likewise: rows with other than 0 are left as they are, but for their gradients
    live,  # [K] bool or int8, or None: rows with 0 likewise
    P,
    STEP_K: tl.constexpr,
    LR_K: tl.constexpr,
    SCALE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # elements that share a maximum; BLOCK if not quantized
):
    """One program owns BLOCK elements of one row, in every tensor, and their maxima."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    tile = start + _tile(BLOCK, WIDTH)
    at = _begin(P, ALIGN) + tile
    w, g, m, v = weights + at, gradients + at, first + at, second + at
    c = low + at if low is not None else None
    block = start // WIDTH + tl.arange(0, BLOCK // WIDTH)
    blocks = (P - 1) // WIDTH + 1  # P + WIDTH may pass 2³¹
    a = first_absmax + tl.program_id(1).to(tl.int64) * blocks + block if first_absmax is not None else None
    b = second_absmax + tl.program_id(1).to(tl.int64) * blocks + block if second_absmax is not None else None
    if _stays(found_inf, live):
        if ZERO:
            _write(g, tl.zeros_like(tile), tile < P)
    else:
        row = tl.program_id(1)
        t = tl.load(step + row * STEP_K)
        rate, times = tl.load(lr + row * LR_K), _factor(factor, scale, SCALE_K)
        one, two = _correction(t.to(tl.float32), LOG_BETA1), _correction(t.to(tl.float32), LOG_BETA2)
        i = t.to(tl.int32)
        if start + BLOCK <= P:
            _adamw(
                w, g, m, v, a, b, c, None, None, tile, i, times, rate, one, two, BETA1, BETA2, EPS, WEIGHT_DECAY, ZERO
            )
        else:
            inside, real = tile < P, block < blocks
            _adamw(
                w, g, m, v, a, b, c, inside, real, tile, i, times, rate, one, two, BETA1, BETA2, EPS, WEIGHT_DECAY, ZERO
            )
