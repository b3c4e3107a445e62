"""A mixture whose head is fused, in Triton's interpreter, against the same mixture by PyTorch's operators."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedmoe.experts import Split
from fedmoe.kernels import gated_head, gated_mix
from fedmoe.mixture import Mixture
from tests.heads import assert_within_rule


def mixtures(header: Callable[[], nn.Module]) -> tuple[Mixture, Mixture]:
    """One with each head, from the same seed."""
    made = []
    for head in ("plain", "fused"):
        torch.manual_seed(0)
        extractor, shared = nn.Linear(6, 20), nn.Linear(6, 20)
        made.append(Mixture(shared, Split(extractor, header()), nn.Linear(6, 2), head))
    return made[0], made[1]


def gradients(model: Mixture, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
    loss, correct = model.program().join(model.program().run(x), y)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))], correct


def refused(*_: object) -> tuple[bool, str]:
    raise AssertionError("not to be called")


@pytest.mark.parametrize("kind", ["linear", "deep"])
def test_fused_is_plain(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "linear":
        plain, fused = mixtures(lambda: nn.Linear(20, 5))
    else:  # the head's kernels do not know it, the mix's do
        plain, fused = mixtures(lambda: nn.Sequential(nn.ReLU(), nn.Linear(20, 5)))
        monkeypatch.setattr(gated_head, "gated_head", refused)
    x, y = torch.randn(9, 6), torch.randint(0, 5, (9,))
    exact, count = gradients(plain.double(), x.double(), y)
    ours, theirs = gradients(fused, x, y), gradients(plain.float(), x, y)
    assert ours[1] == count
    for k, (a, b, c) in enumerate(zip(ours[0], theirs[0], exact, strict=True)):
        assert_within_rule(str(k), a, b, c)
    assert_within_rule("logits", fused(x), plain(x), plain.double()(x.double()))
    used = gated_head if kind == "linear" else gated_mix
    monkeypatch.setattr(used, used.__name__.rpartition(".")[2], refused)
    with pytest.raises(AssertionError, match="not to be called"):
        gradients(fused, x, y)


def test_a_header_with_hooks_keeps_them() -> None:
    _, fused = mixtures(lambda: nn.Linear(20, 5))
    seen: list[Tensor] = []
    fused.header.register_forward_hook(lambda module, given, out: seen.append(out))
    gradients(fused, torch.randn(3, 6), torch.zeros(3, dtype=torch.int64))
    assert len(seen) == 1
