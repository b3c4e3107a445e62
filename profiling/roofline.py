"""What the hardware could do: bandwidth and FLOP/s as measured, and how near to them each operator comes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedmoe.profiling.operators import Operator
from fedmoe.profiling.timing import Limits, ceilings, reached

BYTES = 2**28
"""Of a copy on a CPU: several times a large cache."""
SIDE = 1024
"""Of the square matrices of a product on a CPU: 2 GFLOP, tens of milliseconds a thread."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Reached by a large copy and a large product, here and now, with as many threads as the work has."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, flops: int, bytes: int) -> float:
        """The least that such work takes."""
        return max(bytes / self.bytes_per_second, flops / self.flops_per_second)


@dataclass(frozen=True, slots=True)
class Point:
    """One operator in the plot."""

    name: str
    shapes: str
    calls: int
    seconds: float
    """Of all calls."""
    flops: int
    """Likewise."""
    bytes: int
    """Likewise."""
    share: float
    """Of the ceiling that bounds it: 1 is on the roof; more than 1 is possible where operands lie in caches."""


def measured(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The ceilings of the device for products of this dtype."""
    if (found := ceilings(dtype, device)) is not None:
        return Ceilings(*found)
    limits = Limits(warm_seconds=0.1, seconds=0.5, min_rounds=3, max_rounds=20)
    return Ceilings(*reached(torch.float32, device, BYTES, SIDE, limits))


def points(operators: Sequence[Operator], roof: Ceilings) -> list[Point]:
    """Where operators stand; those that compute nothing are left out."""
    return [
        Point(o.name, o.shapes, o.calls, o.seconds, o.flops, o.bytes, roof.seconds(o.flops, o.bytes) / o.seconds)
        for o in operators
        if o.seconds and (o.flops or o.bytes)
    ]
