"""Aggregation that a few bad updates cannot steer: plain PyTorch oracles and, where there are any, their native twins.

Sources: D. Yin et al., Byzantine-robust distributed learning: towards optimal statistical rates, ICML 2018 (median,
trimmed mean); P. Blanchard et al., Machine learning with adversaries: Byzantine tolerant gradient descent, NeurIPS 2017
(Krum, multi-Krum).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedmoe.kernels import native
from fedmoe.kernels.averaging import check_weighted, put, weighted_mean, weighted_mean_native

robust_native_supported = native.supported


def median(
    updates: Sequence[Tensor],  # K of [P], fp32, bf16 or fp16
    out: Tensor | None = None,  # [P]
) -> Tensor:  # [P]
    """The median of each coordinate: its middle number, or the mean of the two in the middle; NaN is the largest.

    Rounded to fp32 (default), and that to the dtype of `out`. Raises ValueError where shapes differ.
    """
    native.check("median", updates, out=out)
    ordered = torch.stack([update.detach().float() for update in updates]).sort(0).values
    low, high = ordered[(len(updates) - 1) // 2] + 0.0, ordered[len(updates) // 2] + 0.0  # no zero is negative
    middle = torch.where(low == high, low.double(), (low.double() + high.double()) / 2)
    return middle.float() if out is None else put(middle, out)


def trimmed_mean(
    updates: Sequence[Tensor],  # K of [P], fp32, bf16 or fp16
    trim: int,  # numbers to leave out on either side, 2 * trim < K
    out: Tensor | None = None,  # [P]
) -> Tensor:  # [P]
    """The mean of each coordinate without its `trim` lowest and its `trim` highest numbers; NaN is the largest.

    With a and b the lowest and the highest number that are left: the sum in fp64, in the order of the updates, of all
    between, then a and b as often as they are left. Rounded as by `median`; ValueError where shapes or `trim` do not
    fit.
    """
    count = len(updates)
    check_trim(updates, trim, out)
    stacked = torch.stack([update.detach().float() for update in updates])
    ordered = stacked.sort(0).values
    low, high = ordered[trim] + 0.0, ordered[count - 1 - trim] + 0.0
    # The highest may be NaN, which compares with nothing.
    inside = (stacked > low) & (stacked.lt(high) | (high.isnan() & ~stacked.isnan()))
    total = torch.zeros_like(low, dtype=torch.float64)
    for row, counts in zip(stacked, inside, strict=True):
        total += torch.where(counts, row.double(), 0.0)
    lows = ((stacked <= low) | low.isnan()).sum(0) - trim
    highs = ((stacked >= high) | stacked.isnan()).sum(0) - trim
    total = (total + lows * low.double()) + highs * high.double()
    mean = torch.where(low == high, low.double(), total / (count - 2 * trim))
    return mean.float() if out is None else put(mean, out)


def check_trim(updates: Sequence[Tensor], trim: int, out: Tensor | None) -> None:
    """Raise ValueError, naming both values, unless shapes are equal and some of the updates are left."""
    native.check("trimmed_mean", updates, out=out)
    if not 0 <= 2 * trim < len(updates):
        raise ValueError(f"trim is {trim}, must leave some of {len(updates)} updates")


def squared_norms(
    updates: Sequence[Tensor],  # K of [P]
    center: Tensor,  # [P]
) -> list[float]:
    """‖x_k − c‖² of each update, in fp64."""
    native.check("squared_norms", updates, center=center)
    return [float((update.detach().double() - center.detach().double()).square().sum()) for update in updates]


def squared_distances(updates: Sequence[Tensor]) -> Tensor:  # fp64 [K, K]
    """‖x_k − x_l‖² of each pair of K updates [P]."""
    native.check("squared_distances", updates)
    found = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for k, update in enumerate(updates):
        if k:
            found[k, :k] = found[:k, k] = torch.tensor(squared_norms(updates[:k], update), dtype=torch.float64)
    return found


def median_native(updates: Sequence[Tensor], out: Tensor | None = None) -> Tensor:  # [P]
    """`median` in C++, the same number, for contiguous updates of one dtype on the CPU; `out` may be one of them."""
    native.check("median", updates, out=out)
    return _into(out, "median_native", updates, "median")


def trimmed_mean_native(updates: Sequence[Tensor], trim: int, out: Tensor | None = None) -> Tensor:  # [P]
    """`trimmed_mean` in C++, the same number, for contiguous updates of one dtype on the CPU; `out` likewise."""
    check_trim(updates, trim, out)
    return _into(out, "trimmed_mean_native", updates, "trimmed_mean", trim)


def squared_norms_native(updates: Sequence[Tensor], center: Tensor) -> list[float]:
    """`squared_norms` in C++, summed in another order; `center` is of the updates' dtype."""
    native.check("squared_norms", updates, center=center)
    extension = native.extension("squared_norms_native", [*updates, center])
    found: list[float] = extension.squared_norms([u.detach() for u in updates], center.detach(), native.threads())
    return found


def squared_distances_native(updates: Sequence[Tensor]) -> Tensor:  # fp64 [K, K]
    """`squared_distances` in C++, summed in another order."""
    native.check("squared_distances", updates)
    extension = native.extension("squared_distances_native", updates)
    found = torch.empty(len(updates) ** 2, dtype=torch.float64)
    extension.squared_distances(found, [update.detach() for update in updates], native.threads())
    return found.view(len(updates), -1)


class Reductions(NamedTuple):
    """What `clipped_mean` and `krum` are made of; these choose, on the host, whoever computes it."""

    weighted_mean: Callable[[Sequence[Tensor], Sequence[float]], Tensor]
    squared_norms: Callable[[Sequence[Tensor], Tensor], list[float]]
    squared_distances: Callable[[Sequence[Tensor]], Tensor]


PLAIN = Reductions(weighted_mean, squared_norms, squared_distances)
NATIVE = Reductions(weighted_mean_native, squared_norms_native, squared_distances_native)


def clipped_mean(
    updates: Sequence[Tensor],  # K of [P]
    weights: Sequence[float],  # [K]
    center: Tensor,  # [P], what the updates began from
    norm: float | None = None,
    factor: float = 1.0,
    by: Reductions | None = None,  # native where it can be
) -> Tensor:  # [P] fp32
    """c + Σ w_k min(1, norm / ‖x_k − c‖) (x_k − c) / Σ w_k: no update moves the mean by more than `norm`.

    Without a norm it is `factor` times the median of ‖x_k − c‖. Computed as the weighted mean of the updates, with the
    weights w_k s_k for scales s_k, and of c, with what is left of the weights. Raises ValueError as
    `weighted_mean` does, and where ‖x_k − c‖ is not finite, or the norm is negative or NaN.
    """
    check_weighted("clipped_mean", updates, weights, center=center)
    together = [*updates, center]
    by = by or _fastest(together)
    norms = [math.sqrt(square) for square in by.squared_norms(updates, center)]
    for k, length in enumerate(norms):
        if not math.isfinite(length):
            raise ValueError(f"updates[{k}] is at the distance {length} from the center, expected finite")
    most = factor * statistics.median(norms) if norm is None else norm
    if not most >= 0:
        raise ValueError(f"the norm to clip to is {most}, expected 0 or more")
    scales = [most / length if length > most else 1.0 for length in norms]
    left = math.fsum(weight * (1 - scale) for weight, scale in zip(weights, scales, strict=True))
    shares = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    return by.weighted_mean(together, [*shares, left])


def krum(
    updates: Sequence[Tensor],  # K of [P]
    byzantine: int,  # f, 2 f + 2 < K
    chosen: int = 1,  # m
    by: Reductions | None = None,  # native where it can be
) -> list[int]:
    """The m updates of the lowest Krum score, ascending by place: Σ ‖x_k − x_l‖² over the K − f − 2 nearest others.

    Among equal scores the first counts as the lowest. Raises ValueError where shapes differ, f is negative, or there
    are too few updates, naming the numbers.
    """
    count = len(updates)
    if byzantine < 0:
        raise ValueError(f"byzantine is {byzantine}, expected 0 or more")
    if count < 2 * byzantine + 3:
        raise ValueError(f"krum needs 2 * {byzantine} + 3 = {2 * byzantine + 3} updates, got {count}")
    if not 1 <= chosen <= count:
        raise ValueError(f"cannot choose {chosen} of {count} updates")
    distances = (by or _fastest(updates)).squared_distances(updates)
    # The first is an update's distance to itself, or another 0.
    scores = distances.sort(1).values[:, 1 : count - byzantine - 1].sum(1)
    return sorted(scores.sort(stable=True).indices[:chosen].tolist())


def _fastest(updates: Sequence[Tensor]) -> Reductions:
    return NATIVE if native.supported(updates)[0] and not native.mixed(updates) else PLAIN


def _into(out: Tensor | None, caller: str, updates: Sequence[Tensor], rule: str, *arguments: Any) -> Tensor:
    extension = native.extension(caller, updates, out)
    if out is None:
        out = torch.empty_like(updates[0], dtype=torch.float32, requires_grad=False)
    getattr(extension, rule)(out.detach(), [update.detach() for update in updates], *arguments, native.threads())
    return out
