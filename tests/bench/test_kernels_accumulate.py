"""Weighted accumulation: what one client returned, added onto θ."""

from typing import Any

import torch
from torch import Tensor

from fedmoe.kernels.accumulate import accumulate_supported, weighted_accumulate
from fedmoe.profiling.bench import Absent, Bench, Call, Floor, attempt, sizes
from tests.bench.variants import Graphed, agreement, compiled, compiler

BF16, FP32 = "bfloat16", "float32"
WEIGHT = 0.125


@sizes(
    "parameters, dtype",
    full=[(665_048, FP32), (665_048, BF16), (134_217_728, FP32), (134_217_728, BF16)],
    tiny=[(50, FP32)],
)
def test_weighted_accumulate(gpu_benchmark: Bench, parameters: int, dtype: str) -> None:
    bench, kind = gpu_benchmark, getattr(torch, dtype)
    torch.manual_seed(0)
    theta, made = torch.randn(2, parameters, device=bench.device)
    update, weight = made.to(kind), theta.new_tensor(WEIGHT)

    def on(accumulate: Any, *others: Any) -> Call:
        """Onto a θ of its own, compared after the first call."""
        own = theta.clone()

        def call() -> tuple[Tensor]:
            accumulate(own, update, *others)
            return (own,)

        return call

    def graphed(call: Call) -> Call:
        """Not compared: capturing has accumulated before the first call."""
        return Graphed(lambda: (call(), None)[1])

    supported, why = accumulate_supported(theta, update, weight)
    ours: dict[str, Any] = dict.fromkeys(("ours", "ours, graph"), Absent(why))
    if supported:
        ours["ours"] = on(weighted_accumulate, weight)
        ours["ours, graph"] = attempt(lambda: graphed(on(weighted_accumulate, weight)))
    bench(
        {
            "add_, weight of the host": on(host),
            "add_, weight of the host, graph": attempt(lambda: graphed(on(host))),
            "addcmul_": on(device, weight),
            f"{compiler(bench)}, addcmul_": on(compiled(device, bench), weight),
            **ours,
        },
        # θ read and written, the update read.
        floor=Floor(bytes=(8 + kind.itemsize) * parameters, flops=0, dtype=torch.float32),
        check=agreement(("theta",), 1e-6),
    )


def host(theta: Tensor, update: Tensor) -> None:
    """With a number that the host knows: the least that PyTorch needs."""
    theta.add_(update, alpha=WEIGHT)


def device(theta: Tensor, update: Tensor, weight: Tensor) -> None:
    """With a number that is on the device, as ours."""
    theta.addcmul_(update, weight)
