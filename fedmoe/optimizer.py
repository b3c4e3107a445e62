"""What `[training]` says of the optimizer: for an engine; and for the plain loop, by PyTorch, with what persists of it.

Of SGD that is the momentum of every parameter (`momentum/NAME`); of AdamW the running means (`first/NAME`,
`second/NAME`) and the number of steps that they have taken part in, of private parameters and of theta's (`step`).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fedmoe.config import Training
from fedmoe.engine.member import SGD, AdamW
from fedmoe.engine.seam import State

KINDS = {"momentum": "momentum_buffer", "first": "exp_avg", "second": "exp_avg_sq"}
"""Of what is kept of every parameter, by what PyTorch calls it."""


def rule(t: Training) -> SGD | AdamW:
    """As an engine takes it."""
    reset = t.theta_momentum == "reset"
    if t.optimizer == "sgd":
        return SGD(lr=t.lr, momentum=t.momentum, weight_decay=t.weight_decay, reset_theta=reset, clip_norm=t.clip_norm)
    return AdamW(
        lr=t.lr,
        betas=t.betas,
        eps=t.eps,
        bits=8 if coded(t) else 32,
        weight_decay=t.weight_decay,
        reset_theta=reset,
        clip_norm=t.clip_norm,
    )


def coded(t: Training) -> bool:
    """Whether the state is in 8 bits, which engines alone can go on from."""
    return t.optimizer == "adamw" and t.optimizer_states == "8bit"


def make(t: Training, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """PyTorch's own, with all its defaults; the norm is not clipped by it."""
    if t.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=t.lr, momentum=t.momentum, weight_decay=t.weight_decay)
    return torch.optim.AdamW(parameters, lr=t.lr, betas=t.betas, eps=t.eps, weight_decay=t.weight_decay)


def expected(t: Training, parameters: Mapping[str, Tensor], shared: bool) -> dict[str, Tensor]:
    """Tensors of the dtype and shape that each part of the state has, by name; `shared`: whether there is a theta.

    The maxima of 8-bit states are not among them: how many there are is the engine's affair.
    """
    kinds = ("momentum",) if t.optimizer == "sgd" else ("first", "second")
    like = {
        f"{kind}/{name}": torch.empty_like(p, dtype=torch.uint8 if coded(t) else p.dtype, device="meta")
        for kind in kinds
        for name, p in parameters.items()
    }
    return like if t.optimizer == "sgd" else like | {"step": torch.empty(1 + shared, device="meta")}


def state(made: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], theta: set[str]) -> State:
    """What persists, by name, not copied; nothing of parameters that have had no gradient."""
    kept: State = {}
    steps = [0.0] * (1 + bool(theta))
    for name, parameter in parameters.items():
        own = made.state.get(parameter, {})
        kept |= {f"{kind}/{name}": own[key] for kind, key in KINDS.items() if own.get(key) is not None}
        if "step" in own:
            steps[name in theta] = max(steps[name in theta], float(own["step"]))
    return kept | {"step": torch.tensor(steps)} if isinstance(made, torch.optim.AdamW) and kept else kept


def load(
    made: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], theta: set[str], kept: Mapping[str, Tensor]
) -> None:
    """Go on from what `state` gave."""
    made.state.clear()
    for name, parameter in parameters.items():
        own = {key: kept[f"{kind}/{name}"] for kind, key in KINDS.items() if f"{kind}/{name}" in kept}
        for key, tensor in own.items():
            made.state[parameter][key] = torch.empty_like(parameter).copy_(tensor)
        if own and "step" in kept:
            made.state[parameter]["step"] = kept["step"][int(name in theta)].detach().clone()


def forget(made: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Let what is kept of these parameters begin anew."""
    for parameter in parameters:
        for value in made.state.get(parameter, {}).values():
            if value is not None:
                value.zero_()
