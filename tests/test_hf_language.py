"""Language models of transformers by folder: what the parts give is the whole's, and what cannot be used is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from fedmoe.config import Model
from fedmoe.errors import UserError
from fedmoe.models.attention import capped
from fedmoe.models.language import Language, make
from tests.hfmodels import VOCABULARY, save

T = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    above, made = tmp_path_factory.mktemp("models"), dict[str, Path]()
    return lambda kind: made.setdefault(kind, above / kind if kind in made else save(kind, above))


def tokens(seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(vocabulary, (3, T + 1), generator=torch.Generator().manual_seed(seed))


def logits(model: Language, x: Tensor) -> Tensor:
    return capped(model.header(model.extractor(x)), model.softcap)


def hf(folder: Path, **options: Any) -> Language:
    return make(f"hf/{folder}", Model(**options), VOCABULARY, T)


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "mistral", "gemma2"])
def test_loss_and_gradients_are_the_whole_models(folder: Callable[[str], Path], kind: str) -> None:
    model = hf(folder(kind))
    model.extractor.eval()  # GPT-2 has dropout
    whole: Any = transformers.AutoModelForCausalLM.from_pretrained(folder(kind), attn_implementation="eager")
    x = tokens()
    loss = F.cross_entropy(logits(model, x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    theirs = whole(x, labels=x).loss
    torch.testing.assert_close(loss, theirs)
    loss.backward()
    theirs.backward()
    ours = {n.removeprefix("body."): p.grad for n, p in model.extractor.named_parameters()}
    for name, p in whole.base_model.named_parameters():
        torch.testing.assert_close(ours.pop(name), p.grad, rtol=1e-4, atol=1e-6)
    assert ours == {}
    torch.testing.assert_close(model.header.weight.grad, whole.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
    tied = model.header.weight is model.extractor.whole.get_input_embeddings().weight
    assert tied == (kind in ("tied", "gpt2", "gemma2"))
    assert model.softcap == (0.5 if kind == "gemma2" else None)


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_only_adapters_train(folder: Callable[[str], Path], kind: str, dtype: str) -> None:
    model = hf(folder(kind), tune="lora", lora_rank=3, frozen_dtype=dtype)
    for name, p in [*model.extractor.named_parameters(), *model.header.named_parameters()]:
        assert p.requires_grad == ("lora_" in name)
        assert p.dtype == (torch.bfloat16 if dtype == "bf16" and not p.requires_grad else torch.float32)
    linear = {"llama": 7, "tied": 7, "gpt2": 4}[kind] * 2
    assert sum(p.requires_grad for p in model.extractor.parameters()) == 2 * linear
    model.extractor.eval()
    first = logits(model, tokens())
    torch.testing.assert_close(first.float(), logits(hf(folder(kind)), tokens()) if kind != "gpt2" else first.float(),
                               rtol=0, atol=0.02)  # adapters begin as nothing  # fmt: skip
    first.float().square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.extractor.parameters())


def test_adapters_only_where_they_are_wanted(folder: Callable[[str], Path]) -> None:
    model = hf(folder("llama"), tune="lora", lora_targets=("q_proj", "layers.1.mlp.up_proj"))
    named = [name for name, p in model.extractor.named_parameters() if p.requires_grad]
    assert len(named) == 2 * 3 and all("q_proj" in name or "1.mlp.up_proj" in name for name in named)


def test_frozen_body(folder: Callable[[str], Path]) -> None:
    model = hf(folder("llama"), tune="frozen", frozen_dtype="bf16")
    assert not any(p.requires_grad for p in model.extractor.parameters())
    assert model.header.weight.requires_grad and model.header.weight.dtype == torch.float32
    assert model.extractor(tokens()).dtype == torch.float32
    assert not model.extractor.train().body.training
    tied = hf(folder("tied"), tune="frozen")
    assert not tied.header.weight.requires_grad


def test_under_autocast(folder: Callable[[str], Path]) -> None:
    model = hf(folder("llama"), tune="lora", frozen_dtype="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        logits(model, tokens()).float().sum().backward()
    assert all(p.grad is not None for p in model.extractor.parameters() if p.requires_grad)


def test_vocabularies_that_differ(folder: Callable[[str], Path]) -> None:
    name = f"hf/{folder('llama')}"
    assert make(name, Model(), 30, T).header.out_features == 40
    with pytest.raises(UserError, match=r"has a vocabulary of 40 tokens, the tokenizer one of 41: set data.tokenizer"):
        make(name, Model(), 41, T)


@pytest.mark.parametrize(
    ("kind", "options", "complaint"),
    [
        ("cohere", {}, "does more than a linear header"),
        ("bert", {}, "does more than a linear header"),
        ("t5", {}, "is not a causal language model"),
        ("vit", {}, "is not a causal language model"),
        ("llama", {"attention": "flash_attention_2"}, "needs a GPU and the package flash-attn"),
        ("llama", {"tune": "lora", "lora_targets": ("c_attn",)}, "'c_attn', the linear layers of .* are down_proj, "),
    ],
)
def test_models_that_cannot_be_used(
    folder: Callable[[str], Path], kind: str, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        hf(folder(kind), **options)
    assert "\n" not in str(error.value)


def test_too_long_a_sequence_and_unknown_names(folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"has 32 positions, data\.sequence_length is 33: set at most 32"):
        make(f"hf/{folder('gpt2')}", Model(), VOCABULARY, 33)
    with pytest.raises(UserError, match=r"'cnn-1' is none of llama-nano, .*, nor `hf/NAME`"):
        make("cnn-1", Model(), VOCABULARY, T)
