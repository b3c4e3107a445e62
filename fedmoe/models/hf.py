"""Models of Hugging Face's transformers as experts: opened without pickle, split in body and head, tuned as wanted."""

import importlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmoe.config import Model
from fedmoe.engine.seeds import globals_kept
from fedmoe.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PREFIX = "hf/"
CAUSAL = "fedmoe_causal"


class Body(nn.Module):
    """A language model without its head: tokens int64 [B, T] -> representations [B, T, D]."""

    def __init__(self, whole: "PreTrainedModel") -> None:
        super().__init__()
        self.body = whole.base_model
        self._whole: list[Any] = [whole]  # in a list, so that its head is no part of this module

    @property
    def whole(self) -> "PreTrainedModel":
        """The model with its head, as transformers knows it, of the same tensors."""
        whole: PreTrainedModel = self._whole[0]
        return whole

    def forget_head(self) -> None:
        """Let go of the head, of which a global expert has no use."""
        self._whole = [self.whole.base_model]

    def embed(self, tokens: Tensor) -> Tensor:
        """What the model begins with, before positions: [B, T] -> [B, T, E]."""
        out: Tensor = self.whole.get_input_embeddings()(tokens)
        return out

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]; a token's sees those before it alone."""
        out: Tensor = self.body(input_ids=tokens, use_cache=False).last_hidden_state
        return out


class Language(NamedTuple):
    """A language model in two parts: `header(extractor(tokens))`, capped, are its logits."""

    extractor: Body
    header: nn.Linear  # [..., D] -> [..., V]; where embeddings are tied, its weight is the very parameter of these
    softcap: float | None
    """Logits z become softcap * tanh(z / softcap) where it is given."""


def library(name: str) -> Any:
    """The optional library `name`. Raises UserError saying how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"language models need {name} ({error}): pip install 'fedmoe[lm]'") from error


def make(name: str, model: Model, vocabulary: int, positions: int) -> Language:
    """The model `hf/NAME`; see `language.make`.

    Whatever is loaded is safetensors and no code. Raises UserError naming what cannot be had or does not fit.
    """
    transformers, place = library("transformers"), name.removeprefix(PREFIX)
    folder = Path(place).expanduser()
    local = folder.is_dir()
    if not local and place.startswith((".", "/", "~")):
        raise UserError(f"model {name!r}: there is no folder {folder}: give one with a config.json, or a hub name")
    source, options = (str(folder) if local else place), {"trust_remote_code": False, "local_files_only": local}
    with _opening(name):
        config = transformers.AutoConfig.from_pretrained(source, **options)
    kind, text = config.model_type, config.get_text_config()
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise UserError(f"model {name!r}: {kind!r} is no causal language model of transformers: choose one")
    if text.vocab_size < vocabulary:
        raise UserError(
            f"model {name!r} has a vocabulary of {text.vocab_size}, the tokenizer one of {vocabulary}: set "
            "data.tokenizer to the one that belongs to the model, and take models that share it"
        )
    most = getattr(text, "max_position_embeddings", None)
    if most is not None and most < positions:
        raise UserError(
            f"model {name!r} has {most} positions, data.sequence_length is {positions}: lower it, or choose another"
        )
    meta = torch.empty(0).device.type == "meta"
    if model.weights == "random" or meta:
        return split(name, fresh(config, model), model)
    if local and not list(folder.glob("*.safetensors")):
        raise UserError(
            f"model {name!r}: no safetensors in {folder}: put its weights there, or set model.weights to random"
        )
    with _opening(name):
        whole, told = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            **options,
            dtype=torch.float32,
            use_safetensors=True,
            attn_implementation=_attention(model),
            output_loading_info=True,
        )
    for what in ("missing_keys", "mismatched_keys"):
        if odd := sorted(map(str, told.get(what) or ())):
            raise UserError(f"model {name!r}: its weights do not fit its config.json: {what[:-5]} {odd[0]}")
    return split(name, whole, model)


@contextmanager
def _opening(name: str) -> Iterator[None]:
    """What transformers raises within the block for a model that it cannot open is a user's, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever transformers, its hub, safetensors and a broken file raise
        said = " ".join(str(error).split())
        if re.search("gated|401|403|Unauthorized", said):
            raise UserError(
                f"model {name!r} is gated: accept its terms on the hub and log in, or give a folder"
            ) from error
        if re.search("offline|couldn't connect|connect to|internet|cached files|not a local folder|404", said, re.I):
            raise UserError(
                f"model {name!r}: is neither a folder nor to be had from the hub: give a folder with config.json and "
                "safetensors, or check the name and the network"
            ) from error
        raise UserError(f"model {name!r} cannot be opened: {type(error).__name__}: {said[:200]}") from error


def fresh(config: "PretrainedConfig", model: Model) -> "PreTrainedModel":
    """A model with the weights that its family begins with, drawn by the global generator, in fp32."""
    transformers = library("transformers")
    made: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=_attention(model), dtype=torch.float32
    )
    return made


def split(name: str, whole: "PreTrainedModel", model: Model) -> Language:
    """A causal language model in body and head, tuned as `model.tune` says.

    Raises UserError where its logits are more than that, or `model.tune` does not suit it.
    """
    header = whole.get_output_embeddings()
    if type(header) is not nn.Linear:
        raise UserError(f"language model {name!r}: its head is a {type(header).__name__}, must be a linear layer")
    softcap = getattr(whole.config.get_text_config(), "final_logit_softcapping", None)
    _tune(whole, header, model)
    made = Language(Body(whole), header, softcap)
    if header.weight.device.type != "meta":
        _check(name, made)
    if model.tune != "full" and model.frozen_dtype == "bf16":
        for parameter in whole.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    if model.activation_checkpointing:
        if not whole.supports_gradient_checkpointing:
            raise UserError(f"language model {name!r} has no activation checkpointing: leave it off, or choose another")
        # Later versions call it otherwise.
        enable = getattr(whole, "activation_checkpointing_enable", whole.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return made


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


def _attention(model: Model) -> str:
    """The name by which transformers knows what `model.attention` wants."""
    if model.attention != "sdpa":
        return model.attention
    library("transformers").AttentionInterface.register(CAUSAL, causal_attention)
    return CAUSAL


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits within (-softcap, softcap), of the same shape."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _tune(whole: "PreTrainedModel", header: nn.Linear, model: Model) -> None:
    """Have train what `model.tune` says: all; adapters within the body; or the head alone, unless embeddings are it."""
    if model.tune == "full":
        return
    whole.requires_grad_(False)
    if model.tune == "lora":
        peft = library("peft")
        with warnings.catch_warnings():  # of GPT-2's layers, whose weights are transposed, which it then heeds
            warnings.simplefilter("ignore", UserWarning)
            peft.inject_adapter_in_model(
                peft.LoraConfig(
                    r=model.lora_rank,
                    lora_alpha=model.lora_alpha,
                    target_modules=list(model.lora_targets) or "all-linear",
                    task_type="CAUSAL_LM",
                ),
                whole,
            )
    elif header.weight is not whole.get_input_embeddings().weight:
        header.requires_grad_(True)


def _check(name: str, made: Language) -> None:
    """Raise UserError unless head after body, capped, gives the model's own logits."""
    whole, tokens = made.extractor.whole, torch.arange(2)[None]
    was_training = whole.training
    with torch.no_grad(), globals_kept():
        whole.eval()
        own = whole(input_ids=tokens, use_cache=False).logits
        ours = capped(made.header(made.extractor(tokens)), made.softcap)
    whole.train(was_training)
    if not torch.equal(own, ours):
        gap = (own - ours).abs().max().item()
        raise UserError(
            f"language model {name!r}: its logits are not its head's of its body, they differ by {gap:.3g}: this "
            "family's head does more than a linear layer; choose another"
        )
