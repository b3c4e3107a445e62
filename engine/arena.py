"""The arena: modules become views into a client's block of bytes, which a region of the device holds."""

import math

import torch
from torch import Tensor, nn

from fedmoe.engine.layout import Layout
from fedmoe.engine.program import Program


class Arena:
    """One architecture's modules, bound to a region of the device: whoever's block is in the region, they are.

    They may have been made without memory, under `torch.device("meta")`.
    `low` is a dtype that all but normalizations' parameters are copied to and used in; None: they are used as they are.
    Afterwards the modules must not be moved or cast, nor take a state by assignment: each silently unbinds them.
    """

    def __init__(self, program: Program, layout: Layout, region: Tensor, low: torch.dtype | None = None) -> None:
        self.program, self.layout, self.block = program, layout, region[: layout.size]
        self.weights = layout.flat("model", self.block)
        self.low: Tensor | None = None
        """[narrow] in `low`'s dtype."""
        self.moving = self.block[: layout.moving]
        """What of the block may change."""
        if low is not None:
            self.low = torch.zeros(layout.narrow, dtype=low, device=region.device)
        self._bound: dict[str, tuple[Tensor, Tensor]] = {}
        made: dict[int, Tensor] = {}
        for name, tensor in self._tensors().items():
            view = self._view(f"model/{name}")
            if tensor.is_meta:  # has no data that could be exchanged
                made[id(tensor)] = (
                    nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view
                )
            else:
                tensor.data = view
            self._bound[name] = made.get(id(tensor), tensor), view
        for module in program.modules.modules() if made else ():
            for tensors in (module._parameters, module._buffers):
                tensors.update((name, made[id(t)]) for name, t in tensors.items() if id(t) in made)  # type: ignore[misc]
        self.parameters = {name: p for name, p in program.modules.named_parameters() if p.requires_grad}
        """The trainable ones by name, as bound."""

    def masters(self) -> dict[str, Tensor]:
        """The fp32 views of the trainable parameters, by name."""
        return {name: self.layout.entries[f"model/{name}"].of(self.block) for name in self.parameters}

    def kept(self, kind: str) -> dict[str, Tensor]:
        """The views of what the optimizer keeps for them, by name: `momentum`, `first` or `second`."""
        return {name: self.layout.entries[f"{kind}/{name}"].of(self.block) for name in self.parameters}

    def theta(self) -> list[Tensor]:
        """The fp32 views of what is shared."""
        return [self.layout.entries[name].of(self.block) for name in self.layout.theta]

    def flat_views(self, name: str, narrow: Tensor, wide: Tensor) -> Tensor:
        """The part that belongs to parameter `name` of tensors [narrow] and [weights − narrow], in its shape."""
        entry = self.layout.entries[f"model/{name}"]
        start, count = entry.offset // 4, math.prod(entry.shape)
        whole, start = (narrow, start) if start < self.layout.narrow else (wide, start - self.layout.narrow)
        return whole[start : start + count].view(entry.shape)

    def refresh(self) -> None:
        """Copy the masters to their low-precision copies, after a block has come in."""
        if self.low is not None:
            self.low.copy_(self.weights[: self.layout.narrow])

    def check(self) -> None:
        """Assert that every tensor of the modules still is the view that it was bound to."""
        tensors = self._tensors()
        assert tensors.keys() == self._bound.keys(), sorted(tensors.keys() ^ self._bound.keys())
        for name, tensor in tensors.items():
            bound, view = self._bound[name]
            same = tensor is bound and tensor.data_ptr() == view.data_ptr() and tensor.stride() == view.stride()
            assert same and tensor.dtype == view.dtype, f"{name} is no longer bound to the arena"

    def _tensors(self) -> dict[str, Tensor]:
        modules = self.program.modules
        return dict(modules.named_parameters()) | dict(modules.named_buffers())

    def _view(self, name: str) -> Tensor:
        entry = self.layout.entries[name]
        if self.low is not None and entry.offset < 4 * self.layout.narrow:
            start = entry.offset // 4
            return self.low[start : start + math.prod(entry.shape)].view(entry.shape)
        return entry.of(self.block)
