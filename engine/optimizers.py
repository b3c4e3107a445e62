"""The step over an arena's weights: in one kernel over flat memory, or by a library over its parameters."""

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fedmoe.engine.arena import Arena
from fedmoe.engine.layout import Layout, Range
from fedmoe.engine.member import SGD, AdamW
from fedmoe.kernels import flat_optimizer, flat_optimizer_oracle
from fedmoe.kernels.flat_optimizer import Control, Moments


class Optimizer(Protocol):
    """Takes steps on the arena that it was made for."""

    def clear(self) -> None:
        """Forget what a step that was not finished has left."""

    def begin(self) -> None:
        """Before a step's first backward pass: its gradients will be those of this step alone."""

    def add(self) -> None:
        """After each backward pass of a step with several: their gradients add up, in fp32."""

    def step(self) -> None:
        """Take the step, low-precision copies included."""


class Scale:
    """A dynamic loss scale, all of it on the device (PyTorch's GradScaler, without its attachments); one a row."""

    def __init__(self, device: torch.device, rows: tuple[int, ...] = ()) -> None:
        self.scale = torch.full(rows, 2.0**16, device=device)
        self.steps = torch.zeros(rows, dtype=torch.int32, device=device)  # since it last changed
        self.skipped = torch.zeros(rows, device=device)  # steps whose gradients were not finite

    def reset(self) -> None:
        """Begin anew, for another client or round: what the one before needed says nothing that a resumed run knew."""
        self.scale.fill_(2.0**16)
        self.steps.zero_()
        self.skipped.zero_()

    def update(self, found_inf: Tensor) -> None:
        """Halve it after a step that was skipped, double it after 2000 that were not."""
        self.skipped += found_inf
        if not self.scale.ndim:
            torch._amp_update_scale_(self.scale, self.steps, found_inf, 2.0, 0.5, 2000)
            return
        skipped, doubled = found_inf != 0, self.scale * 2
        self.steps.add_(1).masked_fill_(skipped, 0)
        due = self.steps == 2000
        self.steps.masked_fill_(due, 0)
        grown = doubled.where(due & doubled.isfinite(), self.scale)
        self.scale.copy_((self.scale / 2).where(skipped, grown))


class Segment(NamedTuple):
    """Weights whose gradients have one dtype, of one client or a row each of several."""

    start: int  # elements, of the weights
    gradients: Tensor  # [n] or [K, n]
    low: Tensor | None  # likewise: the copy that low precision computes with


class _Part(NamedTuple):
    """What AdamW changes of one range of one row."""

    row: Any  # its number, or ... where there are no rows
    range: Range
    weights: Tensor  # [n]
    moments: Moments
    step: Tensor  # []


class Update:
    """The step of the kernels over flat memory, or of their plain twin where they do not run, over some segments.

    `block` is of one client, or the rows of several. With `scale`, rows whose gradients are not finite are left out.
    """

    def __init__(
        self, layout: Layout, block: Tensor, segments: Sequence[Segment], rule: SGD | AdamW, scale: Scale | None
    ) -> None:
        self._rule, self._scale = rule, scale
        self._parts: list[_Part] = []
        self._weights = layout.flat("model", block)
        self._momentum = layout.flat("momentum", block) if isinstance(rule, SGD) and rule.momentum else None
        if isinstance(rule, AdamW):
            self._steps = layout.flat("step", block)
            for row in range(len(block)) if block.ndim > 1 else (...,):
                for part in layout.ranges:
                    weights = self._weights[row][part.start : part.stop]
                    step = self._steps[row][int(part.theta)]
                    self._parts.append(_Part(row, part, weights, layout.moments(part, block[row]), step))
        self._lr = torch.tensor(rule.lr, device=block.device)
        wanted = scale is not None or rule.clip_norm
        self._control = Control.empty([s.gradients for s in segments]) if wanted else None
        able = [flat_optimizer.flat_optimizer_supported(self._of(s, self._weights), s.gradients)[0] for s in segments]
        self._do: Any = flat_optimizer if all(able) else flat_optimizer_oracle

    def take(self, segments: Sequence[Segment], live: Tensor | None = None, zero: bool = True) -> None:
        """A step of the rows that are live; the segments' shapes are those of the beginning."""
        rule, scale, control = self._rule, self._scale, self._control
        if control is not None:
            self._do.flat_norm(
                [s.gradients for s in segments], scale=None if scale is None else scale.scale,
                max_norm=rule.clip_norm or None, live=live, out=control,
            )  # fmt: skip
            if scale is None:  # what is not finite is to be seen in the weights, as without a clip
                control.found_inf.zero_()
        if isinstance(rule, AdamW):
            self._adamw(rule, segments, live, zero)
        else:
            for s in segments:
                momentum = None if self._momentum is None else self._of(s, self._momentum)
                self._do.sgd_step(
                    self._of(s, self._weights), s.gradients, momentum, lr=self._lr, momentum=rule.momentum,
                    weight_decay=rule.weight_decay, low=s.low, live=live, control=control, zero=zero,
                )  # fmt: skip
        if scale is not None and control is not None:
            scale.update(control.found_inf)

    def _adamw(self, rule: AdamW, segments: Sequence[Segment], live: Tensor | None, zero: bool) -> None:
        """A call a row and range, whose steps are counted by itself."""
        taken = torch.ones_like(self._lr) if self._control is None else 1 - self._control.found_inf
        taken = taken if live is None else taken * live
        self._steps.add_(taken[:, None] if taken.ndim else taken)
        for s in segments:
            end = s.start + s.gradients.shape[-1]
            for part in self._parts:
                if s.start <= part.range.start < end:
                    own = slice(part.range.start - s.start, part.range.stop - s.start)
                    self._do.adamw_step(
                        part.weights, s.gradients[part.row][own], part.moments, step=part.step, lr=self._lr,
                        betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay,
                        low=None if s.low is None else s.low[part.row][own],
                        live=None if live is None else live[part.row],
                        control=None if self._control is None else _row(self._control, part.row), zero=zero,
                    )  # fmt: skip

    def _of(self, segment: Segment, flat: Tensor) -> Tensor:
        return flat[..., segment.start : segment.start + segment.gradients.shape[-1]]


class Flat:
    """By `Update`, which also zeroes the gradients: they are views of flat memory, added to."""

    def __init__(self, arena: Arena, rule: SGD | AdamW, scale: Scale | None) -> None:
        weights, narrow = arena.weights, arena.layout.narrow
        if arena.low is None:  # one dtype, one segment
            whole = torch.zeros_like(weights)
            low, high, segments = whole[:narrow], whole[narrow:], [Segment(0, whole, None)]
        else:
            low, high = torch.zeros_like(arena.low), weights.new_zeros(len(weights) - narrow)
            segments = [Segment(0, low, arena.low), Segment(narrow, high, None)]
        self._segments = [segment for segment in segments if len(segment.gradients)]
        self._gradients = {name: arena.flat_views(name, low, high) for name in arena.parameters}
        self._sums: dict[int, Tensor] = {}
        self._summed = False
        self._arena = arena
        self._update = Update(arena.layout, arena.block, self._segments, rule, scale)

    def clear(self) -> None:
        """Zero the gradients; otherwise each step does it for the next."""
        for segment in self._segments:
            segment.gradients.zero_()
        for sums in self._sums.values():  # kept: a graph may know where they are
            sums.zero_()

    def begin(self) -> None:
        """Gradients were zeroed by the step before."""
        self._summed = False
        for name, parameter in self._arena.parameters.items():
            parameter.grad = self._gradients[name]

    def add(self) -> None:
        """fp32 gradients add up by themselves; others are moved to an fp32 sum, made when first needed."""
        self._summed = True
        for k, (_, gradients, _) in enumerate(self._segments):
            if gradients.dtype != torch.float32:
                if k not in self._sums:
                    self._sums[k] = torch.zeros_like(gradients, dtype=torch.float32)
                self._sums[k] += gradients
                gradients.zero_()

    def step(self) -> None:
        """A kernel a dtype of gradients; with a loss scale or a clip two more before, and one for the scale after."""
        sums = self._sums if self._summed else {}
        self._update.take([s._replace(gradients=sums.get(k, s.gradients)) for k, s in enumerate(self._segments)])


class Library:
    """A library's fused step over the parameters, its state in the arena; gradients are taken over, not added to."""

    def __init__(self, arena: Arena, rule: SGD | AdamW, make: Any) -> None:
        self._parameters = list(arena.parameters.values())
        self._arena, self._clip, masters = arena, rule.clip_norm, arena.masters()
        self._masters = [
            p if arena.low is None or p.dtype == torch.float32 else torch.nn.Parameter(masters[name])
            for name, p in arena.parameters.items()
        ]
        self._pairs = [(m, p) for m, p in zip(self._masters, self._parameters, strict=True) if m is not p]
        self._optimizer = make(self._masters, lr=rule.lr, weight_decay=rule.weight_decay)
        self._steps: list[Tensor] = []  # of each parameter; the arena has one for many
        state, layout = self._optimizer.state, arena.layout
        if isinstance(rule, AdamW):
            firsts, seconds, shared = arena.kept("first"), arena.kept("second"), set(layout.theta)
            counts = layout.flat("step", arena.block)
            self._counts = [counts[int(f"model/{name}" in shared)] for name in arena.parameters]
            for master, name in zip(self._masters, arena.parameters, strict=True):
                self._steps.append(arena.weights.new_zeros(()))
                state[master] |= {"step": self._steps[-1], "exp_avg": firsts[name], "exp_avg_sq": seconds[name]}
        elif rule.momentum:
            for master, momentum in zip(self._masters, arena.kept("momentum").values(), strict=True):
                state[master]["momentum_buffer"] = momentum

    def clear(self) -> None:
        """Have no gradients, since autograd hands its own over where there are none, and the arena's count of steps."""
        self.begin()
        if self._steps:
            torch._foreach_copy_(self._steps, self._counts)

    def begin(self) -> None:
        """Have no gradients."""
        for tensor in (*self._parameters, *self._masters):
            tensor.grad = None

    def add(self) -> None:
        """fp32 gradients add up by themselves; others are added to the masters'."""
        for master, parameter in self._pairs:
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """The library's step, in fp32, and from it the low-precision copies."""
        self.add()
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._masters, self._clip)
        self._optimizer.step()
        if self._steps:
            self._arena.layout.flat("step", self._arena.block).add_(1)
        for master, parameter in self._pairs:
            parameter.copy_(master)


def optimizer(name: str, arena: Arena, rule: SGD | AdamW, scale: Scale | None) -> Optimizer:
    """The one of this name. Raises ValueError for what a library cannot do, or where apex is not there."""
    if name == "flat":
        return Flat(arena, rule, scale)
    if scale is not None:
        raise ValueError(f'precision "fp16" needs optimizer "flat", not "{name}": it alone scales losses on the device')
    if isinstance(rule, AdamW):
        if name != "torch" or rule.bits != 32:
            raise ValueError(f'AdamW with states of {rule.bits} bits needs optimizer "flat", not "{name}"')
        return Library(arena, rule, partial(_adamw, rule, arena.block.is_cuda))
    if name == "torch":
        return Library(arena, rule, partial(torch.optim.SGD, momentum=rule.momentum, fused=True))
    return Library(arena, rule, partial(apex().FusedSGD, momentum=rule.momentum))


def _adamw(rule: AdamW, capturable: bool, masters: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    """PyTorch's AdamW, ready for a CUDA graph, though nobody may capture one."""
    made = torch.optim.AdamW(masters, betas=rule.betas, eps=rule.eps, fused=True, capturable=capturable, **options)
    made._warned_capturable_if_run_uncaptured = True  # warming up is no reason to warn
    return made


def _row(control: Control, row: Any) -> Control:
    """What a norm tells of one row."""
    norm, found_inf, factor, partials = control
    return Control(norm[row], found_inf[row], factor[row], partials if row is ... else partials[row : row + 1])


def apex() -> Any:
    """NVIDIA's apex.optimizers. Raises ValueError where it is missing, unrelated, or built without CUDA."""
    try:
        importlib.import_module("amp_C")
        module = importlib.import_module("apex.optimizers")
        assert hasattr(module, "FusedAdam")
    except (ImportError, AssertionError) as error:
        raise ValueError(
            f'optimizer "apex" needs NVIDIA apex with amp_C and apex.optimizers ({error or "no FusedAdam"}): the '
            'package apex on PyPI is unrelated; build github.com/NVIDIA/apex with --cuda_ext, or take "flat" or "torch"'
        ) from error
    return module
