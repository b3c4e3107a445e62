"""Robust rules: the oracles against NumPy in fp64, the native twins against them, and what bad updates can do."""

import importlib
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe.kernels import native, robust
from fedmoe.kernels.robust import clipped_mean, krum, median, median_native, trimmed_mean, trimmed_mean_native
from tests.extension import INSTRUCTION_SETS, instruction_set

needs_native = pytest.mark.skipif(native.module is None, reason=native.missing)
MEDIANS = [median, pytest.param(median_native, marks=needs_native)]
TRIMMED = [trimmed_mean, pytest.param(trimmed_mean_native, marks=needs_native)]
Rule = Callable[..., Tensor]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-45, 1.0, 1.0]


def drawn(count: int, size: int, seed: int = 0, special: bool = False) -> list[Tensor]:
    """Numbers with ties; and, if asked, a fifth of them special ones."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-20, 20, (count, size), generator=generator) / 7 * torch.rand(1, size, generator=generator)
    if special:
        chosen = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (count, size), generator=generator)]
        numbers = torch.where(torch.rand(count, size, generator=generator) < 0.2, chosen, numbers)
    return list(numbers)


def same(ours: Tensor, theirs: Tensor) -> bool:
    """NaN where the other is, and elsewhere the same bits, a zero's sign among them."""
    a, b = ours.nan_to_num(7), theirs.nan_to_num(7)
    return torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("rule", MEDIANS)
@pytest.mark.parametrize(("count", "size"), [(1, 5), (2, 64), (3, 0), (4, 129), (100, 63), (257, 65), (1000, 70)])
def test_median_is_numpys(rule: Rule, count: int, size: int) -> None:
    updates = drawn(count, size)
    expected = np.median(np.stack([u.numpy() for u in updates]).astype(np.float64), axis=0)
    np.testing.assert_array_equal(rule(updates).numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("rule", TRIMMED)
@pytest.mark.parametrize(
    ("count", "size", "trim"),
    [(1, 5, 0), (3, 64, 1), (5, 0, 1), (10, 130, 2), (100, 63, 10), (257, 65, 128), (1000, 70, 1)],
)
def test_trimmed_mean_is_numpys(rule: Rule, count: int, size: int, trim: int) -> None:
    updates = drawn(count, size)
    ordered = np.sort(np.stack([u.numpy() for u in updates]).astype(np.float64), axis=0)
    expected = ordered[trim : count - trim].mean(0) if size else np.empty(0)
    np.testing.assert_allclose(rule(updates, trim).numpy(), expected, rtol=2**-23, atol=1e-12)


@needs_native
@settings(deadline=None, max_examples=60)
@given(
    count=st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 300])),  # around where bisection begins
    size=st.sampled_from([1, 63, 64, 65, 2049]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(native.FLOATS),
    out_dtype=st.sampled_from([None, *native.FLOATS]),
    instructions=st.sampled_from(INSTRUCTION_SETS),
    data=st.data(),
)
def test_native_is_bit_identical_to_the_oracle(
    count: int,
    size: int,
    seed: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    instructions: str,
    data: Any,
) -> None:
    """NaN, infinities and zeros of both signs among the numbers."""
    updates = [update.to(dtype) for update in drawn(count, size, seed, special=True)]
    trim = data.draw(st.integers(0, (count - 1) // 2))
    ours, theirs = ([None if out_dtype is None else torch.empty(size, dtype=out_dtype) for _ in "mt"] for _ in "ot")
    with instruction_set(instructions):
        assert same(median_native(updates, ours[0]), median(updates, theirs[0]))
        assert same(trimmed_mean_native(updates, trim, ours[1]), trimmed_mean(updates, trim, theirs[1]))


@needs_native
@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 9), size=st.sampled_from([0, 1, 15, 4097]), instructions=st.sampled_from(INSTRUCTION_SETS))
def test_distances_are_those_of_fp64(count: int, size: int, instructions: str) -> None:
    updates = drawn(count, size)
    with instruction_set(instructions):
        norms, distances = robust.squared_norms_native(updates, updates[0]), robust.squared_distances_native(updates)
    torch.testing.assert_close(norms, robust.squared_norms(updates, updates[0]), rtol=1e-12, atol=0)
    torch.testing.assert_close(distances, robust.squared_distances(updates), rtol=1e-12, atol=0)


@needs_native
def test_distances_of_more_coordinates_than_are_taken_at_a_time() -> None:
    updates = drawn(400, 2100)
    stacked = torch.stack(updates).double()
    expected = torch.cdist(stacked, stacked, compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(robust.squared_distances_native(updates), expected, rtol=1e-12, atol=0)


@needs_native
def test_threads_and_instruction_sets_change_no_bit() -> None:
    updates, extension, size = drawn(11, 40_001), importlib.import_module("fedmoe.kernels._native"), 40_001
    found = []
    for instructions in INSTRUCTION_SETS:
        for threads in (1, 2, 5):
            outs = [torch.empty(size), torch.empty(size), torch.empty(121, dtype=torch.float64)]
            with instruction_set(instructions):
                extension.median(outs[0], updates, threads)
                extension.trimmed_mean(outs[1], updates, 3, threads)
                extension.squared_distances(outs[2], updates, threads)
                found.append((outs, extension.squared_norms(updates, updates[3], threads)))
    for outs, norms in found:
        assert all(torch.equal(a, b) for a, b in zip(outs, found[0][0], strict=True)) and norms == found[0][1]


@pytest.mark.parametrize("rule", MEDIANS)
def test_result_may_alias_an_update(rule: Rule) -> None:
    updates = drawn(5, 5000)
    expected = rule(updates)
    assert rule(updates, updates[2]) is updates[2] and torch.equal(updates[2], expected)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e38])
def test_fewer_than_half_bad_numbers_cannot_take_the_result_out_of_the_range_of_the_good(bad: float) -> None:
    good = drawn(5, 300)
    low, high = torch.stack(good).min(0).values, torch.stack(good).max(0).values
    updates = [*good, *[torch.full((300,), bad)] * 3]
    for result in (median(updates), trimmed_mean(updates, 3)):
        assert ((low <= result) & (result <= high)).all()


def test_clipped_mean_is_its_formula_and_bounds_what_one_can_do() -> None:
    center, updates, weights = torch.randn(50), [torch.randn(50) * 10**k for k in range(4)], [1.0, 2.0, 3.0, 4.0]
    moves = [u.double() - center.double() for u in updates]
    clipped = [w * min(1.0, 5.0 / float(m.norm())) * m for w, m in zip(weights, moves, strict=True)]
    expected = center.double() + torch.stack(clipped).sum(0) / 10
    torch.testing.assert_close(clipped_mean(updates, weights, center, 5.0).double(), expected, rtol=1e-6, atol=1e-6)
    assert float((clipped_mean([center + 1e6], [1.0], center, 5.0) - center).norm()) == pytest.approx(5.0)
    # By the median of the norms: 1 and 3 of four.
    norms = sorted(float(m.norm()) for m in moves)
    by_median = clipped_mean(updates, weights, center, (norms[1] + norms[2]) / 2 * 0.5)
    assert torch.equal(clipped_mean(updates, weights, center, factor=0.5), by_median)
    assert torch.equal(clipped_mean([center] * 3, [1.0] * 3, center), center)
    with pytest.raises(ValueError, match=re.escape("updates[1] is at the distance inf")):
        clipped_mean([center, center + math.inf], [1.0, 1.0], center)


@pytest.mark.parametrize(
    ("updates", "weights", "arguments", "message"),
    [
        ([], [], (), "clipped_mean needs at least one update, got 0"),
        ([torch.ones(2)] * 2, [1.0], (), "2 updates, but 1 weights"),
        ([torch.ones(2), torch.ones(3)], [1.0, 1.0], (), "updates[1] has shape (3,), updates[0] has (2,)"),
        ([torch.ones(3)], [1.0], (), "center has shape (2,), updates[0] has (3,)"),
        ([torch.ones(2)], [math.nan], (), "weights[0] is nan"),
        ([torch.ones(2)], [1.0], (math.nan,), "the norm to clip to is nan, expected 0 or more"),
        ([torch.ones(2)], [1.0], (None, -1.0), "the norm to clip to is -1.41"),
    ],
)
def test_clipped_mean_names_what_does_not_fit(updates: Any, weights: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        clipped_mean(updates, weights, torch.zeros(2), *arguments)


def test_krum_is_its_formula() -> None:
    updates = drawn(9, 40, seed=3)
    for f in (0, 1, 2, 3):
        scores = []
        for k, update in enumerate(updates):
            away = sorted(float((update - other).double().square().sum()) for j, other in enumerate(updates) if j != k)
            scores.append(sum(away[: 9 - f - 2]))
        order = sorted(range(9), key=lambda k: scores[k])
        assert krum(updates, f) == order[:1]
        assert krum(updates, f, 4) == sorted(order[:4])


def test_krum_takes_none_of_f_that_are_far_off_or_the_first_of_equals() -> None:
    good = drawn(7, 40)
    updates = [good[0] + 100, *good, good[1] - 100]
    assert not {0, 8} & set(krum(updates, 2, 7))
    assert krum([torch.ones(3)] * 5, 1, 2) == [0, 1]
    with pytest.raises(ValueError, match=re.escape("krum needs 2 * 2 + 3 = 7 updates, got 6")):
        krum(updates[:6], 2)
    with pytest.raises(ValueError, match="byzantine is -1, expected 0 or more"):
        krum(updates, -1)
    with pytest.raises(ValueError, match="cannot choose 10 of 9 updates"):
        krum(updates, 1, 10)


@pytest.mark.parametrize("rule", TRIMMED)
@pytest.mark.parametrize(
    ("updates", "trim", "message"),
    [
        ([], 0, "trimmed_mean needs at least one update, got 0"),
        ([torch.ones(2)] * 4, 2, "trim is 2, must leave some of 4 updates"),
        ([torch.ones(2)] * 4, -1, "trim is -1, must leave some of 4 updates"),
        ([torch.ones(2), torch.ones(3)], 0, "updates[1] has shape (3,), updates[0] has (2,)"),
        ([torch.ones(2, 2)], 0, "updates[0] has shape (2, 2), expected one dimension"),
    ],
)
def test_errors_name_both_values(rule: Rule, updates: list[Tensor], trim: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        rule(updates, trim)


@needs_native
def test_updates_of_two_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("tensor 1 is torch.float16, tensor 0 is torch.float32")):
        median_native([torch.ones(2), torch.ones(2).half()])


@needs_native
@pytest.mark.parametrize(
    ("rule", "out"),
    [("squared_distances", torch.empty(600**2, dtype=torch.float64)), ("median", torch.empty(4_000_000))],
)
def test_ctrl_c_ends_a_long_call_and_the_gil_is_free_meanwhile(rule: str, out: Tensor) -> None:
    updates = [torch.randn(4_000_000), torch.randn(4_000_000)] * 300  # minutes, and six seconds
    call = getattr(importlib.import_module("fedmoe.kernels._native"), rule)
    start, ran = time.perf_counter(), threading.Event()

    def interrupt() -> None:
        ran.set()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with pytest.raises(KeyboardInterrupt):
        thread.start()
        call(out, updates, 1)
    thread.join()
    assert ran.is_set() and time.perf_counter() - start < 30
