"""The flat optimizer's kernels on the device: against the fp64 oracle, and captured in a CUDA graph."""

from typing import Any

import pytest
import torch

from fedmoe.kernels import flat_optimizer as kernels
from tests.optimizers import ADAMW, FP16, FP32, SGD, State, check
from tests.synchronization import without_synchronization

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BF16 = torch.bfloat16
FORMS: dict[int, dict[str, Any]] = {0: SGD, 32: ADAMW, 8: ADAMW}


@pytest.fixture(autouse=True)
def _triton() -> None:
    pytest.importorskip("triton")


@pytest.mark.parametrize("bits", FORMS)
@pytest.mark.parametrize(("gradient", "low"), [(FP32, FP16), (BF16, BF16), (FP16, FP16)])
@pytest.mark.parametrize("shape", [(1,), (257,), (100_003,), (3, 5000), (2, 4096)])
def test_is_the_oracle(shape: tuple[int, ...], gradient: torch.dtype, low: torch.dtype, bits: int) -> None:
    common: dict[str, Any] = {"gradient": gradient, "low": low, "device": "cuda"}
    check(shape, FORMS[bits], bits, **common)
    check(shape, FORMS[bits], bits, norm=0.3, live=len(shape) > 1, wrong=True, **common)
    if len(shape) > 1 and not bits:
        check(shape, apart=True, **common)


def test_addresses_that_are_not_aligned() -> None:
    """Arena segments are, but nothing demands it."""
    w, g = torch.randn(2, 5001, device="cuda")
    expected = w.double() - 0.5 * g.double()
    kernels.sgd_step(w[1:], g[1:], None, lr=torch.full((), 0.5, device="cuda"))
    assert (w[1:].double() - expected[1:]).abs().max() < 1e-6
    assert g[0] != 0 and not g[1:].any()


@pytest.mark.parametrize("norm", [None, 0.3])
@pytest.mark.parametrize("bits", FORMS)
def test_a_captured_step_gives_the_same_bits(bits: int, norm: float | None) -> None:
    scratch, eager, replayed = (State((2, 5000), FP32, "cuda", BF16, BF16, bits) for _ in range(3))
    scale, live = torch.full((), 64.0, device="cuda"), torch.ones(2, dtype=torch.bool, device="cuda")

    def take(state: State) -> None:
        with without_synchronization():
            state.take(kernels, FORMS[bits], scale, live, norm)

    take(scratch)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take(replayed)
    for t in range(4):
        live[0] = t != 3
        for state in (eager, replayed):
            state.receive(t, 64.0, wrong=t == 1 and norm is not None)
        take(eager)
        graph.replay()
        ours, theirs = replayed.tensors(norm is not None), eager.tensors(norm is not None)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), t
    assert eager.step.tolist() == ([3, 4] if norm is None else [2, 3])
