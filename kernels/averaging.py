"""Weighted averaging of clients' updates on the host: the plain PyTorch oracle and its native twin."""

import importlib
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

_native: ModuleType | None = None
_missing = ""
try:
    _native = importlib.import_module("fedmoe.kernels._native")
except ImportError as error:  # a bare checkout, or an extension built for another Python
    _missing = str(error)


def weighted_mean(
    updates: Sequence[Tensor],  # K of [P], floating point
    weights: Sequence[float],  # [K], not negative, not all zero
    out: Tensor | None = None,  # [P]
) -> Tensor:  # [P]
    """Σ w_k x_k / Σ w_k, summed in fp64 in the given order, rounded once to the dtype of `out` (default fp32).

    `out` may be one of the updates. Raises ValueError, naming both values, where counts or shapes differ or the
    weights have no positive finite sum.
    """
    _check(updates, weights, out)
    mean = torch.zeros(updates[0].shape, dtype=torch.float64, device=updates[0].device)
    total = 0.0
    for update, weight in zip(updates, weights, strict=True):
        # Product and sum apart: `add_(…, alpha=weight)` fuses them where the CPU can, so its bits depend on the CPU.
        mean += update.detach().double() * weight
        total += weight  # not sum(): from Python 3.12 on it compensates, which C++ does not
    mean /= total
    if out is None:
        return mean.float()
    out.detach().copy_(mean)
    return out


def weighted_mean_native(
    updates: Sequence[Tensor],  # K of [P], fp32, contiguous, on the CPU
    weights: Sequence[float],  # [K], not negative, not all zero
    out: Tensor | None = None,  # [P], likewise
) -> Tensor:  # [P]
    """`weighted_mean` in C++: the same bits in one pass over memory, without the GIL.

    Raises ValueError as `weighted_mean` does, and with the reason of `weighted_mean_native_supported` where that
    says no. `out` may be one of the updates, but may not overlap one partly.
    """
    _check(updates, weights, out)
    supported, reason = weighted_mean_native_supported([*updates, *([] if out is None else [out])])
    if not supported:
        raise ValueError(f"weighted_mean_native: {reason}")
    assert _native is not None
    if out is None:
        out = torch.empty_like(updates[0], requires_grad=False)
    _native.weighted_mean(out.detach(), [update.detach() for update in updates], [float(w) for w in weights])
    return out


def weighted_mean_native_supported(updates: Sequence[Tensor]) -> tuple[bool, str]:
    """Whether `weighted_mean_native` takes these tensors, and if not, why."""
    if _native is None:
        return False, f"the native extension is missing ({_missing}); `pip install .` builds it"
    for k, update in enumerate(updates):
        if update.device.type != "cpu":
            return False, f"tensor {k} is on {update.device}, not cpu"
        if update.dtype != torch.float32:
            return False, f"tensor {k} is {update.dtype}, not torch.float32"
        if not update.is_contiguous():
            return False, f"tensor {k} is not contiguous: shape {tuple(update.shape)}, strides {update.stride()}"
    return True, ""


def _check(updates: Sequence[Tensor], weights: Sequence[float], out: Tensor | None) -> None:
    if not updates:
        raise ValueError("weighted_mean needs at least one update, got 0")
    if len(updates) != len(weights):
        raise ValueError(f"{len(updates)} updates, but {len(weights)} weights")
    shape = updates[0].shape
    if len(shape) != 1:
        raise ValueError(f"updates[0] has shape {tuple(shape)}, expected one dimension")
    for name, tensor in [*((f"updates[{k}]", update) for k, update in enumerate(updates)), ("out", out)]:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, updates[0] has {tuple(shape)}")
    for k, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights[{k}] is {weight}, expected finite and not negative")
    if not 0 < (total := sum(weights)) < math.inf:
        raise ValueError(f"the {len(weights)} weights sum to {total}, expected positive and finite")
