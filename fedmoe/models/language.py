"""Causal language models in two parts, body and head: small ones with fresh weights here, any of transformers' by `hf`.

The families are transformers' own, in three sizes by the parameters that a model has besides its embeddings: `nano`,
about 0.1 M, the usual global expert; `tiny`, about 0.6 M; `small`, about 14 M.
"""

from typing import TYPE_CHECKING, Any

from fedmoe.config import Model
from fedmoe.errors import UserError
from fedmoe.models import hf
from fedmoe.models.hf import Language as Language

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SIZES = {"nano": (64, 2, 4, 128), "tiny": (128, 4, 4, 256), "small": (384, 8, 6, 1024)}
"""Width, layers, heads, and width between the two layers of a feed-forward network."""
FAMILIES = ("llama", "qwen", "gpt2", "gemma")
NAMES = tuple(f"{family}-{size}" for family in FAMILIES for size in SIZES)


def make(name: str, model: Model, vocabulary: int, positions: int) -> Language:
    """The untrained model called `name`, for texts of up to `positions` tokens of a vocabulary of so many.

    `hf/NAME` is one of transformers', from a folder or by its hub name, with its weights or untrained, as
    `model.weights` says. How it trains is `model.tune`'s. Raises UserError for an unknown name, or a model that cannot
    be had or does not fit.
    """
    if name.startswith(hf.PREFIX):
        return hf.make(name, model, vocabulary, positions)
    if name not in NAMES:
        raise UserError(f"language model {name!r} is none of {', '.join(NAMES)}, nor `hf/NAME`")
    return hf.split(name, hf.fresh(_config(name, vocabulary, positions), model), model)


def _config(name: str, vocabulary: int, positions: int) -> "PretrainedConfig":
    transformers = hf.library("transformers")
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
