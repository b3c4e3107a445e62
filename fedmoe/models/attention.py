"""Attention of language models, told that it is causal instead of being given a mask."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "fedmoe_causal"
"""By which transformers knows it."""


def causal_attention(
    module: nn.Module,
    query: Tensor,  # [B, heads, T, d]
    key: Tensor,  # [B, heads / g, T, d]
    value: Tensor,  # likewise
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:  # [B, T, heads, d]
    """Each token's attention to itself and those before it, as transformers calls it (`AttentionInterface`).

    The library makes a mask of [B, 1, T, T], or looks at its values to be spared it, for which the host waits. Texts
    here are whole windows, so PyTorch's own causal kernels do.
    """
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    if groups > 1 and not query.is_cuda:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is None and (sliding_window is None or sliding_window >= length):
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=groups > 1 and query.is_cuda
        )
        return out.transpose(1, 2).contiguous(), None
    if groups > 1 and query.is_cuda:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    at = torch.arange(length, device=query.device)
    back = at[:, None] - at
    seen = (back >= 0) & (back < (sliding_window or length))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = capped(scores, softcap).masked_fill(~seen, -torch.inf).float().softmax(3).to(query.dtype)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2).contiguous(), None


def capped(values: Tensor, softcap: float | None) -> Tensor:
    """Values within (-softcap, softcap), by a tanh, of the same shape; as they are where there is no cap."""
    return values if softcap is None else softcap * torch.tanh(values / softcap)
