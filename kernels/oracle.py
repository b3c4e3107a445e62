"""Plain PyTorch statements of the fused operations: slow, obvious, differentiable, in any dtype."""

from torch import Tensor


def gated_mix(
    global_: Tensor,  # [B, D]
    local: Tensor,  # [B, D]
    gate: Tensor,  # [B, 2] logits, order [global, local]
) -> Tensor:  # [B, D]
    """Mix two representations by the softmax of the gate's logits (FedMoE, arXiv 2402.01350, section 3)."""
    weights = gate.softmax(dim=1)
    return weights[:, :1] * global_ + weights[:, 1:] * local
