"""Autocast for what torch.func.vmap runs.

PyTorch's own works on operators as they arrive at it, which under vmap is after some have been taken apart: a linear
layer then stays in fp32, a convolution is given two dtypes and fails, a cross-entropy is rounded to bf16. This one
works on the functions that a module calls.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_PRODUCTS = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "matmul",
    "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention",
}  # fmt: skip
"""In low precision."""

_NORMALIZATIONS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
"""In fp32, their parameters' dtype, with a result in their input's."""

_LOSSES = {"softmax", "log_softmax", "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "kl_div"}
"""In fp32."""


class Lowered(TorchFunctionMode):
    """Within it, products are taken in the dtype `low`; what calls no function of the lists has its operands' dtype."""

    def __init__(self, low: torch.dtype) -> None:
        super().__init__()
        self._low = low

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _PRODUCTS:
            args, kwargs = _cast((args, kwargs), self._low)
        elif name in _LOSSES:
            args, kwargs = _cast((args, kwargs), torch.float32)
        elif name in _NORMALIZATIONS and args:
            wide, kwargs = _cast((args, kwargs), torch.float32)
            return func(*wide, **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """All tensors of fp32, bf16 or fp16 in `dtype`; those that are so already, as they are: they may be updated."""

    def one(value: Any) -> Any:
        small = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if small else value

    return tree_map(one, values)
