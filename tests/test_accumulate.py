"""Weighted accumulation: the oracle and the refusals; the kernel is tested by `tests/interpreter`."""

import numpy as np
import pytest
import torch

from fedmoe.kernels import accumulate, launch, oracle
from fedmoe.kernels.accumulate import accumulate_supported, weighted_accumulate
from fedmoe.kernels.averaging import weighted_mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_oracle_is_what_is_written_out(dtype: torch.dtype) -> None:
    theta, update = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    update = update.to(dtype)
    expected = theta.numpy() + np.float32(0.3) * update.float().numpy()
    actual = oracle.weighted_accumulate(theta, update, torch.tensor(0.3))
    assert actual.dtype == torch.float32
    # PyTorch may fuse where NumPy rounds twice.
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_oracle_client_after_client_is_the_weighted_mean() -> None:
    updates = list(torch.randn(4, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    weights, theta = [5.0, 1.0, 0.0, 2.0], torch.zeros(100, dtype=torch.float64)
    for update, weight in zip(updates, weights, strict=True):
        theta = oracle.weighted_accumulate(theta, update, torch.tensor(weight / sum(weights), dtype=torch.float64))
    torch.testing.assert_close(theta.float(), weighted_mean(updates, weights))


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"theta has shape \(4,\), update \(3,\), expected equal \[P\]"):
        weighted_accumulate(torch.zeros(4), torch.zeros(3), torch.ones(()))
    with pytest.raises(ValueError, match=r"theta has shape \(2, 2\), update \(2, 2\)"):
        weighted_accumulate(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(()))


@pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET=1 is set")
def test_is_refused_on_the_cpu() -> None:
    given = torch.zeros(4), torch.zeros(4), torch.ones(())
    supported, reason = accumulate_supported(*given)
    assert not supported and ("not on a CUDA device" in reason or "Triton is missing" in reason)
    with pytest.raises(ValueError, match="weighted_accumulate: "):
        weighted_accumulate(*given)


def test_is_refused_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_missing", "No module named 'triton'")
    refused = accumulate_supported(torch.zeros(4), torch.zeros(4), torch.ones(()))
    assert refused == (False, "Triton is missing (No module named 'triton')")


@pytest.mark.skipif(launch.INTERPRETED, reason="interpreted kernels cannot be compiled")
def test_compiled_code_rounds_once_and_moves_vectors() -> None:
    aot = pytest.importorskip("fedmoe.kernels.aot", reason="needs Triton")
    for _, _, call in accumulate.shipped():
        ptx = aot.compiled(call, 90).ptx
        assert "fma.rn.f32" in ptx and "mul.f32" not in ptx and "add.f32" not in ptx
        assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
