"""Causal language models, body and head apart: small ones with fresh weights, and any of transformers, `hf/NAME`.

The families are transformers' own, in three sizes by the parameters that a model has besides its embeddings: `nano`,
about 0.07 M, the usual global expert; `tiny`, about 0.6 M; `small`, about 13 M.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedmoe import config as settings
from fedmoe.errors import UserError, reason
from fedmoe.models import hf, tuning
from fedmoe.models.attention import capped

SIZES = {"nano": (64, 2, 4, 128), "tiny": (128, 4, 4, 256), "small": (384, 8, 6, 1024)}
"""Width, layers, heads, and width between the two layers of a feed-forward network."""
FAMILIES = ("llama", "qwen", "gpt2", "gemma")
NAMES = tuple(f"{family}-{size}" for family in FAMILIES for size in SIZES)


class Body(tuning.Extractor):
    """A language model without its head: tokens int64 [B, T] -> representations [B, T, D]."""

    def __init__(self, whole: Any, header: nn.Linear) -> None:
        super().__init__(whole.base_model, header)
        self._whole: list[Any] = [whole]  # in a list, so that its head is no part of this module

    @property
    def whole(self) -> Any:
        """The model with its head, as transformers knows it, of the same tensors."""
        return self._whole[0]

    def forget_head(self) -> None:
        """Let go of the head, of which a global expert has no use."""
        self._whole = [self.body]

    @property
    def width(self) -> int:
        """D."""
        width: int = self.whole.config.get_text_config().hidden_size
        return width

    @property
    def embedding_width(self) -> int:
        """E."""
        width: int = self.whole.get_input_embeddings().weight.shape[1]
        return width

    def checkpoint(self, on: bool) -> None:
        """Whether what is within layers is computed again in the backward pass rather than kept."""
        hf.checkpoint(self.whole, on)

    def embed(self, tokens: Tensor) -> Tensor:
        """What the model begins with, before positions: [B, T] -> [B, T, E]."""
        out: Tensor = self.whole.get_input_embeddings()(tokens)
        return out

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]; a token's sees those before it alone."""
        return self.given(self.body(input_ids=tokens, use_cache=False).last_hidden_state)


class Language(NamedTuple):
    """A language model in two parts: `capped(header(extractor(tokens)), softcap)` are its logits."""

    extractor: Body
    header: nn.Linear  # [..., D] -> [..., V]; where embeddings are tied, its weight is the very parameter of these
    softcap: float | None
    """Logits z become softcap * tanh(z / softcap) where it is given."""


def make(name: str, options: settings.Model, vocabulary: int, positions: int) -> Language:
    """The untrained model called `name`, for texts of up to `positions` tokens of a vocabulary of so many.

    Draws from PyTorch's global generator. Under `torch.device("meta")` nothing is read but the configuration, and
    nothing checked that takes memory. Raises UserError for an unknown name, a model that is not a causal language model
    with a linear header, one that is too small for the vocabulary or the positions, and whatever is wrong with its
    files.
    """
    check_name(name)
    if name in NAMES:
        source = hf.Source(name, _config(name, vocabulary, positions), None)
    else:
        source = hf.find(name, options)
        _fit(source, vocabulary, positions)
    whole, _ = hf.load(hf.CAUSAL, source, options)
    body, header = whole.base_model, whole.get_output_embeddings()
    if body is whole or not isinstance(header, nn.Linear):
        raise UserError(f"model {name!r} has no linear header behind a body, which is what can be mixed")
    softcap = getattr(whole.config.get_text_config(), "final_logit_softcapping", None)
    _check(name, whole, body, header, softcap)
    tuning.apply(name, whole, body, header, options, probe=options.tune == "frozen")
    return Language(Body(whole, header), header, softcap)


def check_name(name: str) -> None:
    """Raise UserError for what cannot be the name of a language model."""
    if name not in NAMES and not name.startswith(hf.PREFIX):
        raise UserError(f"language model {name!r} is none of {', '.join(NAMES)}, nor `{hf.PREFIX}NAME`")


def _fit(source: hf.Source, vocabulary: int, positions: int) -> None:
    """Raise UserError where the model's tokens or positions are too few."""
    text = source.config.get_text_config()
    tokens, most = getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)
    if tokens is not None and tokens < vocabulary:
        raise UserError(
            f"model {source.name!r} has a vocabulary of {tokens} tokens, the tokenizer one of {vocabulary}: set "
            "data.tokenizer to the one that belongs to the model, and take models that share it"
        )
    if most is not None and most < positions:
        raise UserError(
            f"model {source.name!r} has {most} positions, data.sequence_length is {positions}: set at most {most}"
        )


def _check(name: str, whole: Any, body: Any, header: nn.Linear, softcap: float | None) -> None:
    """Raise UserError unless the two parts give the model's own logits, each from the tokens before it alone."""
    if hf.on_meta():
        return
    tokens = torch.tensor([[0, 1], [0, 0]])

    def parts() -> Tensor:
        return capped(header(body(input_ids=tokens, use_cache=False).last_hidden_state), softcap)

    try:
        own = hf.evaluated(whole, lambda: whole(input_ids=tokens, use_cache=False).logits)
        ours = hf.evaluated(whole, parts)
    except Exception as error:  # whatever a model raises
        raise UserError(f"model {name!r} does not run on tokens: {reason(error)}") from error
    if not hf.same(ours, own):
        raise UserError(f"model {name!r} does more than a linear header to make logits, which is not supported")
    if not hf.same(own[0, 0], own[1, 0]):
        raise UserError(f"model {name!r} is not causal: what it says of a token depends on the next one")


def _config(name: str, vocabulary: int, positions: int) -> Any:
    transformers = hf.library(name)
    family, _, size = name.partition("-")
    width, layers, heads, inner = SIZES[size]
    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads, n_inner=inner,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
    given: dict[str, Any] = {
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "intermediate_size": inner,
        "head_dim": width // heads,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "llama":
        return transformers.LlamaConfig(**given, tie_word_embeddings=False)
    if family == "qwen":
        return transformers.Qwen3Config(**given, tie_word_embeddings=True)
    return transformers.Gemma3TextConfig(
        **given, tie_word_embeddings=True, query_pre_attn_scalar=width // heads, sliding_window=positions
    )
