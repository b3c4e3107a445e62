"""Triton kernels of the gated mix alone, for headers that are not linear; shapes and names as in gated_head_kernels."""

import triton
import triton.language as tl

from fedmoe.kernels.gated_common_kernels import alphas, put

MIX_TILE = (4, 256, 4, 2)
"""BLOCK_B, BLOCK_D, warps and stages of both kernels."""


@triton.jit(do_not_specialize=["B"])
def mix_kernel(
    global_,  # [B, D]
    local,  # [B, D]
    gate,  # [B, 2] logits, order [global, local]
    mixed,  # [B, D] out, contiguous
    B,
    D: tl.constexpr,
    GLOBAL_B: tl.constexpr,
    GLOBAL_D: tl.constexpr,
    LOCAL_B: tl.constexpr,
    LOCAL_D: tl.constexpr,
    GATE_B: tl.constexpr,
    GATE_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK_B rows of `mixed`."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = rows < B
    row = rows.to(tl.int64)
    alpha_g, alpha_l = alphas(gate, row, live, GATE_B, GATE_E)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = live[:, None] & (d < D)[None, :]
        r_g = tl.load(global_ + row[:, None] * GLOBAL_B + d[None, :] * GLOBAL_D, mask=inside, other=0.0)
        r_l = tl.load(local + row[:, None] * LOCAL_B + d[None, :] * LOCAL_D, mask=inside, other=0.0)
        out = alpha_g[:, None] * r_g.to(tl.float32) + alpha_l[:, None] * r_l.to(tl.float32)
        tl.store(mixed + row[:, None] * D + d[None, :], out.to(mixed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B"])
def mix_backward_kernel(
    upstream,  # [B, D] gradient of the mix, contiguous, of any floating dtype
    global_,  # [B, D]
    local,  # [B, D]
    gate,  # [B, 2]
    d_global,  # [B, D] out, contiguous
    d_local,  # [B, D] out, contiguous
    d_gate,  # [B, 2] out, contiguous
    B,
    D: tl.constexpr,
    GLOBAL_B: tl.constexpr,
    GLOBAL_D: tl.constexpr,
    LOCAL_B: tl.constexpr,
    LOCAL_D: tl.constexpr,
    GATE_B: tl.constexpr,
    GATE_E: tl.constexpr,
    ADD_GLOBAL: tl.constexpr,  # add to d_global instead of writing it; likewise below
    ADD_LOCAL: tl.constexpr,
    ADD_GATE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK_B rows of all three gradients."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = rows < B
    row = rows.to(tl.int64)
    alpha_g, alpha_l = alphas(gate, row, live, GATE_B, GATE_E)
    dots = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = live[:, None] & (d < D)[None, :]
        at = row[:, None] * D + d[None, :]
        dr = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
        r_g = tl.load(global_ + row[:, None] * GLOBAL_B + d[None, :] * GLOBAL_D, mask=inside, other=0.0)
        r_l = tl.load(local + row[:, None] * LOCAL_B + d[None, :] * LOCAL_D, mask=inside, other=0.0)
        dots += tl.sum(dr * (r_g.to(tl.float32) - r_l.to(tl.float32)), 1)
        put(d_global + at, alpha_g[:, None] * dr, inside, ADD_GLOBAL)
        put(d_local + at, alpha_l[:, None] * dr, inside, ADD_LOCAL)
    dg = alpha_g * alpha_l * dots
    put(d_gate + row * 2, dg, live, ADD_GATE)
    put(d_gate + row * 2 + 1, -dg, live, ADD_GATE)
