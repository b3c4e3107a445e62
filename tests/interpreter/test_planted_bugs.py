"""Known bugs of fused cross-entropies, put into the kernels: the checks must notice each."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fedmoe.kernels import gated_head_kernels as few
from fedmoe.kernels import gated_head_launch, gated_lm_head_launch
from fedmoe.kernels import gated_lm_head_kernels as many
from tests.heads import MANY, Operands, check, operands
from tests.planted import planted

FP32, FP16 = torch.float32, torch.float16


def two_layers() -> None:
    check(*operands(40, 40, 10, FP32))


def factor_a_row() -> None:
    check(*operands(19, 40, 10, FP32), "none")


def smoothing() -> None:
    check(*operands(19, 40, 10, FP32), label_smoothing=0.2)


def confident() -> None:
    given, targets = operands(12, 20, 4, FP16)
    assert given[4] is not None
    given[4] += torch.tensor([12, 0, 0, 0], dtype=FP16)
    check(given, targets.fill_(0), scale=1024.0)


def exact_offset(classes: int) -> tuple[Operands, torch.Tensor]:
    """Logits near 8192 that fp32 holds exactly, so that plain PyTorch's error is small too."""
    given, targets = operands(12, 20, classes, FP32)
    g, _, gate, w, b = given
    given[0], given[3] = g.round(), (w * 64).round() / 64
    given[2] = torch.tensor([200.0, -200.0]).expand_as(gate)  # the global expert alone
    given[4] = (b * 64).round() / 64 + 8192
    return given, targets


def offset() -> None:
    check(*exact_offset(4))


def tokens() -> None:
    """Two row chunks, each with two parts of the vocabulary."""
    check(*operands(18, 24, 100, FP32), head=MANY, slab_bytes=16 * 64 * 4, **ALL)


def many_tokens() -> None:
    check(*operands(40, 8, 20, FP32), head=MANY)


def token_factors() -> None:
    weights = torch.linspace(0.5, 2, 18)
    check(*operands(18, 24, 100, FP32), "none", head=MANY, slab_bytes=16 * 128 * 4, token_weights=weights, **ALL)


def confident_tokens() -> None:
    given, targets = operands(12, 20, 40, FP32)
    given[4][0] += 14
    check(given, targets.fill_(0), scale=1024.0, head=MANY)


def offset_tokens() -> None:
    given, targets = exact_offset(40)
    check(given, targets, "none", head=MANY)


ALL: dict[str, Any] = {"label_smoothing": 0.2, "z_loss": 0.05}
BUGS: dict[str, tuple[ModuleType, str, str, Callable[[], None]]] = {
    "bias added twice": (
        few,
        "z += tl.load(bias",
        "z += 2 * tl.load(bias",
        two_layers,
    ),
    "bias's gradient left out of the sum over later rows": (
        few,
        "db += tl.sum(dz, 1)",
        "db = tl.sum(dz, 1)",
        two_layers,
    ),
    "a row's upstream gradient not applied before the sum over rows": (
        few,
        "dz *= tl.load(scale + row * SCALE_B, mask=live, other=0.0)[None, :]",
        "dz *= tl.load(scale)",
        factor_a_row,
    ),
    "loss as a difference of numbers with a large common offset": (
        few,
        "(log_total - tl.sum(tl.where(is_target, z, 0.0), 1))",
        "((top + log_total) - tl.sum(tl.where(is_target, z + top[:, None], 0.0), 1))",
        offset,
    ),
    "p - 1 of a confident target in low precision": (
        few,
        "-(others / total)[:, None], p)",
        "(p.to(tl.float16) - 1).to(tl.float32), p)",
        confident,
    ),
    "header's gradient summed in bf16": (
        few,
        'mixed.to(global_.dtype.element_ty), dw, input_precision="ieee")',
        'mixed.to(global_.dtype.element_ty), dw, input_precision="ieee").to(tl.bfloat16).to(tl.float32)',
        two_layers,
    ),
    "smoothing's gradient given to ignored rows": (
        few,
        "kept[:, None] & real[None, :]",
        "real[None, :]",
        smoothing,
    ),
    "the gate's gradient without the other expert": (
        few,
        "alpha_g * alpha_l * dots",
        "alpha_g * dots",
        two_layers,
    ),
    "bias added twice to a token's logits": (
        many,
        "z += tl.load(bias + c * BIAS_C, mask=inside, other=0.0)",
        "z += 2 * tl.load(bias + c * BIAS_C, mask=inside, other=0.0)",
        tokens,
    ),
    "a token's upstream gradient replaced by the first's": (
        many,
        "tl.load(scale + row * SCALE_R)",
        "tl.load(scale)",
        token_factors,
    ),
    "a token's weight left out of its gradient": (many, "factor = w * tl.load", "factor = tl.load", token_factors),
    "a token's loss as a difference of numbers with a large common offset": (
        many,
        "(log_total - (z_y - m))",
        "((m + log_total) - z_y)",
        offset_tokens,
    ),
    "p - 1 of a confident token in low precision": (
        many,
        "tl.where(START + c == y, share, p)",
        "tl.where(START + c == y, (p.to(tl.float16) - 1).to(tl.float32), p)",
        confident_tokens,
    ),
    "sum of exponentials not rescaled to a larger top": (many, "s = s * tl.exp(m - new)", "s = s", tokens),
    "gradients of ignored tokens left from before": (
        many,
        "tl.zeros([BLOCK_V], logits.dtype.element_ty), mask=c < HELD",
        "tl.zeros([BLOCK_V], logits.dtype.element_ty), mask=c < 0",
        tokens,
    ),
    "bias's gradient of the last rows alone": (many, "db += tl.sum(dz, 0)", "db = tl.sum(dz, 0)", many_tokens),
    "z-loss without the top": (many, "2 * Z_LOSS * (m + log_total) * p", "2 * Z_LOSS * log_total * p", tokens),
}


@pytest.mark.parametrize("bug", BUGS)
def test_is_noticed(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, right, wrong, checked = BUGS[bug]
    checked()
    launcher = gated_head_launch if module is few else gated_lm_head_launch
    monkeypatch.setattr(launcher, "_kernels", planted(module, right, wrong, tmp_path))
    with pytest.raises(AssertionError, match="plain PyTorch's"):
        checked()


def test_the_bias_of_the_first_classes_in_every_slab_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens()
    right, wrong = "bias[start : start + breadth]", "bias[:breadth]"
    copy = planted(gated_lm_head_launch, right, wrong, tmp_path)
    monkeypatch.setattr(gated_lm_head_launch, "losses_launch", copy.losses_launch)
    with pytest.raises(AssertionError, match="plain PyTorch's"):
        tokens()


@pytest.mark.parametrize("drift", ["header", "chunk of the mix"])
def test_sums_in_low_precision_are_noticed(drift: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the chunks, and over the parts of a vocabulary: each product's sum is rounded to fp16 at its end."""
    right = gated_lm_head_launch.product

    def rounding(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
        right(a, b, out, add)
        if out.dtype == FP32 and (a.stride(0) == 1) == (drift == "header"):
            out.copy_(out.half())

    given, targets = operands(18, 24, 100, FP32)
    check(given, targets, head=MANY, slab_bytes=16 * 64 * 4)
    monkeypatch.setattr(gated_lm_head_launch, "product", rounding)
    with pytest.raises(AssertionError, match="plain PyTorch's"):
        check(given, targets, head=MANY, slab_bytes=16 * 64 * 4)
