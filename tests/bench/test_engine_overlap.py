"""Two experts of equal size, which alone do not fill a GPU: forward on one stream, and on two."""

from functools import partial

import torch
from torch import Tensor, nn

from fedmoe.engine.device import prepare
from fedmoe.engine.program import Program
from fedmoe.engine.step import branches
from fedmoe.experts import build
from fedmoe.profiling.bench import Bench, Unavailable, attempt
from tests.bench.variants import Graphed, agreement


def test_overlap(gpu_benchmark: Bench) -> None:
    """CNN-1's extractor twice, a batch of 64 in CIFAR-10's shape; under graphs, or the host would be what is timed."""
    bench = gpu_benchmark
    prepare(bench.device.type, 0, False)
    torch.manual_seed(0)
    experts = [build("cnn-1", (3, 32, 32), 10).extractor.to(bench.device) for _ in range(2)]
    x = torch.randn(64 if bench.full else 2, 3, 32, 32, device=bench.device)
    named = dict(zip(("global", "local"), experts, strict=True))
    # Neither prediction nor loss is asked for.
    program = Program(nn.ModuleList(experts), named, lambda outputs: outputs["local"], _no_loss, {})

    def forward(streams: list[torch.cuda.Stream]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(branches(program, x, streams).values())

    def on_two() -> Graphed:
        if bench.device.type != "cuda":
            raise Unavailable("streams need a GPU")
        return Graphed(partial(forward, [torch.cuda.Stream()]))

    bench(
        {
            "one stream, no graph": partial(forward, []),
            "one stream": attempt(lambda: Graphed(partial(forward, []))),
            "two streams": attempt(on_two),
        },
        check=agreement(tuple(named), 1e-4),
    )


def _no_loss(outputs: object, targets: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
