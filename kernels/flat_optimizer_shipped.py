"""The configurations of the flat optimizer's kernels that are shipped, on tensors of the default device."""

from collections.abc import Iterator
from typing import Any

import torch

from fedmoe.kernels.flat_optimizer_launch import adamw_launch, norm_launches, sgd_launch
from fedmoe.kernels.flat_optimizer_state import Control, Moments
from fedmoe.kernels.launch import Launch


def shipped() -> Iterator[tuple[str, str, Launch]]:
    """Kernel, configuration and launch: each dtype of gradients, each storage of moments, one row and many."""
    yield from _rows((2_621_558,), torch.float32, None, True)
    yield from _rows((2_621_558,), torch.bfloat16, torch.bfloat16, True)
    yield from _rows((10, 665_088), torch.float16, torch.float16, True)
    yield from _rows((10, 665_048), torch.float32, None, False)
    apart = torch.empty(10, 2, 665_088)[:, 0]
    call = sgd_launch(
        apart, torch.empty(apart.shape), apart, torch.empty(()), 0.9, 1e-3, False, None, None, None, None, True
    )
    yield "flat_optimizer sgd", f"float32 {list(apart.shape)}, rows apart", call


def _rows(
    shape: tuple[int, ...], dtype: torch.dtype, low: torch.dtype | None, controlled: bool
) -> Iterator[tuple[str, str, Launch]]:
    weights, gradients = torch.empty(shape), torch.empty(shape, dtype=dtype)
    copy = None if low is None else torch.empty(shape, dtype=low)
    lr, scale, step = torch.empty(()), torch.empty(()), torch.empty(shape[:-1])
    live = torch.empty(shape[:-1], dtype=torch.bool) if len(shape) > 1 else None
    control = Control.empty([gradients]) if controlled else None
    text = f"{str(dtype).removeprefix('torch.')} {list(shape)}{' after a norm' if controlled else ''}"
    common: Any = (copy, None, live, control, True)
    yield "flat_optimizer sgd", text, sgd_launch(weights, gradients, weights, lr, 0.9, 1e-3, False, *common)
    for bits in (32, 8):
        moments, betas = Moments.zeros(weights, bits), (0.9, 0.999)
        call = adamw_launch(weights, gradients, moments, step, lr, betas, 1e-8, 0.01, *common)
        yield f"flat_optimizer adamw {bits}-bit", text, call
    if control is not None:
        launches = norm_launches([gradients], scale, 1.0, live, step, control)
        for name, call in zip(("norm", "control"), launches, strict=True):
            yield f"flat_optimizer {name}", text, call
