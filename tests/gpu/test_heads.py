"""Both heads and the mix on the device: against the fp64 oracle, captured in a CUDA graph, the same bits each time."""

from typing import Any

import pytest
import torch

from fedmoe.kernels import oracle
from fedmoe.kernels.gated_lm_head_launch import Scratch
from fedmoe.kernels.gated_mix import gated_mix
from tests.heads import (
    ALL_OPTIONS,
    FEW,
    MANY,
    NAMES,
    Head,
    Operands,
    assert_within_rule,
    check,
    class_weights,
    operands,
)
from tests.synchronization import without_synchronization

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton() -> None:
    pytest.importorskip("triton")


def on_gpu(rows: int, width: int, classes: int, dtype: torch.dtype) -> tuple[Operands, torch.Tensor]:
    given, targets = operands(rows, width, classes, dtype)
    return [t.cuda() for t in given], targets.cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 500, 10), (512, 500, 100), (67, 500, 1), (130, 50, 1000), (3, 512, 62)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_few_classes(shape: tuple[int, int, int], dtype: torch.dtype, reduction: str) -> None:
    given, targets = on_gpu(*shape, dtype=dtype)
    check(given, targets, reduction)
    check(given, targets, reduction, **ALL_OPTIONS, class_weights=class_weights(shape[2]).cuda())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 512, 5000), (130, 768, 50257), (17, 100, 129)])
@pytest.mark.parametrize("cut", [1, 3, 30])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vocabulary(shape: tuple[int, int, int], dtype: torch.dtype, cut: int, reduction: str) -> None:
    given, targets = on_gpu(*shape, dtype=dtype)
    slab_bytes = max(shape[0] * 64, shape[0] * (shape[2] + 64) // cut) * dtype.itemsize
    check(given, targets, reduction, head=MANY, slab_bytes=slab_bytes)
    weights = torch.linspace(0, 2, shape[0], device="cuda")
    check(given, targets, reduction, head=MANY, slab_bytes=slab_bytes, **ALL_OPTIONS, token_weights=weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mix(dtype: torch.dtype) -> None:
    (g, l_, gate, _, _), _ = on_gpu(1000, 500, 1, dtype=dtype)
    assert_within_rule("mix", gated_mix(g, l_, gate), oracle.gated_mix(g, l_, gate), oracle.gated_mix(
        g.double(), l_.double(), gate.double()
    ))  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("head", [FEW, MANY], ids=["few", "vocabulary"])
def test_heads_compile_as_one_graph(head: Head, reduction: str) -> None:
    given, targets = on_gpu(130, 512, 100 if head is FEW else 3000, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in given]

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = head.functional(*tensors, label_smoothing=0.1, reduction=reduction)[0]
        return (out * 0.7).sum()

    expected = loss(*leaves, targets)
    actual = torch.compile(loss, fullgraph=True)(*leaves, targets)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_mix_compiles_as_one_graph() -> None:
    (g, l_, gate, _, _), _ = on_gpu(130, 512, 1, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (g, l_, gate)]
    upstream = torch.randn_like(g)
    expected, actual = gated_mix(*leaves), torch.compile(gated_mix, fullgraph=True)(*leaves)
    assert torch.equal(actual, expected)
    theirs = torch.autograd.grad(expected, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(actual, leaves, upstream), theirs, strict=True))


CUTS = {"whole": 256 * 3008 * 2, "rows": 64 * 3008 * 2, "classes": 100_000}
"""Slabs for 256 tokens and 3000 classes in bf16: one; four row chunks; eight, with classes in parts, carried over."""


@pytest.mark.parametrize("accumulate", [False, True], ids=["written", "added"])
@pytest.mark.parametrize(("head", "cut"), [(FEW, ""), *((MANY, cut) for cut in CUTS)])
def test_a_captured_step_of_parameters_gives_the_same_bits(head: Head, cut: str, accumulate: bool) -> None:
    made, targets = on_gpu(256, 512, 100 if head is FEW else 3000, dtype=torch.bfloat16)
    given = [torch.nn.Parameter(t) for t in made]
    wide = [torch.empty_like(t, dtype=torch.float32) if k > 2 else torch.empty_like(t) for k, t in enumerate(made)]
    scale, loss = torch.tensor(0.7, device="cuda"), torch.empty((), device="cuda")
    correct = torch.empty((), dtype=torch.int64, device="cuda")
    scratch: dict[str, Any] = {} if head is FEW else {"scratch": Scratch.empty(made[0], 3000, CUTS[cut])}
    before = 0.5 if accumulate else float("nan")

    def refill() -> None:
        for t in (loss, *wide):
            t.fill_(before)
        correct.fill_(7)

    def step() -> None:
        with without_synchronization():
            head.step(
                *given, targets, scale=scale, denominator=head.denominator(targets), loss=loss, correct=correct,
                gradients=head.gradients(*wide), accumulate=("loss", "correct", *NAMES[1:]) if accumulate else (),
                **scratch,
            )  # fmt: skip

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        refill()
        step()
    torch.cuda.synchronize()
    expected = [t.clone() for t in (loss, correct, *wide)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        refill()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip((loss, correct, *wide), expected, strict=True))


def test_more_than_2_to_the_31_logits() -> None:
    """Offsets of rows beyond 2³¹ elements, in one slab: 17,000 tokens of 128,256 classes; the last rows are checked."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    given, targets = on_gpu(17_000, 16, 128_256, dtype=torch.bfloat16)
    losses, _ = MANY.functional(*given, targets, reduction="none", slab_bytes=17_000 * 128_256 * 2)
    last = [t[-64:] if k < 3 else t for k, t in enumerate(given)]
    exact, _ = MANY.plain(*(t.double() for t in last), targets[-64:], reduction="none")
    plain, _ = MANY.plain(*last, targets[-64:], reduction="none")
    assert_within_rule("loss", losses[-64:], plain, exact)
