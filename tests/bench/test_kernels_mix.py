"""The gated mix alone, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from fedmoe.kernels.gated_mix import (
    MixGradients,
    gated_mix,
    gated_mix_backward_step,
    gated_mix_step,
    gated_mix_supported,
)
from fedmoe.profiling.bench import Absent, Bench, Floor, attempt, sizes
from tests.bench.variants import Graphed, agreement, compiled, compiler, plain_mix, tolerance

NAMES = ("mixed", "d_global", "d_local", "d_gate")
BF16, FP32 = "bfloat16", "float32"


@sizes(
    "rows, width, dtype",
    full=[(64, 500, BF16), (512, 500, BF16), (8192, 4096, BF16), (8192, 4096, FP32)],
    tiny=[(5, 12, FP32)],
)
def test_gated_mix(gpu_benchmark: Bench, rows: int, width: int, dtype: str) -> None:
    bench, kind = gpu_benchmark, getattr(torch, dtype)
    torch.manual_seed(0)
    shapes = (rows, width), (rows, width), (rows, 2)
    leaves = [torch.randn(*shape, device=bench.device).to(kind).requires_grad_() for shape in shapes]
    upstream = torch.randn(rows, width, device=bench.device).to(kind)

    def both(mix: Any) -> Any:
        def call() -> tuple[Tensor, ...]:
            mixed = mix(*leaves)
            return mixed.detach(), *torch.autograd.grad(mixed, leaves, upstream)

        return call

    supported, why = gated_mix_supported(*leaves)
    ours: dict[str, Any] = dict.fromkeys(("ours", "ours, graph", "ours, step", "ours, step, graph"), Absent(why))
    if supported:
        ours = {
            "ours": both(gated_mix),
            "ours, graph": attempt(lambda: Graphed(both(gated_mix))),
            "ours, step": step(leaves, upstream),
            "ours, step, graph": attempt(lambda: Graphed(step(leaves, upstream))),
        }
    tuned = "max-autotune-no-cudagraphs"
    bench(
        {
            "eager": both(plain_mix),
            "eager, graph": attempt(lambda: Graphed(both(plain_mix))),
            compiler(bench): both(compiled(plain_mix, bench)),
            "compile, graph": attempt(lambda: Graphed(both(compiled(plain_mix, bench, tuned)))),
            **ours,
        },
        # Forward: two representations read, one written. Backward: three read, two written. The gate read twice, and
        # its gradient written. No products.
        floor=Floor(bytes=(8 * rows * width + 3 * 2 * rows) * kind.itemsize, flops=0, dtype=kind),
        check=agreement(NAMES, tolerance(kind)),
    )


def step(leaves: list[Tensor], upstream: Tensor) -> Any:
    """The engine's entries, into buffers made once."""
    operands = [t.detach() for t in leaves]
    mixed, gradients = torch.empty_like(upstream), MixGradients(*(torch.empty_like(t) for t in operands))

    def call() -> tuple[Tensor, ...]:
        gated_mix_step(*operands, mixed=mixed)
        gated_mix_backward_step(upstream, *operands, gradients=gradients)
        return mixed, *gradients

    return call
