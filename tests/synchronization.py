"""Notices what makes the host wait for a GPU, with one and without."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2", "equal")
"""Operators whose result or whose shape the host must know; a boolean mask as an index is `nonzero` in disguise."""


class NoSynchronization(TorchDispatchMode):
    """Fails on an operator that would make the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in _indices(args)
        )
        assert name not in WAITING and not masked, f"{name} makes the host wait"
        return func(*args, **(kwargs or {}))


def _indices(args: tuple[Any, ...]) -> list[Any]:
    return [i for arg in args if isinstance(arg, (list, tuple)) for i in arg]


@contextmanager
def without_synchronization() -> Iterator[None]:
    """On a GPU, fail on what makes the host wait."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
