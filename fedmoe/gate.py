"""The gate: a small private network that weighs the two experts for each sample, or each token of a text."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmoe.config import gate_norms


class SwitchNorm(nn.Module):
    """Switchable normalization of vectors (Luo et al., arXiv 1806.10779).

    Means and variances are learned convex mixtures of the layer's (over features) and the batch's (over samples; its
    running estimate in evaluation). The paper's third source, instance statistics, has no meaning for a vector.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.mean_mix = nn.Parameter(torch.ones(2))  # order [layer, batch]
        self.var_mix = nn.Parameter(torch.ones(2))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """[B, F] -> [B, F]."""
        layer_var, layer_mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        if self.training:
            batch_var, batch_mean = torch.var_mean(x, dim=0, correction=0)
            with torch.no_grad():  # not by lerp_, which vmap runs row by row
                self.running_mean += self.momentum * (batch_mean - self.running_mean)
                self.running_var += self.momentum * (batch_var - self.running_var)
        else:
            batch_mean, batch_var = self.running_mean, self.running_var
        m, v = self.mean_mix.softmax(0), self.var_mix.softmax(0)
        mean = m[0] * layer_mean + m[1] * batch_mean
        var = v[0] * layer_var + v[1] * batch_var
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


class Gate(nn.Module):
    """Flatten, norm, Linear, norm, sigmoid, Linear, norm: raw samples to logits in the order [global, local].

    The weights of the experts are the softmax of these logits; whoever mixes takes it, fused with the mixing.
    Arguments: `features` of a flattened sample, `hidden` width, `norm` as in the configuration (`gate.norm`).
    """

    def __init__(self, features: int, hidden: int, norm: str) -> None:
        super().__init__()
        first, second, third = gate_norms(norm)
        self.norm_in = _norm(first, features)
        self.fc1 = nn.Linear(features, hidden)
        self.norm_hidden = _norm(second, hidden)
        self.fc2 = nn.Linear(hidden, 2)
        self.norm_out = _norm(third, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> logits [B, 2]."""
        h = F.sigmoid(self.norm_hidden(self.fc1(self.norm_in(x.flatten(1)))))
        out: Tensor = self.norm_out(self.fc2(h))
        return out


class TokenGate(nn.Module):
    """The gate for each token of a sequence, from the embeddings of that token and of those before it.

    It sees the token's own embedding beside the mean of all so far, so nothing that follows; the rest is as in `Gate`.
    Arguments: `width` E of an embedding, `hidden` width, `norm` as in the configuration, none of it over a batch,
    whose statistics would be of tokens to come.
    """

    def __init__(self, width: int, hidden: int, norm: str) -> None:
        super().__init__()
        kinds = gate_norms(norm)
        assert not {"batch", "switch"} & set(kinds), kinds
        first, second, third = kinds
        self.norm_in = _norm(first, 2 * width)
        self.fc1 = nn.Linear(2 * width, hidden)
        self.norm_hidden = _norm(second, hidden)
        self.fc2 = nn.Linear(hidden, 2)
        self.norm_out = _norm(third, 2)

    def forward(self, embedded: Tensor) -> Tensor:
        """[B, T, E] -> logits [B, T, 2]."""
        so_far = torch.arange(1, embedded.shape[1] + 1, device=embedded.device, dtype=torch.float32)
        mean = embedded.float().cumsum(1) / so_far[:, None]
        both = torch.cat([embedded, mean.to(embedded.dtype)], 2)
        h = F.sigmoid(self.norm_hidden(self.fc1(self.norm_in(both))))
        out: Tensor = self.norm_out(self.fc2(h))
        return out


def _norm(kind: str, features: int) -> nn.Module:
    makers = {"switch": SwitchNorm, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
    return makers[kind](features) if kind in makers else nn.Identity()
