"""A cohort: small clients of one architecture as one batched model, a row of every tensor each.

The modules are called once for all rows, by torch.func.vmap, so a row knows nothing of the others and the gradient of
the losses' sum is each client's own. Clients of unequal length go together: one that has taken its steps goes on
through the arithmetic, which is the same for every step, and nothing of what that gives is kept.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedmoe.engine.graphs import Replayed, Track
from fedmoe.engine.layout import Layout
from fedmoe.engine.lowered import Lowered
from fedmoe.engine.member import SGD, AdamW
from fedmoe.engine.optimizers import Scale, Segment, Update
from fedmoe.engine.program import Program
from fedmoe.engine.ranges import phase
from fedmoe.engine.samples import Loader
from fedmoe.engine.seeds import globals_kept
from fedmoe.engine.step import How, branches


class Cohort:
    """K clients whose blocks are the rows of `blocks`, uint8 [K, size].

    `scratch`, uint8 of at least `Cohort.scratch`, is for what a step uses and does not keep; cohorts that do not train
    at the same time may share it. The optimizer is always the flat one, whatever `how` says: it alone skips rows.
    Branches run one after the other, each for K clients. Images come with their channels first, since convolutions of
    a batched model are grouped ones over K times the channels.
    """

    def __init__(
        self,
        program: Program,
        layout: Layout,
        blocks: Tensor,
        scratch: Tensor,
        loader: Loader,
        rule: SGD | AdamW,
        how: How,
        track: Track,
    ) -> None:
        self.layout, self.rows, self.blocks = layout, len(blocks), blocks
        self._loader, self._how, self._device = loader, how, blocks.device
        self._body = _Body(program)
        self._weights = layout.flat("model", blocks)  # [K, weights], rows apart
        self._segments = list(self._carved(scratch))
        self._parameters: dict[str, Tensor] = {}  # trainable, [K, ...], leaves of autograd
        self._gradients: dict[str, Tensor] = {}
        self._others: dict[str, Tensor] = {}  # frozen, [K, ...]
        self._buffers: dict[str, Tensor] = {}  # [K, ...]
        modules = program.modules
        for name, parameter in modules.named_parameters():
            if parameter.requires_grad:
                self._parameters[name], self._gradients[name] = self._own(name)
            else:
                self._others[name] = layout.entries[f"model/{name}"].of(blocks)
        for name, _ in modules.named_buffers():
            self._buffers[name] = layout.entries[f"model/{name}"].of(blocks)
        self.loss = torch.zeros(self.rows, device=self._device)
        """[K], each client's sum over its own steps since `begin`."""
        self.correct = torch.zeros(self.rows, dtype=torch.int64, device=self._device)
        self._steps = torch.zeros(self.rows, dtype=torch.int64, device=self._device)  # [K], each client's own
        self._done = torch.zeros(1, dtype=torch.int64, device=self._device)  # steps
        changing = [blocks, self.loss, self.correct, self._done]
        self.scale = Scale(self._device, (self.rows,)) if how.precision == "fp16" else None
        self._optimizer = Update(layout, blocks, self._segments, rule, self.scale)
        if self.scale is not None:
            changing += [self.scale.scale, self.scale.steps, self.scale.skipped]
        self._replayed = Replayed(lambda indices: self._take(indices), loader, track, changing, self._restart)

    @staticmethod
    def scratch(layout: Layout, rows: int) -> int:
        """Bytes for so many clients' gradients and low-precision copies, together as large as their weights."""
        return rows * 4 * layout.weights

    def begin(self, steps: Sequence[int]) -> None:  # K
        """All clients are there: how many steps each will take."""
        self._steps.copy_(torch.tensor(steps))
        self.loss.zero_()
        self.correct.zero_()
        self._done.zero_()
        if self.scale is not None:
            self.scale.reset()
        self._restart()
        self._body.train()

    def steps(self, orders: Sequence[Tensor]) -> Iterator[None]:  # K times int64 [steps, B, ...], on the CPU
        """Take the steps of the client that has most, on these samples; yields before each."""
        shapes = [list(order.shape) for order in orders]
        if len(orders) != self.rows or any(shape[1] != shapes[0][1] or not shape[0] for shape in shapes):
            raise ValueError(f"a cohort of {self.rows} takes as many orders [steps, B, ...] of one B, got {shapes}")
        # A client that is done sees its last batch again: whatever it computes with is then of its own kind.
        every = torch.arange(max(map(len, orders)))
        return self._replayed.run(torch.stack([order[every.clamp(max=len(order) - 1)] for order in orders], dim=1))

    def _restart(self) -> None:
        """What steps use, but the blocks do not hold, as it is before the first step."""
        for segment in self._segments:
            segment.gradients.zero_()
            if segment.low is not None:
                segment.low.copy_(self._of(segment))

    def _take(self, indices: Tensor) -> None:  # int64 [K, B] or [K, B, 4], where the samples are
        live = self._steps > self._done
        with phase("batch"):
            x, y = self._loader.batch(indices.flatten(0, 1), channels_last=False)
            x, y = x.unflatten(0, (self.rows, -1)), y.unflatten(0, (self.rows, -1))
        # Copies, for two reasons: what a client that is done makes of them must not stay, and where rows do not touch,
        # as they do not in the blocks, batch normalization under vmap updates a copy and drops that in silence.
        buffers = {name: buffer.clone(memory_format=torch.contiguous_format) for name, buffer in self._buffers.items()}
        with Lowered(self._how.low) if self._how.low is not None else contextlib.nullcontext():
            loss, hits = vmap(self._one, randomness="different")({**self._parameters, **self._others}, buffers, x, y)
        with phase("backward"):
            total = loss.sum() if self.scale is None else (loss * self.scale.scale).sum()
            made = torch.autograd.grad(total, list(self._parameters.values()), allow_unused=True)
            used = [(mine, new) for mine, new in zip(self._gradients.values(), made, strict=True) if new is not None]
            torch._foreach_copy_([mine for mine, _ in used], [new for _, new in used])
        with phase("optimizer"):
            self._update(live)
        for name, buffer in self._buffers.items():
            buffer.copy_(buffers[name].where(live.view(-1, *[1] * (buffer.ndim - 1)), buffer))
        self.loss += loss.detach().masked_fill(~live, 0)
        self.correct += hits.masked_fill(~live, 0)
        self._done += 1

    def _one(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
        """Loss and hits of one client, as vmap sees it."""
        tensors = {f"body.{name}": tensor for name, tensor in (parameters | buffers).items()}
        return functional_call(self._body, tensors, (x, y))

    def _update(self, live: Tensor) -> None:
        self._optimizer.take(self._segments, live, zero=False)

    def _of(self, segment: Segment) -> Tensor:
        """[K, n] The weights of the segment."""
        return self._weights[:, segment.start : segment.start + segment.gradients.shape[1]]

    def _carved(self, scratch: Tensor) -> Iterator[Segment]:
        layout, low, end = self.layout, self._how.low, 0

        def carve(columns: int, dtype: torch.dtype) -> Tensor:
            nonlocal end
            start, end = end, end + self.rows * columns * dtype.itemsize
            return scratch[start:end].view(dtype).view(self.rows, columns)

        bounds = [(0, layout.narrow, low), (layout.narrow, layout.weights, None)]
        for start, stop, kind in bounds if low is not None else [(0, layout.weights, None)]:
            if n := stop - start:
                copies = (carve(n, kind), carve(n, kind)) if kind is not None else (carve(n, torch.float32), None)
                yield Segment(start, *copies)
        assert end == self.scratch(layout, self.rows)

    def _own(self, name: str) -> tuple[Tensor, Tensor]:
        """A trainable parameter as a leaf over what is computed with, and its gradient."""
        entry = self.layout.entries[f"model/{name}"]
        start, n = entry.offset // 4, entry.bytes // 4
        segment = next(s for s in reversed(self._segments) if s.start <= start)
        used = self._of(segment) if segment.low is None else segment.low
        columns = slice(start - segment.start, start - segment.start + n)
        leaf, gradient = (t[:, columns].view(self.rows, *entry.shape) for t in (used, segment.gradients))
        return leaf.detach().requires_grad_(), gradient


class _Body(nn.Module):
    """A program's step as a module, which is what `functional_call` substitutes tensors in."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.body, self._program = program.modules, program

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        outputs = branches(self._program, x, [])
        with phase("header"):
            return self._program.join(outputs, y)


def cohort_supported(program: Program, layout: Layout, loader: Loader, rule: SGD | AdamW, how: How) -> tuple[bool, str]:
    """Whether clients with this program can train together, and if not, why. Tried out, on two blank clients."""
    blocks = torch.zeros(2, layout.size, dtype=torch.uint8, device=loader.device)
    scratch = torch.empty(Cohort.scratch(layout, 2), dtype=torch.uint8, device=loader.device)
    try:
        with globals_kept():
            cohort = Cohort(program, layout, blocks, scratch, loader, rule, how, Track(loader.device))
            cohort.begin([1, 1])
            for _ in cohort.steps([torch.zeros(1, 2, dtype=torch.int64)] * 2):
                pass
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # what vmap says of operators and control flow it lacks
        return False, f"its modules do not run under torch.func.vmap: {type(error).__name__}: {error}".splitlines()[0]
    return True, ""
