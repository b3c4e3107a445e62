"""What PyTorch's operators took, one by one: time, FLOPs, bytes; and the most memory that was in use at a time."""

import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(slots=True)
class Operator:
    """All calls of one operator with inputs of one kind."""

    name: str
    shapes: str
    """Of its inputs, as `float32[64, 500] float32[10, 500]`."""
    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0
    """Inputs read once and outputs written once."""


class Operators(TorchDispatchMode):
    """Within it every operator is timed by itself: on a GPU the host waits for each, so together they are slower."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self.all: dict[tuple[str, str], Operator] = {}
        self.peak_bytes = 0
        """Most bytes of tensors made within it that were alive at a time."""
        self._clock, self._gpu = clock, device.type == "cuda"
        self._alive: dict[int, int] = {}  # bytes, by the storage's address
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._wait()
        start = self._clock()
        out = func(*args, **kwargs)
        self._wait()
        seconds = self._clock() - start
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(out))
        name = func.overloadpacket.__name__
        shapes = " ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in inputs)
        entry = self.all.setdefault((name, shapes), Operator(name, shapes))
        entry.calls += 1
        entry.seconds += seconds
        if not _view(func):
            entry.bytes += sum(t.nbytes for t in {id(t): t for t in [*inputs, *outputs]}.values())
            if (formula := flop_registry.get(func.overloadpacket)) is not None:
                entry.flops += int(formula(*args, **kwargs, out_val=out))
        self._note(inputs, outputs)
        return out

    def slowest(self) -> list[Operator]:
        """All, those that took most first."""
        return sorted(self.all.values(), key=lambda operator: -operator.seconds)

    def _wait(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()

    def _note(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Follow the storages that an operator made until they go."""
        before = {t.untyped_storage().data_ptr() for t in inputs}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            if address and address not in before and address not in self._alive:
                self._alive[address] = size
                self._bytes += size
                weakref.finalize(storage, self._gone, address)
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def _gone(self, address: int) -> None:
        self._bytes -= self._alive.pop(address, 0)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def _view(func: Any) -> bool:
    """Whether nothing is computed: what comes out is memory that went in, seen otherwise."""
    aliases = [value.alias_info for value in func._schema.returns]
    return func.overloadpacket.__name__ == "_unsafe_view" or any(a is not None and not a.is_write for a in aliases)
