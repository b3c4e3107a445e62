"""Tensors without memory, against those that have it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmoe.engine.pretend import Pretence, pretended

CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a product": lambda x, y: x @ y,
    "two results": lambda x, y: x.max(1),
    "a list of operands": lambda x, y: torch.cat([x, y.t()]),
    "another type": lambda x, y: x.to(torch.bfloat16),
    "1 is not True": lambda x, y: (x.sum(1, True), x.sum(1), x * 1, x * True, x * 1.0, x > 1),
    "in place": lambda x, y: x.add_(1),
    "in place, with itself": lambda x, y: torch.add(x, x, out=x),
    "into another": lambda x, y: torch.add(x, 1, out=y.t()),
    "into one that grows": lambda x, y: torch.add(x, 1, out=x.new_empty(0)),
    "another shape in place": lambda x, y: (x.unsqueeze_(0), x.t),
    "another's memory": lambda x, y: x.set_(y.t()),  # type: ignore[call-overload]
    "views": lambda x, y: (x.t(), x[1:], x[0], x.view(-1), x.view(torch.int32), *x.split(1), x.expand(2, *x.shape)),
    "a view or a copy": lambda x, y: (x.t().reshape(-1), x.reshape(-1), x.contiguous(), y.t().contiguous()),
    "a normalization": lambda x, y: F.layer_norm(x, (3,)),
    "a loss": lambda x, y: F.cross_entropy(x, torch.zeros(len(x), dtype=torch.int64)),
    "complex numbers": lambda x, y: torch.view_as_real(torch.view_as_complex(x[:, :2].contiguous()).conj() * 2),
}


def described(call: Callable[[Tensor, Tensor], Any]) -> list[Any]:
    """What can be said of a call's results and operands without looking at values."""
    x, y = torch.ones(4, 3), torch.ones(3, 4)
    out = call(x, y)
    tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)] + [x, y]
    homes = [t.untyped_storage()._cdata for t in tensors]
    return [
        (t.shape, t.stride(), t.storage_offset(), t.dtype, t.device, t.untyped_storage().nbytes(), homes.index(home))
        for t, home in zip(tensors, homes, strict=True)
    ]


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("name", CALLS)
def test_all_but_values_is_as_with_memory_each_time(name: str) -> None:
    expected = described(CALLS[name])
    with Pretence():
        assert [described(CALLS[name]) for _ in range(3)] == [expected] * 3


def test_gradients_and_shared_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model[3].weight.requires_grad_(False)
    with pretended(model) as own:
        own(torch.ones(2, 3)).sum().backward()
        assert own[2].weight is own[0].weight
        assert [p.grad is not None for p in own.parameters()] == [True, True, True, False, True]
    assert all(p.grad is None for p in model.parameters())


def test_values_are_not_to_be_had() -> None:
    with Pretence():
        x = torch.ones(3) * 2
        for ask in (x.tolist, x.numpy, x[0].item, lambda: x.data_ptr()):
            with pytest.raises(RuntimeError):
                ask()


def test_what_lives_is_counted() -> None:
    pretence = Pretence()
    with pretence:
        before = torch.empty(1000)
        for _ in range(2):  # the second time all is known
            with pretence.live() as live:
                x = before + 1
                del x
                y = before.clone()
                z = before.view(10, 100).t() * 2
                z[1:].add_(1)
                before.mul_(2)
                del y, z
            assert live.peak == 2 * 4000
