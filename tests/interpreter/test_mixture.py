"""A mixture whose head is fused, in Triton's interpreter, against the same mixture by PyTorch's operators."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from fedmoe.errors import UserError
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


def every_module(register: Callable[..., Any]) -> Callable[[nn.Module, Any], Any]:
    """For the header alone, as the others are called for their outputs in any case."""

    def attach(header: nn.Module, see: Any) -> Any:
        return register(lambda module, *others: see() if module is header else None)

    return attach


def replaced(header: nn.Module, see: Any) -> None:
    forward = header.forward
    header.forward = lambda mixed: (see(), forward(mixed))[1]


ATTACHED: dict[str, Callable[[nn.Module, Any], Any]] = {
    "forward": lambda header, see: header.register_forward_hook(lambda *_: see()),
    "forward pre": lambda header, see: header.register_forward_pre_hook(lambda *_: see()),
    "backward": lambda header, see: header.register_full_backward_hook(lambda *_: see()),
    "backward pre": lambda header, see: header.register_full_backward_pre_hook(lambda *_: see()),
    "a forward of its own": replaced,
    "forward of all": every_module(hooks.register_module_forward_hook),
    "forward pre of all": every_module(hooks.register_module_forward_pre_hook),
    "backward of all": every_module(hooks.register_module_full_backward_hook),
    "backward pre of all": every_module(hooks.register_module_full_backward_pre_hook),
}


@pytest.mark.parametrize("kind", ATTACHED)
def test_what_is_attached_to_a_header_is_kept(kind: str) -> None:
    _, fused = mixtures(lambda: nn.Linear(20, 5))
    seen: list[bool] = []
    handle = ATTACHED[kind](fused.header, lambda: seen.append(True))
    try:
        gradients(fused, torch.randn(3, 6), torch.zeros(3, dtype=torch.int64))
    finally:
        if handle is not None:
            handle.remove()
    assert len(seen) == 1


def test_auto_is_plain_where_shapes_broadcast() -> None:
    """A representation of width 1, which PyTorch adds to each feature, is not the kernels'."""
    torch.manual_seed(0)
    model = Mixture(nn.Linear(6, 20), Split(nn.Linear(6, 1), nn.Linear(20, 5)), nn.Linear(6, 2), "auto")
    x, y = torch.randn(3, 6), torch.zeros(3, dtype=torch.int64)
    ours = gradients(model, x, y)
    model.head = "plain"
    theirs = gradients(model, x, y)
    assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
    model.head = "fused"
    with pytest.raises(UserError, match=r"the kernels cannot run: local has shape \(3, 1\), expected \(3, 20\)"):
        gradients(model, x, y)
