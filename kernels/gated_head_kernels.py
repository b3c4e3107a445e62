"""Triton kernels of the gated head for few classes: mix, header, softmax, loss and all their gradients.

Shapes: B rows, D representation width, C classes. Arguments in capitals are compile-time constants, so that D = 500
keeps its known divisibility: NAME_B, NAME_C, NAME_D are the strides of `name` in elements along that dimension.
Any pointer that is documented as "or None" is left out by compilation. Nothing here allocates or adds atomically:
each element is written by one program, in a fixed order of summation, so two runs give the same bits.
"""

import triton
import triton.language as tl

from fedmoe.kernels.gated_common_kernels import alphas, capped, put, sum_of

ROW_TILES = {
    # (bytes of an element, classes up to): BLOCK_B, BLOCK_D, warps, stages
    (2, 16): (16, 64, 4, 3),
    (2, 128): (16, 64, 4, 3),
    (2, 1024): (8, 32, 8, 2),
    (4, 16): (16, 64, 4, 3),
    (4, 128): (16, 32, 8, 3),
    (4, 1024): (4, 16, 16, 2),
}
"""`rows_kernel`'s tiles; its BLOCK_C is all classes, rounded up to a power of two of at least 16.

16 rows of 1024 classes would spill: 128 to 776 bytes of stack with all options on, for sm_90.
Chosen by what the compiler makes of them; no tile here has been timed.
"""

HEADER_TILES = {
    # bytes of an element: BLOCK_B, BLOCK_C, BLOCK_D, warps, stages
    2: (64, 64, 32, 4, 3),
    4: (32, 32, 32, 4, 3),
}
"""`header_kernel`'s tiles; BLOCK_C is less where there are fewer classes."""

SHIPPED = [
    # dtype, D, C, all options (bias, class weights, smoothing, z-loss, softcap, accumulation) or none
    *((dtype, 500, c, full) for dtype in ("bfloat16", "float32") for c in (10, 100, 1000) for full in (False, True)),
    ("float16", 500, 10, True),
    ("bfloat16", 512, 100, True),
    ("bfloat16", 50, 10, True),
    ("float32", 50, 10, True),
]
"""What the tests compile ahead of time: every tile, with and without options."""


@triton.jit(do_not_specialize=["B"])
def rows_kernel(
    global_,  # [B, D] the global expert's representation
    local,  # [B, D] the local expert's, same dtype
    gate,  # [B, 2] gate logits, order [global, local]
    weight,  # [C, D] header, same dtype as the representations
    bias,  # [C] or None
    targets,  # [B] integer
    class_weights,  # [C] or None
    scale,  # [] or [B] (SCALE_B = 1) fp32, the gradients' factor; read only if d_global is given
    denominator,  # [] fp32, the gradients' divisor (0 counts as 1); likewise
    losses,  # [B] fp32 out, each row's loss, neither scaled nor divided
    row_weights,  # [B] fp32 out, each row's share of the denominator, or None
    hits,  # [B] int32 out, whether the prediction is right
    d_logits,  # [B, C] fp32 out, contiguous, neither scaled nor divided; or None
    d_global,  # [B, D] out, contiguous, or None: no gradients at all
    d_local,  # [B, D] out, contiguous, or None
    d_gate,  # [B, 2] out, contiguous, or None
    B,
    D: tl.constexpr,
    C: tl.constexpr,
    GLOBAL_B: tl.constexpr,
    GLOBAL_D: tl.constexpr,
    LOCAL_B: tl.constexpr,
    LOCAL_D: tl.constexpr,
    GATE_B: tl.constexpr,
    GATE_E: tl.constexpr,
    WEIGHT_C: tl.constexpr,
    WEIGHT_D: tl.constexpr,
    BIAS_C: tl.constexpr,
    TARGETS_B: tl.constexpr,
    CLASS_WEIGHTS_C: tl.constexpr,
    SCALE_B: tl.constexpr,
    IGNORE: tl.constexpr,  # target of rows that are left out
    SMOOTHING: tl.constexpr,  # ε
    Z_LOSS: tl.constexpr,  # λ
    SOFTCAP: tl.constexpr,  # 0: none
    ADD_GLOBAL: tl.constexpr,  # add to d_global instead of writing it; likewise below
    ADD_LOCAL: tl.constexpr,
    ADD_GATE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK_B rows, all their classes, and every output of these rows."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = rows < B
    row = rows.to(tl.int64)  # B · D may pass 2³¹
    classes = tl.arange(0, BLOCK_C)
    real = classes < C
    alpha_g, alpha_l = alphas(gate, row, live, GATE_B, GATE_E)

    z = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = live[:, None] & (d < D)[None, :]
        r_g = tl.load(global_ + row[:, None] * GLOBAL_B + d[None, :] * GLOBAL_D, mask=inside, other=0.0)
        r_l = tl.load(local + row[:, None] * LOCAL_B + d[None, :] * LOCAL_D, mask=inside, other=0.0)
        mixed = alpha_g[:, None] * r_g.to(tl.float32) + alpha_l[:, None] * r_l.to(tl.float32)
        w = tl.load(
            weight + classes[None, :] * WEIGHT_C + d[:, None] * WEIGHT_D,
            mask=real[None, :] & (d < D)[:, None],
            other=0.0,
        )
        z = tl.dot(mixed.to(weight.dtype.element_ty), w, z, input_precision="ieee")
    if bias is not None:
        z += tl.load(bias + classes * BIAS_C, mask=real, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP > 0:
        z = capped(z, SOFTCAP)
    z = tl.where(real[None, :], z, float("-inf"))

    y = tl.load(targets + row * TARGETS_B, mask=live, other=0)
    kept = live & (y != IGNORE)
    valid = (y >= 0) & (y < C)
    is_target = classes[None, :] == y[:, None]
    w_y = tl.where(kept, 1.0, 0.0)
    if class_weights is not None:
        w_y = tl.load(class_weights + y * CLASS_WEIGHTS_C, mask=kept & valid, other=0.0).to(tl.float32)
    w_y = tl.where(kept & ~valid, float("nan"), w_y)  # a label out of range: its loss is not finite, so it is noticed

    top = tl.max(z, 1)
    prediction = tl.min(tl.where(z == top[:, None], classes[None, :], BLOCK_C), 1)  # the first of equals, as argmax
    z -= top[:, None]  # every later term is free of a common offset
    e = tl.exp(z)
    others = tl.sum(tl.where(is_target, 0.0, e), 1)
    total = others + tl.sum(tl.where(is_target, e, 0.0), 1)
    log_total = tl.log(total)
    loss = (1 - SMOOTHING) * w_y * (log_total - tl.sum(tl.where(is_target, z, 0.0), 1))
    if SMOOTHING > 0:
        w_c = tl.where(real, 1.0, 0.0)
        if class_weights is not None:
            w_c = tl.load(class_weights + classes * CLASS_WEIGHTS_C, mask=real, other=0.0).to(tl.float32)
        gaps = tl.where(real[None, :], w_c[None, :] * (log_total[:, None] - z), 0.0)
        loss += SMOOTHING / C * tl.sum(gaps, 1)
    if Z_LOSS > 0:
        lse = top + log_total
        loss += Z_LOSS * lse * lse
    tl.store(losses + rows, tl.where(kept, loss, 0.0), mask=live)
    tl.store(hits + rows, (kept & (prediction == y)).to(tl.int32), mask=live)
    if row_weights is not None:
        tl.store(row_weights + rows, w_y, mask=live)

    if d_global is not None:
        p = e / total[:, None]
        # p − 1 of the target as −(the others' share): a difference of numbers near 1 would cancel.
        dz = (1 - SMOOTHING) * w_y[:, None] * tl.where(is_target, -(others / total)[:, None], p)
        if SMOOTHING > 0:
            dz += SMOOTHING / C * (p * tl.sum(w_c, 0) - w_c[None, :])
        if Z_LOSS > 0:
            dz += (2 * Z_LOSS * lse)[:, None] * p
        if SOFTCAP > 0:  # 1 − tanh², from the capped logits: holding the slope since then would spill at C = 1000
            tanh = (z + top[:, None]) / SOFTCAP
            dz *= 1 - tanh * tanh
        dz = tl.where(kept[:, None] & real[None, :], dz, 0.0)
        tl.store(d_logits + row[:, None] * C + classes[None, :], dz, mask=live[:, None] & real[None, :])
        low = dz.to(weight.dtype.element_ty)  # before the scale: in fp16 a division by B would lose small numbers
        divisor = tl.load(denominator)
        factor = tl.load(scale + row * SCALE_B, mask=live, other=0.0) / tl.where(divisor == 0, 1.0, divisor)
        dots = tl.zeros([BLOCK_B], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = live[:, None] & (d < D)[None, :]
            w = tl.load(
                weight + classes[:, None] * WEIGHT_C + d[None, :] * WEIGHT_D,
                mask=real[:, None] & (d < D)[None, :],
                other=0.0,
            )
            dr = tl.dot(low, w, input_precision="ieee") * factor[:, None]
            # Read again: all of D at once does not fit into registers next to the classes.
            r_g = tl.load(global_ + row[:, None] * GLOBAL_B + d[None, :] * GLOBAL_D, mask=inside, other=0.0)
            r_l = tl.load(local + row[:, None] * LOCAL_B + d[None, :] * LOCAL_D, mask=inside, other=0.0)
            dots += tl.sum(dr * (r_g.to(tl.float32) - r_l.to(tl.float32)), 1)
            at = row[:, None] * D + d[None, :]
            put(d_global + at, alpha_g[:, None] * dr, inside, ADD_GLOBAL)
            put(d_local + at, alpha_l[:, None] * dr, inside, ADD_LOCAL)
        dg = alpha_g * alpha_l * dots
        put(d_gate + row * 2, dg, live, ADD_GATE)
        put(d_gate + row * 2 + 1, -dg, live, ADD_GATE)


@triton.jit(do_not_specialize=["B"])
def header_kernel(
    global_,  # [B, D]
    local,  # [B, D]
    gate,  # [B, 2]
    d_logits,  # [B, C] fp32, contiguous, from rows_kernel
    scale,  # [] or [B] (SCALE_B = 1) fp32
    denominator,  # [] fp32, 0 counts as 1
    losses,  # [B] fp32, from rows_kernel
    hits,  # [B] int32, from rows_kernel
    loss,  # [] fp32 out, divided but not scaled, or None
    correct,  # [] int64 out, or None
    d_weight,  # [C, D] out, contiguous
    d_bias,  # [C] out, contiguous, or None
    B,
    D: tl.constexpr,
    C: tl.constexpr,
    GLOBAL_B: tl.constexpr,
    GLOBAL_D: tl.constexpr,
    LOCAL_B: tl.constexpr,
    LOCAL_D: tl.constexpr,
    GATE_B: tl.constexpr,
    GATE_E: tl.constexpr,
    SCALE_B: tl.constexpr,
    ADD_LOSS: tl.constexpr,  # add to `loss` instead of writing it; likewise below
    ADD_CORRECT: tl.constexpr,
    ADD_WEIGHT: tl.constexpr,
    ADD_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns a tile [BLOCK_C, BLOCK_D] of d_weight; of the first column also d_bias; the first the totals."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    classes = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = classes < C
    divisor = tl.load(denominator)
    factor = 1 / tl.where(divisor == 0, 1.0, divisor)
    if loss is not None:
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            put(loss, sum_of(losses, B, 256) * factor, None, ADD_LOSS)
            put(correct, sum_of(hits, B, 256).to(correct.dtype.element_ty), None, ADD_CORRECT)
    if SCALE_B == 0:
        factor *= tl.load(scale)

    dw = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, B, BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B)
        live = rows < B
        row = rows.to(tl.int64)
        alpha_g, alpha_l = alphas(gate, row, live, GATE_B, GATE_E)
        inside = live[:, None] & (d < D)[None, :]
        r_g = tl.load(global_ + row[:, None] * GLOBAL_B + d[None, :] * GLOBAL_D, mask=inside, other=0.0)
        r_l = tl.load(local + row[:, None] * LOCAL_B + d[None, :] * LOCAL_D, mask=inside, other=0.0)
        mixed = alpha_g[:, None] * r_g.to(tl.float32) + alpha_l[:, None] * r_l.to(tl.float32)
        dz = tl.load(d_logits + row[None, :] * C + classes[:, None], mask=real[:, None] & live[None, :], other=0.0)
        if SCALE_B != 0:  # a factor a row belongs before the sum over rows
            dz *= tl.load(scale + row * SCALE_B, mask=live, other=0.0)[None, :]
        db += tl.sum(dz, 1)
        low = dz.to(global_.dtype.element_ty)
        dw = tl.dot(low, mixed.to(global_.dtype.element_ty), dw, input_precision="ieee")
    at = classes[:, None] * D + d[None, :]
    put(d_weight + at, dw * factor, real[:, None] & (d < D)[None, :], ADD_WEIGHT)
    if d_bias is not None:
        if tl.program_id(0) == 0:
            put(d_bias + classes, db * factor, real, ADD_BIAS)


@triton.jit(do_not_specialize=["B"])
def totals_kernel(
    losses,  # [B] fp32
    row_weights,  # [B] fp32
    hits,  # [B] int32
    loss,  # [] fp32 out, or None
    correct,  # [] int64 out
    denominator,  # [] fp32 out: 1, or the sum of the rows' weights
    B,
    MEAN: tl.constexpr,  # divide by the sum of the rows' weights, if that is not 0
):
    """The one program owns all three sums."""
    divisor = 1.0
    if MEAN:
        divisor = sum_of(row_weights, B, 256)
    tl.store(denominator, divisor)
    tl.store(correct, sum_of(hits, B, 256).to(correct.dtype.element_ty))
    if loss is not None:
        tl.store(loss, sum_of(losses, B, 256) / tl.where(divisor == 0, 1.0, divisor))
