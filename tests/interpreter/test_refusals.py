"""What kernels do not take is refused in one line: far-apart strides, shapes, options, and what is no dense tensor."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedmoe.kernels.accumulate import weighted_accumulate
from fedmoe.kernels.flat_optimizer import Control, Moments, adamw_step, flat_norm, sgd_step
from fedmoe.kernels.gated_mix import gated_mix, gated_mix_supported
from tests.heads import FEW, MANY, Head, operands

HEADS = pytest.mark.parametrize("head", [FEW, MANY], ids=["few", "vocabulary"])
GLOBAL, LOCAL, WEIGHT, BIAS = 0, 1, 3, 4


@HEADS
def test_features_beyond_2_to_the_31_elements(head: Head) -> None:
    """Rows may be anywhere; features and classes are counted in 32 bits. Without memory: only strides are looked at."""
    shapes: list[tuple[int, ...]] = [(5, 20), (5, 20), (5, 2), (30, 20), (30,)]
    given = [torch.empty(shape, device="meta") for shape in shapes]
    targets = torch.empty(5, dtype=torch.int64, device="meta")
    assert head.supported(*given, targets) == (True, "")
    wide = 2**31 // 19 + 1
    strided = [(GLOBAL, (1, wide)), (LOCAL, (1, wide)), (BIAS, (2**31 // 29 + 1,))]
    if head is FEW:
        strided += [(WEIGHT, (1, wide)), (WEIGHT, (2**31 // 29 + 1, 1))]
    for place, strides in strided:
        far = [*given]
        far[place] = torch.empty_strided(shapes[place], strides, device="meta")
        able, why = head.supported(*far, targets)
        name = ("global", "local", "gate", "weight", "bias")[place]
        assert not able and f"{name} has strides" in why and f"use {name}.contiguous()" in why
    far = [*given]
    far[GLOBAL] = torch.empty_strided((5, 20), (2**40, 1), device="meta")
    assert head.supported(*far, targets) == (True, "")


def test_the_mix_of_features_beyond_2_to_the_31_elements() -> None:
    near, gate = torch.empty(5, 20, device="meta"), torch.empty(5, 2, device="meta")
    far = torch.empty_strided((5, 20), (1, 2**31 // 19 + 1), device="meta")
    assert gated_mix_supported(near, near, gate) == (True, "")
    for pair, name in (((far, near), "global"), ((near, far), "local")):
        able, why = gated_mix_supported(*pair, gate)
        assert not able and f"use {name}.contiguous()" in why


def test_too_large_a_header() -> None:
    row = torch.empty(1, 2**22, device="meta")
    header = row.expand(1024, -1)
    able, why = FEW.supported(row, row, row[:, :2], header, None, torch.empty(1, dtype=torch.int64, device="meta"))
    assert not able and why == "weight has 4294967296 elements, more than 2³¹"


@HEADS
def test_shapes_that_plain_would_broadcast(head: Head) -> None:
    given, targets = operands(5, 20, 30)
    for place, wrong in ((LOCAL, given[LOCAL][:, :1]), (GLOBAL, given[GLOBAL][0]), (BIAS, given[BIAS][:1])):
        other = [*given]
        other[place] = wrong
        able, why = head.supported(*other, targets)
        assert not able and " has shape " in why
        with pytest.raises(ValueError, match=" has shape "):
            head.functional(*other, targets)
    assert gated_mix_supported(given[0], given[1][:, :1], given[2])[0] is False


@HEADS
@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("softcap", [torch.nan, torch.inf, -1.0, 0]),
        ("z_loss", [torch.nan, torch.inf, -1.0]),
        ("label_smoothing", [torch.nan, torch.inf, -0.1, 1.1]),
        ("ignore_index", [2**63, -(2**63) - 1, -100.0, "none"]),
    ],
)
def test_options_out_of_range(head: Head, option: str, values: list[Any]) -> None:
    given, targets = operands(5, 8, 3)
    for value in values:
        with pytest.raises(ValueError, match=f"{option} is {value!r}, expected "):
            head.functional(*given, targets, **{option: value})


@HEADS
def test_numbers_and_sparse_tensors_for_a_head(head: Head) -> None:
    given, targets = operands(5, 8, 3)
    one = torch.ones(())
    wanted: dict[str, Any] = {"scale": one, "denominator": one, "loss": torch.ones(()), "correct": torch.tensor(0)}
    wanted["gradients"] = head.gradients(*(torch.empty_like(t) for t in given))
    for name in ("scale", "denominator"):
        with pytest.raises(ValueError, match=f"{name} is 2.0, expected a tensor"):
            head.step(*given, targets, **{**wanted, name: 2.0})
    with pytest.raises(ValueError, match=r"global is torch\.sparse_coo, expected a dense tensor"):
        head.functional(given[0].to_sparse(), *given[1:], targets)
    with pytest.raises(ValueError, match=r"_weights is 2\.0, expected a tensor"):
        head.functional(*given, targets, **{head.weights: 2.0})
    with pytest.raises(ValueError, match="vmap over 0 elements"):
        torch.func.vmap(lambda g: head.functional(g, *given[1:], targets)[0])(torch.ones(0, 5, 8))


def test_numbers_and_sparse_tensors_elsewhere() -> None:
    flat, one = torch.ones(5), torch.ones(())
    sparse: Tensor = flat.to_sparse()
    control, number, moments = Control.empty([flat]), 0.5, Moments.zeros(flat)
    wrong: Any = number
    for call, message in (
        (lambda: gated_mix(torch.ones(5, 8).to_sparse(), torch.ones(5, 8), torch.ones(5, 2)), "global is .*dense"),
        (lambda: gated_mix(torch.ones(5, 8), torch.ones(5, 8), wrong), "gate is 0.5, expected a tensor"),
        (lambda: weighted_accumulate(flat, flat, wrong), "weight is 0.5, expected a tensor"),
        (lambda: weighted_accumulate(sparse, flat, one), "theta is .*sparse_coo, expected a dense tensor"),
        (lambda: sgd_step(flat, flat.clone(), None, lr=wrong), "lr is 0.5, expected a tensor"),
        (lambda: sgd_step(flat, flat.clone(), None, lr=one, live=wrong), "live is 0.5, expected a tensor"),
        (lambda: sgd_step(flat, sparse, None, lr=one), "gradients is .*sparse_coo, expected a dense tensor"),
        (lambda: adamw_step(flat, flat.clone(), moments, step=wrong, lr=one), "step is 0.5, expected a tensor"),
        (lambda: adamw_step(flat, flat.clone(), moments, step=one, lr=wrong), "lr is 0.5, expected a tensor"),
        (lambda: flat_norm([flat], max_norm=one, out=control), "max_norm is 1.0, expected a positive number"),  # type: ignore[arg-type]
        (lambda: flat_norm([flat], scale=wrong, out=control), "scale is 0.5, expected a tensor"),
        (lambda: flat_norm([flat], step=wrong, out=control), "step is 0.5, expected a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
