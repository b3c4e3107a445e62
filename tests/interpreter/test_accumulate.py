"""The weighted accumulation's kernel in Triton's interpreter, against the fp64 oracle."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe.kernels import oracle
from fedmoe.kernels.accumulate import accumulate_supported, weighted_accumulate
from tests.heads import assert_within_rule

FP32, FP16 = torch.float32, torch.float16


def operands(size: int, dtype: torch.dtype = FP32, seed: int = 0) -> tuple[Tensor, Tensor]:
    theta, update = torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    return theta, update.to(dtype)


def check(theta: Tensor, update: Tensor, weight: Tensor) -> None:
    exact = oracle.weighted_accumulate(theta.double(), update.double(), weight.double())
    plain, before = oracle.weighted_accumulate(theta, update, weight), update.clone()
    weighted_accumulate(theta, update, weight)
    if theta.numel():
        assert_within_rule("theta", theta, plain, exact)
    assert torch.equal(update, before)


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("size", [0, 1, 3, 1023, 1024, 1025, 5000])
def test_is_the_oracle(size: int, dtype: torch.dtype) -> None:
    check(*operands(size, dtype), torch.tensor(0.3))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    size=st.integers(1, 4000),
    offset=st.integers(0, 3),
    weight=st.sampled_from([0.0, 1.0, -1.0, 0.3, 1e-8, 1e8]),
    dtype=st.sampled_from([FP32, FP16]),
    seed=st.integers(0, 100),
)
def test_any_size_and_offset(size: int, offset: int, weight: float, dtype: torch.dtype, seed: int) -> None:
    theta, update = operands(size + offset, dtype, seed)
    check(theta[offset:], update[offset:], torch.tensor(weight))


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_client_after_client(dtype: torch.dtype) -> None:
    weights = torch.tensor([0.5, 0.125, 0.375])
    updates = [operands(3000, dtype, seed)[1] for seed in range(3)]
    theta, plain, exact = torch.zeros(3000), torch.zeros(3000), torch.zeros(3000, dtype=torch.float64)
    for update, weight in zip(updates, weights, strict=True):
        weighted_accumulate(theta, update, weight)
        plain = oracle.weighted_accumulate(plain, update, weight)
        exact = oracle.weighted_accumulate(exact, update, weight.double())
    assert_within_rule("theta", theta, plain, exact)


def test_nothing_beyond_the_end_is_touched() -> None:
    theta, update = operands(3000)
    before = theta.clone()
    weighted_accumulate(theta[100:2500], update[100:2500], torch.ones(()))
    assert torch.equal(theta[:100], before[:100]) and torch.equal(theta[2500:], before[2500:])


def test_onto_itself() -> None:
    theta, _ = operands(1500)
    before = theta.clone()
    weighted_accumulate(theta, theta, torch.ones(()))
    assert torch.equal(theta, 2 * before)


def test_what_is_not_finite_is_not_hidden() -> None:
    for wrong in (float("nan"), float("inf")):
        theta, update = operands(1500)
        update[[7, 1400]] = wrong
        weighted_accumulate(theta, update, torch.tensor(0.1))
        assert theta.isfinite().logical_not().nonzero()[:, 0].tolist() == [7, 1400]


def test_two_runs_give_the_same_bits() -> None:
    (first, update), (second, _) = operands(5000, FP16), operands(5000, FP16)
    weighted_accumulate(first, update, torch.tensor(0.3))
    weighted_accumulate(second, update, torch.tensor(0.3))
    assert torch.equal(first, second)


def test_refusals() -> None:
    theta, update = operands(10)
    one = torch.ones(())
    assert accumulate_supported(theta, update, one) == (True, "")
    for wrong, message in (
        ((theta.half(), update, one), r"theta is torch\.float16, not one of \(torch\.float32,\)"),
        ((theta, update.double(), one), r"update is torch\.float64"),
        ((theta, update, one.double()), r"weight is torch\.float64"),
        ((theta[::2], update[:5], one), r"theta is not contiguous: shape \(5,\), strides \(2,\)"),
        ((theta[:5], update[::2], one), r"update is not contiguous"),
        ((theta, update, torch.ones(1)), r"weight has shape \(1,\).* expected contiguous \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            weighted_accumulate(*wrong)
