"""The step over an arena's weights: in one kernel over flat memory, or by a library over its parameters."""

import importlib
from typing import Any, Protocol

import torch
from torch import Tensor

from fedmoe.engine.arena import Arena
from fedmoe.engine.member import SGD
from fedmoe.kernels import flat_optimizer, flat_optimizer_oracle
from fedmoe.kernels.flat_optimizer import Control


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


class Flat:
    """One kernel over all weights, which also zeroes the gradients: they are views of flat memory, added to."""

    def __init__(self, arena: Arena, sgd: SGD, scale: Scale | None) -> None:
        weights, narrow = arena.weights, arena.layout.narrow
        dtype = torch.float32 if arena.low is None else arena.low.dtype
        low = weights.new_zeros(narrow, dtype=dtype)
        high = weights.new_zeros(len(weights) - narrow)
        segments: list[tuple[slice, Tensor, Tensor | None]]
        if arena.low is None:  # one dtype, one segment
            whole = weights.new_zeros(len(weights))
            low, high, segments = whole[:narrow], whole[narrow:], [(slice(0, len(weights)), whole, None)]
        else:
            segments = [(slice(0, narrow), low, arena.low), (slice(narrow, len(weights)), high, None)]
        self._segments = [segment for segment in segments if len(segment[1])]
        self._gradients = {name: arena.flat_views(name, low, high) for name in arena.parameters}
        self._sums: dict[int, Tensor] = {}
        self._arena, self._sgd, self._scale = arena, sgd, scale
        self._lr = weights.new_tensor(sgd.lr)
        self._control = Control.empty([g for _, g, _ in self._segments]) if scale else None
        able = flat_optimizer.flat_optimizer_supported(weights, low)[0]
        self._do: Any = flat_optimizer if able else flat_optimizer_oracle

    def clear(self) -> None:
        """Zero the gradients; otherwise each step does it for the next."""
        for _, gradients, _ in self._segments:
            gradients.zero_()
        for sums in self._sums.values():  # kept: a graph may know where they are
            sums.zero_()

    def begin(self) -> None:
        """Gradients were zeroed by the step before."""
        for name, parameter in self._arena.parameters.items():
            parameter.grad = self._gradients[name]

    def add(self) -> None:
        """fp32 gradients add up by themselves; others are moved to an fp32 sum, made when first needed."""
        for k, (_, gradients, _) in enumerate(self._segments):
            if gradients.dtype != torch.float32:
                if k not in self._sums:
                    self._sums[k] = torch.zeros_like(gradients, dtype=torch.float32)
                self._sums[k] += gradients
                gradients.zero_()

    def step(self) -> None:
        """A kernel a dtype of gradients; with a loss scale two more before, and one for the scale after."""
        sgd, arena = self._sgd, self._arena
        segments = [
            (part, self._sums.get(k, gradients), low) for k, (part, gradients, low) in enumerate(self._segments)
        ]
        if self._control is not None and self._scale is not None:
            self._do.flat_norm([g for _, g, _ in segments], scale=self._scale.scale, out=self._control)
        for part, gradients, low in segments:
            self._do.sgd_step(
                arena.weights[part], gradients, arena.momentum[part] if sgd.momentum else None, lr=self._lr,
                momentum=sgd.momentum, weight_decay=sgd.weight_decay, low=low, control=self._control,
            )  # fmt: skip
        if self._control is not None and self._scale is not None:
            self._scale.update(self._control.found_inf)


class Library:
    """A library's fused SGD over the parameters, its momentum in the arena; gradients are taken over, not added to."""

    def __init__(self, arena: Arena, sgd: SGD, make: Any) -> None:
        self._parameters = list(arena.parameters.values())
        self._arena, masters = arena, arena.masters()
        self._masters = [
            p if arena.low is None or p.dtype == torch.float32 else torch.nn.Parameter(masters[name])
            for name, p in arena.parameters.items()
        ]
        self._pairs = [(m, p) for m, p in zip(self._masters, self._parameters, strict=True) if m is not p]
        self._optimizer = make(self._masters, lr=sgd.lr, momentum=sgd.momentum, weight_decay=sgd.weight_decay)
        if sgd.momentum:
            for master, momentum in zip(self._masters, arena.momenta().values(), strict=True):
                self._optimizer.state[master]["momentum_buffer"] = momentum

    def clear(self) -> None:
        """Have no gradients: autograd hands its own over where there are none."""
        for tensor in (*self._parameters, *self._masters):
            tensor.grad = None

    def begin(self) -> None:
        """As `clear`."""
        self.clear()

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
        self._optimizer.step()
        for master, parameter in self._pairs:
            parameter.copy_(master)


def optimizer(name: str, arena: Arena, sgd: SGD, scale: Scale | None) -> Optimizer:
    """The one of this name. Raises ValueError where a loss scale is wanted of a library, or apex is not there."""
    if name == "flat":
        return Flat(arena, sgd, scale)
    if scale is not None:
        raise ValueError(f'precision "fp16" needs optimizer "flat", not "{name}": it alone scales losses on the device')
    if name == "torch":
        return Library(arena, sgd, lambda *a, **k: torch.optim.SGD(*a, **k, fused=True))
    return Library(arena, sgd, apex().FusedSGD)


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
