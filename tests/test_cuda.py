"""The CUDA extension without a GPU: that it is built, what it checks, and that it says why there is no device."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmoe.kernels import cuda, native, robust
from fedmoe.kernels.cuda import cuda_supported

needs_cuda_part = pytest.mark.skipif(cuda.module is None, reason=f"no CUDA part: {cuda.missing}")

ONES = np.ones(3, np.float32)
PAGE = np.zeros(64, np.float32)


def test_is_built_where_nvcc_works(tmp_path: Path) -> None:
    if native.module is None:
        pytest.skip(f"nothing is built: {native.missing}")
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("no nvcc on PATH")
    source = tmp_path / "empty.cu"
    source.write_text("__global__ void nothing() {}\n")
    compiled = subprocess.run([nvcc, "-c", source, "-o", tmp_path / "empty.o"], capture_output=True, text=True)
    if compiled.returncode:
        pytest.skip(f"{nvcc} compiles nothing: {compiled.stdout}{compiled.stderr}")
    assert cuda.module is not None, (
        f"{nvcc} works, but the CUDA part was not built, or cannot be loaded: {cuda.missing}"
    )


@needs_cuda_part
def test_reports_devices_or_the_reason() -> None:
    assert cuda.module is not None
    count, reason = cuda.module.device_count()
    assert count >= 0 and bool(reason) == (count == 0)


@needs_cuda_part
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("weighted_mean_paged", (ONES, [], [], 1), "at least one update is needed, got 0"),
        ("weighted_mean_paged", (ONES, [ONES], [1.0, 2.0], 1), "1 updates, but 2 weights"),
        (
            "median_paged",
            (ONES, [np.ones(3)], 1),
            "updates[0] is float64, expected float32, float16 or bfloat16",
        ),
        ("median_paged", (ONES, [ONES, ONES.astype(np.float16)], 1), "updates[1] is float16, updates[0] is float32"),
        ("median_paged", (ONES, [np.ones(6, np.float32)[::2]], 1), "updates[0] has stride 2, expected 1 (contiguous)"),
        ("median_paged", (np.ones(2, np.float32), [ONES], 1), "out has 2 elements, expected 3"),
        ("median_paged", (np.ones(3, np.int32), [ONES], 1), "out is int32, expected float32"),
        ("median_paged", (PAGE[1:4], [PAGE[0:3]], 1), "out overlaps updates[0] partly"),
        ("median_paged", (ONES, [ONES], 0), "chunk is 0, expected 1 or more"),
        ("trimmed_mean_paged", (PAGE[:3], [ONES] * 4, 2, 1), "trim is 2, must leave some of 4 updates"),
        ("squared_norms_paged", ([ONES], np.ones(2, np.float32), 1), "center has 2 elements, expected 3"),
        ("squared_norms_paged", ([ONES], np.ones(3, np.float16), 1), "center is float16, updates[0] is float32"),
        ("squared_distances_paged", (np.ones(3), [ONES, ONES], 1), "out has 3 elements, expected 4"),
        ("squared_distances_paged", (np.ones(4, np.float32), [ONES, ONES], 1), "out is float32, expected float64"),
        ("weighted_mean", (ONES, [ONES], [1.0], 0), "updates[0] is on device type 1, expected CUDA (2)"),
        ("squared_norms", ([ONES], ONES, 0), "updates[0] is on device type 1, expected CUDA (2)"),
    ],
)
def test_buffers_that_do_not_fit_are_named_as_on_the_host(name: str, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(cuda.module, name)(*arguments)


@needs_cuda_part
def test_no_coordinates_need_no_device() -> None:
    empty, found = torch.empty(0), torch.ones(9, dtype=torch.float64)
    assert cuda.module is not None
    cuda.module.median_paged(empty, [empty], 5)
    assert cuda.module.squared_norms_paged([empty] * 2, empty, 5) == [0.0, 0.0]
    cuda.module.squared_distances_paged(found, [empty] * 3, 5)
    assert not found.any()


@needs_cuda_part
@pytest.mark.skipif(cuda.module is None or cuda.module.device_count()[0] > 0, reason="there is a GPU")
def test_without_a_device_cudas_reason_is_given() -> None:
    assert cuda.module is not None
    reason, updates = cuda.module.device_count()[1], [torch.ones(4)] * 5
    assert reason and cuda_supported(updates, chunk=2) == (False, reason)
    with pytest.raises(RuntimeError, match=re.escape(f"median of 5 updates, paged: {reason}")):
        cuda.module.median_paged(torch.ones(4), updates, 2)
    calls: list[Callable[[], Any]] = [
        lambda: cuda.weighted_mean(updates, [1] * 5, chunk=2),
        lambda: cuda.median(updates, chunk=2),
        lambda: cuda.trimmed_mean(updates, 1, chunk=2),
        lambda: robust.clipped_mean(updates, [1] * 5, updates[0], by=cuda.reductions(2)),
        lambda: robust.krum(updates, 1, by=cuda.reductions(2)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(reason)):
            call()


@needs_cuda_part
def test_what_the_host_refuses_is_refused_alike() -> None:
    ones = torch.ones(4)
    for call, message in (
        (lambda: cuda.median([]), "median needs at least one update, got 0"),
        (lambda: cuda.trimmed_mean([ones] * 4, 2), "trim is 2, must leave some of 4 updates"),
        (lambda: cuda.weighted_mean([ones], [-1.0]), "weights[0] is -1.0, expected finite and not negative"),
        (lambda: cuda.squared_norms([ones], torch.ones(3)), "center has shape (3,), updates[0] has (4,)"),
        (lambda: cuda.squared_distances([ones, torch.ones(3)]), "updates[1] has shape (3,), updates[0] has (4,)"),
        (lambda: cuda.median([ones], chunk=0), "chunk is 0, expected 1 or more"),
        (lambda: cuda.median([ones]), "median: tensor 0 is on cpu, not cuda"),
        (lambda: cuda.median([ones], ones.double(), chunk=2), "median: tensor 1 is torch.float64, not one of"),
        (lambda: robust.krum([ones] * 3, 0, by=cuda.reductions()), "squared_distances: tensor 0 is on cpu, not cuda"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_a_missing_extension_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "module", None)
    able, reason = cuda_supported([torch.ones(2)], chunk=1)
    assert not able and "the CUDA extension is missing" in reason and "nvcc" in reason
