"""What of a transformers model trains: all of it, adapters of low rank in its linear layers, or its header alone."""

import importlib
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedmoe import config as settings
from fedmoe.errors import UserError

ADAPTER = "default"
"""The name that peft gives an adapter where there is one."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Extractor(nn.Module):
    """A transformers model without its header; always in evaluation mode where nothing of it trains."""

    def __init__(self, body: nn.Module, header: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self._taken, self._given = next(body.parameters()).dtype, header.weight.dtype
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Without dropout, and with running averages as they are, if it is frozen."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def taken(self, x: Tensor) -> Tensor:
        """Input in the type of the body, unless autocast decides."""
        return _cast(x, self._taken)

    def given(self, x: Tensor) -> Tensor:
        """A representation in the type of the header's weight, unless autocast decides."""
        return _cast(x, self._given)


def body_dtype(options: settings.Model) -> torch.dtype:
    """What a model is made in."""
    return torch.float32 if options.tune == "full" else DTYPES[options.frozen_dtype]


def apply(
    name: str, whole: nn.Module, body: nn.Module, header: nn.Linear, options: settings.Model, probe: bool
) -> None:
    """Freeze `body` of the model `whole` and put adapters into it, in place, as `options.tune` says.

    Frozen parameters take their dtype. The header trains with "full", and otherwise if `probe` and it is not the frozen
    input embedding. Raises UserError where peft is missing, or for targets that are no linear layers of the body.
    """
    if options.tune == "full":
        return
    tied = {id(p) for p in body.parameters()}
    for p in body.parameters():
        p.requires_grad_(False)
    for p in header.parameters():
        p.requires_grad_(probe and id(p) not in tied)
    if options.tune == "lora":
        _adapt(name, whole, body, options)
    for p in {*body.parameters(), *header.parameters()}:
        if p.is_floating_point():
            p.data = p.data.to(torch.float32 if p.requires_grad else body_dtype(options))


def optional(library: str, name: str) -> Any:
    """An optional library that the model `name` needs; UserError where it cannot be imported."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name == library:
            raise UserError(f"model {name!r} needs {library}, which is not installed: pip install {library}") from error
        raise UserError(f"model {name!r} needs {library}, which needs {error.name}, which is not installed") from error
    except Exception as error:  # what libraries below it raise
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"model {name!r} needs {library}, which cannot be imported here: {what}") from error


def _adapt(name: str, whole: nn.Module, body: nn.Module, options: settings.Model) -> None:
    peft = optional("peft", name)
    linear = {path: module for path, module in body.named_modules() if _is_linear(module)}
    targets = set(options.lora_targets) or {path.rpartition(".")[2] for path in linear}
    known = {path for path in linear if any(path == t or path.endswith(f".{t}") for t in targets)}
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in linear):
            names = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
            raise UserError(f"model.lora_targets has {target!r}, the linear layers of model {name!r} are {names}")
    if not known:
        raise UserError(
            f'model {name!r} has no linear layers that adapters could go into: set model.tune to "frozen" or "full"'
        )
    body_config: Any = body.config
    config = peft.LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules=sorted(targets),
        # transformers' Conv1D, of GPT-2, keeps its weight the other way round.
        fan_in_fan_out=not any(isinstance(linear[path], nn.Linear) for path in known),
        base_model_name_or_path=body_config.name_or_path or None,
    )
    peft.inject_adapter_in_model(config, whole, adapter_name=ADAPTER)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    kind = x.device.type
    return x if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) else x.to(dtype)
