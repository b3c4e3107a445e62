"""The gated head: its oracle, its refusals; its kernels are tested in `tests/interpreter`."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedmoe.kernels import launch, oracle
from fedmoe.kernels.gated_head import gated_head_denominator
from tests.heads import ALL_OPTIONS, MANY, class_weights, gated_head, gated_head_supported, operands, plain_head

FP64 = torch.float64


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_oracle_is_cross_entropy(reduction: str, smoothing: float, weighted: bool) -> None:
    given, targets = operands(12, 7, 5, FP64)
    leaves = [t.requires_grad_() for t in given if t is not None]
    g, l_, gate, w, b = leaves
    weights = class_weights(5).double() if weighted else None
    loss, correct = plain_head(
        g, l_, gate, w, b, targets, label_smoothing=smoothing, class_weights=weights, reduction=reduction
    )
    logits = F.linear(oracle.gated_mix(g, l_, gate), w, b)
    expected = F.cross_entropy(logits, targets, weights, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    assert correct == (logits.argmax(1) == targets).sum()
    for ours, theirs in zip(
        torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"z_loss": 0.1}, {"softcap": 2.0}, ALL_OPTIONS])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_the_oracle(options: dict[str, Any], reduction: str) -> None:
    given, targets = operands(6, 4, 3, FP64)
    weights = class_weights(3).double()

    def loss(*tensors: Tensor) -> Tensor:
        return plain_head(*tensors, targets, **options, class_weights=weights, reduction=reduction)[0]

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in given if t is not None])


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_the_vocabularys_oracle(options: dict[str, Any], reduction: str) -> None:
    given, targets = operands(6, 4, 3, FP64)
    weights = torch.linspace(0, 2, 6, dtype=FP64)

    def loss(*tensors: Tensor) -> Tensor:
        out: Tensor = MANY.plain(*tensors, targets, **options, token_weights=weights, reduction=reduction)[0]
        return out

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in given if t is not None])


def test_oracle_follows_the_formula() -> None:
    """Loss and dz = p Σq − q + 2λ lse p, times the softcap's derivative, written out for one row."""
    z = torch.tensor([[1.0, -2.0, 3.0]], dtype=FP64, requires_grad=True)
    w, smoothing, z_loss, cap = torch.tensor([0.5, 1, 2], dtype=FP64), 0.3, 0.1, 2.0
    gate, target = torch.zeros(1, 2, dtype=FP64), torch.tensor([2])
    loss, _ = plain_head(
        z, z, gate, torch.eye(3, dtype=FP64), None, target,
        label_smoothing=smoothing, z_loss=z_loss, softcap=cap, class_weights=w, reduction="sum",
    )  # fmt: skip
    capped = cap * (z[0] / cap).tanh()
    lse, p = capped.logsumexp(0), capped.softmax(0)
    q = smoothing * w / 3
    q[2] += (1 - smoothing) * w[2]
    torch.testing.assert_close(loss, (q * (lse - capped)).sum() + z_loss * lse**2)
    dz = (p * q.sum() - q + 2 * z_loss * lse * p) * (1 - (capped / cap) ** 2)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0][0], dz.detach())


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    given, targets = operands(6, 4, 3, FP64)
    leaves = [t.requires_grad_() for t in given if t is not None]
    loss, correct = plain_head(*leaves, targets.fill_(-100), **ALL_OPTIONS)
    assert loss == 0 and correct == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, leaves))


def test_denominator() -> None:
    targets = torch.tensor([0, -100, 2, 2])
    assert gated_head_denominator(targets) == 3
    assert gated_head_denominator(targets, torch.tensor([1.0, 5, 0.25])) == 1.5
    assert gated_head_denominator(targets, ignore_index=2) == 2
    for wrong in (3, -1, 2**40):  # as the loss, not an error: on a GPU that would end the process
        targets[0] = wrong
        assert gated_head_denominator(targets, torch.ones(3)).isnan()
        assert gated_head_denominator(targets, torch.ones(3), ignore_index=wrong).isnan()


@pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET=1 is set")
def test_is_refused_on_the_cpu() -> None:
    given, targets = operands(6, 4, 3)
    supported, reason = gated_head_supported(*given, targets)
    assert not supported and ("not on a CUDA device" in reason or "Triton is missing" in reason)
    with pytest.raises(ValueError, match="gated_head: "):
        gated_head(*given, targets)


def test_is_refused_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_missing", "No module named 'triton'")
    given, targets = operands(6, 4, 3)
    assert gated_head_supported(*given, targets) == (False, "Triton is missing (No module named 'triton')")
