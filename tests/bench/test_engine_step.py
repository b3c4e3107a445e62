"""The whole step of one client, CNN-1 with the paper's global expert, batch 64: the engine and a clean eager loop.

The loop is what a good user writes: samples and state on the device, PyTorch's fused SGD, and under a graph no work of
the host but a copy of indices. It is given bf16 as well, in which it may be the faster one.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmoe.client import Client
from fedmoe.engine.device import prepare
from fedmoe.engine.step import How, autocast
from fedmoe.profiling.bench import Absent, Bench, Call, Unavailable, attempt
from fedmoe.reference import ReferenceEngine
from tests.bench.federations import FASTEST, a_round, federation, plain, steps_of
from tests.bench.variants import Graphed
from tests.engines import engine
from tests.support import begin

BF16 = torch.bfloat16


def test_step(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """A client alone: 20 steps a call."""
    bench, gpu = gpu_benchmark, gpu_benchmark.device.type == "cuda"
    prepare(bench.device.type, 0, False)  # before a loop is captured: with the convolutions that the engine has
    config = federation(tmp_path, 1, 1600 if bench.full else 200 if bench.timed else 80, model={"local": ("cnn-1",)})
    run = begin(config, tmp_path / "run")
    own = plain(config, run, bench.device, fused=True)
    fastest = FASTEST if gpu else How()
    with ExitStack() as stack:

        def ours(precision: str) -> Call:
            how = replace(fastest, precision=precision)
            made = stack.enter_context(engine(config, run, how, bench.device.type, folder=f"store-{precision}"))
            a_round(config, made)()
            return steps_of(made, 0)

        def graphed(low: torch.dtype | None) -> Call:
            return under_graph(bench, own, low)

        variants: dict[str, Call | Absent] = {
            "eager loop": loop(own, None),
            "eager loop, bf16": attempt(lambda: on_gpu(bench, lambda: loop(own, BF16))),
            "eager loop, graph": attempt(lambda: graphed(None)),
            "eager loop, graph, bf16": attempt(lambda: graphed(BF16)),
            "engine": ours("fp32"),
            "engine, bf16": attempt(lambda: on_gpu(bench, lambda: ours("bf16"))),
        }
        bench(variants)


def test_step_in_cohort(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """16 clients: the loop's steps, one client after the other; and whole rounds of the engine's, all that is in them.

    As many times faster as the rounds are, a client in a cohort is.
    """
    bench, gpu = gpu_benchmark, gpu_benchmark.device.type == "cuda"
    prepare(bench.device.type, 0, False)  # before a loop is captured: with the convolutions that the engine has
    clients, each = (16, 800) if bench.full else (2, 80)
    config = federation(tmp_path, clients, each, model={"local": ("cnn-1",)})
    run = begin(config, tmp_path / "run")
    own = plain(config, run, bench.device, fused=True)
    fastest = FASTEST if gpu else How()
    with ExitStack() as stack:

        def ours(precision: str, cohort: int) -> Call:
            how, folder = replace(fastest, precision=precision), f"store-{precision}-{cohort}"
            options: dict[str, Any] = {"folder": folder, "cohort": cohort}
            return a_round(config, stack.enter_context(engine(config, run, how, bench.device.type, **options)))

        def loops(low: torch.dtype | None) -> Call:
            return one_by_one([loop(own, low, client) for client in range(clients)])

        def low(cohort: int) -> Call | Absent:
            return attempt(lambda: on_gpu(bench, lambda: ours("bf16", cohort)))

        bench(
            {
                "eager loop": loops(None),
                "eager loop, bf16": attempt(lambda: on_gpu(bench, lambda: loops(BF16))),
                "alone": ours("fp32", 1),
                "alone, bf16": low(1),
                "together": ours("fp32", clients),
                "together, bf16": low(clients),
            },
            host=True,
        )


def on_gpu(bench: Bench, make: Callable[[], Call]) -> Call:
    """What a CPU does so slowly that it is no comparison."""
    if bench.device.type != "cuda":
        raise Unavailable("compared on a GPU only")
    return make()


def one_by_one(calls: Sequence[Call]) -> Call:
    """All of them, in order."""

    def call() -> None:
        for each in calls:
            each()

    return call


def loop(engine: ReferenceEngine, low: torch.dtype | None, id: int = 0) -> Call:
    """An epoch of the client's steps, eagerly."""
    client, order = opened(engine, id)

    def call() -> None:
        for indices in order:
            a_step(client, indices, low)

    return call


def under_graph(bench: Bench, engine: ReferenceEngine, low: torch.dtype | None) -> Call:
    """The same, a step captured as a CUDA graph and replayed for each batch."""
    client, order = opened(engine)
    indices = order[0].clone()
    replay = Graphed(lambda: a_step(client, indices, low))

    def call() -> None:
        for batch in order:
            indices.copy_(batch)
            replay()

    return call


def a_step(client: Client, indices: Tensor, low: torch.dtype | None) -> Tensor:
    """One step on these samples; the loss."""
    x, y = client.batch(indices)
    client.optimizer.zero_grad()
    with autocast(x.device, low):
        loss, _ = client.program.join(client.program.run(x), y)
    loss.backward()
    client.optimizer.step()
    return loss.detach()


def opened(engine: ReferenceEngine, id: int = 0) -> tuple[Client, Tensor]:
    """The client, ready to train, and its batches [steps, B]."""
    client = engine.client(id)
    client.mixture.train()
    steps, size = client.training // client.batch_size, client.batch_size
    return client, torch.arange(steps * size, device=client.images.device).view(steps, size)
