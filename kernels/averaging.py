"""Weighted averaging of clients' updates on the host: the plain PyTorch oracle, its native twin, and one by one.

The sum has one definition on all paths: in fp64, one product and one addition for each update, in the order given,
divided last and rounded once to fp32. So it has the same bits everywhere; numbers of samples as weights make the
products exact.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedmoe.kernels import native


def weighted_mean(
    updates: Sequence[Tensor],  # K of [P], floating point
    weights: Sequence[float],  # [K], not negative, not all zero
    out: Tensor | None = None,  # [P]
) -> Tensor:  # [P]
    """Σ w_k x_k / Σ w_k, rounded to fp32, and that to the dtype of `out` if it has another.

    `out` may be one of the updates. Raises ValueError, naming both values, where counts or shapes differ or the
    weights have no positive finite sum.
    """
    check_weighted("weighted_mean", updates, weights, out=out)
    mean = torch.zeros(updates[0].shape, dtype=torch.float64, device=updates[0].device)
    total = 0.0
    for update, weight in zip(updates, weights, strict=True):
        _add(mean, update.detach(), weight)
        total += weight  # not sum(): from Python 3.12 on it compensates, which C++ does not
    mean /= total
    return mean.float() if out is None else put(mean, out)


def weighted_mean_native(
    updates: Sequence[Tensor],  # K of [P], fp32, bf16 or fp16, contiguous, on the CPU
    weights: Sequence[float],  # [K], not negative, not all zero
    out: Tensor | None = None,  # [P], any of these dtypes
) -> Tensor:  # [P]
    """`weighted_mean` in C++: the same bits in one pass over memory, without the GIL, on PyTorch's number of threads.

    Raises ValueError as `weighted_mean` does, and with the reason of `weighted_mean_native_supported` where that
    says no. `out` may be one of the updates, but may not overlap one partly.
    """
    check_weighted("weighted_mean", updates, weights, out=out)
    extension = native.extension("weighted_mean_native", updates, out)
    if out is None:
        out = torch.empty_like(updates[0], dtype=torch.float32, requires_grad=False)
    given = [update.detach() for update in updates]
    extension.weighted_mean(out.detach(), given, [float(w) for w in weights], native.threads())
    return out


weighted_mean_native_supported = native.supported


class RunningMean:
    """`weighted_mean` of updates that come one by one, in the memory of one fp64 accumulator.

    In the same order it has the same bits; in another it is within one unit in the last place of fp32, unless updates
    cancel each other almost wholly.
    """

    def __init__(self) -> None:
        self.total = 0.0
        """Σ w_k so far."""
        self._sums: Tensor | None = None

    def add(self, update: Tensor, weight: float) -> None:
        """Count an update [P] in; raises ValueError, before anything is counted, where shape or weight will not do."""
        if not (math.isfinite(weight) and weight >= 0 and math.isfinite(self.total + weight)):
            raise ValueError(f"the weight is {weight}, expected finite, with a finite sum, and not negative")
        native.check("RunningMean", [update])
        if self._sums is None:
            self._sums = torch.zeros(update.shape, dtype=torch.float64, device=update.device)
        elif update.shape != self._sums.shape:
            raise ValueError(f"the update has shape {tuple(update.shape)}, those before {tuple(self._sums.shape)}")
        if native.supported([update])[0]:
            assert native.module is not None
            native.module.accumulate(self._sums, [update.detach()], [float(weight)], native.threads())
        else:
            _add(self._sums, update.detach(), weight)
        self.total += weight

    def mean(self) -> Tensor:
        """The mean so far, fp32 [P]; raises ValueError with nothing of a positive weight."""
        if self._sums is None or not self.total > 0:
            raise ValueError(f"the weights sum to {self.total}, expected positive")
        return (self._sums / self.total).float()


def put(result: Tensor, out: Tensor) -> Tensor:
    """`out`, holding an fp64 result rounded to fp32, and that to its dtype."""
    out.detach().copy_(result.float())
    return out


def check_weighted(caller: str, updates: Sequence[Tensor], weights: Sequence[float], **others: Tensor | None) -> None:
    """Raise ValueError, naming both values, unless shapes are equal and weights as many, of a positive finite sum."""
    native.check(caller, updates, **others)
    if len(updates) != len(weights):
        raise ValueError(f"{len(updates)} updates, but {len(weights)} weights")
    for k, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights[{k}] is {weight}, expected finite and not negative")
    if not 0 < (total := sum(weights)) < math.inf:
        raise ValueError(f"the {len(weights)} weights sum to {total}, expected positive and finite")


def _add(sums: Tensor, update: Tensor, weight: float) -> None:
    # Product and sum apart: `add_(…, alpha=weight)` fuses them where the CPU can, so its bits depend on the CPU.
    sums += update.double() * float(weight)
