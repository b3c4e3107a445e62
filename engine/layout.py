"""Where everything that a client owns and that persists lies in one block of bytes.

A block holds, each tensor at a multiple of 256 bytes and in its logical shape:

    weights    fp32, all trainable parameters       those that low precision copies, then normalizations'; θ first
    momentum   fp32, laid out like the weights; or first and second moment, in fp32, or in codes of a byte with
               their blocks' maxima, and how many steps these have taken part in
    buffers    floating point, then integer
    unused     parameters without gradient
    constants  the program's; those of equal clients are kept once, and none goes out with a client that has trained

What a step needs and does not keep, gradients and low-precision copies, lies outside.
"""

import hashlib
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
DIGEST = 32
"""Bytes of SHA-256."""
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
    and where they are codes `first_absmax` and `second_absmax` (fp32, by the blocks of all ranges). Where there are
    constants, `constants` is the digest of them all (`digest`), and each is here by its name, though in no state."""
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
    fixed: frozenset[str]
    """Names of the constants."""
    moving: int
    """Bytes of a block that a state is packed into; the constants follow."""
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
        constants = [name for name in parameters if name in program.constants]
        unused = [name for name, p in parameters.items() if not p.requires_grad and name not in program.constants]
        end = moving = place("model/", unused, end)
        if constants:
            entries["constants"] = Entry(end, (DIGEST,), torch.uint8)
            moving = _aligned(end + DIGEST)
            end = place("model/", constants, moving)
        theta = tuple(f"model/{name}" for name in (*parameters, *floating) if shared and name.startswith(shared))
        fixed = frozenset(f"model/{name}" for name in constants)
        return cls(entries, whole, ranges, weights // 4, narrow // 4, theta, fixed, moving, end)

    @property
    def trainable(self) -> list[str]:
        """Names of the trainable parameters."""
        named = [name for name, entry in self.entries.items() if entry.offset < 4 * self.weights]
        return [name.removeprefix("model/") for name in named]

    @property
    def optimizer(self) -> int:
        """Bytes of what the optimizer keeps."""
        return sum(entry.bytes for kind, entry in self.whole.items() if kind != "model")

    @property
    def in_state(self) -> dict[str, Entry]:
        """All entries but the constants."""
        return {name: entry for name, entry in self.entries.items() if name not in self.fixed}

    def pack(self, state: State, block: Tensor) -> None:  # uint8 [moving]
        """Write a state into the moving part of a block; what it does not have of the optimizer's is zero.

        Raises ValueError naming a tensor that is missing, unknown, or of another dtype or shape.
        """
        entries = self.in_state
        for name in sorted(state.keys() - entries.keys()):
            raise ValueError(f"tensor {name!r} is unknown")
        block.zero_()
        for name, entry in entries.items():
            if name not in state:
                if not name.startswith("model/") and name != "constants":
                    continue
                raise ValueError(f"tensor {name!r} is missing")
            tensor = state[name]
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                theirs, ours = (tensor.dtype, list(tensor.shape)), (entry.dtype, list(entry.shape))
                raise ValueError(f"tensor {name!r} is {theirs[0]} {theirs[1]}, the client's is {ours[0]} {ours[1]}")
            entry.of(block).copy_(tensor)

    def unpack(self, block: Tensor) -> State:  # uint8 [moving] on the CPU
        """The state in the moving part of a block, as copies."""
        return {name: entry.of(block).clone() for name, entry in self.in_state.items()}

    def constants(self, modules: nn.Module, start: int, stop: int) -> Tensor:  # uint8 [stop - start] on the CPU
        """Bytes of the constants of modules, counted from the end of a block's moving part."""
        part = torch.zeros(stop - start, dtype=torch.uint8)
        for name in self.fixed:
            own = self.entries[name].offset - self.moving
            first, last = max(own, start), min(own + self.entries[name].bytes, stop)
            if first < last:
                content = _bytes(modules.get_parameter(name.removeprefix("model/")))
                part[first - start : last - start] = content[first - own : last - own]
        return part

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


def digest(modules: nn.Module, names: Iterable[str]) -> Tensor:  # uint8 [DIGEST] on the CPU
    """SHA-256 over the bytes of parameters, with their names, dtypes and shapes."""
    whole = hashlib.sha256()
    for name in names:
        parameter = modules.get_parameter(name).detach()
        whole.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        whole.update(_bytes(parameter).numpy().data)
    return torch.frombuffer(bytearray(whole.digest()), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> Tensor:  # uint8 [n] on the CPU
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


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
