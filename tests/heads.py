"""Checks of the gated head against the fp64 oracle, by the error that plain PyTorch makes in the same dtype."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedmoe.kernels import gated_head as few
from fedmoe.kernels import gated_lm_head as many
from fedmoe.kernels import oracle
from fedmoe.kernels.gated_lm_head_launch import Gradients, Scratch


class Head(NamedTuple):
    """A head's entries; Any, because mypy cannot count unpacked operands."""

    plain: Any
    functional: Any
    step: Any
    supported: Any
    denominator: Any
    gradients: Any
    weights: str  # the option that weighs the loss


FEW = Head(
    oracle.gated_head,
    few.gated_head,
    few.gated_head_step,
    few.gated_head_supported,
    few.gated_head_denominator,
    few.Gradients,
    "class_weights",
)
MANY = Head(
    oracle.gated_lm_head,
    many.gated_lm_head,
    many.gated_lm_head_step,
    many.gated_lm_head_supported,
    many.gated_lm_head_denominator,
    Gradients,
    "token_weights",
)
plain_head, gated_head, gated_head_step, gated_head_supported = FEW[:4]

NAMES = ("loss", "d_global", "d_local", "d_gate", "d_weight", "d_bias")
ALL_OPTIONS: dict[str, Any] = {"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 3.0}
Operands = list[Any]  # of Tensor or, for the bias, None


def operands(
    rows: int, width: int, classes: int, dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0
) -> tuple[Operands, Tensor]:
    """Random global_, local, gate, weight and bias, and targets of which every fifth is ignored."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = randn(classes, width) / width**0.5
    made = [randn(rows, width), randn(rows, width), randn(rows, 2), weight, randn(classes)]
    targets = torch.randint(0, classes, (rows,), generator=generator)
    targets[3::5] = -100
    given: Operands = [t.to(dtype) for t in made]
    return (given if bias else [*given[:4], None]), targets


def class_weights(classes: int) -> Tensor:
    """Weights of very different size, one of them 0."""
    return torch.linspace(0, 2, classes) if classes > 1 else torch.ones(1)


def assert_within_rule(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Error at most twice that of plain PyTorch in the same dtype, plus 1e-5."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    error, allowed = (actual.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error <= 2 * allowed + 1e-5, f"{name}: error {error:.2e}, plain PyTorch's {allowed:.2e}"


def differentiated(
    head: Any, given: Operands, targets: Tensor, dtype: torch.dtype, upstream: Tensor, **options: Any
) -> tuple[list[Tensor], Tensor]:
    """Loss and gradients, in the order of NAMES, and the correct count."""
    # `detach` keeps the strides, which are part of what is tested.
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in given]
    loss, correct = head(*leaves, targets, **options)
    gradients = torch.autograd.grad(loss, [t for t in leaves if t is not None], upstream.to(loss.dtype))
    return [loss.detach(), *gradients], correct


def check(
    given: Operands,
    targets: Tensor,
    reduction: str = "mean",
    scale: float = 0.7,  # bf16 cannot hold it
    head: Head = FEW,
    slab_bytes: int | None = None,
    **options: Any,
) -> None:
    """Both entries, values and gradients; `reduction="none"` with an upstream gradient of its own for each row."""
    assert given[0] is not None
    dtype = given[0].dtype
    upstream = (torch.linspace(-1, 2, len(targets)) if reduction == "none" else torch.tensor(scale)).to(targets.device)
    arguments = {"reduction": reduction, **options}
    exact, count = differentiated(head.plain, given, targets, torch.float64, upstream, **arguments)
    plain, _ = differentiated(head.plain, given, targets, dtype, upstream, **arguments)
    if slab_bytes is not None:
        arguments["slab_bytes"] = slab_bytes
    actual, correct = differentiated(head.functional, given, targets, dtype, upstream, **arguments)
    for name, ours, theirs, truth in zip(NAMES, actual, plain, exact, strict=False):
        assert_within_rule(name, ours, theirs, truth)
    assert correct == count
    if reduction != "none":
        for accumulate in (False, True):
            check_step(head, given, targets, exact, plain, count, reduction, scale, accumulate, slab_bytes, options)


def check_step(
    head: Head,
    given: Operands,
    targets: Tensor,
    exact: list[Tensor],
    plain: list[Tensor],
    count: Tensor,
    reduction: str,
    scale: float,
    accumulate: bool,
    slab_bytes: int | None,
    options: dict[str, Any],
) -> None:
    """The step into buffers that hold NaN, or that are added to; the header's in fp32, as an engine's."""
    before = 0.5 if accumulate else float("nan")
    like = [g.float() if k >= 4 else g for k, g in enumerate(plain)]  # d_weight, d_bias
    like[0] = like[0].float()
    buffers = [torch.full_like(t, before, memory_format=torch.contiguous_format) for t in like]
    correct = torch.tensor(7, device=targets.device)
    denominator = torch.ones((), device=targets.device)
    if reduction == "mean":
        keys = {k: options[k] for k in (head.weights, "ignore_index") if k in options}
        denominator = head.denominator(targets, **keys)
    gradients = head.gradients(*buffers[1:], *([None] if given[4] is None else []))
    head.step(
        *given,
        targets,
        scale=torch.tensor(scale, device=targets.device),
        denominator=denominator,
        loss=buffers[0],
        correct=correct,
        gradients=gradients,
        accumulate=("loss", "correct", *NAMES[1:]) if accumulate else (),
        **({} if slab_bytes is None else {"scratch": Scratch.empty(given[0], len(given[3]), slab_bytes)}),
        **options,
    )
    base = before if accumulate else 0.0
    for name, ours, theirs, truth in zip(NAMES, buffers, like, exact, strict=False):
        assert_within_rule(f"{name} of the step", ours, theirs + base, truth + base)
    assert correct == count + (7 if accumulate else 0)
