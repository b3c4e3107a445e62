"""The vocabulary head's kernels in Triton's interpreter: every option's value and gradient, both entries, edges."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe.kernels import gated_lm_head_kernels
from fedmoe.kernels.gated_lm_head_launch import Gradients, Scratch
from tests.heads import ALL_OPTIONS, MANY, assert_within_rule, check, operands

FP32, FP16 = torch.float32, torch.float16
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0},
    {"z_loss": 0.1},
    {"softcap": 2.0},
    {"ignore_index": 3},
    {"token_weights": torch.linspace(0, 2, 19)},
    {**ALL_OPTIONS, "token_weights": torch.linspace(0, 2, 19)},
]
CUTS = {"whole": None, "rows": 16 * 320 * 4, "classes": 16 * 128 * 4}
"""Slabs for 19 rows and 300 classes in fp32: all at once; two row chunks; classes in parts (in fp16 half the bytes)."""
SHIPPED_TILE = gated_lm_head_kernels.ROW_TILE


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a row takes several."""
    monkeypatch.setattr(gated_lm_head_kernels, "ROW_TILE", (256, 8))


def lm_check(given: list[Any], targets: Tensor, reduction: str = "mean", cut: str = "whole", **options: Any) -> None:
    size = CUTS[cut]
    slab_bytes = None if size is None else size * given[0].element_size() // 4
    check(given, targets, reduction, head=MANY, slab_bytes=slab_bytes, **options)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [*((options, FP32) for options in OPTIONS), (OPTIONS[0], FP16), (OPTIONS[-1], FP16)],
    ids=lambda value: "+".join(value) or "plain" if isinstance(value, dict) else str(value),
)
def test_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    ignored = options.get("ignore_index", -100)
    for reduction, bias, cut in (("mean", True, "rows"), ("sum", False, "classes"), ("none", True, "whole")):
        given, targets = operands(19, 40, 300, dtype, bias)
        lm_check(given, targets.where(targets != -100, ignored), reduction, cut, **options)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 70),
    classes=st.integers(1, 700),
    dtype=st.sampled_from([FP32, FP16]),
    bias=st.booleans(),
    weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    label_smoothing=st.sampled_from([0.0, 0.3]),
    z_loss=st.sampled_from([0.0, 0.01]),
    softcap=st.sampled_from([None, 1.0, 30.0]),
    slab_bytes=st.sampled_from([None, 16 * 64 * 4, 10**4]),
    seed=st.integers(0, 100),
)
def test_any_shape_and_options(
    rows: int, width: int, classes: int, dtype: torch.dtype, bias: bool, weighted: bool, seed: int, **options: Any
) -> None:
    weights = torch.linspace(0, 2, rows) if weighted else None
    check(*operands(rows, width, classes, dtype, bias, seed), head=MANY, **options, token_weights=weights)


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_edges(dtype: torch.dtype) -> None:
    given, targets = operands(18, 20, 140, dtype)
    confident = [*given[:4], given[4].clone()]
    confident[4][0] += 14
    lm_check(confident, torch.zeros_like(targets))
    lm_check(confident, torch.zeros_like(targets), cut="classes", label_smoothing=1e-3, softcap=20.0)
    lm_check([*given[:4], given[4] + 1e4], targets, cut="classes", label_smoothing=0.1)
    lm_check([*given[:4], given[4] - 1e4], targets)
    saturated = given[2].clone()
    saturated[:8, 0] = torch.tensor([0, 30, -30, 200, -200, 6e4, -6e4, 12])
    lm_check([*given[:2], saturated, *given[3:]], targets)
    lm_check(given, torch.full_like(targets, -100), cut="classes", **ALL_OPTIONS)
    loss, correct = MANY.functional(*given, torch.full_like(targets, -100))
    assert loss == 0 and correct == 0
    lm_check(given, targets, token_weights=torch.zeros(18))


def test_inputs_that_are_not_contiguous() -> None:
    (g, l_, gate, w, b), targets = operands(19, 40, 300)
    strided = [
        torch.stack([g, g], 2)[:, :, 0],
        l_.T.contiguous().T,
        gate[:, :1].expand(19, 2).T.contiguous().T,
        w.T.contiguous().T,
        torch.stack([b, b], 1)[:, 1],
    ]
    assert not any(t.is_contiguous() for t in strided)
    weights = torch.stack([torch.linspace(0, 2, 19)] * 2, 1)[:, 0]
    lm_check(strided, torch.stack([targets, targets], 1)[:, 0], cut="classes", token_weights=weights)
    lm_check([g[:1].expand(19, 40), l_, gate, w, b], targets.int())


def test_a_label_out_of_range_makes_the_loss_nan() -> None:
    given, targets = operands(4, 8, 3)
    for wrong in (3, 200, -1, 2**32):
        targets[1] = wrong
        assert MANY.functional(*given, targets)[0].isnan()


@pytest.mark.parametrize(("softcap", "spread"), [(20.0, 20.0), (100.0, 1.0), (1e3, 1.0), (1e6, 1.0), (1e30, 1.0)])
def test_softcaps_around_and_far_above_the_logits(softcap: float, spread: float) -> None:
    given, targets = operands(18, 20, 140)
    lm_check([*given[:4], given[4] * spread], targets, cut="classes", softcap=softcap)


def test_classes_that_cannot_be() -> None:
    """Biases of -inf for the first block, in the second case of the shipped size, and for a whole slab."""
    given, targets = operands(18, 20, 300)
    given[4][:256] = -torch.inf
    targets = targets.where(targets == -100, 256 + targets % 44)
    lm_check(given, targets)
    lm_check(given, targets, cut="classes", z_loss=0.1)


def test_a_whole_block_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_lm_head_kernels, "ROW_TILE", SHIPPED_TILE)
    given, targets = operands(3, 8, SHIPPED_TILE[0] + 40)
    given[4][: SHIPPED_TILE[0]] = -torch.inf
    lm_check(given, targets.where(targets == -100, SHIPPED_TILE[0] + targets % 40))


def test_equal_logits_predict_the_first_class() -> None:
    (g, l_, gate, w, _), _ = operands(3, 8, 300)
    for cut in CUTS.values():
        slab = {} if cut is None else {"slab_bytes": cut}
        for first in (0, 130):
            same = torch.zeros_like(w)
            same[:first] = -1
            _, correct = MANY.functional(g.abs(), l_.abs(), gate, same, None, torch.tensor([0, 130, 131]), **slab)
            assert correct == 1


def test_runs_are_bit_identical() -> None:
    given, targets = operands(18, 40, 300)
    for slab_bytes in CUTS.values():
        both = []
        for _ in range(2):
            leaves = [t.detach().requires_grad_() for t in given]
            loss, _ = MANY.functional(*leaves, targets, **({} if slab_bytes is None else {"slab_bytes": slab_bytes}))
            both.append([loss, *torch.autograd.grad(loss, leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_no_gradient_work_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    given, targets = operands(7, 20, 30)
    expected, _ = MANY.plain(*given, targets)
    monkeypatch.setattr("fedmoe.kernels.gated_lm_head_launch._products", None)
    torch.testing.assert_close(MANY.functional(*given, targets)[0], expected)
    with torch.no_grad():
        MANY.functional(*[t.requires_grad_() for t in given], targets)


def test_a_frozen_header_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither entry multiplies for its gradient, and the other gradients stay the same."""
    given, targets = operands(7, 20, 30)
    for dtype in (FP32, FP16):
        leaves = [t.to(dtype).requires_grad_() for t in given]
        expected = torch.autograd.grad(MANY.functional(*leaves, targets)[0], leaves[:3])
        frozen = [*leaves[:3], *(t.detach() for t in leaves[3:])]
        with monkeypatch.context() as patched:
            patched.setattr("fedmoe.kernels.gated_lm_head_launch.bias_launch", None)
            actual = torch.autograd.grad(MANY.functional(*frozen, targets)[0], leaves[:3])
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    out = [torch.empty_like(t) for t in given[:3]]
    loss, correct, one = torch.empty(()), torch.tensor(0), torch.ones(())
    leaves = [t.detach().requires_grad_() for t in given]
    MANY.step(
        *[t.detach() for t in given], targets, scale=one, denominator=one, loss=loss, correct=correct,
        gradients=Gradients(out[0], out[1], out[2], None, None),
    )  # fmt: skip
    expected = torch.autograd.grad(MANY.functional(*leaves, targets, reduction="sum")[0], leaves[:3])
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_opcheck() -> None:
    given, targets = operands(5, 20, 30)
    leaves = [t.requires_grad_() for t in given]
    for reduction, gradients in (("mean", True), ("none", False)):
        arguments = (*leaves, targets, torch.ones(5), -100, 0.1, 0.0, 0.0, reduction, 2**20, gradients, gradients)
        torch.library.opcheck(torch.ops.fedmoe.gated_lm_head.default, arguments)
    detached = [t.detach() for t in given]
    arguments = (torch.ones(()), torch.ones(()), *detached, targets, None, -100, 0.1, 0.0, 0.0, 2**20, True)
    torch.library.opcheck(torch.ops.fedmoe.gated_lm_head_backward.default, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction: str) -> None:
    given, targets = operands(5, 20, 30)
    leaves = [t.requires_grad_() for t in given]

    def loss(*tensors: Any) -> Tensor:
        out: Tensor = MANY.functional(*tensors, label_smoothing=0.1, reduction=reduction)[0]
        return (out * 2).sum()

    expected = torch.autograd.grad(loss(*leaves, targets), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*leaves, targets), leaves)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_vmap() -> None:
    clients = [operands(5, 20, 30, seed=k) for k in range(3)]
    stacked = [torch.stack([c[0][i] for c in clients]).requires_grad_() for i in range(5)]
    targets = torch.stack([c[1] for c in clients])
    losses = torch.func.vmap(lambda *t: MANY.functional(*t)[0])(*stacked, targets)
    gradients = torch.autograd.grad(losses, stacked, torch.tensor([1.0, 2.0, 3.0]))
    for k, (client, y) in enumerate(clients):
        leaves = [t.requires_grad_() for t in client]
        loss, _ = MANY.functional(*leaves, y)
        assert torch.equal(loss, losses[k])
        for ours, theirs in zip(gradients, torch.autograd.grad(loss, leaves, torch.tensor(k + 1.0)), strict=True):
            # Not bit for bit: under vmap the backward pass computes the logits again.
            assert_within_rule("vmap", ours[k], theirs, theirs.double())


def test_wrong_arguments() -> None:
    given, targets = operands(20, 20, 300)
    with pytest.raises(ValueError, match=r"token_weights has shape \(3,\), expected \(20,\)"):
        MANY.functional(*given, targets, token_weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"slab_bytes is 100, at least 4096 are needed for 20 rows"):
        MANY.functional(*given, targets, slab_bytes=100)
    with pytest.raises(ValueError, match=r"weight is torch\.float16"):
        MANY.functional(*given[:3], given[3].half(), None, targets)
    one = torch.ones(())
    wanted: dict[str, Any] = {"scale": one, "denominator": one, "loss": one.clone(), "correct": torch.tensor(0)}
    buffers = [torch.empty_like(t) for t in given]
    with pytest.raises(ValueError, match=r"d_weight is torch\.float16, expected torch\.float32"):
        MANY.step(*given, targets, **wanted, gradients=MANY.gradients(*buffers[:3], buffers[3].half(), None))
    with pytest.raises(ValueError, match=r"d_bias is given, but no bias"):
        MANY.step(*given[:4], None, targets, **wanted, gradients=Gradients(*buffers))


def test_wrong_scratch() -> None:
    """Too small, it would be written beyond its end."""
    given, targets = operands(20, 20, 300)
    one = torch.ones(())
    good = Scratch.empty(given[0], 300, 20 * 64 * 4)
    assert good.carried is not None
    rows, best = torch.empty(7), torch.empty(16, dtype=torch.int64)
    for change, message in (
        ({"slab": torch.empty(20, 300)}, r"scratch\.slab has shape \(20, 300\), expected \[R, a multiple of 64\]"),
        ({"slab": torch.empty(0, 64)}, r"scratch\.slab has shape \(0, 64\)"),
        ({"slab": torch.empty(16, 0)}, r"scratch\.slab has shape \(16, 0\)"),
        ({"slab": torch.empty(64)}, r"scratch\.slab has shape \(64,\)"),
        ({"d_mixed": None}, "scratch lacks d_mixed or carried"),
        ({"carried": None}, "scratch lacks d_mixed or carried"),
        ({"losses": rows}, r"scratch\.losses has shape \(7,\)"),
        ({"carried": (*good.carried[:2], rows, *good.carried[3:])}, r"scratch\.carried\[2\] has shape \(7,\)"),
        ({"carried": (*good.carried[:4], best)}, r"scratch\.carried\[4\] .*expected"),
    ):
        with pytest.raises(ValueError, match=message):
            MANY.step(
                *given, targets, scale=one, denominator=one, loss=one.clone(), correct=torch.tensor(0),
                gradients=Gradients(*(torch.empty_like(t) for t in given)), scratch=good._replace(**change),
            )  # fmt: skip


def test_there_is_no_second_derivative() -> None:
    given, targets = operands(5, 20, 30)
    for reduction in ("sum", "none"):  # gradients ready with the loss, or made later
        leaves = [t.clone().requires_grad_() for t in given]
        loss = MANY.functional(*leaves, targets, reduction=reduction)[0].sum()
        with pytest.raises(RuntimeError, match=r"no second derivative|no autograd formula"):
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            torch.autograd.grad(first[0].sum(), leaves)


def test_a_header_may_change_before_the_backward_pass() -> None:
    """Gradients that are ready need no operands any more."""
    given, targets = operands(5, 20, 30)
    leaves = [t.requires_grad_() for t in given]
    expected = torch.autograd.grad(MANY.functional(*leaves, targets)[0], leaves)
    loss, _ = MANY.functional(*leaves, targets)
    with torch.no_grad():
        leaves[3].zero_()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True))
