"""The gated head's kernels in Triton's interpreter: every option's value and gradient, both entries, edge cases."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmoe.kernels import oracle
from fedmoe.kernels.gated_head import Gradients, gated_head_step
from tests.heads import ALL_OPTIONS, check, class_weights, gated_head, gated_head_supported, operands

FP32, FP16 = torch.float32, torch.float16
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0},
    {"z_loss": 0.1},
    {"softcap": 2.0},
    {"ignore_index": 3},
    {"class_weights": class_weights(10)},
    {**ALL_OPTIONS, "class_weights": class_weights(10)},
]


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    ignored = options.get("ignore_index", -100)
    for reduction, bias in (("mean", True), ("sum", True), ("none", True), ("mean", False)):
        given, targets = operands(19, 40, 10, dtype, bias)
        check(given, targets.where(targets != -100, ignored), reduction, **options)


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize(("rows", "width", "classes"), [(17, 500, 10), (67, 500, 1), (33, 500, 100), (3, 50, 1000)])
def test_shapes(rows: int, width: int, classes: int, dtype: torch.dtype) -> None:
    check(*operands(rows, width, classes, dtype), **ALL_OPTIONS, class_weights=class_weights(classes))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 70),
    classes=st.integers(1, 40),
    dtype=st.sampled_from([FP32, FP16]),
    bias=st.booleans(),
    weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    label_smoothing=st.sampled_from([0.0, 0.3]),
    z_loss=st.sampled_from([0.0, 0.01]),
    softcap=st.sampled_from([None, 1.0, 30.0]),
    seed=st.integers(0, 100),
)
def test_any_shape_and_options(
    rows: int, width: int, classes: int, dtype: torch.dtype, bias: bool, weighted: bool, seed: int, **options: Any
) -> None:
    weights = class_weights(classes) if weighted else None
    check(*operands(rows, width, classes, dtype, bias, seed), **options, class_weights=weights)


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_all_targets_ignored(dtype: torch.dtype) -> None:
    given, targets = operands(9, 20, 4, dtype)
    targets.fill_(-100)
    check(given, targets, **ALL_OPTIONS)
    loss, correct = gated_head(*given, targets)
    assert loss == 0 and correct == 0


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_saturated_gate(dtype: torch.dtype) -> None:
    given, targets = operands(8, 20, 4, dtype)
    assert given[2] is not None
    given[2][:, 0] = torch.tensor([0, 30, -30, 200, -200, 6e4, -6e4, 12])
    check(given, targets)


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_confident_targets(dtype: torch.dtype) -> None:
    given, targets = operands(12, 20, 4, dtype)
    assert given[3] is not None and given[4] is not None
    given[4] += torch.tensor([12, 0, 0, 0], dtype=dtype)
    check(given, targets.fill_(0), scale=1024.0)
    check(given, targets.fill_(0), scale=1024.0, label_smoothing=1e-3, softcap=20.0)


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_logits_with_a_large_offset(offset: float, dtype: torch.dtype) -> None:
    given, targets = operands(12, 20, 4, dtype)
    assert given[4] is not None
    given[4] += offset
    check(given, targets)


@pytest.mark.parametrize(("softcap", "spread"), [(20.0, 20.0), (100.0, 1.0), (1e3, 1.0), (1e6, 1.0), (1e30, 1.0)])
def test_softcaps_around_and_far_above_the_logits(softcap: float, spread: float) -> None:
    given, targets = operands(12, 20, 6)
    check([*given[:4], given[4] * spread], targets, softcap=softcap)


def test_inputs_that_are_not_contiguous() -> None:
    given, targets = operands(12, 40, 6)
    g, l_, gate, w, b = (t.clone() for t in given if t is not None)
    strided = [
        torch.stack([g, g], 2)[:, :, 0],
        l_.T.contiguous().T,
        gate[:, :1].expand(12, 2).T.contiguous().T,
        w.T.contiguous().T,
        torch.stack([b, b], 1)[:, 1],
    ]
    assert not any(t.is_contiguous() for t in strided)
    weights = torch.stack([class_weights(6)] * 2, 1)[:, 0]
    check([*strided], torch.stack([targets, targets], 1)[:, 0], class_weights=weights)
    check([g.expand(12, 40), l_[:1].expand(12, 40), gate, w, b], targets.int())


def test_a_label_out_of_range_makes_the_loss_nan() -> None:
    given, targets = operands(4, 8, 3)
    for wrong in (3, 15, 99, -1):
        targets[1] = wrong
        assert gated_head(*given, targets)[0].isnan()


def test_what_is_not_finite_is_not_hidden() -> None:
    for wrong in (float("nan"), float("inf")):
        given, targets = operands(4, 8, 3)
        given[0][1, 2] = wrong
        assert not gated_head(*given, targets)[0].isfinite()


def test_two_runs_give_the_same_bits() -> None:
    def run() -> list[torch.Tensor]:
        given, targets = operands(70, 90, 12)
        leaves = [t.requires_grad_() for t in given if t is not None]
        loss, _ = gated_head(*leaves, targets, **ALL_OPTIONS)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_micro_batches_accumulate_to_the_whole_step() -> None:
    given, targets = operands(30, 20, 5)
    g, l_, gate, w, b = (t.requires_grad_() for t in given if t is not None)
    whole, _ = oracle.gated_head(g, l_, gate, w, b, targets)
    exact = torch.autograd.grad(whole, (g, l_, gate, w, b))
    out = [torch.empty_like(t) for t in (g, l_, gate, w, b)]
    loss, correct = torch.empty(()), torch.empty((), dtype=torch.int64)
    denominator = (targets != -100).sum().float()  # of the whole step
    for k, rows in enumerate(torch.arange(30).split(13)):
        at = slice(int(rows[0]), int(rows[-1]) + 1)
        gated_head_step(
            g[at], l_[at], gate[at], w, b, targets[at],
            scale=torch.ones(()), denominator=denominator, loss=loss, correct=correct,
            gradients=Gradients(out[0][at], out[1][at], out[2][at], out[3], out[4]),
            accumulate=("loss", "correct", "d_weight", "d_bias") if k else (),
        )  # fmt: skip
    torch.testing.assert_close(loss, whole.detach())
    for ours, theirs in zip(out, exact, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_gradient_work_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    given, targets = operands(6, 8, 3)
    leaves = [t.requires_grad_() for t in given if t is not None]
    monkeypatch.setattr("fedmoe.kernels.gated_head.header_launch", None)
    with torch.no_grad():
        loss, _ = gated_head(*leaves, targets)
    assert not loss.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str) -> None:
    given, targets = operands(5, 20, 3)
    leaves = [t.requires_grad_() for t in given if t is not None]
    options = (None, -100, 0.1, 0.01, 3.0)
    torch.library.opcheck(torch.ops.fedmoe.gated_head.default, (*leaves, targets, *options, reduction))
    detached = [t.detach() for t in leaves[:4]]
    arguments = (torch.ones(()), torch.ones(()), *detached, None, targets, *options)
    torch.library.opcheck(torch.ops.fedmoe.gated_head_backward.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    given, targets = operands(5, 20, 3)
    leaves = [t.requires_grad_() for t in given if t is not None]

    def double(*tensors: torch.Tensor) -> torch.Tensor:
        return gated_head(*tensors, label_smoothing=0.1)[0] * 2

    expected = torch.autograd.grad(double(*leaves, targets), leaves)
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*leaves, targets), leaves)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_vmap() -> None:
    clients = [operands(5, 20, 3, seed=k) for k in range(3)]
    stacked = [torch.stack([c[0][i] for c in clients]).requires_grad_() for i in range(5)]
    targets = torch.stack([c[1] for c in clients])
    losses = torch.func.vmap(lambda *t: gated_head(*t)[0])(*stacked, targets)
    gradients = torch.autograd.grad(losses, stacked, torch.tensor([1.0, 2.0, 3.0]))
    for k, (client, y) in enumerate(clients):
        leaves = [t.requires_grad_() for t in client if t is not None]
        loss, _ = gated_head(*leaves, y)
        assert torch.equal(loss, losses[k])
        for ours, theirs in zip(gradients, torch.autograd.grad(loss, leaves, torch.tensor(k + 1.0)), strict=True):
            assert torch.equal(ours[k], theirs)


def test_there_is_no_second_derivative() -> None:
    given, targets = operands(5, 20, 3)
    leaves = [t.requires_grad_() for t in given]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first = torch.autograd.grad(gated_head(*leaves, targets)[0], leaves, create_graph=True)
        torch.autograd.grad(first[0].sum(), leaves)


def test_bf16_is_refused_here() -> None:
    given, targets = operands(5, 20, 3, torch.bfloat16)
    assert gated_head_supported(*given, targets) == (False, "Triton's interpreter multiplies bfloat16 wrongly")


def test_wrong_arguments() -> None:
    given, targets = operands(5, 20, 3)
    with pytest.raises(ValueError, match=r"gate has shape \(4, 2\), expected \(5, 2\)"):
        gated_head(given[0], given[1], given[2][:4], given[3], None, targets)
    with pytest.raises(ValueError, match=r"reduction is 'avg'"):
        gated_head(*given, targets, reduction="avg")
    with pytest.raises(ValueError, match=r"softcap is 0, expected finite and positive"):
        gated_head(*given, targets, softcap=0)
    with pytest.raises(ValueError, match=r"1025 classes are more than 1024"):
        gated_head(given[0], given[1], given[2], torch.ones(1025, 20), None, targets)
