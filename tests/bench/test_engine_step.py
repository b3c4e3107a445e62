"""The whole step of one client, CNN-1 with the paper's global expert, batch 64: the engine and a clean eager loop.

The loop is what a good user writes: samples and state on the device, PyTorch's fused SGD, and under a graph no work of
the host but a copy of indices. It is given bf16 as well, and channels-last, with which it may be the faster one.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedmoe.client import Client
from fedmoe.config import Config
from fedmoe.engine.device import prepare
from fedmoe.engine.step import How, autocast
from fedmoe.profiling.bench import Absent, Bench, Call, Unavailable, attempt
from fedmoe.reference import ReferenceEngine
from tests.bench.federations import FASTEST, a_round, federation, plain, steps_of
from tests.bench.variants import Graphed
from tests.engines import apart, engine
from tests.support import begin

BF16 = torch.bfloat16


class Trained(NamedTuple):
    """What an epoch left, to be held against another way's."""

    momentum: dict[str, Tensor]
    """By parameter; unlike the weights, of which most is where they began, it is all of the steps' own."""
    low: bool
    """Whether in bf16, of which a step's gradients have a few percent of error."""


def test_step(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """A client alone: 20 steps a call. All begin where a round has left the client, and must come to the same."""
    bench, gpu = gpu_benchmark, gpu_benchmark.device.type == "cuda"
    prepare(bench.device.type, 0, False)  # before a loop is captured: with the convolutions that the engine has
    config = federation(tmp_path, 1, 1600 if bench.full else 200 if bench.timed else 80, model={"local": ("cnn-1",)})
    run = begin(config, tmp_path / "run")
    fastest = FASTEST if gpu else How()
    with ExitStack() as stack:

        def ours(precision: str) -> Call:
            how = replace(fastest, precision=precision)
            made = stack.enter_context(engine(config, run, how, bench.device.type, folder=f"store-{precision}"))
            a_round(config, made)()
            steps, arena = steps_of(made, 0), made.lanes[0].rooms[0].steps["cnn-1"].arena

            def call() -> Trained:
                steps()
                return Trained(arena.kept("momentum"), precision == "bf16")

            return call

        def loops(low: torch.dtype | None, channels_last: bool, make: Callable[..., Call] = loop) -> Call:
            own = clean(config, run, bench.device, channels_last)
            a_round(config, own)()
            return make(own, low, channels_last)

        def graphed(low: torch.dtype | None, channels_last: bool) -> Call:
            return loops(low, channels_last, under_graph)

        variants: dict[str, Call | Absent] = {}
        for layout, last in (("", False), (", channels-last", True)):
            variants |= {
                f"eager loop{layout}": loops(None, last),
                f"eager loop{layout}, bf16": attempt(partial(on_gpu, bench, partial(loops, BF16, last))),
                f"eager loop, graph{layout}": attempt(partial(graphed, None, last)),
                f"eager loop, graph{layout}, bf16": attempt(partial(graphed, BF16, last)),
            }
        variants |= {
            "engine": ours("fp32"),
            "engine, bf16": attempt(lambda: on_gpu(bench, lambda: ours("bf16"))),
        }
        bench(variants, check=same)


def test_step_in_cohort(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """16 clients: the loop's steps, one client after the other; and whole rounds of the engine's, all that is in them.

    As many times faster as the rounds are, a client in a cohort is.
    """
    bench, gpu = gpu_benchmark, gpu_benchmark.device.type == "cuda"
    prepare(bench.device.type, 0, False)  # before a loop is captured: with the convolutions that the engine has
    clients, each = (16, 800) if bench.full else (2, 80)
    config = federation(tmp_path, clients, each, model={"local": ("cnn-1",)})
    run = begin(config, tmp_path / "run")
    own, last = (clean(config, run, bench.device, channels_last) for channels_last in (False, True))
    fastest = FASTEST if gpu else How()
    with ExitStack() as stack:

        def ours(precision: str, cohort: int) -> Call:
            how, folder = replace(fastest, precision=precision), f"store-{precision}-{cohort}"
            options: dict[str, Any] = {"folder": folder, "cohort": cohort}
            return a_round(config, stack.enter_context(engine(config, run, how, bench.device.type, **options)))

        def loops(own: ReferenceEngine, low: torch.dtype | None, channels_last: bool) -> Call:
            return one_by_one([loop(own, low, channels_last, client) for client in range(clients)])

        def low(cohort: int) -> Call | Absent:
            return attempt(lambda: on_gpu(bench, lambda: ours("bf16", cohort)))

        bench(
            {
                "eager loop": loops(own, None, False),
                "eager loop, bf16": attempt(lambda: on_gpu(bench, lambda: loops(own, BF16, False))),
                "eager loop, channels-last": loops(last, None, True),
                "eager loop, channels-last, bf16": attempt(lambda: on_gpu(bench, lambda: loops(last, BF16, True))),
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


def clean(config: Config, run: Path, device: torch.device, channels_last: bool) -> ReferenceEngine:
    """The plain loop's clients, with fused SGD, their weights in the layout that they are given images in."""
    made = plain(config, run, device, fused=True)
    for id in range(config.federation.clients if channels_last else 0):
        for parameter in made.client(id).mixture.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return made


def loop(engine: ReferenceEngine, low: torch.dtype | None, channels_last: bool, id: int = 0) -> Call:
    """An epoch of the client's steps, eagerly."""
    client, order = opened(engine, id)

    def call() -> Trained:
        for indices in order:
            a_step(client, indices, low, channels_last)
        return trained(client, low)

    return call


def under_graph(engine: ReferenceEngine, low: torch.dtype | None, channels_last: bool) -> Call:
    """The same, a step captured as a CUDA graph and replayed for each batch; the client is as it was before that."""
    client, order = opened(engine)
    indices, before = order[0].clone(), client.state()
    replay = Graphed(lambda: a_step(client, indices, low, channels_last))
    with torch.no_grad():  # in place: the graph knows these tensors and no others
        for name, tensor in client.tensors().items():
            tensor.copy_(before[f"model/{name}"])
        for name, momentum in trained(client, low).momentum.items():
            momentum.copy_(before[f"momentum/{name}"])

    def call() -> Trained:
        for batch in order:
            indices.copy_(batch)
            replay()
        return trained(client, low)

    return call


def trained(client: Client, low: torch.dtype | None) -> Trained:
    """What it has become."""
    state = client.optimizer.state
    return Trained({n: state[p]["momentum_buffer"] for n, p in client.mixture.named_parameters()}, low is not None)


def same(first: Trained, other: Trained) -> None:
    """Twenty steps that lack a term, or take it twice, are as far apart as they are long."""
    one, two = (torch.cat([t.momentum[name].flatten() for name in sorted(first.momentum)]) for t in (first, other))
    found, most = apart(two, one), 0.25 if other.low else 0.01
    assert found <= most, f"momentum is {found:.1e} apart, more than {most}"


def a_step(client: Client, indices: Tensor, low: torch.dtype | None, channels_last: bool) -> Tensor:
    """One step on these samples; the loss."""
    x, y = client.batch(indices)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
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
    return client, torch.arange(steps * size, device=client.inputs.device).view(steps, size)
