"""Triton kernel that adds a weighted update onto θ."""

import triton
import triton.language as tl

ACCUMULATE_TILE = (1024, 4)
"""BLOCK and warps: 8 elements a thread, 16 bytes of a 16-bit update in one load. Not yet timed."""


@triton.jit(do_not_specialize=["P"])
def accumulate_kernel(
    theta,  # [P] fp32, in and out
    update,  # [P]
    weight,  # [] fp32
    P,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK neighbouring elements of `theta`."""
    start = tl.program_id(0).to(tl.int64) * BLOCK  # P may pass 2³¹
    at = start + tl.arange(0, BLOCK)
    w = tl.load(weight)
    # Whole tiles apart: under a mask whose end is unknown to the compiler, no access could be a vector.
    if start + BLOCK <= P:
        u = tl.load(update + at).to(tl.float32)
        tl.store(theta + at, tl.fma(u, w, tl.load(theta + at)))
    else:
        live = at < P
        u = tl.load(update + at, mask=live).to(tl.float32)
        tl.store(theta + at, tl.fma(u, w, tl.load(theta + at, mask=live)), mask=live)
