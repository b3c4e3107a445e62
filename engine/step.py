"""A training step over an arena: branches side by side, join, backward, optimizer; captured once, then replayed.

On a GPU nothing in it makes the host wait: loss, hits and which batch comes next are device scalars.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedmoe.engine.arena import Arena
from fedmoe.engine.member import SGD
from fedmoe.engine.optimizers import Scale, optimizer
from fedmoe.engine.program import Program
from fedmoe.engine.ranges import phase
from fedmoe.engine.samples import Loader
from fedmoe.engine.seam import Refused
from fedmoe.engine.seeds import globals_kept

Pool = Any
"""A torch.cuda.graph_pool_handle(): memory of graphs that never run at the same time, and keep nothing in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class How:
    """What of the plan concerns a step."""

    precision: str = "fp32"
    """fp32, tf32, bf16 or fp16."""
    optimizer: str = "torch"
    """flat, torch or apex."""
    streams: bool = False
    """Give every branch a stream of its own."""
    graphs: bool = False
    """Capture the step as a CUDA graph and replay it."""
    channels_last: bool = True
    """Give images with their channels innermost, where the modules take that."""

    @property
    def low(self) -> torch.dtype | None:
        """The dtype of parameters' copies and of autocast; None: fp32."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)


class Taken(NamedTuple):
    """What a client's training in a round gave, besides what it has become."""

    steps: int
    loss: float
    """Sum over the steps."""
    correct: float
    finite: bool
    """Whether all that must be finite is."""


class Step:
    """Trains whoever is in the arena, on batches that an order names."""

    def __init__(self, arena: Arena, loader: Loader, sgd: SGD, how: How, pool: Pool | None = None) -> None:
        self.arena, self._loader, self._how, self._pool = arena, loader, how, pool
        self.device = arena.block.device
        self.scale = Scale(self.device) if how.precision == "fp16" else None
        self.optimizer = optimizer(how.optimizer, arena, sgd, self.scale)
        count = len(arena.program.branches) - 1 if how.streams and self.device.type == "cuda" else 0
        self._streams = [torch.cuda.Stream(self.device) for _ in range(count)]
        self.parts = 1
        """How many parts a batch is taken in, one after the other, for want of memory."""
        self._channels_last = how.channels_last and self._takes_channels_last()
        self.loss = torch.zeros((), device=self.device)
        """Sum over the steps since `begin`."""
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self._next = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._order: Tensor | None = None  # [steps, B] on the device, at an address that the graphs know
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by batch size
        self._graphed = how.graphs

    def begin(self) -> None:
        """A client has come into the arena."""
        self.arena.refresh()
        self.optimizer.clear()
        self.loss.zero_()
        self.correct.zero_()
        if self.scale is not None:
            self.scale.reset()
        self.arena.program.modules.train()

    def epoch(self, order: Tensor) -> Iterator[None]:  # int64 [steps, B] on the CPU
        """Take the steps of an epoch; yields before each."""
        if not self._graphed or self.device.type != "cuda" or not self._loader.resident:
            for indices in self._placed(order):
                yield
                self._take(indices)
            return
        graph = self._graph(order)
        if graph is None:
            yield from self.epoch(order)
            return
        for _ in range(len(order)):
            yield
            graph.replay()

    def predictions(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:  # int64 [n] on the CPU
        """Logits [B, C] and targets [B] of samples, `size` at a time, in evaluation mode; call it without gradients."""
        self.arena.refresh()
        program = self.arena.program
        program.modules.eval()
        for indices in self._placed(order).split(size):
            x, y = self._loader.batch(indices, self._channels_last)
            with autocast(self.device, self._how.low):
                yield program.logits(branches(program, x, self._streams)), y

    def _placed(self, order: Tensor) -> Tensor:
        """Where the samples are."""
        return order.to(self.device, non_blocking=True) if self._loader.resident else order

    def _takes_channels_last(self) -> bool:
        """Whether the modules do, and nothing else changes by it.

        Code that views its input as another shape cannot take it, which a training step shows; and dropout would draw
        other masks, since it draws in the order of memory.
        """
        program = self.arena.program
        # Made as a batch is: `contiguous` would leave images of one channel as they are.
        x = torch.zeros(2, *self._loader.shape, dtype=torch.uint8, device=self.device)
        x = x.to(torch.float32, memory_format=torch.channels_last)
        if any(isinstance(module, torch.nn.modules.dropout._DropoutNd) for module in program.modules.modules()):
            return False
        kept, y = self.arena.block.clone(), torch.zeros(2, dtype=torch.int64, device=self.device)
        self.arena.refresh()
        program.modules.train()
        try:
            with globals_kept(), contextlib.suppress(RuntimeError), autocast(self.device, self._how.low):
                outputs = branches(program, x, [])
                program.join(outputs, y)[0].backward()
                return True
        finally:
            self.arena.block.copy_(kept)
            for parameter in self.arena.parameters.values():
                parameter.grad = None
        return False

    def _take(self, indices: Tensor) -> None:
        self.optimizer.begin()
        for part in indices.chunk(self.parts):
            with phase("batch"):
                x, y = self._loader.batch(part, self._channels_last)
            with autocast(self.device, self._how.low):
                outputs = branches(self.arena.program, x, self._streams)
                with phase("header"):
                    loss, hits = self.arena.program.join(outputs, y)
            if self.parts > 1:
                loss = loss * (len(part) / len(indices))
            with phase("backward"):
                (loss if self.scale is None else loss * self.scale.scale).backward()
            if self.parts > 1:
                self.optimizer.add()
            self.loss += loss.detach()
            self.correct += hits
        with phase("optimizer"):
            self.optimizer.step()

    def halve(self, batch: int, who: str) -> None:
        """Take batches in twice as many parts from now on, because device memory did not suffice for `who`.

        Raises Refused where that is not possible: a sample is the least, and batch statistics are of whole batches.
        """
        modules = self.arena.program.modules
        whole = any(isinstance(module, torch.nn.modules.batchnorm._NormBase) for module in modules.modules())
        whole |= any(name.endswith("running_mean") for name, _ in modules.named_buffers())  # others' kinds
        if whole or 2 * self.parts > batch:
            why = "its normalization needs whole batches" if whole else f"it takes them in {self.parts} parts already"
            raise Refused(
                f"{who}: out of device memory with batches of {batch}, and {why}: lower training.batch_size, or give "
                "the states of clients less device memory (engine.device_memory_mb)"
            )
        self.parts *= 2
        self._graphs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _graph(self, order: Tensor) -> torch.cuda.CUDAGraph | None:
        """The graph for batches of this size, with `order` in place; captured if there is none yet.

        None where a step cannot be captured, as one that makes the host wait: from then on each is taken by itself.
        """
        size = order.shape[1]
        if self._order is None or order.numel() > self._order.numel():  # an address that graphs hold: make it seldom
            room = 1 << (order.numel() - 1).bit_length()
            self._order, self._graphs = torch.zeros(room, dtype=torch.int64, device=self.device), {}
        self._order[: order.numel()].copy_(order.reshape(-1).pin_memory(), non_blocking=True)
        self._next.zero_()
        if size not in self._graphs:
            try:
                self._graphs[size] = self._captured(size)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph of this step: {str(error).splitlines()[0]}", stacklevel=2)
                self._graphed = False
                self.arena.refresh()  # from what was put back
                self.optimizer.clear()  # of the gradients of a step that was not finished
                return None
        return self._graphs[size]

    def _captured(self, size: int) -> torch.cuda.CUDAGraph:
        """Capture; warming up trains, so what the client owns is put back after."""
        assert self._order is not None
        rows = self._order[: len(self._order) // size * size].view(-1, size)
        changing = [self.arena.block, self.loss, self.correct]
        if self.scale is not None:
            changing += [self.scale.scale, self.scale.steps, self.scale.skipped]

        def step() -> None:
            self._take(rows.index_select(0, self._next).view(size))
            self._next.add_(1).remainder_(len(rows))

        def ready() -> None:  # or the graph would add to what the warm-up left
            for parameter in self.arena.parameters.values():
                parameter.grad = None

        graph = captured(step, changing, self._pool, ready)
        self.arena.refresh()
        self._next.zero_()
        return graph


def captured(
    step: Callable[[], None], changing: Sequence[Tensor], pool: Pool | None, ready: Callable[[], None] = lambda: None
) -> torch.cuda.CUDAGraph:
    """Capture a step; warming up takes some, so `changing` is put back after. `ready` is called before the capture."""
    kept, random = [tensor.clone() for tensor in changing], torch.cuda.get_rng_state()
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        current.wait_stream(side)
        ready()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
        return graph
    finally:
        torch.cuda.set_stream(current)  # a capture that fails may leave its own
        torch.cuda.set_rng_state(random)  # or whoever makes a client capture would change its dropout
        for tensor, value in zip(changing, kept, strict=True):
            tensor.copy_(value)


def branches(program: Program, x: Tensor, streams: list[torch.cuda.Stream]) -> dict[str, Tensor]:
    """Every branch's output; with streams, all but one beside the current one; autograd does likewise backward."""
    if not streams:
        outputs = {}
        for name, branch in program.branches.items():
            with phase(name):
                outputs[name] = branch(x)
        return outputs
    current = torch.cuda.current_stream()
    outputs = {}
    for (name, branch), stream in zip(program.branches.items(), [*streams, current], strict=True):
        stream.wait_stream(current)
        x.record_stream(stream)  # its memory must not be used again while this stream still reads it
        with torch.cuda.stream(stream), phase(name):
            outputs[name] = branch(x)
        outputs[name].record_stream(current)
    for stream in streams:
        current.wait_stream(stream)
    return outputs


def autocast(device: torch.device, low: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    """Autocast to `low`, its cache off: what it would cache are the arena's own low-precision copies."""
    if low is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=low, cache_enabled=False)
