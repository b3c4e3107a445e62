"""Aggregation on the device, and paged through it, against the host's bit by bit, and against fp64."""

import math

import pytest
import torch
from torch import Tensor

from fedmoe.kernels import averaging, cuda, native, robust
from fedmoe.kernels.native import FLOATS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(cuda.module is None, reason=f"no CUDA part: {cuda.missing}"),
]

needs_native = pytest.mark.skipif(native.module is None, reason=native.missing)
PLACES = [None, 333, 4096, 10**6]  # on the device; paged, in chunks that divide the size or not, or hold it all
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-45, 1.0, 1.0]


def drawn(count: int, size: int, dtype: torch.dtype, special: bool = False) -> list[Tensor]:
    """In host memory: numbers with ties; and, if asked, a fifth of them special ones."""
    generator = torch.Generator().manual_seed(count + size)
    numbers = torch.randint(-20, 20, (count, size), generator=generator) / 7 * torch.rand(1, size, generator=generator)
    if special:
        chosen = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (count, size), generator=generator)]
        numbers = torch.where(torch.rand(count, size, generator=generator) < 0.2, chosen, numbers)
    return [row.to(dtype).clone() for row in numbers]


def placed(tensors: list[Tensor], chunk: int | None) -> list[Tensor]:
    """On the device, or pinned."""
    return [tensor.cuda() if chunk is None else tensor.pin_memory() for tensor in tensors]


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """NaN where the other is, and elsewhere the same bits, a zero's sign among them."""
    ours = ours.cpu()
    assert ours.dtype == theirs.dtype and torch.equal(ours.isnan(), theirs.isnan())
    a, b = ours.nan_to_num(7), theirs.nan_to_num(7)
    assert torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def weights_of(count: int) -> list[float]:
    return [0.1 + k % 7 for k in range(count)]


@pytest.mark.parametrize("chunk", PLACES)
@pytest.mark.parametrize("out_dtype", [None, *FLOATS])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 127), (5, 0), (10, 1001), (101, 8191), (300, 130)])
def test_coordinatewise_rules_are_the_hosts(
    count: int, size: int, dtype: torch.dtype, out_dtype: torch.dtype | None, chunk: int | None
) -> None:
    host, special = drawn(count, size, dtype), drawn(count, size, dtype, special=True)
    there, special_there, trim = placed(host, chunk), placed(special, chunk), (count - 1) // 3

    def outs() -> tuple[Tensor | None, Tensor | None]:
        if out_dtype is None:
            return None, None
        return torch.empty(size, dtype=out_dtype), placed([torch.empty(size, dtype=out_dtype)], chunk)[0]

    for weights in (weights_of(count), [0.0] * (count - 1) + [2.0**53]):
        out, out_there = outs()
        expected = averaging.weighted_mean(host, weights, out)
        assert_same(cuda.weighted_mean(there, weights, out_there, chunk), expected)
    out, out_there = outs()
    assert_same(cuda.weighted_mean(special_there, [1.0] * count, out_there, chunk),
                averaging.weighted_mean(special, [1.0] * count, out))  # fmt: skip
    for each, each_there in ((host, there), (special, special_there)):
        out, out_there = outs()
        assert_same(cuda.median(each_there, out_there, chunk), robust.median(each, out))
        for left_out in {0, trim, (count - 1) // 2}:
            out, out_there = outs()
            expected = robust.trimmed_mean(each, left_out, out)
            assert_same(cuda.trimmed_mean(each_there, left_out, out_there, chunk), expected)


@pytest.mark.parametrize("chunk", PLACES)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 255, 256, 257, 300])
def test_rules_are_those_of_fp64(count: int, chunk: int | None) -> None:
    host = drawn(count, 999, torch.float32)
    there, stacked, weights = placed(host, chunk), torch.stack(host).double(), weights_of(count)
    ordered, trim = stacked.sort(0).values, (count - 1) // 3
    mean = (stacked * torch.tensor(weights, dtype=torch.float64)[:, None]).sum(0) / sum(weights)
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    for ours, exact in (
        (cuda.weighted_mean(there, weights, chunk=chunk), mean),
        (cuda.median(there, chunk=chunk), middle),
        (cuda.trimmed_mean(there, trim, chunk=chunk), ordered[trim : count - trim].mean(0)),
    ):
        torch.testing.assert_close(ours.cpu().double(), exact, rtol=2**-23, atol=1e-12)


@pytest.mark.parametrize("chunk", PLACES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 0), (2, 15), (9, 1025), (5, 4097), (3, 300_001), (300, 2049)])
def test_squares_are_those_of_fp64_and_the_hosts(count: int, size: int, dtype: torch.dtype, chunk: int | None) -> None:
    host = drawn(count, size, dtype)
    there = placed(host, chunk)
    norms, distances = cuda.squared_norms(there, there[-1], chunk), cuda.squared_distances(there, chunk)
    stacked = torch.stack(host).double()
    exact = torch.cdist(stacked, stacked, compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(distances, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(norms, exact[-1].tolist(), rtol=1e-12, atol=0)
    assert distances.diagonal().eq(0).all() and torch.equal(distances, distances.T)
    if native.module is not None:
        assert norms == robust.squared_norms_native(host, host[-1])
        assert torch.equal(distances, robust.squared_distances_native(host))


@needs_native
@pytest.mark.parametrize("chunk", PLACES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_clipped_mean_krum_and_multi_krum_are_the_hosts(dtype: torch.dtype, chunk: int | None) -> None:
    host = drawn(11, 5001, dtype)
    host[3] += 50
    there, weights, by = placed(host, chunk), weights_of(11), cuda.reductions(chunk)
    for norm in (None, 20.0):
        expected = robust.clipped_mean(host, weights, host[0], norm, 0.5)
        assert_same(robust.clipped_mean(there, weights, there[0], norm, 0.5, by=by), expected)
    for chosen in (1, 4, 8):
        few = robust.krum(host, 3, chosen)
        assert robust.krum(there, 3, chosen, by=by) == few and 3 not in few
        expected = averaging.weighted_mean([host[k] for k in few], [1] * chosen)
        assert_same(by.weighted_mean([there[k] for k in few], [1] * chosen), expected)


@pytest.mark.parametrize("chunk", PLACES)
def test_squares_that_are_not_finite_say_so(chunk: int | None) -> None:
    host = drawn(3, 9001, torch.float32)
    host[1][5000], host[2][8999] = math.nan, math.inf
    there = placed(host, chunk)
    norms = cuda.squared_norms(there, there[0], chunk)
    assert norms[0] == 0 and math.isnan(norms[1]) and norms[2] == math.inf
    with pytest.raises(ValueError, match=r"updates\[1\] is at the distance nan"):
        robust.clipped_mean(there, [1, 1, 1], there[0], by=cuda.reductions(chunk))


@pytest.mark.parametrize("chunk", PLACES)
def test_result_may_alias_an_update_and_runs_give_the_same_bits(chunk: int | None) -> None:
    there = placed(drawn(7, 70_001, torch.float32), chunk)
    first, distances = cuda.trimmed_mean(there, 2, chunk=chunk), cuda.squared_distances(there, chunk)
    for _ in range(3):
        assert torch.equal(cuda.trimmed_mean(there, 2, chunk=chunk), first)
        assert torch.equal(cuda.squared_distances(there, chunk), distances)
    assert cuda.trimmed_mean(there, 2, there[4], chunk) is there[4] and torch.equal(there[4], first)


def test_pageable_host_memory_is_paged_too() -> None:
    host = drawn(9, 10_001, torch.bfloat16)
    assert_same(cuda.median(host, chunk=1000), robust.median(host))
    assert_same(cuda.weighted_mean(host, weights_of(9), chunk=1000), averaging.weighted_mean(host, weights_of(9)))


def test_buffers_that_begin_anywhere() -> None:
    host = drawn(4, 1003, torch.float16)
    there = [update[3:] for update in placed(host, None)]  # 6 bytes after a boundary
    assert_same(cuda.median(there), robust.median([update[3:] for update in host]))
    assert cuda.squared_norms(there, there[0])[0] == 0


def test_work_follows_its_stream() -> None:
    """What is queued there before is seen, and what comes after sees the result."""
    stream, host = torch.cuda.Stream(), drawn(5, 500_001, torch.float32)
    there = placed(host, None)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for update in there:
            update += 1
        result = cuda.median(there) * 2
    stream.synchronize()
    assert_same(result, robust.median([update + 1 for update in host]) * 2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_the_gpu_is_that_of_the_updates() -> None:
    host = drawn(5, 1001, torch.float32)
    there = [update.to("cuda:1") for update in host]
    assert_same(cuda.median(there), robust.median(host))
    with pytest.raises(ValueError, match="tensor 1 is on cuda:0, tensor 0 on cuda:1"):
        cuda.median([there[0], there[1].to("cuda:0")])
