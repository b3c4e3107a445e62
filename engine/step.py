"""Steps over an arena: branches side by side, join, backward, optimizer; and evaluation, without the last two.

On a GPU nothing in it makes the host wait: loss, hits and which batch comes next are device scalars.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmoe.engine.arena import Arena
from fedmoe.engine.graphs import Replayed, Track
from fedmoe.engine.member import SGD, AdamW
from fedmoe.engine.optimizers import Scale, optimizer
from fedmoe.engine.program import Program, batch_statistics
from fedmoe.engine.ranges import phase
from fedmoe.engine.samples import Loader
from fedmoe.engine.seam import Payload, Refused
from fedmoe.engine.seeds import globals_kept

RAGGED = 64
"""Batches of an evaluation that are not full are filled up to a multiple of it, so that few shapes need graphs."""


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
    """Whether all that must be finite is, the loss aside."""
    payload: Payload
    """What is shared, on the host."""

    @property
    def whole(self) -> bool:
        """Whether the client can be kept."""
        return self.finite and math.isfinite(self.loss)


class Step:
    """Trains and evaluates whoever is in the arena, on batches that an order names."""

    def __init__(
        self, arena: Arena, loader: Loader, rule: SGD | AdamW, how: How, track: Track, micro_batch: int = 0
    ) -> None:
        self.arena, self._loader, self._how = arena, loader, how
        self._streams = track.sides(len(arena.program.branches) - 1) if how.streams else []
        self.device = arena.block.device
        self.scale = Scale(self.device) if how.precision == "fp16" else None
        self.optimizer = optimizer(how.optimizer, arena, rule, self.scale)
        self._micro_batch = micro_batch
        self.parts = 1
        """How many parts a batch is taken in at least, one after the other, for want of memory."""
        self._channels_last = how.channels_last and self._takes_channels_last()
        self.loss = torch.zeros((), device=self.device)
        """Since `begin` the sum over training steps, or of an evaluation the sum over its samples."""
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        sums = [self.loss, self.correct]
        training = [arena.moving, *sums]
        if self.scale is not None:
            training += [self.scale.scale, self.scale.steps, self.scale.skipped]
        self._training = Replayed(lambda indices: self._take(indices), loader, track, training, self._restart)
        self._evaluation = Replayed(self._judge, loader, track, sums, arena.refresh)

    def begin(self) -> None:
        """A client has come into the arena."""
        self._restart()
        self.loss.zero_()
        self.correct.zero_()
        if self.scale is not None:
            self.scale.reset()
        self.arena.program.modules.train()

    def epoch(self, order: Tensor) -> Iterator[None]:  # int64 [steps, B, ...] on the CPU
        """Take the steps of an epoch; yields before each."""
        return self._training.run(order)

    def evaluate(self, samples: Tensor, size: int) -> Iterator[None]:  # int64 [n] on the CPU
        """Add up loss and hits over samples, `size` at a time, in evaluation mode; yields before each batch.

        Changes nothing else.
        """
        self.arena.refresh()
        self.loss.zero_()
        self.correct.zero_()
        self.arena.program.modules.eval()
        if self._evaluation.graphed and self._rows_are_apart():  # a graph a shape: of those not full, few
            size = min(size, -(-len(samples) // RAGGED) * RAGGED)
            return self._evaluation.run(F.pad(samples, (0, -len(samples) % size), value=-1).view(-1, size))
        return (None for batch in samples.split(size) for _ in self._evaluation.run(batch[None]))

    def _rows_are_apart(self) -> bool:
        """Whether a sample's output in evaluation is its own: some normalizations take statistics of batches there."""
        norms = (m for m in self.arena.program.modules.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase))
        return all(norm.running_mean is not None for norm in norms)

    def _restart(self) -> None:
        """What steps use, but the block does not hold, as it is before a client's first step."""
        self.arena.refresh()
        self.optimizer.clear()

    def _takes_channels_last(self) -> bool:
        """Whether the modules do, and nothing else changes by it.

        Code that views its input as another shape cannot take it, which a training step shows; and dropout would draw
        other masks, since it draws in the order of memory.
        """
        program = self.arena.program
        if len(self._loader.shape) == 1:
            return False
        # Made as a batch is: `contiguous` would leave images of one channel as they are.
        x = torch.zeros(2, *self._loader.shape, dtype=torch.uint8, device=self.device)
        x = x.to(torch.float32, memory_format=torch.channels_last)
        if any(isinstance(module, torch.nn.modules.dropout._DropoutNd) for module in program.modules.modules()):
            return False
        kept, y = self.arena.moving.clone(), torch.zeros(2, dtype=torch.int64, device=self.device)
        self.arena.refresh()
        program.modules.train()
        try:
            with globals_kept(), autocast(self.device, self._how.low):
                program.join(program.run(x), y)[0].backward()
                return True
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
        finally:
            self.arena.moving.copy_(kept)
            for parameter in self.arena.parameters.values():
                parameter.grad = None

    def _take(self, indices: Tensor) -> None:
        self.optimizer.begin()
        parts = indices.chunk(self._split(len(indices)))
        for part in parts:
            with phase("batch"):
                x, y = self._loader.batch(part, self._channels_last)
            with autocast(self.device, self._how.low):
                outputs = branches(self.arena.program, x, self._streams)
                with phase("header"):
                    loss, hits = self.arena.program.join(outputs, y)
            if len(parts) > 1:
                loss = loss * (len(part) / len(indices))
            with phase("backward"):
                (loss if self.scale is None else loss * self.scale.scale).backward()
            if len(parts) > 1:
                self.optimizer.add()
            self.loss += loss.detach()
            self.correct += hits
        with phase("optimizer"):
            self.optimizer.step()

    @torch.no_grad()
    def _judge(self, indices: Tensor) -> None:  # [B]; -1: no sample
        with phase("batch"):
            x, y = self._loader.batch(indices.clamp(min=0), self._channels_last)
        program, counts = self.arena.program, indices.to(self.device, non_blocking=True) >= 0
        with autocast(self.device, self._how.low):
            losses, hits = program.judge(branches(program, x, self._streams), y)
        self.loss += losses.masked_fill(~counts, 0).sum()
        self.correct += (hits * counts).sum()

    def _split(self, batch: int) -> int:
        """How many parts a batch of so many samples is taken in."""
        return max(self.parts, parts_of(batch, self._micro_batch))

    def halve(self, batch: int, who: str) -> None:
        """Take batches in twice as many parts from now on, because device memory did not suffice for `who`.

        Raises Refused where that is not possible: a sample is the least, and batch statistics are of whole batches.
        """
        whole, parts = batch_statistics(self.arena.program.modules), self._split(batch)
        if whole or 2 * parts > batch:
            why = "its normalization needs whole batches" if whole else f"it takes them in {parts} parts already"
            raise Refused(
                f"{who}: out of device memory with batches of {batch}, and {why}: lower training.batch_size, or give "
                "the states of clients less device memory (engine.device_memory_mb)"
            )
        self.parts = 2 * parts
        self._training.drop()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def parts_of(batch: int, micro_batch: int) -> int:
    """How many parts a batch is taken in, so that none has more samples than `micro_batch`; 0: one."""
    return -(-batch // micro_batch) if micro_batch else 1


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
