"""The native extension, if it is there, and which tensors its functions take."""

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What an update may be stored as."""

module: ModuleType | None = None
missing = ""
try:
    module = importlib.import_module("fedmoe.kernels._native")
except ImportError as error:  # a bare checkout, or an extension built for another Python
    missing = str(error)


def supported(tensors: Sequence[Tensor]) -> tuple[bool, str]:
    """Whether the extension takes these updates, and the result after them if there is one; if not, why."""
    if module is None:
        return False, f"the native extension is missing ({missing}); `pip install .` builds it"
    reason = misfit(tensors, "cpu")
    return not reason, reason


def misfit(tensors: Sequence[Tensor], device: str) -> str:
    """Why the extensions cannot read one of these tensors, on devices of this type; empty if they can."""
    for k, tensor in enumerate(tensors):
        if tensor.device.type != device:
            return f"tensor {k} is on {tensor.device}, not {device}"
        if tensor.dtype not in FLOATS:
            return f"tensor {k} is {tensor.dtype}, not one of {', '.join(map(str, FLOATS))}"
        if not tensor.is_contiguous():
            return f"tensor {k} is not contiguous: shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        if tensor.data_ptr() % tensor.itemsize:
            return f"tensor {k} begins at an address that is not a multiple of its {tensor.itemsize} bytes"
    return ""


def mixed(updates: Sequence[Tensor]) -> str:
    """Which update has not the first one's dtype, or an empty string."""
    for k, update in enumerate(updates):
        if update.dtype != updates[0].dtype:
            return f"tensor {k} is {update.dtype}, tensor 0 is {updates[0].dtype}"
    return ""


def extension(caller: str, updates: Sequence[Tensor], out: Tensor | None = None) -> ModuleType:
    """The extension, for updates of one dtype; ValueError with the reason where it does not take them."""
    able, reason = supported([*updates, *([] if out is None else [out])])
    if not able or (reason := mixed(updates)):
        raise ValueError(f"{caller}: {reason}")
    assert module is not None
    return module


def threads() -> int:
    """As many as PyTorch takes."""
    return torch.get_num_threads()


def check(caller: str, updates: Sequence[Tensor], **others: Tensor | None) -> None:
    """Raise ValueError, naming both values, unless there are updates [P] and all shapes, the others' too, are equal."""
    if not updates:
        raise ValueError(f"{caller} needs at least one update, got 0")
    shape = updates[0].shape
    if len(shape) != 1:
        raise ValueError(f"updates[0] has shape {tuple(shape)}, expected one dimension")
    for name, tensor in [*((f"updates[{k}]", update) for k, update in enumerate(updates)), *others.items()]:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, updates[0] has {tuple(shape)}")
