"""Device functions that the gated head's kernels share: the gate's weights, the softcap, sums and writes."""

import triton
import triton.language as tl


@triton.jit
def alphas(gate, row, live, GATE_B: tl.constexpr, GATE_E: tl.constexpr):
    """Softmax of two logits, in fp32 [BLOCK_B]: each weight from its own exponential, so neither cancels."""
    gap = tl.load(gate + row * GATE_B, mask=live, other=0.0).to(tl.float32)
    gap -= tl.load(gate + row * GATE_B + GATE_E, mask=live, other=0.0).to(tl.float32)
    return 1 / (1 + tl.exp(-gap)), 1 / (1 + tl.exp(gap))


@triton.jit
def capped(z, SOFTCAP: tl.constexpr):
    """softcap · tanh(z / softcap), in fp32.

    By an exponential that cannot overflow; below 0.625, where its difference to 1 would cancel and a cap of 10⁴ leave
    an error of 3·10⁻⁴, by the polynomial of Cephes' `tanhf`, onto z itself, whatever the cap.
    """
    x = tl.abs(z) / SOFTCAP
    e = tl.exp(-2 * x)
    large = SOFTCAP * ((1 - e) / (1 + e))
    s = x * x
    p = (((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s
    return tl.where(x < 0.625, z + z * s * (p - 3.33332819422e-1), tl.where(z < 0, -large, large))


@triton.jit
def sum_of(values, B, BLOCK: tl.constexpr):
    """Sum of values [B], in a fixed order."""
    total = tl.zeros([BLOCK], values.dtype.element_ty)
    for start in range(0, B, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values + at, mask=at < B, other=0)
    return tl.sum(total, 0)


@triton.jit
def put(out, value, mask, ACCUMULATE: tl.constexpr):
    """Write `value` to `out`, or add it there in fp32, rounded once."""
    if ACCUMULATE:
        value += tl.load(out, mask=mask).to(value.dtype)
    tl.store(out, value.to(out.dtype.element_ty), mask=mask)
