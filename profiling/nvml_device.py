"""Finding the GPU that a torch device is in NVML, the driver's management library, and why it tells something or not.

It needs nvidia-ml-py (`pip install nvidia-ml-py`), whose module is called `pynvml`, and which is given along as `nvml`:
without a GPU, tests give another.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedmoe.profiling.timing import reason

Scope = Literal["whole", "slice", "shared", "any"]
"""What something is of on a GPU in slices (MIG): the whole GPU, a slice, the GPU and so each slice, or either."""

ERRORS = {
    "LIBRARY_NOT_FOUND": "no NVIDIA driver: libnvidia-ml is not found",
    "DRIVER_NOT_LOADED": "the NVIDIA driver is not loaded",
    "LIB_RM_VERSION_MISMATCH": "the NVIDIA driver was updated but not loaded again: reboot",
    "NO_PERMISSION": "no permission: the driver lets only administrators read it",
    "NOT_SUPPORTED": "this GPU or its driver does not give it",
    "FUNCTION_NOT_FOUND": "this driver is too old to give it",
    "GPU_IS_LOST": "the GPU is lost: it has fallen off the bus",
}
"""By the end of NVML_ERROR_…, what it means; other errors are given in NVML's words."""

WHOLE = "MIG: NVML gives it for the whole GPU, not for a slice"
UNNAMED = "MIG: NVML does not tell which slice of the GPU this is"


class Unavailable(Exception):
    """Says why NVML does not tell something."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a slice of one, as NVML knows it."""

    nvml: Any
    handle: Any
    """Of what this process sees, as far as NVML tells."""
    whole: Any
    """Handle of the GPU; the same where there are no slices."""
    mig: Literal["no", "slice", "unnamed"] = "no"
    """Whether this process sees a slice only; NVML may name the GPU, but not the slice."""

    def ask(self, scope: Scope, get: Callable[[Any, Any], Any]) -> Any:
        """What `get(nvml, handle)` gives; raises Unavailable where that is not of what this process sees."""
        if scope == "whole" and self.mig != "no":
            raise Unavailable(WHOLE)  # never asked: drivers answer for a slice, too, and with all the GPU's power
        if scope == "slice" and self.mig == "unnamed":
            raise Unavailable(UNNAMED)
        return get(self.nvml, self.whole if scope == "shared" else self.handle)


def open_gpu(device: torch.device, nvml: Any = None) -> Gpu:
    """Load NVML and find the GPU of `device` by its UUID; raises Unavailable.

    By UUID, because CUDA_VISIBLE_DEVICES gives GPUs other numbers than NVML does. `nvml.nvmlShutdown()` ends it.
    """
    if device.type != "cuda":
        raise Unavailable(f"{device} is not a GPU")
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            raise Unavailable("pynvml is not installed: pip install nvidia-ml-py") from None
    try:
        nvml.nvmlInit()
    except Exception as error:
        raise Unavailable(why(nvml, error)) from error
    try:
        return _find(nvml, str(torch.cuda.get_device_properties(device).uuid))
    except Exception as error:
        nvml.nvmlShutdown()
        raise Unavailable(why(nvml, error)) from error


def code(nvml: Any, error: Exception) -> str:
    """The end of the NVML_ERROR_… that an error is; empty if it is none of those that mean something here."""
    if not isinstance(error, nvml.NVMLError):
        return ""
    value: Any = getattr(error, "value", None)
    return next((name for name in (*ERRORS, *_UNKNOWN_UUID) if value == getattr(nvml, f"NVML_ERROR_{name}")), "")


def why(nvml: Any, error: Exception) -> str:
    """An error in one line, for a user."""
    if isinstance(error, Unavailable):
        return str(error)
    if not isinstance(error, nvml.NVMLError):
        return reason(error)
    return ERRORS.get(code(nvml, error), f"NVML: {error}")


_UNKNOWN_UUID = ("NOT_FOUND", "INVALID_ARGUMENT")


def _find(nvml: Any, uuid: str) -> Gpu:
    """CUDA gives a UUID without the prefix that NVML wants, and of a slice, depending on its version, its GPU's."""
    for prefix in ("GPU-", "MIG-"):
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(prefix + uuid)
        except Exception as error:
            if code(nvml, error) not in _UNKNOWN_UUID:
                raise
            continue
        if prefix == "MIG-":
            return Gpu(nvml, handle, _parent(nvml, handle), "slice")
        return Gpu(nvml, handle, handle, "unnamed" if _sliced(nvml, handle) else "no")
    raise Unavailable(f"NVML sees no GPU with the UUID {uuid}")


def _parent(nvml: Any, handle: Any) -> Any:
    try:
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    except Exception:  # a container may hold a slice without its GPU
        return handle


def _sliced(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except Exception:  # a GPU that cannot be cut, as all before Ampere, refuses the question
        return False
