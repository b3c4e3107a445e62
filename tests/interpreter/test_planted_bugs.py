"""Known bugs of fused cross-entropies, put into the kernels: the checks must notice each."""

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedmoe.kernels import gated_head_kernels, gated_head_launch
from tests.heads import check, operands

FP32, FP16 = torch.float32, torch.float16
_count = itertools.count()


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


def offset_without_rounding() -> None:
    """Logits near 8192 that fp32 holds exactly, so that plain PyTorch's error is small too."""
    given, targets = operands(12, 20, 4, FP32)
    g, _, gate, w, b = (t for t in given if t is not None)
    given[0], given[3] = g.round(), (w * 64).round() / 64
    given[2] = torch.tensor([200.0, -200.0]).expand_as(gate)  # the global expert alone
    given[4] = (b * 64).round() / 64 + 8192
    check(given, targets)


BUGS: dict[str, tuple[str, str, Callable[[], None]]] = {
    "bias added twice": (
        "z += tl.load(bias",
        "z += 2 * tl.load(bias",
        two_layers,
    ),
    "bias's gradient left out of the sum over later rows": (
        "db += tl.sum(dz, 1)",
        "db = tl.sum(dz, 1)",
        two_layers,
    ),
    "a row's upstream gradient not applied before the sum over rows": (
        "dz *= tl.load(scale + row * SCALE_B, mask=live, other=0.0)[None, :]",
        "dz *= tl.load(scale)",
        factor_a_row,
    ),
    "loss as a difference of numbers with a large common offset": (
        "(log_total - tl.sum(tl.where(is_target, z, 0.0), 1))",
        "((top + log_total) - tl.sum(tl.where(is_target, z + top[:, None], 0.0), 1))",
        offset_without_rounding,
    ),
    "p - 1 of a confident target in low precision": (
        "-(others / total)[:, None], p)",
        "(p.to(tl.float16) - 1).to(tl.float32), p)",
        confident,
    ),
    "header's gradient summed in bf16": (
        'mixed.to(global_.dtype.element_ty), dw, input_precision="ieee")',
        'mixed.to(global_.dtype.element_ty), dw, input_precision="ieee").to(tl.bfloat16).to(tl.float32)',
        two_layers,
    ),
    "smoothing's gradient given to ignored rows": (
        "kept[:, None] & real[None, :]",
        "real[None, :]",
        smoothing,
    ),
    "the gate's gradient without the other expert": (
        "alpha_g * alpha_l * dots",
        "alpha_g * dots",
        two_layers,
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_is_noticed(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, checked = BUGS[bug]
    checked()
    source = Path(gated_head_kernels.__file__).read_text()
    assert source.count(right) == 1
    path = tmp_path / "kernels.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"planted_{next(_count)}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(gated_head_launch, "_kernels", module)
    with pytest.raises(AssertionError, match="plain PyTorch's"):
        checked()
