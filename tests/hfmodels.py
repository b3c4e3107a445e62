"""Tiny models of transformers in folders, for tests; none is fetched."""

import os
from pathlib import Path
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

VOCABULARY = 40
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ROTARY: dict[str, Any] = {**COMMON, **SHAPE, "num_key_value_heads": 1, "max_position_embeddings": 32}


def configuration(kind: str) -> Any:
    """The transformers configuration of one of the models."""
    import transformers

    t: Any = transformers

    image = {**SHAPE, "image_size": 28, "patch_size": 14, "num_channels": 1, "num_labels": 10}
    makers: dict[str, Any] = {
        "llama": lambda: t.LlamaConfig(**ROTARY),
        "tied": lambda: t.LlamaConfig(**ROTARY, tie_word_embeddings=True),
        "gpt2": lambda: t.GPT2Config(**COMMON, n_embd=16, n_layer=2, n_head=2, n_positions=32),
        "mistral": lambda: t.MistralConfig(**ROTARY, sliding_window=4),
        "gemma2": lambda: t.Gemma2Config(**ROTARY, head_dim=8, sliding_window=4, final_logit_softcapping=0.5),
        "cohere": lambda: t.CohereConfig(**ROTARY),
        "bert": lambda: t.BertConfig(**{**COMMON, "pad_token_id": 0}, **SHAPE),
        "t5": lambda: t.T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8),
        "vit": lambda: t.ViTConfig(**image),
        "deit": lambda: t.DeiTConfig(**image),
        "resnet": lambda: t.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_channels=1, num_labels=10
        ),
    }
    return makers[kind]()


def save(kind: str, above: Path) -> Path:
    """The folder of a model with random weights, made below `above`."""
    import transformers

    t: Any = transformers

    auto: Any = {
        "t5": t.AutoModelForSeq2SeqLM,
        **dict.fromkeys(("vit", "resnet"), t.AutoModelForImageClassification),
        "deit": t.DeiTForImageClassificationWithTeacher,
    }.get(kind, t.AutoModelForCausalLM)
    config = configuration(kind)
    t.utils.logging.disable_progress_bar()
    t.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = auto(config) if kind == "deit" else auto.from_config(config)
    model.save_pretrained(above / kind)
    return above / kind
