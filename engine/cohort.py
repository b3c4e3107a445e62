"""A cohort: small clients of one architecture as one batched model, a row of every tensor each.

The modules are called once for all rows, by torch.func.vmap, so a row knows nothing of the others and the gradient of
the losses' sum is each client's own. Clients of unequal length go together: one that has taken its steps goes on
through the arithmetic, which is the same for every step, and nothing of what that gives is kept.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedmoe.engine.arena import Entry, Layout
from fedmoe.engine.lowered import Lowered
from fedmoe.engine.member import SGD
from fedmoe.engine.program import Program
from fedmoe.engine.ranges import phase
from fedmoe.engine.samples import Loader
from fedmoe.engine.seeds import globals_kept
from fedmoe.engine.step import How, Pool, branches, captured
from fedmoe.kernels import flat_optimizer, flat_optimizer_oracle


@dataclass(frozen=True, slots=True)
class _Segment:
    """A range of a block's weights whose gradients have one dtype, of all rows."""

    start: int  # elements
    weights: Tensor  # [K, n] fp32
    momentum: Tensor  # [K, n] fp32
    gradients: Tensor  # [K, n]
    low: Tensor | None  # [K, n]


class Cohort:
    """K clients in `memory`, uint8 of at least `Cohort.bytes`, which holds nothing before `put`.

    A block's parts lie apart there, each as contiguous [K, n], which is what the optimizer's kernel wants. The
    optimizer is always the flat one, whatever `how` says: it alone skips rows. Branches run one after the other, each
    for K clients. Images come with their channels first, since convolutions of a batched model are grouped ones over K
    times the channels.
    """

    def __init__(
        self,
        program: Program,
        layout: Layout,
        rows: int,
        memory: Tensor,
        loader: Loader,
        sgd: SGD,
        how: How,
        pool: Pool | None = None,
    ) -> None:
        self.layout, self.rows = layout, rows
        self._loader, self._sgd, self._how, self._device = loader, sgd, how, memory.device
        self._pool, self._body = pool, _Body(program)
        self._memory = memory[: self.bytes(layout, rows)]
        self._segments, self._rest = self._carved()
        self._parameters: dict[str, Tensor] = {}  # trainable, [K, ...], leaves of autograd
        self._gradients: dict[str, Tensor] = {}
        self._others: dict[str, Tensor] = {}  # frozen, [K, ...]
        self._buffers: dict[str, Tensor] = {}  # [K, ...]
        modules = program.modules
        for name, parameter in modules.named_parameters():
            if parameter.requires_grad:
                own = self._own(name)
                self._parameters[name], self._gradients[name] = own
            else:
                self._others[name] = self._in_rest(layout.entries[f"model/{name}"])
        for name, _ in modules.named_buffers():
            self._buffers[name] = self._in_rest(layout.entries[f"model/{name}"])
        weights, gradients, low = self._segments[0].weights, self._segments[0].gradients, self._segments[0].low
        able = flat_optimizer.flat_optimizer_supported(weights, gradients, low)[0]
        self._do: Any = flat_optimizer if able else flat_optimizer_oracle
        self._lr = torch.tensor(sgd.lr, device=self._device)
        self.loss = torch.zeros(rows, device=self._device)
        """[K], each client's sum over its own steps since `begin`."""
        self.correct = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._steps = torch.zeros(rows, dtype=torch.int64, device=self._device)  # [K], how many are each client's own
        self._next = torch.zeros(1, dtype=torch.int64, device=self._device)  # the step to come
        self._order = torch.empty(0, dtype=torch.int64)  # [steps, K, B], where the samples are
        self._place = self._order  # [n], of the order, at an address that the graphs know
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by batch size

    @staticmethod
    def bytes(layout: Layout, rows: int) -> int:
        """Of memory for so many clients: blocks; gradients and low-precision copies, together as large as weights."""
        return rows * (layout.size + 4 * layout.weights)

    def put(self, row: int, block: Tensor) -> None:  # uint8 [size]
        """Let the client whose block this is have the row."""
        for mine, theirs in self._pairs(row, block):
            mine.copy_(theirs)

    def get(self, row: int, block: Tensor) -> None:  # uint8 [size]
        """Write the block of the row's client."""
        for mine, theirs in self._pairs(row, block):
            theirs.copy_(mine)

    def begin(self, orders: Sequence[Tensor]) -> None:  # K times int64 [steps, B], on the CPU
        """All clients are there: which samples each will see in each of its steps."""
        shapes = [list(order.shape) for order in orders]
        if len(orders) != self.rows or any(shape[1] != shapes[0][1] or not shape[0] for shape in shapes):
            raise ValueError(f"a cohort of {self.rows} takes as many orders [steps, B] of one B, got {shapes}")
        steps = torch.tensor([len(order) for order in orders])
        # A client that is done sees its last batch again: whatever it computes with is then of its own kind.
        every = torch.arange(int(steps.max()))
        table = torch.stack([order[every.clamp(max=len(order) - 1)] for order in orders], dim=1)
        self._order = self._placed(table)
        self._steps.copy_(steps)
        self.loss.zero_()
        self.correct.zero_()
        self._next.zero_()
        for segment in self._segments:
            segment.gradients.zero_()
            if segment.low is not None:
                segment.low.copy_(segment.weights)
        self._body.train()

    def steps(self) -> Iterator[None]:
        """Take the steps of the client that has most; yields before each."""
        graph = self._graph() if self._graphed else None
        for indices in self._order:
            yield
            if graph is None:
                self._take(indices)
            else:
                graph.replay()

    def finite(self, names: Sequence[str]) -> Tensor:
        """Bool [names, K]: whether these tensors of the state, named `model/...`, are finite, client by client."""
        tensors = {**self._others, **self._buffers}
        for name in self._parameters:
            tensors[name] = self._own(name, masters=True)[0]
        return torch.stack([tensors[name.removeprefix("model/")].flatten(1).isfinite().all(1) for name in names])

    @property
    def _graphed(self) -> bool:
        return self._how.graphs and self._device.type == "cuda" and self._loader.resident

    def _placed(self, order: Tensor) -> Tensor:  # int64 [steps, K, B] on the CPU
        """Where the samples are; for graphs, at one address."""
        if not self._graphed:
            return order.to(self._device, non_blocking=True) if self._loader.resident else order
        if order.numel() > self._place.numel():  # seldom, since it costs the graphs
            room = 1 << (order.numel() - 1).bit_length()
            self._place, self._graphs = torch.zeros(room, dtype=torch.int64, device=self._device), {}
        placed = self._place[: order.numel()].view(order.shape)
        return placed.copy_(order.pin_memory(), non_blocking=True)

    def _graph(self) -> torch.cuda.CUDAGraph:
        """The graph for batches of this size; captured if there is none yet."""
        _, rows, size = self._order.shape
        if size not in self._graphs:
            every = self._place[: len(self._place) // (rows * size) * rows * size].view(-1, rows, size)
            changing = [self._memory, self.loss, self.correct, self._next]

            def step() -> None:  # warming up may take more of them than there are
                self._take(every.index_select(0, self._next.remainder(len(every)))[0])

            self._graphs[size] = captured(step, changing, self._pool)
        return self._graphs[size]

    def _take(self, indices: Tensor) -> None:  # int64 [K, B], where the samples are
        live = self._steps > self._next
        with phase("batch"):
            x, y = self._loader.batch(indices.reshape(-1), channels_last=False)
            x, y = x.unflatten(0, (self.rows, -1)), y.view(self.rows, -1)
        # Copies, for two reasons: what a client that is done makes of them must not stay, and where rows do not touch,
        # as they do not in the region, batch normalization under vmap updates a copy and drops that in silence.
        buffers = {name: buffer.clone(memory_format=torch.contiguous_format) for name, buffer in self._buffers.items()}
        with Lowered(self._how.low) if self._how.low is not None else contextlib.nullcontext():
            loss, hits = vmap(self._one, randomness="different")({**self._parameters, **self._others}, buffers, x, y)
        with phase("backward"):
            made = torch.autograd.grad(loss.sum(), list(self._parameters.values()), allow_unused=True)
            used = [(mine, new) for mine, new in zip(self._gradients.values(), made, strict=True) if new is not None]
            torch._foreach_copy_([mine for mine, _ in used], [new for _, new in used])
        with phase("optimizer"):
            self._update(live)
        for name, buffer in self._buffers.items():
            buffer.copy_(buffers[name].where(live.view(-1, *[1] * (buffer.ndim - 1)), buffer))
        self.loss += loss.detach().masked_fill(~live, 0)
        self.correct += hits.masked_fill(~live, 0)
        self._next += 1

    def _one(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
        """Loss and hits of one client, as vmap sees it."""
        tensors = {f"body.{name}": tensor for name, tensor in (parameters | buffers).items()}
        return functional_call(self._body, tensors, (x, y))

    def _update(self, live: Tensor) -> None:
        sgd = self._sgd
        for s in self._segments:
            self._do.sgd_step(
                s.weights, s.gradients, s.momentum if sgd.momentum else None, lr=self._lr, momentum=sgd.momentum,
                weight_decay=sgd.weight_decay, low=s.low, live=live, zero=False,
            )  # fmt: skip

    def _carved(self) -> tuple[list[_Segment], Tensor]:
        """The segments, and uint8 [K, n] of what a block has after its momentum."""
        layout, low, end = self.layout, self._how.low, 0

        def carve(columns: int, dtype: torch.dtype) -> Tensor:
            nonlocal end
            start, end = end, end + self.rows * columns * dtype.itemsize
            return self._memory[start:end].view(dtype).view(self.rows, columns)

        segments = []
        bounds = [(0, layout.narrow, low), (layout.narrow, layout.weights, None)]
        for start, stop, kind in bounds if low is not None else [(0, layout.weights, None)]:
            if n := stop - start:
                weights, momentum = carve(n, torch.float32), carve(n, torch.float32)
                copies = (carve(n, kind), carve(n, kind)) if kind is not None else (carve(n, torch.float32), None)
                segments.append(_Segment(start, weights, momentum, *copies))
        rest = carve(layout.size - 8 * layout.weights, torch.uint8)
        assert end == len(self._memory)
        return segments, rest

    def _pairs(self, row: int, block: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of all parts of a block: where they are in the cohort, and in the block."""
        flat = self.layout.flat(block)
        for segment in self._segments:
            for which, part in enumerate((segment.weights, segment.momentum)):
                yield part[row], flat[which][segment.start : segment.start + part.shape[1]]
        yield self._rest[row], block[8 * self.layout.weights :]

    def _own(self, name: str, masters: bool = False) -> tuple[Tensor, Tensor]:
        """A trainable parameter as a leaf over what is computed with, or over the masters, and its gradient."""
        entry = self.layout.entries[f"model/{name}"]
        start, n = entry.offset // 4, entry.bytes // 4
        segment = next(s for s in reversed(self._segments) if s.start <= start)
        used = segment.weights if masters or segment.low is None else segment.low
        columns = slice(start - segment.start, start - segment.start + n)
        leaf, gradient = (t[:, columns].view(self.rows, *entry.shape) for t in (used, segment.gradients))
        return leaf.detach().requires_grad_(not masters), gradient

    def _in_rest(self, entry: Entry) -> Tensor:
        start = entry.offset - 8 * self.layout.weights
        return self._rest[:, start : start + entry.bytes].view(entry.dtype).view(self.rows, *entry.shape)


class _Body(nn.Module):
    """A program's step as a module, which is what `functional_call` substitutes tensors in."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.body, self._program = program.modules, program

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        outputs = branches(self._program, x, [])
        with phase("header"):
            return self._program.join(outputs, y)


def cohort_supported(program: Program, layout: Layout, loader: Loader, how: How) -> tuple[bool, str]:
    """Whether clients with this program can train together, and if not, why. Tried out, on two blank clients."""
    if how.precision == "fp16":
        return False, "a cohort has no loss scale, which fp16 needs for each client"
    memory = torch.zeros(Cohort.bytes(layout, 2), dtype=torch.uint8, device=loader.device)
    sgd = SGD(lr=0.0, momentum=0.0, weight_decay=0.0, reset_theta=False)
    try:
        with globals_kept():
            cohort = Cohort(program, layout, 2, memory, loader, sgd, how)
            cohort.begin([torch.zeros(1, 2, dtype=torch.int64)] * 2)
            for _ in cohort.steps():
                pass
    except (RuntimeError, TypeError, ValueError) as error:  # what vmap says of operators and control flow it lacks
        return False, f"its modules do not run under torch.func.vmap: {type(error).__name__}: {error}".splitlines()[0]
    return True, ""
