"""Weighted accumulation on the device, against fp64: eager, in a graph, and without a host synchronization."""

import pytest
import torch
from torch import Tensor

from fedmoe.kernels import oracle
from fedmoe.kernels.accumulate import accumulate_supported, weighted_accumulate
from tests.synchronization import without_synchronization

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    supported, reason = accumulate_supported(*(torch.zeros((), device="cuda"),) * 3)
    if not supported:
        pytest.skip(reason)
    theta, update = torch.randn(2, size, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    return theta.clone(), update.to(dtype), torch.tensor(0.3, device="cuda")


def assert_rounded_once(theta: Tensor, before: Tensor, update: Tensor, weight: Tensor, times: int = 1) -> None:
    exact = before.double()
    for _ in range(times):
        exact = oracle.weighted_accumulate(exact, update, weight.double())
    magnitude = before.double().abs() + times * (weight.double() * update.double()).abs()
    assert ((theta.double() - exact).abs() <= times * 2**-24 * magnitude).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 3, 1023, 1024, 5_000_001])
@pytest.mark.parametrize("offset", [0, 1])  # 1: not aligned to 16 bytes
def test_is_rounded_once(size: int, offset: int, dtype: torch.dtype) -> None:
    theta, update, weight = operands(size + offset, dtype)
    before = theta.clone()
    weighted_accumulate(theta[offset:], update[offset:], weight)
    assert_rounded_once(theta[offset:], before[offset:], update[offset:], weight)
    assert torch.equal(theta[:offset], before[:offset])


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_a_graph_without_synchronization(dtype: torch.dtype) -> None:
    theta, update, weight = operands(665_048, dtype)
    before, scratch = theta.clone(), theta.clone()
    with without_synchronization():
        weighted_accumulate(scratch, update, weight)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weighted_accumulate(theta, update, weight)
    with without_synchronization():
        weight.fill_(0.7)  # read at replay
        graph.replay()
        graph.replay()
    assert_rounded_once(theta, before, update, weight, times=2)


def test_two_runs_give_the_same_bits() -> None:
    theta, update, weight = operands(665_048, torch.bfloat16)
    other = theta.clone()
    weighted_accumulate(theta, update, weight)
    weighted_accumulate(other, update, weight)
    assert torch.equal(theta, other)


def test_more_than_two_to_the_31_elements() -> None:
    size = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 7 * size:
        pytest.skip("needs 15 GB of free GPU memory")
    theta = torch.zeros(size, device="cuda")
    update = torch.ones(size, dtype=torch.float16, device="cuda")
    weighted_accumulate(theta, update, torch.tensor(0.5, device="cuda"))
    assert bool((theta == 0.5).all())


def test_tensors_on_two_devices_are_refused() -> None:
    theta, update, _ = operands(10, torch.float32)
    with pytest.raises(ValueError, match="weight is on cpu, theta on cuda:0"):
        weighted_accumulate(theta, update, torch.tensor(0.3))
