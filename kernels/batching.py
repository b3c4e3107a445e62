"""Rules for `torch.func.vmap` over the kernels' ops."""

from collections.abc import Callable
from typing import Any

import torch


def one_by_one(op: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A rule that calls `op`, which returns a tensor, or a tuple or a list of them, for one element after another."""

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError("vmap over 0 elements: there is nothing to call, expected at least 1")
        calls = [
            op(*(arg if dim is None else arg.select(dim, k) for arg, dim in zip(args, dims, strict=True)))
            for k in range(info.batch_size)
        ]
        if isinstance(calls[0], torch.Tensor):
            return torch.stack(calls), 0
        stacked = [torch.stack(outputs) for outputs in zip(*calls, strict=True)]
        kind = type(calls[0])
        return kind(stacked), kind([0] * len(stacked))

    return rule
