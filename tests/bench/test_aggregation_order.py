"""Median and trimmed mean of K clients' θ, in the host's memory, on one thread, against sorting."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmoe.kernels.robust import median_native, robust_native_supported, trimmed_mean_native
from fedmoe.profiling.bench import Absent, Bench, Floor
from tests.bench.variants import agreement

BLOCK = 4096
"""Coordinates that are sorted at a time."""
SIZES = pytest.mark.parametrize(("clients", "parameters"), [(10, 66_504), (100, 66_504), (1000, 6_650)])
"""A tenth and a hundredth of CNN-5's extractor: sorting all of it would take a minute."""


def compare(
    bench: Bench,
    updates: list[Tensor],
    rule: Callable[[Tensor], Tensor],
    ours: Callable[[], Tensor],
) -> None:
    """`rule`: of sorted numbers [BLOCK, K], in torch."""
    clients, parameters = len(updates), len(updates[0])

    def sorting() -> tuple[Tensor]:
        """Each block with a coordinate's numbers side by side, which sorts faster than with them in a column."""
        blocks = range(0, parameters, BLOCK)
        rows = (torch.stack([update[i : i + BLOCK] for update in updates], 1).sort(1).values for i in blocks)
        return (torch.cat([rule(row) for row in rows]),)

    def sorting_in_numpy() -> tuple[Tensor]:
        blocks = range(0, parameters, BLOCK)
        rows = (np.stack([array[i : i + BLOCK] for array in arrays], 1) for i in blocks)
        return (torch.cat([rule(torch.from_numpy(np.sort(row, 1))) for row in rows]),)

    arrays = [update.numpy() for update in updates]
    native, why = robust_native_supported(updates)
    bench(
        {
            "torch.sort": sorting,
            "NumPy": sorting_in_numpy,
            "ours, native": (lambda: (ours(),)) if native else Absent(why),
        },
        floor=Floor(bytes=4 * (clients + 1) * parameters, flops=0, dtype=torch.float32),
        check=agreement(("theta",), 1e-5),
        host=True,
    )


def drawn(bench: Bench, clients: int, parameters: int) -> list[Tensor]:
    size = (clients, parameters) if bench.timed else (5, 50)
    return list(torch.randn(size, generator=torch.Generator().manual_seed(0)))


@SIZES
def test_median(gpu_benchmark: Bench, clients: int, parameters: int) -> None:
    updates = drawn(gpu_benchmark, clients, parameters)
    low, high = (len(updates) - 1) // 2, len(updates) // 2
    compare(gpu_benchmark, updates, lambda row: (row[:, low] + row[:, high]) / 2, lambda: median_native(updates))


@SIZES
def test_trimmed_mean(gpu_benchmark: Bench, clients: int, parameters: int) -> None:
    """Without a tenth on either side."""
    updates = drawn(gpu_benchmark, clients, parameters)
    trim = max(1, len(updates) // 10)
    kept = slice(trim, len(updates) - trim)
    compare(gpu_benchmark, updates, lambda row: row[:, kept].mean(1), lambda: trimmed_mean_native(updates, trim))
