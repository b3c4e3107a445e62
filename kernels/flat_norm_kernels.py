"""Triton kernels of the norm over flat gradients and of its verdict, and what all flat kernels share.

Shapes: K rows (1 for tensors without them) of P elements, contiguous. Arguments in capitals are sizes or compile-time
constants; NAME_K is 1 where the scalar `name` has an element a row, 0 where one serves all; ALIGN divides where every
row begins. Any pointer that is documented as "or None" is left out by compilation. Nothing here allocates or adds
atomically: sums are taken in an order that depends on the sizes alone. No kernel reads a scalar that another program
of it writes.
"""

import triton
import triton.language as tl

NORM_WARPS = 4

CONTROL_TILE = (1024, 4)
"""BLOCK and warps."""


@triton.jit
def _begin(P, ALIGN: tl.constexpr):
    """Where this program's row begins, in a way that shows the compiler its alignment."""
    return tl.program_id(1).to(tl.int64) * (P // ALIGN) * ALIGN


@triton.jit
def _stays(found_inf, live):
    """Whether this program's row does not take the step."""
    row = tl.program_id(1)
    stays = row < 0
    if found_inf is not None:
        stays |= tl.load(found_inf + row) != 0
    if live is not None:
        stays |= tl.load(live + row) == 0
    return stays


@triton.jit
def _factor(factor, scale, SCALE_K: tl.constexpr):
    """What this row's gradients are multiplied by."""
    value = 1.0
    if factor is not None:
        value = tl.load(factor + tl.program_id(1))
    elif scale is not None:
        value = tl.div_rn(1.0, tl.load(scale + tl.program_id(1) * SCALE_K))
    return value


@triton.jit
def _read(pointers, mask):
    """In fp32; 0 outside."""
    values = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0)
    return values.to(tl.float32)


@triton.jit
def _write(pointers, values, mask):
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["P", "FIRST", "PARTS", "PROGRAMS"])
def norm_kernel(
    gradients,  # [K, P]
    scale,  # [] or [K] fp32, or None
    live,  # [K] bool or int8, or None
    partials,  # [K, PARTS] fp32 out, columns FIRST to FIRST + PROGRAMS
    P,
    FIRST,
    PARTS,
    PROGRAMS,
    SCALE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns one partial sum of squares of a row: of every PROGRAMS-th block from its own on."""
    program = tl.program_id(0)
    begin = _begin(P, ALIGN)
    total = tl.zeros([BLOCK], tl.float32)
    if _stays(None, live) == 0:
        factor = _factor(None, scale, SCALE_K)
        at = begin + tl.arange(0, BLOCK)
        for block in range(program, P // BLOCK, PROGRAMS):  # in 64 bits where P is
            g = _read(gradients + at + block * BLOCK, None) * factor
            total += g * g
        rest = P // BLOCK * BLOCK
        left = tl.where(program == PROGRAMS - 1, P - rest, 0)
        g = _read(gradients + at + rest, tl.arange(0, BLOCK) < left) * factor
        total += g * g
    tl.store(partials + tl.program_id(1).to(tl.int64) * PARTS + FIRST + program, tl.sum(total, 0))


@triton.jit(do_not_specialize=["PARTS"])
def control_kernel(
    partials,  # [K, PARTS] fp32, from norm_kernel
    scale,  # [] or [K] fp32, or None
    live,  # [K] bool or int8, or None
    norm,  # [K] fp32 out
    found_inf,  # [K] fp32 out, 0 or 1
    factor,  # [K] fp32 out
    step,  # [K] fp32 or int32, in place, or None
    PARTS,
    SCALE_K: tl.constexpr,
    MAX_NORM: tl.constexpr,  # 0: no clip
    BLOCK: tl.constexpr,
):
    """One program owns a row's scalars."""
    row = tl.program_id(1)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, PARTS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += _read(partials + (row.to(tl.int64) * PARTS + at), at < PARTS)
    length = tl.sqrt_rn(tl.sum(sums, 0))
    finite = length < float("inf")  # neither infinite nor NaN
    value = _factor(None, scale, SCALE_K)
    if MAX_NORM > 0:
        value *= tl.minimum(tl.div_rn(MAX_NORM, length + 1e-6), 1.0)
    tl.store(norm + row, length)
    tl.store(found_inf + row, tl.where(finite, 0.0, 1.0))
    tl.store(factor + row, value)
    if step is not None:
        taken = finite & (_stays(None, live) == 0)
        tl.store(step + row, tl.load(step + row) + taken.to(step.dtype.element_ty))
