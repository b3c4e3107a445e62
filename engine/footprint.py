"""What a client's step takes of memory: the engine's own step, taken on tensors without memory."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from fedmoe.engine.arena import Arena
from fedmoe.engine.graphs import Track
from fedmoe.engine.layout import Layout
from fedmoe.engine.member import SGD, AdamW, Samples
from fedmoe.engine.pretend import Pretence
from fedmoe.engine.program import Program
from fedmoe.engine.samples import Loader
from fedmoe.engine.seeds import globals_kept
from fedmoe.engine.step import How, Step

M = TypeVar("M", bound=nn.Module)


class Footprint(NamedTuple):
    """Bytes at their peak, besides the client's block, its low-precision copy and the data set."""

    training: int
    """Of a step: gradients, what the backward pass keeps and makes, what the optimizer needs meanwhile."""
    evaluation: int
    """Of a batch; 0 where none was asked for."""


@contextmanager
def _uncollected() -> Iterator[None]:
    """Have Python not look for cycles meanwhile, which takes long beside large models, and of which a step has none."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def footprint(
    modules: M,
    program: Callable[[M], Program],
    samples: Samples,
    rule: SGD | AdamW,
    how: How,
    batch: int,
    evaluation_batch: int = 0,
    micro_batch: int = 0,
    kernels: bool = False,
) -> Footprint:
    """Of a client with these modules, whose program `program` makes, by the operators that run on a CPU.

    `samples` are such as the client's; what is in them does not matter. Nothing is computed: it takes as long for large
    models as for small ones. With `kernels` the optimizer is the flat one of a GPU, which needs nothing besides.
    """
    pretence = Pretence()
    own = pretence.copy(modules)
    with pretence, globals_kept(), _uncollected():
        inputs = torch.empty(max(batch, evaluation_batch), *samples.inputs.shape[1:], dtype=samples.inputs.dtype)
        few = Samples(inputs, torch.zeros(len(inputs), dtype=torch.int64), samples.mean, samples.std)
        made = program(own)
        layout, device = Layout.of(made, rule), torch.device("cpu")
        arena = Arena(made, layout, torch.zeros(layout.size, dtype=torch.uint8), how.low)
        loader = Loader(few, device, resident=True)
        with pretence.live() as training:
            step = Step(arena, loader, rule, how, Track(device, graphs=False), micro_batch)
            if kernels:
                step.optimizer.step = lambda: None  # type: ignore[method-assign]
            step.begin()
            for _ in step.epoch(torch.zeros(1, batch, dtype=torch.int64)):
                pass
        step.optimizer.clear()
        with pretence.live() as evaluation:
            order = torch.zeros(evaluation_batch, dtype=torch.int64)
            for _ in step.evaluate(order, evaluation_batch) if evaluation_batch else ():
                pass
    return Footprint(training.peak, evaluation.peak)
