"""Accumulation on the device against fp64, aggregation there against the host."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedmoe.kernels import robust
from fedmoe.kernels.averaging import weighted_mean

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("size", [0, 1, 3, 4, 1023, 5_000_001])
@pytest.mark.parametrize("offset", [0, 1])  # 1: not aligned to 16 bytes
def test_accumulation(size: int, offset: int) -> None:
    native = pytest.importorskip("fedmoe.kernels._native_cuda", reason="no nvcc at build time")
    theta, update = torch.randn(2, size + offset, device="cuda").unbind()
    theta, update = theta.clone()[offset:], update.clone()[offset:]
    expected = theta.double() + 0.3 * update.double()
    magnitude = theta.double().abs() + 0.3 * update.double().abs()
    stream = torch.cuda.current_stream().cuda_stream
    native.weighted_accumulate(theta.data_ptr(), update.data_ptr(), 0.3, size, stream)
    # 0.3 is rounded to fp32 once, the fused multiply-add once more: two half ulps of what is added.
    assert ((theta.double() - expected).abs() <= 2**-23 * magnitude).all()


RULES: dict[str, Callable[[list[Tensor], list[float], int], Tensor]] = {
    "mean": lambda updates, weights, trim: weighted_mean(updates, weights),
    "median": lambda updates, weights, trim: robust.median(updates),
    "trimmed_mean": lambda updates, weights, trim: robust.trimmed_mean(updates, trim),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("clients", "size"), [(1, 1), (5, 0), (10, 1000), (101, 70_001)])
def test_aggregation_is_the_hosts(rule: str, clients: int, size: int) -> None:
    """Bit for bit, ties, infinities and NaN among the numbers; and paged, in chunks that do not divide the size."""
    native = pytest.importorskip("fedmoe.kernels._native_cuda", reason="no nvcc at build time")
    host = list((torch.randint(-20, 20, (clients, size)) / 7).pin_memory())
    if rule != "mean" and size > 10:
        host[0][:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    weights, trim = [float(k + 1) for k in range(clients)], (clients - 1) // 3
    expected = RULES[rule](host, weights, trim)
    device = [update.cuda() for update in host]
    addresses = torch.tensor([update.data_ptr() for update in device], device="cuda")
    on_device, out = torch.tensor(weights, dtype=torch.float64, device="cuda"), torch.empty(size, device="cuda")
    pointers = (out.data_ptr(), addresses.data_ptr(), on_device.data_ptr())
    native.aggregate_on_device(rule, *pointers, clients, trim, size, torch.cuda.current_stream().cuda_stream)
    assert torch.equal(out.cpu().nan_to_num(7), expected.nan_to_num(7))
    paged = torch.empty(size).pin_memory()
    native.aggregate_paged(rule, paged.data_ptr(), [u.data_ptr() for u in host], weights, trim, size, 333)
    assert torch.equal(paged.nan_to_num(7), expected.nan_to_num(7))
