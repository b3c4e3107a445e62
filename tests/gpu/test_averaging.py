"""Averaging on the device, against fp64."""

import pytest
import torch

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
