"""Counting the floating-point operations of a piece of work."""

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def count(work: Callable[[], object]) -> int:
    """FLOPs of the matrix products and convolutions in one run of `work`, a multiply-add counting as two.

    Elementwise work is not counted, as is usual. A backward run inside `work` is.
    """
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
