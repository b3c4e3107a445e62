"""Every shipped configuration of the Triton kernels, compiled ahead of time, without a GPU."""

import re

import pytest

pytest.importorskip("triton")

from fedmoe.kernels.aot import SHARED_LIMIT, compiled
from fedmoe.kernels.launch import INTERPRETED
from fedmoe.kernels.shipped import Shipped, shipped

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")

OFFSETS = re.compile(r"tt\.addptr .*[ x](i\d+)>? ")
ALL = list(shipped())
WIDE = [made for made in ALL if made.kernel.startswith("flat_optimizer") and "control" not in made.kernel]
FIRST = list({made.kernel: made for made in reversed(ALL)}.values())


@pytest.mark.parametrize(
    ("arch", "made"),
    [*((arch, made) for arch in (80, 90) for made in ALL), *((100, made) for made in FIRST)],
    ids=lambda value: f"{value.kernel} {value.configuration}" if isinstance(value, Shipped) else f"sm_{value}",
)
def test_shipped(arch: int, made: Shipped) -> None:
    got = compiled(made.launch, arch)
    assert got.stack == 0, "spills"
    assert got.shared <= SHARED_LIMIT[arch]
    assert "tf32" not in got.ptx
    assert bool(got.products) == made.tensor_cores, got.products
    assert max(got.copies, default=0) >= made.copy
    offsets = OFFSETS.findall(got.ttir)
    assert "i64" in offsets or not offsets, "row offsets in 32 bits overflow from 2³¹ elements on"


@pytest.mark.parametrize("made", WIDE, ids=lambda made: f"{made.kernel} {made.configuration}")
def test_flat_tensors_are_moved_128_bits_at_a_time(made: Shipped) -> None:
    ptx = compiled(made.launch, 90).ptx
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx or "norm" in made.kernel
