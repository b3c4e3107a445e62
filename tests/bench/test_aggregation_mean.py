"""The mean of K clients' θ, in the host's memory, on one thread and on two; and that memory's bandwidth."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmoe.config import Config
from fedmoe.engine.facts import host_memory
from fedmoe.engine.seam import Result
from fedmoe.kernels.averaging import weighted_mean, weighted_mean_native, weighted_mean_native_supported
from fedmoe.profiling.bench import Absent, Bench, Floor
from fedmoe.server import Server
from tests.bench.variants import agreement

R = TypeVar("R")


@pytest.mark.parametrize(("clients", "parameters"), [(100, 665_048), (100, 11_000_000), (1000, 665_048)])
def test_averaging(gpu_benchmark: Bench, clients: int, parameters: int) -> None:
    """By samples, every client with other numbers of them."""
    if not gpu_benchmark.timed:
        clients, parameters = 3, 50
    needed = 4 * (clients + 6) * parameters
    if needed > 0.8 * host_memory()[1]:
        pytest.skip(f"takes {needed / 1e9:.1f} GB of host memory, {host_memory()[1] / 1e9:.1f} GB are available")
    updates = list(torch.randn(clients, parameters, generator=torch.Generator().manual_seed(0)))
    counts = [400 + k for k in range(clients)]
    shares = [count / sum(counts) for count in counts]
    results = [Result(k, {"theta": update}, counts[k], {}) for k, update in enumerate(updates)]
    server = Server(Config(), {"theta": torch.zeros(parameters)})
    out, part = np.empty((2, parameters), np.float32)
    arrays = [update.numpy() for update in updates]

    def read() -> None:
        """The sum of all numbers: one pass, and nothing to write."""
        for update in updates:
            update.sum()

    def in_torch() -> tuple[Tensor]:
        mean = torch.zeros(parameters)
        for update, share in zip(updates, shares, strict=True):
            mean.add_(update, alpha=share)
        return (mean,)

    def in_numpy() -> tuple[Tensor]:
        """Without new memory in the loop."""
        out[:] = 0
        for array, share in zip(arrays, shares, strict=True):
            np.multiply(array, np.float32(share), out=part)
            np.add(out, part, out=out)
        return (torch.from_numpy(out),)

    def on_two(call: Callable[[], R]) -> Callable[[], R]:
        def called() -> R:
            before = torch.get_num_threads()
            torch.set_num_threads(2)
            try:
                return call()
            finally:
                torch.set_num_threads(before)

        return called

    native, why = weighted_mean_native_supported(updates)
    ours = (lambda: (weighted_mean_native(updates, counts),)) if native else Absent(why)
    gpu_benchmark(
        {
            "torch loop": in_torch,
            "NumPy": in_numpy,
            "read": read,
            "ours, native": ours,
            "ours, plain": Absent("the native one is there") if native else lambda: (weighted_mean(updates, counts),),
            # Each read twice, since it is checked as well, and the sums read and written for each.
            "ours, one by one": lambda: tuple(server.aggregate(results).values()),
            "torch loop, two threads": on_two(in_torch),
            "read, two threads": on_two(read),
            "ours, native, two threads": ours if isinstance(ours, Absent) else on_two(ours),
        },
        # Every update read, the mean written; a multiply-add for each number.
        floor=Floor(bytes=4 * (clients + 1) * parameters, flops=2 * clients * parameters, dtype=torch.float32),
        check=agreement(("theta",), 1e-5),
        host=True,
    )
