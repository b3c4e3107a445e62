"""Plain PyTorch statements of the fused operations: slow, obvious, differentiable, in any dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F


def gated_mix(
    global_: Tensor,  # [B, D]
    local: Tensor,  # [B, D]
    gate: Tensor,  # [B, 2] logits, order [global, local]
) -> Tensor:  # [B, D]
    """Mix two representations by the softmax of the gate's logits (FedMoE, arXiv 2402.01350, section 3)."""
    weights = gate.softmax(dim=1)
    return weights[:, :1] * global_ + weights[:, 1:] * local


def gated_head(
    global_: Tensor,  # [B, D]
    local: Tensor,  # [B, D]
    gate: Tensor,  # [B, 2] logits, order [global, local]
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    targets: Tensor,  # [B] integer
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weights: Tensor | None = None,  # [C]
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:  # [] or, for "none", [B]; []
    """The mix, its logits' loss and the number of correct predictions; rows with `ignore_index` count for nothing.

    A row's loss is Σ_c q_c (lse − z_c) + z_loss · lse², with q_c = (1 − ε) w_y [c = y] + ε w_c / C, ε the label
    smoothing, w the class weights, z the logits, capped to softcap · tanh(z / softcap), and lse = log Σ exp z.
    `mean` divides by Σ w_y of the rows that count; with none, the loss is 0.
    """
    logits = F.linear(gated_mix(global_, local, gate), weight, bias)
    w = logits.new_ones(len(weight)) if class_weights is None else class_weights.to(logits.dtype)
    rows, kept, correct = _losses(logits, targets, ignore_index, label_smoothing, z_loss, softcap, w)
    return _reduced(rows, w[targets.where(kept, 0).long()].where(kept, 0), reduction), correct


def gated_lm_head(
    global_: Tensor,  # [B, D]
    local: Tensor,  # [B, D]
    gate: Tensor,  # [B, 2] logits, order [global, local]
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    targets: Tensor,  # [B] integer
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,  # [B]
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:  # [] or, for "none", [B]; []
    """`gated_head` for a vocabulary: with a weight for each token, by which all of its loss is multiplied.

    `mean` divides by the sum of the weights of the rows that count; where it is 0, by 1.
    """
    logits = F.linear(gated_mix(global_, local, gate), weight, bias)
    ones = logits.new_ones(len(weight))
    rows, kept, correct = _losses(logits, targets, ignore_index, label_smoothing, z_loss, softcap, ones)
    w = torch.ones_like(rows) if token_weights is None else token_weights.to(rows.dtype)
    w = w.where(kept, 0)
    return _reduced((rows * w).where(kept, 0), w, reduction), correct


def weighted_accumulate(
    theta: Tensor,  # [P]
    update: Tensor,  # [P]
    weight: Tensor,  # []
) -> Tensor:  # [P]
    """A new θ + weight · update, in the dtype of θ; Σ w_k θ_k when called for client after client."""
    return theta + weight * update.to(theta.dtype)


def _losses(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float | None,
    w: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # [B] losses, [B] which rows count, [] correct predictions
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = targets != ignore_index
    index = targets.where(kept, 0).long()
    gaps = -logits.log_softmax(dim=1)  # lse − z_c
    rows = (1 - smoothing) * w[index] * gaps.gather(1, index[:, None])[:, 0]
    if smoothing:
        rows = rows + smoothing / logits.shape[1] * (gaps * w).sum(1)
    if z_loss:
        rows = rows + z_loss * logits.logsumexp(1) ** 2
    return rows.where(kept, 0), kept, ((logits.argmax(1) == targets) & kept).sum()


def _reduced(rows: Tensor, weights: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if reduction != "mean":
        raise ValueError(f"reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    total = weights.sum()
    return rows.sum() / total.where(total != 0, 1)
