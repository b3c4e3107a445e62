"""Modules on tensors that have a shape and no memory: what they compute and take is known without doing it."""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

M = TypeVar("M", bound=nn.Module)


@contextmanager
def pretended(modules: M) -> Iterator[M]:
    """A copy without memory, what is shared in it shared; within the block no tensor that is made has any."""
    tensors = [*modules.parameters(), *modules.buffers()]
    with torch.no_grad():
        plain = [tensor.detach() for tensor in tensors]
    with FakeTensorMode() as mode:
        made: dict[int, Any] = {}
        for tensor, detached in zip(tensors, plain, strict=True):
            # Of a model that has no memory to begin with, as if it had.
            fake = torch.empty(detached.shape, dtype=detached.dtype) if detached.is_meta else mode.from_tensor(detached)
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if parameter else fake
        yield copy.deepcopy(modules, made)


class Live(TorchDispatchMode):
    """Adds up the bytes of what is made within it, as long as that lives; `peak` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._know(storage, 0)  # not made here
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._know(storage, storage.nbytes())
        return out

    def _know(self, storage: torch.UntypedStorage, size: int) -> None:
        if (key := storage._cdata) not in self._known:
            self._known.add(key)
            self._live += size
            self.peak = max(self.peak, self._live)
            # Another may get its address afterwards.
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
