"""Every shipped configuration of the Triton kernels, compiled ahead of time, without a GPU."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fedmoe.kernels.aot import SHARED_LIMIT, compiled
from fedmoe.kernels.gather import gather_launch
from fedmoe.kernels.launch import INTERPRETED, Launch
from fedmoe.kernels.shipped import Shipped, shipped
from tests.offsets import overflowing
from tests.planted import planted

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")

ALL = list(shipped())
WIDE = [made for made in ALL if made.kernel.startswith("flat_optimizer") and "control" not in made.kernel]
WIDENED = ".to(tl.int64)"
MODULES = sorted({made.launch.kernel.fn.__module__ for made in ALL})
CASTS = [(m, place) for m in MODULES for place in range(Path(str(sys.modules[m].__file__)).read_text().count(WIDENED))]
"""Every place that widens an offset."""
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
    assert not overflowing(got.ttir, made.launch)


def far_apart() -> Launch:
    """A batch from images that are a view of something else, so that 3 channels or 31 columns span 2³¹ bytes."""
    with torch.device("meta"):
        images = torch.empty_strided((1000, 3, 32, 32), (2**32, 2**30, 2**29, 2**27), dtype=torch.uint8)
        labels, mean, drawn = torch.empty(64, dtype=torch.int64), torch.empty(3), torch.empty(64, 3, dtype=torch.int32)
        return gather_launch(images, labels, labels, mean, mean, drawn, torch.empty(64, 3, 32, 32), labels)


def test_views_far_apart_do_not_overflow() -> None:
    assert not overflowing(compiled(far_apart(), 90).ttir, far_apart())


@pytest.mark.parametrize(("module", "place"), CASTS, ids=lambda value: str(value).rpartition(".")[2])
def test_offsets_in_32_bits_are_noticed(module: str, place: int, tmp_path: Path) -> None:
    """The bug that overflows at 2³¹ elements of, say, tokens × vocabulary: each widening left out alone."""
    copy = planted(sys.modules[module], WIDENED, "", tmp_path, place)
    for launch in (*(made.launch for made in ALL), far_apart()):
        if launch.kernel.fn.__module__ == module:
            call = launch._replace(kernel=getattr(copy, launch.kernel.fn.__name__))
            if overflowing(compiled(call, 90).ttir, call):
                return
    pytest.fail("not noticed")


@pytest.mark.parametrize("made", WIDE, ids=lambda made: f"{made.kernel} {made.configuration}")
def test_flat_tensors_are_moved_128_bits_at_a_time(made: Shipped) -> None:
    ptx = compiled(made.launch, 90).ptx
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx or "norm" in made.kernel
