"""The gated mix's kernels in Triton's interpreter, against the fp64 oracle."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedmoe.kernels import oracle
from fedmoe.kernels.gated_mix import gated_mix, gated_mix_supported
from tests.heads import assert_within_rule

NAMES = ("mix", "d_global", "d_local", "d_gate")


def results(mix: Any, tensors: list[Tensor], upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    mixed = mix(*leaves)
    return [mixed.detach(), *torch.autograd.grad(mixed, leaves, upstream.to(dtype))]


def check(tensors: list[Tensor], upstream: Tensor) -> None:
    dtype = tensors[0].dtype
    exact = results(oracle.gated_mix, tensors, upstream, torch.float64)
    plain = results(oracle.gated_mix, tensors, upstream, dtype)
    for name, ours, theirs, truth in zip(
        NAMES, results(gated_mix, tensors, upstream, dtype), plain, exact, strict=True
    ):
        assert ours.dtype == dtype
        assert_within_rule(name, ours, theirs, truth)


def operands(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(rows, width), torch.randn(rows, width), torch.randn(rows, 2) * 3]
    return [t.to(dtype) for t in made], torch.randn(rows, width).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (9, 500), (4, 256), (6, 513)])
def test_is_the_oracle(rows: int, width: int, dtype: torch.dtype) -> None:
    check(*operands(rows, width, dtype))


def test_saturated_gates_and_strides() -> None:
    (g, l_, gate), upstream = operands(6, 40)
    gate[:, 1] = torch.tensor([0, 40, -40, 300, -300, 6e4])
    check([g.T.contiguous().T, torch.stack([l_, l_], 2)[:, :, 1], gate.T.contiguous().T], upstream)
    check([g, l_[:1].expand(6, 40), gate], upstream[:, :1].expand(6, 40))


def test_opcheck_compile_and_vmap() -> None:
    tensors, upstream = operands(5, 20)
    leaves = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.fedmoe.gated_mix.default, tuple(leaves))
    torch.library.opcheck(torch.ops.fedmoe.gated_mix_backward.default, (upstream, *[t.detach() for t in tensors]))
    mixed = gated_mix(*leaves)
    assert torch.equal(torch.compile(gated_mix, fullgraph=True, backend="aot_eager")(*leaves), mixed)
    stacked = [torch.stack([t, -t]) for t in tensors]
    assert torch.equal(torch.func.vmap(gated_mix)(*stacked)[0], mixed)


def test_refusals() -> None:
    (g, l_, gate), _ = operands(5, 20)
    with pytest.raises(ValueError, match=r"gate has shape \(5, 1\), expected \(5, 2\)"):
        gated_mix(g, l_, gate[:, :1])
    with pytest.raises(ValueError, match=r"local is torch\.float16"):
        gated_mix(g, l_.half(), gate)
    assert gated_mix_supported(g, l_, gate) == (True, "")
