"""Every shipped configuration of the Triton kernels, compiled ahead of time, without a GPU."""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fedmoe.kernels.aot import SHARED_LIMIT, compiled
from fedmoe.kernels.launch import INTERPRETED
from fedmoe.kernels.shipped import Shipped, shipped
from tests.planted import planted

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


@pytest.mark.parametrize("kernel", ["gated_head rows", "gated_lm_head losses and gradient"])
def test_row_offsets_in_32_bits_are_noticed(kernel: str, tmp_path: Path) -> None:
    """The bug that overflows at 2³¹ elements of tokens × vocabulary."""
    made = next(made for made in ALL if made.kernel.startswith(kernel))
    module = sys.modules[made.launch.kernel.fn.__module__]
    copy = planted(module, ".to(tl.int64)", "", tmp_path, everywhere=True)
    call = made.launch._replace(kernel=getattr(copy, made.launch.kernel.fn.__name__))
    assert "i64" in OFFSETS.findall(compiled(made.launch, 90).ttir)
    assert "i64" not in OFFSETS.findall(compiled(call, 90).ttir)


@pytest.mark.parametrize("made", WIDE, ids=lambda made: f"{made.kernel} {made.configuration}")
def test_flat_tensors_are_moved_128_bits_at_a_time(made: Shipped) -> None:
    ptx = compiled(made.launch, 90).ptx
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx or "norm" in made.kernel
