"""The gate against its definition, norm by norm."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmoe.config import gate_norms
from fedmoe.errors import UserError
from fedmoe.gate import Gate, SwitchNorm


def test_presets() -> None:
    assert gate_norms("none") == ("none", "none", "none")
    assert gate_norms("paper") == ("switch", "batch", "batch")
    assert gate_norms("layer-batch-none") == ("layer", "batch", "none")


@pytest.mark.parametrize("norm", ["", "batch", "layer-batch", "layer,batch,batch", "a-b-c", "none-none-none-none"])
def test_unknown_norms_are_refused(norm: str) -> None:
    with pytest.raises(UserError, match="must be none, paper, or three of switch, layer, batch, none"):
        gate_norms(norm)


def test_without_norms_it_is_two_linear_layers_and_a_sigmoid() -> None:
    torch.manual_seed(0)
    gate = Gate(12, 128, "none")
    assert sum(p.numel() for p in gate.parameters()) == 12 * 128 + 128 + 128 * 2 + 2
    x = torch.randn(5, 3, 2, 2)
    h = torch.sigmoid(x.reshape(5, 12) @ gate.fc1.weight.T + gate.fc1.bias)
    torch.testing.assert_close(gate(x), h @ gate.fc2.weight.T + gate.fc2.bias)


def test_norms_are_where_the_names_say() -> None:
    gate = Gate(12, 8, "layer-batch-switch")
    assert isinstance(gate.norm_in, nn.LayerNorm)
    assert isinstance(gate.norm_hidden, nn.BatchNorm1d)
    assert isinstance(gate.norm_out, SwitchNorm)
    assert (gate.norm_in.normalized_shape, gate.norm_hidden.num_features) == ((12,), 8)
    x = torch.randn(6, 12)
    out = gate.norm_out(gate.fc2(torch.sigmoid(gate.norm_hidden(gate.fc1(gate.norm_in(x))))))
    gate.norm_hidden.reset_running_stats()
    assert torch.equal(gate(x), out)


def extreme(norm: SwitchNorm, layer: float) -> SwitchNorm:
    """`norm` with all its weight on one source."""
    with torch.no_grad():
        for mix in (norm.mean_mix, norm.var_mix):
            mix.copy_(torch.tensor([layer, -layer]))
    return norm


def test_switch_norm_is_layer_norm_at_one_end_and_batch_norm_at_the_other() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 5) * 3 + 1
    torch.testing.assert_close(extreme(SwitchNorm(5), 50.0)(x), F.layer_norm(x, (5,)))
    torch.testing.assert_close(extreme(SwitchNorm(5), -50.0)(x), F.batch_norm(x, None, None, training=True))


def test_switch_norm_evaluates_with_running_statistics() -> None:
    torch.manual_seed(0)
    norm = extreme(SwitchNorm(5), -50.0)
    for _ in range(200):
        norm(torch.randn(64, 5) * 3 + 1)
    norm.eval()
    before = norm.running_mean.clone()
    x = torch.randn(4, 5)
    torch.testing.assert_close(norm(x), (x - norm.running_mean) * torch.rsqrt(norm.running_var + 1e-5))
    assert torch.equal(norm.running_mean, before)
    # Each sample's result is its own in evaluation.
    torch.testing.assert_close(norm(x[:1]), norm(x)[:1])
    assert (norm.running_mean - 1).abs().max() < 0.5
    assert (norm.running_var - 9).abs().max() < 3


def test_switch_norm_starts_half_and_half_and_learns_both_mixtures() -> None:
    torch.manual_seed(0)
    norm, x = SwitchNorm(5), torch.randn(7, 5) * 3 + 1
    mean = (x.mean(1, keepdim=True) + x.mean(0)) / 2
    var = (x.var(1, keepdim=True, correction=0) + x.var(0, correction=0)) / 2
    torch.testing.assert_close(norm(x), (x - mean) / (var + 1e-5).sqrt())
    norm(x).pow(3).sum().backward()
    for mix in (norm.mean_mix, norm.var_mix):
        assert mix.grad is not None
        assert mix.grad.abs().min() > 0
