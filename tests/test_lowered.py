"""Autocast under vmap: which dtype an operation gives, and that it is what autocast gives one client."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from fedmoe.engine.lowered import Lowered

BF16, FP32 = torch.bfloat16, torch.float32
OPERATIONS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], torch.dtype]] = {
    "linear": (F.linear, [(4, 6), (5, 6), (5,)], BF16),
    "convolution": (F.conv2d, [(4, 3, 8, 8), (5, 3, 3, 3), (5,)], BF16),
    "matmul": (torch.matmul, [(4, 6), (6, 5)], BF16),
    "operator": (lambda a, b: a @ b, [(4, 6), (6, 5)], BF16),
    "cross-entropy": (lambda z: F.cross_entropy(z, torch.zeros(4, dtype=torch.int64)), [(4, 6)], FP32),
    "relu": (F.relu, [(4, 6)], FP32),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_is_autocast(name: str) -> None:
    operation, shapes, dtype = OPERATIONS[name]
    operands = [torch.randn(3, *shape) for shape in shapes]
    with Lowered(BF16):
        ours = vmap(operation)(*operands)
    assert ours.dtype == dtype
    for row in range(3):
        with torch.autocast("cpu", BF16, cache_enabled=False):
            alone = operation(*(operand[row] for operand in operands))
        assert alone.dtype == dtype
        torch.testing.assert_close(ours[row], alone, rtol=1e-2, atol=1e-2)


def test_normalizations_are_taken_in_fp32_and_update_what_they_are_given() -> None:
    x, means = torch.randn(3, 4, 6).to(BF16), torch.zeros(3, 6)
    variances, weights = torch.ones(3, 6), torch.ones(3, 6)

    def normalized(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, weight, None, True)

    with Lowered(BF16):
        y = vmap(normalized)(x, means, variances, weights)
    assert y.dtype == BF16
    torch.testing.assert_close(means, 0.1 * x.float().mean(1))
    torch.testing.assert_close(y.float().mean(1), torch.zeros(3, 6), rtol=0, atol=1e-2)


def test_doubles_stay_doubles() -> None:
    with Lowered(BF16):
        assert F.linear(torch.ones(2, 3).double(), torch.ones(4, 3).double()).dtype == torch.float64
