"""What operators are counted to have done, and where they stand under the roof."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fedmoe.profiling import roofline
from fedmoe.profiling.operators import Operator, Operators
from fedmoe.profiling.roofline import Ceilings

CPU = torch.device("cpu")


def ticking() -> float:
    """A clock that gains a second each time it is read."""
    ticking.now += 1  # type: ignore[attr-defined]
    return float(ticking.now)  # type: ignore[attr-defined]


ticking.now = 0  # type: ignore[attr-defined]


def by_name(seen: Operators) -> dict[str, Operator]:
    return {operator.name: operator for operator in seen.all.values()}


def test_flops_and_bytes_of_a_product() -> None:
    a, b = torch.randn(20, 30), torch.randn(30, 40)
    with Operators(CPU, ticking) as seen:
        for _ in range(3):
            (a @ b).relu_()
    found = by_name(seen)
    product = found["mm"]
    assert (product.calls, product.seconds) == (3, 3) and product.shapes == "float32[20, 30] float32[30, 40]"
    assert product.flops == 3 * 2 * 20 * 30 * 40
    assert product.bytes == 3 * 4 * (20 * 30 + 30 * 40 + 20 * 40)
    assert found["relu_"].flops == 0 and found["relu_"].bytes == 3 * 4 * 20 * 40  # the same memory, once


def test_what_only_looks_otherwise_at_memory_costs_nothing() -> None:
    x = torch.randn(6, 4)
    with Operators(CPU) as seen:
        x.t().reshape(2, 12)
        x.view(24)[3:].detach()
    found = by_name(seen)
    assert found["clone"].bytes > 0
    assert all(found[name].bytes == 0 for name in ("t", "view", "slice", "detach", "_unsafe_view"))


def test_flops_of_a_training_step_are_those_of_pytorchs_counter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x), y).backward()
    with Operators(CPU) as seen:
        F.cross_entropy(model(x), y).backward()
    assert sum(operator.flops for operator in seen.all.values()) == counter.get_total_flops() > 0


def test_the_peak_is_of_what_was_alive_at_a_time() -> None:
    kept = []
    with Operators(CPU) as seen:
        for _ in range(10):
            torch.zeros(1000)  # 4000 bytes, gone at once
        assert seen.peak_bytes == 4000
        kept = [torch.zeros(1000) for _ in range(3)]
        assert seen.peak_bytes == 12000
        kept[0].add_(1)
        kept[1][2:].mul_(2)
        assert seen.peak_bytes == 12000
        del kept
        gc.collect()
        torch.zeros(2000)
    assert seen.peak_bytes == 12000


def test_points_are_relative_to_the_ceiling_that_bounds_them() -> None:
    roof = Ceilings(bytes_per_second=10.0, flops_per_second=1000.0)
    operators = [
        Operator("copy", "", 1, 4.0, 0, 20),
        Operator("mm", "", 1, 2.0, 1000, 1),
        Operator("view", "", 1, 1.0, 0, 0),
        Operator("untimed", "", 1, 0.0, 5, 5),
    ]
    assert [(p.name, p.share) for p in roofline.points(operators, roof)] == [("copy", 0.5), ("mm", 0.5)]


def test_the_roof_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "BYTES", 2**20)
    monkeypatch.setattr(roofline, "SIDE", 64)
    roof = roofline.measured(CPU, torch.float32)
    assert roof.bytes_per_second > 1e6 and roof.flops_per_second > 1e6
