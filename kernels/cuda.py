"""Aggregation in CUDA C++ of updates in the memory of one GPU, or in host memory and paged through it.

Functions are twins, of the same bits, of those of the same names in fedmoe.kernels.averaging and fedmoe.kernels.robust.
They raise ValueError as those do, or with the reason of `cuda_supported`; RuntimeError gives CUDA's reason where it
fails. With a `chunk` the updates are in host memory, and so many coordinates of all of them are on the current GPU at a
time, twice; copies and work overlap where the updates are pinned. `reductions` is for `clipped_mean` and `krum`.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fedmoe.kernels import native, robust
from fedmoe.kernels.averaging import check_weighted

module: ModuleType | None = None
missing = ""
try:
    module = importlib.import_module("fedmoe.kernels._native_cuda")
except ImportError as error:
    missing = str(error)


def cuda_supported(tensors: Sequence[Tensor], chunk: int | None = None) -> tuple[bool, str]:
    """Whether the extension takes these updates, and the result after them if there is one; if not, why."""
    if module is None:
        return False, f"the CUDA extension is missing ({missing}); `pip install .` builds it where nvcc is found"
    if reason := native.misfit(tensors, "cuda" if chunk is None else "cpu"):
        return False, reason
    for k, tensor in enumerate(tensors):
        if tensor.device != tensors[0].device:
            return False, f"tensor {k} is on {tensor.device}, tensor 0 on {tensors[0].device}"
    count, reason = module.device_count()
    return count > 0, reason


def weighted_mean(
    updates: Sequence[Tensor],  # K of [P], fp32, bf16 or fp16
    weights: Sequence[float],  # [K], not negative, not all zero
    out: Tensor | None = None,  # [P], any of these dtypes; fp32 beside the updates by default
    chunk: int | None = None,  # coordinates
) -> Tensor:  # [P]
    """`averaging.weighted_mean`; does not wait for the GPU, unless paged."""
    check_weighted("weighted_mean", updates, weights, out=out)
    return _into(out, "weighted_mean", updates, chunk, [float(weight) for weight in weights])


def median(updates: Sequence[Tensor], out: Tensor | None = None, chunk: int | None = None) -> Tensor:  # [P]
    """`robust.median`; does not wait for the GPU, unless paged."""
    native.check("median", updates, out=out)
    return _into(out, "median", updates, chunk)


def trimmed_mean(
    updates: Sequence[Tensor],  # K of [P]
    trim: int,
    out: Tensor | None = None,  # [P]
    chunk: int | None = None,
) -> Tensor:  # [P]
    """`robust.trimmed_mean`; does not wait for the GPU, unless paged."""
    robust.check_trim(updates, trim, out)
    return _into(out, "trimmed_mean", updates, chunk, trim)


def squared_norms(updates: Sequence[Tensor], center: Tensor, chunk: int | None = None) -> list[float]:
    """`robust.squared_norms_native`; waits."""
    native.check("squared_norms", updates, center=center)
    call = _twin("squared_norms", [*updates, center], None, chunk)
    found: list[float] = call(_detached(updates), center.detach())
    return found


def squared_distances(updates: Sequence[Tensor], chunk: int | None = None) -> Tensor:  # fp64 [K, K], in host memory
    """`robust.squared_distances_native`; waits."""
    native.check("squared_distances", updates)
    call = _twin("squared_distances", updates, None, chunk)
    found = torch.empty(len(updates) ** 2, dtype=torch.float64)
    call(found, _detached(updates))
    return found.view(len(updates), -1)


def reductions(chunk: int | None = None) -> robust.Reductions:
    """What `robust.clipped_mean` and `robust.krum` take as `by`, to be computed here."""
    return robust.Reductions(
        functools.partial(weighted_mean, chunk=chunk),
        functools.partial(squared_norms, chunk=chunk),
        functools.partial(squared_distances, chunk=chunk),
    )


def _into(out: Tensor | None, name: str, updates: Sequence[Tensor], chunk: int | None, *arguments: Any) -> Tensor:
    call = _twin(name, updates, out, chunk)
    if out is None:
        pinned = chunk is not None and torch.cuda.is_available()
        out = torch.empty(updates[0].shape, device=updates[0].device, pin_memory=pinned)
    call(out.detach(), _detached(updates), *arguments)
    return out


def _twin(name: str, updates: Sequence[Tensor], other: Tensor | None, chunk: int | None) -> Callable[..., Any]:
    """The extension's function but for its last argument, for tensors that it takes."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected 1 or more")
    able, reason = cuda_supported([*updates, *([] if other is None else [other])], chunk)
    if not able or (reason := native.mixed(updates)):
        raise ValueError(f"{name}: {reason}")
    paged = chunk is not None
    how = chunk if paged else torch.cuda.current_stream(updates[0].device).cuda_stream
    function = getattr(module, f"{name}_paged" if paged else name)
    return lambda *arguments: function(*arguments, how)


def _detached(updates: Sequence[Tensor]) -> list[Tensor]:
    return [update.detach() for update in updates]
