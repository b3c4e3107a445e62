"""The gated head for few classes: mix, header, loss, correct predictions and the gradients of all five operands."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmoe.kernels.gated_head import Gradients
from fedmoe.kernels.gated_head_launch import Scratch
from fedmoe.profiling.bench import Absent, Bench, Floor, attempt, sizes
from tests.bench.variants import Graphed, agreement, compiled, compiler, differentiated, plain_mix, tolerance
from tests.heads import gated_head, gated_head_step, gated_head_supported

NAMES = ("loss", "correct", "d_global", "d_local", "d_gate", "d_weight", "d_bias")
BF16, FP32 = "bfloat16", "float32"
FULL = [(rows, 500, classes, BF16) for classes in (10, 100) for rows in (64, 128, 256, 512)]


@sizes("rows, width, classes, dtype", full=[*FULL, (64, 500, 10, FP32), (512, 500, 100, FP32)], tiny=[(5, 12, 3, FP32)])
def test_gated_head(gpu_benchmark: Bench, rows: int, width: int, classes: int, dtype: str) -> None:
    bench, kind = gpu_benchmark, getattr(torch, dtype)
    torch.manual_seed(0)
    shapes = (rows, width), (rows, width), (rows, 2), (classes, width), (classes,)
    made = [torch.randn(*shape, device=bench.device) for shape in shapes]
    made[3] /= width**0.5  # logits as of a header that has begun to learn
    leaves = [t.to(kind).requires_grad_() for t in made]
    targets = torch.randint(0, classes, (rows,), device=bench.device)

    eager = differentiated(plain, leaves, targets)
    tuned = "max-autotune-no-cudagraphs"  # captured here, because torch's own graphs copy the inputs in
    supported, why = gated_head_supported(*leaves, targets)
    ours: dict[str, Any] = dict.fromkeys(("ours", "ours, step", "ours, step, graph"), Absent(why))
    if supported:
        ours["ours"] = differentiated(gated_head, leaves, targets)
        ours["ours, step"] = step(leaves, targets)
        ours["ours, step, graph"] = attempt(lambda: Graphed(step(leaves, targets)))
    bench(
        {
            "eager": eager,
            "eager, graph": attempt(lambda: Graphed(eager)),
            compiler(bench): differentiated(compiled(plain, bench), leaves, targets),
            "compile, graph": attempt(lambda: Graphed(differentiated(compiled(plain, bench, tuned), leaves, targets))),
            **ours,
        },
        floor=floor(rows, width, classes, kind),
        check=agreement(NAMES, tolerance(kind)),
    )


def plain(
    global_: Tensor, local: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and correct predictions in PyTorch."""
    logits = F.linear(plain_mix(global_, local, gate), weight, bias)
    return F.cross_entropy(logits, targets), (logits.argmax(1) == targets).sum()


def step(leaves: list[Tensor], targets: Tensor) -> Any:
    """The engine's entry, into buffers made once; the header's gradients in fp32, as its arena keeps them."""
    operands: list[Any] = [t.detach() for t in leaves]
    d_rows = [torch.empty_like(t) for t in operands[:3]]
    d_header = [torch.empty_like(t, dtype=torch.float32) for t in operands[3:]]
    gradients = Gradients(*d_rows, *d_header)
    loss = torch.empty((), device=targets.device)
    correct = torch.empty((), dtype=torch.int64, device=targets.device)
    one, rows = torch.ones_like(loss), torch.full_like(loss, len(targets))
    scratch = Scratch.empty(len(targets), len(operands[3]), targets.device)

    def call() -> tuple[Tensor | None, ...]:
        gated_head_step(
            *operands,
            targets,
            scale=one,
            denominator=rows,  # the engine knows how many rows a step has
            loss=loss,
            correct=correct,
            gradients=gradients,
            scratch=scratch,
        )
        return loss, correct, *gradients

    return call


def floor(rows: int, width: int, classes: int, dtype: torch.dtype) -> Floor:
    """Every operand read once, its gradient written once: 2 (2 B D + 2 B + C D + C) numbers, B targets, two results.

    Three products (logits, dR, dW) of 2 B D C FLOPs each.
    """
    numbers = 2 * rows * width + 2 * rows + classes * width + classes
    moved = 2 * numbers * dtype.itemsize + 8 * rows + 12
    return Floor(bytes=moved, flops=3 * 2 * rows * width * classes, dtype=dtype)
