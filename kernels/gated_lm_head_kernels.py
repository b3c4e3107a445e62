"""Triton kernels of the gated head for a vocabulary: between products, logits become loss and gradients in place.

Shapes: R rows (tokens) of a chunk, C classes (the vocabulary), V of them in the slab that is at hand. Arguments in
capitals are compile-time constants as in gated_head_kernels. The softmax needs two passes over a row: the second finds
it in the L2 cache, since the rows in flight (256 KiB each for 128256 classes in bf16) fit there.
"""

import triton
import triton.language as tl

from fedmoe.kernels.gated_common_kernels import capped, put

ROW_TILE = (4096, 8)
"""`losses_kernel`'s BLOCK_V, less where there are fewer classes, and warps."""

BIAS_TILE = (32, 128, 4)
"""`bias_kernel`'s BLOCK_R, BLOCK_V and warps."""

SHIPPED = [
    # dtype, D, C, all options or none, classes in the slab
    *((dtype, 4096, 128256, full, 128256) for dtype in ("bfloat16", "float32") for full in (False, True)),
    ("float16", 768, 50257, True, 50257),
    ("bfloat16", 4096, 128256, True, 16384),
]
"""What the tests compile ahead of time."""


@triton.jit
def _logits(logits, bias, c, held, inside, BIAS_C: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits of columns `c`, in fp32, with bias and softcap; where `held` but not `inside`, anything."""
    z = tl.load(logits + c, mask=held, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + c * BIAS_C, mask=inside, other=0.0).to(tl.float32)
    if SOFTCAP > 0:
        z = capped(z, SOFTCAP)
    return z


@triton.jit(do_not_specialize=["START"])
def losses_kernel(
    logits,  # [R, V], rows as long as HELD; without bias or cap. With GRADIENT, out: their gradient
    bias,  # [V] of this slab, or None
    targets,  # [R] integer
    token_weights,  # [R] or None
    scale,  # [] or [R] (SCALE_B = 1) fp32, the gradients' factor; read only with GRADIENT
    denominator,  # [] fp32, the gradients' divisor (0 counts as 1); likewise
    losses,  # [R] fp32 out, neither scaled nor divided
    hits,  # [R] int32 out, whether the prediction is right
    top,  # [R] fp32, or None: carried from slab to slab are the largest logit so far,
    others,  # [R] fp32, Σ exp(z − top) of all but the target,
    gaps,  # [R] fp32, Σ (top − z),
    target_logit,  # [R] fp32
    best,  # [R] int32, and the first class of the largest logit
    START,  # class of the slab's first column
    C: tl.constexpr,
    V: tl.constexpr,
    HELD: tl.constexpr,  # V rounded up to what the slab has: an odd vocabulary would keep accesses from being vectors
    LOGITS_R: tl.constexpr,
    BIAS_C: tl.constexpr,
    TARGETS_R: tl.constexpr,
    TOKEN_WEIGHTS_R: tl.constexpr,
    SCALE_R: tl.constexpr,
    IGNORE: tl.constexpr,  # target of rows that are left out
    SMOOTHING: tl.constexpr,  # ε
    Z_LOSS: tl.constexpr,  # λ
    SOFTCAP: tl.constexpr,  # 0: none
    STATISTICS: tl.constexpr,  # take the slab into account; otherwise the carried values are final
    FIRST: tl.constexpr,  # nothing is carried here yet
    LAST: tl.constexpr,  # all classes have been seen after this: write loss and hit
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program owns a row of the slab and that row's outputs."""
    row = tl.program_id(0).to(tl.int64)  # R · C may pass 2³¹
    logits += row * LOGITS_R
    label = tl.load(targets + row * TARGETS_R)
    y = label.to(tl.int32)
    if label == IGNORE:
        if LAST:
            tl.store(losses + row, 0.0)
            tl.store(hits + row, 0)
        if GRADIENT:  # the products read them
            for start in range(0, V, BLOCK_V):
                c = start + tl.arange(0, BLOCK_V)
                tl.store(logits + c, tl.zeros([BLOCK_V], logits.dtype.element_ty), mask=c < HELD)
    else:
        w = 1.0
        if token_weights is not None:
            w = tl.load(token_weights + row * TOKEN_WEIGHTS_R).to(tl.float32)
        w = tl.where((label >= 0) & (label < C), w, float("nan"))  # a label out of range: its loss is noticed
        # The top starts low but finite: where a whole block is -inf, -inf − -inf would make everything NaN.
        m, s, g, z_y, b = -3e38, 0.0, 0.0, 0.0, 0
        if not FIRST:
            m, s, g = tl.load(top + row), tl.load(others + row), tl.load(gaps + row)
            z_y, b = tl.load(target_logit + row), tl.load(best + row)
        if STATISTICS:
            here = (y >= START) & (y < START + V)
            # Before the loop, whose reductions are barriers: below, other threads overwrite the target's logit.
            z_y = tl.where(here, _logits(logits, bias, y - START, here, here, BIAS_C, SOFTCAP), z_y)
            for start in range(0, V, BLOCK_V):
                c = start + tl.arange(0, BLOCK_V)
                inside = c < V
                z = _logits(logits, bias, c, c < HELD, inside, BIAS_C, SOFTCAP)
                z = tl.where(inside, z, float("-inf"))
                block_top = tl.max(z, 0)
                b = tl.where(block_top > m, tl.min(tl.where(z == block_top, START + c, C), 0), b)
                new = tl.maximum(m, block_top)
                if SMOOTHING > 0:  # as distances from the top: each is exact where the logits share a large offset
                    g += (START + start) * (new - m)
                    g += tl.sum(tl.where(inside, new - z, 0.0), 0)
                e = tl.where(START + c == y, 0.0, tl.exp(z - new))
                s = s * tl.exp(m - new) + tl.sum(e, 0)
                m = new
            if not (FIRST and LAST):
                tl.store(top + row, m)
                tl.store(others + row, s)
                tl.store(gaps + row, g)
                tl.store(target_logit + row, z_y)
                tl.store(best + row, b)
        total = s + tl.exp(z_y - m)
        log_total = tl.log(total)
        if LAST:
            loss = (1 - SMOOTHING) * (log_total - (z_y - m))
            if SMOOTHING > 0:
                loss += SMOOTHING * (g / C + log_total)
            if Z_LOSS > 0:
                loss += Z_LOSS * (m + log_total) * (m + log_total)
            tl.store(losses + row, w * loss)
            tl.store(hits + row, (b == y).to(tl.int32))
        if GRADIENT:
            divisor = tl.load(denominator)
            factor = w * tl.load(scale + row * SCALE_R) / tl.where(divisor == 0, 1.0, divisor)
            # p − 1 of the target as −(the others' share): a difference of numbers near 1 would cancel.
            share = -s / total
            for start in range(0, V, BLOCK_V):
                c = start + tl.arange(0, BLOCK_V)
                inside = c < V
                z = _logits(logits, bias, c, c < HELD, inside, BIAS_C, SOFTCAP)
                p = tl.exp(z - m) / total
                dz = (1 - SMOOTHING) * tl.where(START + c == y, share, p)
                if SMOOTHING > 0:
                    dz += SMOOTHING * (p - 1 / C)
                if Z_LOSS > 0:
                    dz += 2 * Z_LOSS * (m + log_total) * p
                if SOFTCAP > 0:  # 1 − tanh²
                    dz *= 1 - (z / SOFTCAP) * (z / SOFTCAP)
                tl.store(logits + c, (factor * dz).to(logits.dtype.element_ty), mask=c < HELD)


@triton.jit(do_not_specialize=["R"])
def bias_kernel(
    d_logits,  # [R, V]
    d_bias,  # [V] out, contiguous
    R,
    V: tl.constexpr,
    HELD: tl.constexpr,
    LOGITS_R: tl.constexpr,
    ADD_BIAS: tl.constexpr,  # add to d_bias instead of writing it
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program owns BLOCK_V elements of d_bias, which are this slab's."""
    c = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = c < V
    db = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, R, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        row = rows.to(tl.int64)
        at = d_logits + row[:, None] * LOGITS_R + c[None, :]
        dz = tl.load(at, mask=(rows < R)[:, None] & (c < HELD)[None, :], other=0.0).to(tl.float32)
        db += tl.sum(dz, 0)
    put(d_bias + c, db, inside, ADD_BIAS)
