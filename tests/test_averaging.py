"""Weighted averaging: the oracle against NumPy in fp64, the native path against the oracle bit by bit."""

import importlib
import importlib.util
import math
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe.kernels import native
from fedmoe.kernels.averaging import RunningMean, weighted_mean, weighted_mean_native, weighted_mean_native_supported
from tests.extension import INSTRUCTION_SETS, instruction_set

BUILT, REASON = weighted_mean_native_supported([])
needs_native = pytest.mark.skipif(not BUILT, reason=REASON)
BOTH = [weighted_mean, pytest.param(weighted_mean_native, marks=needs_native)]
Mean = Callable[..., Tensor]


def updates_and_weights(count: int, size: int, seed: int = 0) -> tuple[list[Tensor], list[float]]:
    generator = torch.Generator().manual_seed(seed)
    updates = [torch.randn(size, generator=generator) * 10.0 ** (k % 5 - 2) for k in range(count)]
    return updates, (torch.rand(count, generator=generator, dtype=torch.float64) + 0.01).tolist()


def test_extension_is_built_where_required() -> None:
    if os.environ.get("FEDMOE_REQUIRE_NATIVE") != "1":
        pytest.skip("FEDMOE_REQUIRE_NATIVE=1 is not set")
    assert BUILT, REASON


@pytest.mark.parametrize("mean", BOTH)
@pytest.mark.parametrize("size", [0, 1, 7, 4095, 4096, 4097, 20_000])  # around the native tile of 4096
@pytest.mark.parametrize("count", [1, 3, 100, 1000])
def test_equals_numpy_in_fp64(mean: Mean, count: int, size: int) -> None:
    updates, weights = updates_and_weights(count, size)
    expected = np.average(np.stack([u.numpy() for u in updates]).astype(np.float64), axis=0, weights=weights)
    actual = mean(updates, weights)
    assert actual.dtype == torch.float32 and actual.shape == (size,)
    # fp64 sums: only the last rounding to fp32 is left, half a unit in the last place, and a tie's other side.
    np.testing.assert_allclose(actual.numpy(), expected, rtol=2**-23, atol=1e-12)


@pytest.mark.parametrize("mean", BOTH)
@pytest.mark.parametrize(
    ("numbers", "weights"),
    [
        # A 1 that comes before the large number is taken away is lost; at every place among eleven.
        *(([2.0**60, *[0.0] * before, 1.0, -(2.0**60), *[0.0] * (8 - before)], [1] * 11) for before in range(9)),
        # On a tie of fp32: what follows is even if divided last, and by this sum of the weights, odd otherwise.
        ([1.0, 1 - 2**-24], [49, 49]),
        ([1.0, 3.0 * 2**29, 0.0], [2**53, 1, 1]),
        # Nothing is left of a product that is rounded before it is added.
        ([-1.0, 1 + 2**-23], [0.1 * (1 + 2**-23), 0.1]),
    ],
)
def test_sums_are_in_the_order_given_and_divided_last(mean: Mean, numbers: list[float], weights: list[float]) -> None:
    """Where another order, a fused multiply-add, or a product with 1 / Σ w comes to another number in fp32, too."""
    total = sums = 0.0
    for number, weight in zip(numbers, weights, strict=True):
        sums += weight * number
        total += weight
    expected = torch.tensor([sums / total] * 70, dtype=torch.float64).float()
    updates, one_by_one = [torch.full((70,), number) for number in numbers], RunningMean()
    assert torch.equal(mean(updates, weights), expected)
    for update, weight in zip(updates, weights, strict=True):
        one_by_one.add(update, weight)
    assert torch.equal(one_by_one.mean(), expected)


@needs_native
@settings(deadline=None)
@given(
    count=st.integers(1, 12),
    size=st.sampled_from([1, 5, 4095, 4097]),
    seed=st.integers(0, 1000),
    integers=st.booleans(),
    dtype=st.sampled_from(native.FLOATS),
    out_dtype=st.sampled_from([None, *native.FLOATS]),
    instructions=st.sampled_from(INSTRUCTION_SETS),
)
def test_native_is_bit_identical(
    count: int,
    size: int,
    seed: int,
    integers: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    instructions: str,
) -> None:
    drawn, weights = updates_and_weights(count, size, seed)
    updates = [update.to(dtype) for update in drawn]
    if integers:
        weights = [round(1000 * weight) for weight in weights]
    outs = [None if out_dtype is None else torch.empty(size, dtype=out_dtype) for _ in range(2)]
    with instruction_set(instructions):
        assert torch.equal(weighted_mean_native(updates, weights, outs[0]), weighted_mean(updates, weights, outs[1]))


@needs_native
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_widened_and_rounded_as_pytorch_does(dtype: torch.dtype, instructions: str) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    with instruction_set(instructions):
        assert torch.equal(weighted_mean_native([every], [1]).nan_to_num(7e7), every.float().nan_to_num(7e7))
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).int()
        near = torch.cat([every.float().view(torch.int32) + d for d in (-1, 0, 1, 2**12 - 1, 2**12, 2**15)])
        numbers = torch.cat([bits, near]).view(torch.float32)
        ours = weighted_mean_native([numbers], [1], torch.empty(numbers.shape, dtype=dtype))
    assert torch.equal(ours.float().nan_to_num(7e7), numbers.to(dtype).float().nan_to_num(7e7))


@needs_native
def test_threads_and_runs_change_no_bit() -> None:
    updates, weights = updates_and_weights(9, 100_001)
    extension, outs = importlib.import_module("fedmoe.kernels._native"), []
    for threads in (1, 1, 2, 3, 7, 64):
        outs.append(torch.empty(100_001))
        extension.weighted_mean(outs[-1], updates, weights, threads)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("plain", [pytest.param(False, marks=needs_native), True])
@settings(deadline=None)
@given(count=st.integers(1, 20), seed=st.integers(0, 1000))
def test_one_by_one_is_bit_identical_in_order_and_within_an_ulp_in_another(plain: bool, count: int, seed: int) -> None:
    updates, weights = updates_and_weights(count, 700, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(native, "module", None)
        same, other = RunningMean(), RunningMean()
        for k in range(count):
            same.add(updates[k], weights[k])
            other.add(updates[order[k]], weights[order[k]])
        together = weighted_mean(updates, weights)
        assert torch.equal(same.mean(), together)
        ulp = torch.nextafter(together.abs(), torch.tensor(math.inf)) - together.abs()
        assert ((other.mean() - together).abs() <= ulp).all()


def test_running_mean_refuses_before_it_counts() -> None:
    mean = RunningMean()
    with pytest.raises(ValueError, match="the weights sum to 0"):
        mean.mean()
    mean.add(torch.ones(3), 2)
    for update, weight, message in (
        (torch.ones(4), 1.0, r"the update has shape \(4,\), those before \(3,\)"),
        (torch.ones(3), math.nan, "the weight is nan"),
        (torch.ones(3), -1.0, "the weight is -1"),
        (torch.ones(3, 1), 1.0, "expected one dimension"),
    ):
        with pytest.raises(ValueError, match=message):
            mean.add(update, weight)
    assert mean.mean().tolist() == [1.0] * 3 and mean.total == 2


@pytest.mark.parametrize("mean", BOTH)
def test_non_finite_and_large_values_pass_through(mean: Mean) -> None:
    updates = [torch.tensor([math.inf, math.nan, 3e38, 1.0]), torch.tensor([1.0, 1.0, 3e38, 1.0])]
    actual = mean(updates, [1, 3])
    assert actual.isfinite().tolist() == [False, False, True, True]  # 6e38 overflows fp32, not the fp64 sum
    assert torch.equal(actual[2:], updates[0][2:])


@pytest.mark.parametrize("mean", BOTH)
def test_writes_into_out_and_may_alias_an_update(mean: Mean) -> None:
    updates, weights = updates_and_weights(3, 10_000)
    expected, out = mean(updates, weights), torch.empty(10_000)
    assert mean(updates, weights, out) is out
    assert torch.equal(out, expected)
    mean(updates, weights, out=updates[1])
    assert torch.equal(updates[1], expected)


@pytest.mark.parametrize("mean", BOTH)
def test_a_client_of_weight_zero_does_not_count(mean: Mean) -> None:
    updates, _ = updates_and_weights(2, 5)
    assert torch.equal(mean(updates, [0, 3]), updates[1])


@pytest.mark.parametrize("mean", BOTH)
def test_weights_beyond_64_bits_count(mean: Mean) -> None:
    assert mean([torch.ones(2), torch.zeros(2)], [2**70, 3 * 2**70]).tolist() == [0.25] * 2


@pytest.mark.parametrize("mean", BOTH)
def test_parameters_are_averaged_without_gradient(mean: Mean) -> None:
    updates = [torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)]
    out = torch.empty(3, requires_grad=True)
    for result in (mean(updates, [1, 1]), mean(updates, [1, 1], out)):
        assert result.grad_fn is None and result.tolist() == [0.5] * 3


@pytest.mark.parametrize("mean", BOTH)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "at least one update, got 0"),
        (([torch.ones(2)], [1, 2]), "1 updates, but 2 weights"),
        (([torch.ones(2), torch.ones(3)], [1, 2]), "updates[1] has shape (3,), updates[0] has (2,)"),
        (([torch.ones(2)], [1], torch.ones(4)), "out has shape (4,), updates[0] has (2,)"),
        (([torch.ones(2, 2)], [1]), "updates[0] has shape (2, 2), expected one dimension"),
        (([torch.ones(2), torch.ones(2)], [1, -1]), "weights[1] is -1, expected finite and not negative"),
        (([torch.ones(2)], [math.nan]), "weights[0] is nan"),
        (([torch.ones(2), torch.ones(2)], [0, 0]), "the 2 weights sum to 0"),
        (([torch.ones(2), torch.ones(2)], [1e308, 1e308]), "the 2 weights sum to inf"),
    ],
)
def test_errors_name_both_values(mean: Mean, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mean(*arguments)


@needs_native
@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (
            torch.ones(4, dtype=torch.float64),
            "tensor 1 is torch.float64, not one of torch.float32, torch.bfloat16, torch.float16",
        ),
        (torch.ones(8)[::2], "tensor 1 is not contiguous: shape (4,), strides (2,)"),
        (torch.ones(4, device="meta"), "tensor 1 is on meta, not cpu"),
        (
            torch.frombuffer(bytearray(17), dtype=torch.float32, offset=1),
            "tensor 1 begins at an address that is not a multiple of its 4 bytes",
        ),
    ],
)
def test_unsupported_tensors_are_refused_with_the_reason(tensor: Tensor, reason: str) -> None:
    assert weighted_mean_native_supported([torch.ones(4), tensor]) == (False, reason)
    with pytest.raises(ValueError, match=re.escape(reason)):
        weighted_mean_native([torch.ones(4), tensor], [1, 1])


def test_missing_extension_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "module", None)
    supported, reason = weighted_mean_native_supported([torch.ones(2)])
    assert not supported and "pip install" in reason
