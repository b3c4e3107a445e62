"""The arena: all that a client owns and that persists, as one block of bytes; modules become views into it.

A block holds, each tensor at a multiple of 256 bytes and in its logical shape:

    weights    fp32, all trainable parameters       those that low precision copies, then normalizations'; θ first
    momentum   fp32, laid out like the weights; or first and second moment, in fp32, or in codes of a byte with
               their blocks' maxima, and how many steps these have taken part in
    buffers    floating point, then integer
    frozen     parameters without gradient

What a step needs and does not keep, gradients and low-precision copies, lies outside. Moving a client is one copy.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedmoe.engine.member import SGD, AdamW
from fedmoe.engine.program import Program
from fedmoe.engine.seam import State
from fedmoe.kernels.flat_optimizer import Moments
from fedmoe.kernels.flat_optimizer_state import QUANTIZED

ALIGNMENT = 256
NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Entry(NamedTuple):
    """One tensor of a block."""

    offset: int  # bytes from the block's beginning, a multiple of ALIGNMENT, but for moments of a byte an element
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Without the gap behind it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, block: Tensor) -> Tensor:  # uint8 [..., n]
        """This tensor as a view of a block, or of bytes that are laid out like one; of several, a row each."""
        own = block[..., self.offset : self.offset + self.bytes].view(self.dtype)
        return own.view((*block.shape[:-1], *self.shape))


class Range(NamedTuple):
    """Weights that lie together and are all of theta, or none; each range is quantized by itself."""

    theta: bool
    start: int  # elements
    stop: int
    maxima: int  # where its blocks' maxima begin among those of all

    @property
    def blocks(self) -> slice:
        """Where its blocks' maxima are."""
        return slice(self.maxima, self.maxima - (self.start - self.stop) // QUANTIZED)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of an architecture lies. Equal layouts have equal architectures as far as state is concerned."""

    entries: dict[str, Entry]
    """Of each tensor, by its name in the state: `model/...`, and of every trainable parameter `momentum/...`, or
    `first/...` and `second/...`; with the latter `step` (fp32 [1], or [2] where there is a theta, whose is the second),
    and where they are codes `first_absmax` and `second_absmax` (fp32, by the blocks of all ranges)."""
    whole: dict[str, Entry]
    """Of everything of one kind together, gaps included, by that kind: `model` (the weights alone), `momentum`, ..."""
    ranges: tuple[Range, ...]
    """Of the weights, in order, two of theta and two of the rest at most."""
    weights: int
    """Elements of the weights, gaps included: the block's first 4 · weights bytes."""
    narrow: int
    """How many of them low precision copies; the rest are normalizations'."""
    theta: tuple[str, ...]
    """Names of what is shared, parameters, then float buffers, in registration order."""
    size: int
    """Bytes of a block."""

    @classmethod
    def of(cls, program: Program, rule: SGD | AdamW) -> "Layout":
        """The layout of a program's modules and of what is kept to train them.

        Raises ValueError for a trainable parameter that is not fp32: masters are.
        """
        modules = program.modules
        parameters, buffers = dict(modules.named_parameters()), dict(modules.named_buffers())
        shared = tuple(f"{child}." for child in program.segments.get("theta", ()))
        for name, parameter in parameters.items():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                raise ValueError(f"parameter {name!r} is {parameter.dtype}, the engine trains torch.float32")
        trainable = [name for name, p in parameters.items() if p.requires_grad]
        wide = _normalizations(modules)
        trainable.sort(key=lambda name: (name in wide, not name.startswith(shared)))
        entries: dict[str, Entry] = {}
        whole: dict[str, Entry] = {}

        def place(prefix: str, names: Iterable[str], end: int) -> int:
            for name in names:
                tensor = parameters[name] if name in parameters else buffers[name]
                entries[prefix + name] = Entry(end, tuple(tensor.shape), tensor.dtype)
                end = _aligned(end + entries[prefix + name].bytes)
            return end

        def like_weights(kind: str, dtype: torch.dtype) -> int:
            whole[kind] = Entry(end, (weights // 4,), dtype)
            for name in trainable:
                offset, shape, _ = entries[f"model/{name}"]
                entries[f"{kind}/{name}"] = Entry(end + offset // 4 * dtype.itemsize, shape, dtype)
            return _aligned(end + whole[kind].bytes)

        def apart(kind: str, count: int) -> int:
            entries[kind] = whole[kind] = Entry(end, (count,), torch.float32)
            return _aligned(end + 4 * count)

        narrow = place("model/", [name for name in trainable if name not in wide], 0)
        end = weights = place("model/", [name for name in trainable if name in wide], narrow)
        whole["model"] = Entry(0, (weights // 4,), torch.float32)
        ranges = _ranges(
            [(name.startswith(shared), entries[f"model/{name}"].offset // 4) for name in trainable],
            narrow // 4,
            weights // 4,
        )
        if isinstance(rule, SGD):
            end = like_weights("momentum", torch.float32)
        else:
            for kind in ("first", "second"):
                end = like_weights(kind, torch.float32 if rule.bits == 32 else torch.uint8)
            for kind in ("first_absmax", "second_absmax") if rule.bits == 8 else ():
                end = apart(kind, ranges[-1].blocks.stop if ranges else 0)
            end = apart("step", 1 + any(r.theta for r in ranges))
        floating = [name for name, b in buffers.items() if b.is_floating_point()]
        end = place("model/", [*floating, *(name for name in buffers if name not in floating)], end)
        end = place("model/", [name for name, p in parameters.items() if not p.requires_grad], end)
        theta = tuple(f"model/{name}" for name in (*parameters, *floating) if shared and name.startswith(shared))
        return cls(entries, whole, ranges, weights // 4, narrow // 4, theta, end)

    @property
    def trainable(self) -> list[str]:
        """Names of the trainable parameters."""
        named = [name for name, entry in self.entries.items() if entry.offset < 4 * self.weights]
        return [name.removeprefix("model/") for name in named]

    @property
    def optimizer(self) -> int:
        """Bytes of what the optimizer keeps."""
        return sum(entry.bytes for kind, entry in self.whole.items() if kind != "model")

    def pack(self, state: State, block: Tensor) -> None:
        """Write a state into a block; what it does not have of the optimizer's is zero.

        Raises ValueError naming a tensor that is missing, unknown, or of another dtype or shape.
        """
        for name in sorted(state.keys() - self.entries.keys()):
            raise ValueError(f"tensor {name!r} is unknown")
        block.zero_()
        for name, entry in self.entries.items():
            if name not in state:
                if not name.startswith("model/"):
                    continue
                raise ValueError(f"tensor {name!r} is missing")
            tensor = state[name]
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                theirs, ours = (tensor.dtype, list(tensor.shape)), (entry.dtype, list(entry.shape))
                raise ValueError(f"tensor {name!r} is {theirs[0]} {theirs[1]}, the client's is {ours[0]} {ours[1]}")
            entry.of(block).copy_(tensor)

    def unpack(self, block: Tensor) -> State:  # uint8 [n] on the CPU
        """The state in a block, as copies."""
        return {name: entry.of(block).clone() for name, entry in self.entries.items()}

    def flat(self, kind: str, block: Tensor) -> Tensor:  # [weights], of several blocks [.., weights]
        """Everything of one kind (`whole`) in a block, gaps included; the gaps are zero and stay so."""
        return self.whole[kind].of(block)

    def moments(self, part: Range, block: Tensor) -> Moments:
        """The part's moments in a block, as the kernels of AdamW take them."""
        first, second = (self.flat(kind, block)[part.start : part.stop] for kind in ("first", "second"))
        if first.dtype == torch.float32:
            return Moments(first, second)
        return Moments(
            first, second, *(self.flat(f"{kind}_absmax", block)[part.blocks] for kind in ("first", "second"))
        )

    def reset_theta(self, block: Tensor) -> None:
        """Let what the optimizer keeps for theta begin anew: moments, and how many steps they have taken part in."""
        parts = [part for part in self.ranges if part.theta]
        kinds = [kind for kind in self.whole if kind in ("momentum", "first", "second")]
        tensors = [self.flat(kind, block)[part.start : part.stop] for part in parts for kind in kinds]
        maxima = [kind for kind in self.whole if kind.endswith("_absmax")]
        tensors += [self.flat(kind, block)[part.blocks] for part in parts for kind in maxima]
        if parts and "step" in self.whole:
            tensors.append(self.flat("step", block)[1:])
        if tensors:
            torch._foreach_zero_(tensors)


class Arena:
    """One architecture's modules, bound to a region of the device: whoever's block is in the region, they are.

    `low` is a dtype that all but normalizations' parameters are copied to and used in; None: they are used as they are.
    Afterwards the modules must not be moved or cast, nor take a state by assignment: each silently unbinds them.
    """

    def __init__(self, program: Program, layout: Layout, region: Tensor, low: torch.dtype | None = None) -> None:
        self.program, self.layout, self.block = program, layout, region[: layout.size]
        self.weights = layout.flat("model", self.block)
        self.low: Tensor | None = None
        """[narrow] in `low`'s dtype."""
        if low is not None:
            self.low = torch.zeros(layout.narrow, dtype=low, device=region.device)
        self._bound: dict[str, tuple[Tensor, Tensor]] = {}
        tensors = dict(program.modules.named_parameters()) | dict(program.modules.named_buffers())
        for name, tensor in tensors.items():
            view = self._view(f"model/{name}")
            tensor.data = view
            self._bound[name] = tensor, view
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
        tensors = dict(self.program.modules.named_parameters()) | dict(self.program.modules.named_buffers())
        assert tensors.keys() == self._bound.keys(), sorted(tensors.keys() ^ self._bound.keys())
        for name, tensor in tensors.items():
            bound, view = self._bound[name]
            same = tensor is bound and tensor.data_ptr() == view.data_ptr() and tensor.stride() == view.stride()
            assert same and tensor.dtype == view.dtype, f"{name} is no longer bound to the arena"

    def _view(self, name: str) -> Tensor:
        entry = self.layout.entries[name]
        if self.low is not None and entry.offset < 4 * self.layout.narrow:
            start = entry.offset // 4
            return self.low[start : start + math.prod(entry.shape)].view(entry.shape)
        return entry.of(self.block)


def _aligned(end: int) -> int:
    return -(-end // ALIGNMENT) * ALIGNMENT


def _ranges(trainable: Iterable[tuple[bool, int]], narrow: int, weights: int) -> tuple[Range, ...]:
    """The ranges of parameters, each given by whether it is theta's and its first element, in order."""
    kinds: dict[tuple[bool, bool], int] = {}  # in order, each with its first element
    for theta, start in trainable:
        kinds.setdefault((start >= narrow, theta), start)
    made: list[Range] = []
    for (_, theta), (start, stop) in zip(kinds, pairwise([*kinds.values(), weights]), strict=True):
        made.append(Range(theta, start, stop, made[-1].blocks.stop if made else 0))
    return tuple(made)


def _normalizations(modules: nn.Module) -> set[str]:
    """Names of the parameters of normalizations, PyTorch's and those called so, which low precision leaves in fp32."""
    return {
        f"{path}.{name}" if path else name
        for path, module in modules.named_modules()
        if isinstance(module, NORMALIZATIONS) or "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
