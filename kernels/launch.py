"""Calling a Triton kernel: what one call is given, where it runs, and why a machine or a tensor is refused."""

import contextlib
import importlib
from collections.abc import Collection, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """One call of one kernel."""

    kernel: Any
    grid: tuple[int, ...]
    tensors: dict[str, Tensor | None]
    constants: dict[str, Any]  # compile-time
    sizes: dict[str, int]  # run-time integers, never specialized
    warps: int
    stages: int

    def run(self) -> None:
        """Enqueue it on the current stream of the tensors' device."""
        device = next(t.device for t in self.tensors.values() if t is not None)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](**self.tensors, **self.constants, **self.sizes, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's. Products fused with sums are named: their default differs between Triton's versions."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def load(name: str) -> ModuleType | None:
    """The module of kernels `fedmoe.kernels.<name>`; None without Triton, of which `refusal` tells."""
    global _missing
    try:
        return importlib.import_module(f"fedmoe.kernels.{name}")
    except ImportError as error:
        _missing = str(error)
        return None


_missing = ""
_any = load("gated_head_kernels")
INTERPRETED = _any is not None and type(_any.rows_kernel).__name__ == "InterpretedFunction"
"""Whether kernels run in NumPy, on CPU tensors: TRITON_INTERPRET=1 when Triton was imported."""


def refusal(tensors: Iterable[tuple[str, Tensor | None, Collection[torch.dtype]]]) -> str:
    """Why no kernel here takes these tensors, each with its name and the dtypes it may have; empty if they do.

    All must be where the first is. Tensors that are None are left out.
    """
    given = [(name, tensor, dtypes) for name, tensor, dtypes in tensors if tensor is not None]
    if reason := next(filter(None, (not_dense(name, tensor) for name, tensor, _ in given)), ""):
        return reason
    first, reference, _ = given[0]
    if _missing:
        return f"Triton is missing ({_missing})"
    device = reference.device
    if device.type != "cuda" and not INTERPRETED:
        return f"{first} is on {device}, not on a CUDA device"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{device} has compute capability {torch.cuda.get_device_capability(device)}, below (8, 0)"
    for name, tensor, dtypes in given:
        if tensor.device != device:
            return f"{name} is on {tensor.device}, {first} on {device}"
        if tensor.dtype not in dtypes:
            return f"{name} is {tensor.dtype}, not one of {tuple(dtypes)}"
    return ""


def is_fake(tensor: Tensor) -> bool:
    """Whether it has no memory: an operator on it tells what it would give, where kernels run, and computes nothing."""
    return isinstance(tensor, FakeTensor)


def not_dense(name: str, value: object) -> str:
    """Why `value` is no memory that a kernel could walk through; empty if it is."""
    if not isinstance(value, Tensor):
        return f"{name} is {value!r}, expected a tensor"
    return "" if value.layout == torch.strided else f"{name} is {value.layout}, expected a dense tensor"


def fits(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, device: torch.device) -> None:
    """Raise ValueError unless `tensor` is a contiguous buffer of this shape and dtype (None: any floating) there."""
    if reason := not_dense(name, tensor):
        raise ValueError(reason)
    if tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device != device:
        found = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
        raise ValueError(f"{name} has {found}, expected contiguous {shape} on {device}")
    if tensor.dtype != dtype if dtype else not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, expected {dtype or 'floating point'}")
