"""Language models in two parts against the libraries' own, and the mixture of two of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmoe import mixture
from fedmoe.config import Config, Data, Gate, Model
from fedmoe.errors import UserError
from fedmoe.kernels import oracle
from fedmoe.mixture import Mixture
from fedmoe.models import attention, language
from fedmoe.models.language import Body, Language

V, T = 61, 12
NANO = [name for name in language.NAMES if name.endswith("nano")]
TEXT = Data(kind="text", name="stdlib", sequence_length=T)


def made(name: str, **fields: Any) -> Language:
    torch.manual_seed(0)
    return language.make(name, Model(**fields), V, T)


def mixed(name: str, **fields: Any) -> Mixture:
    """A mixture of a model of this name and llama-nano."""
    model = Model(local=(name,), global_expert="llama-nano", adapter="linear", **fields.pop("model", {}))
    return mixture.build(replace(Config(), data=TEXT, model=model, **fields), 0, (T,), V)


def batch(rows: int = 3) -> tuple[Tensor, Tensor]:
    windows = torch.randint(0, V, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    return windows[:, :-1], windows[:, 1:]


def owned(parts: Language) -> dict[int, nn.Parameter]:
    """All parameters, those that are tied once."""
    return {id(p): p for p in [*parts.extractor.parameters(), *parts.header.parameters()]}


@pytest.mark.parametrize("size", ["nano", "tiny"])
@pytest.mark.parametrize("family", language.FAMILIES)
def test_sizes_are_as_documented_and_alike(family: str, size: str) -> None:
    parts = made(f"{family}-{size}")
    embedding: Any = parts.extractor.whole.get_input_embeddings().weight
    tied = parts.header.weight is embedding
    assert tied == (family != "llama")
    besides = sum(p.numel() for p in owned(parts).values()) - embedding.numel() * (1 if tied else 2)
    assert {"nano": 60_000, "tiny": 500_000}[size] < besides < {"nano": 110_000, "tiny": 650_000}[size]


@pytest.mark.parametrize("name", NANO)
def test_with_the_gate_on_the_local_expert_loss_and_gradients_are_the_models_own(name: str) -> None:
    model = mixed(name, method="static", static_weight=0.0)
    x, y = batch()
    loss, correct = model.join(model.program().run(x), y)
    loss.backward()
    body = model.local_expert
    assert isinstance(body, Body)
    whole = body.whole
    ours = {key: p.grad.clone() for key, p in whole.named_parameters() if p.grad is not None}
    whole.zero_grad()
    logits = whole(input_ids=x, labels=None, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert correct == (logits.argmax(2) == y).sum()
    for key, parameter in whole.named_parameters():
        torch.testing.assert_close(ours[key], parameter.grad, msg=key)
    assert all(p.grad is None or not p.grad.any() for p in model.get_submodule("global_expert").parameters())


@pytest.mark.parametrize("name", NANO)
def test_own_attention_is_the_librarys(name: str) -> None:
    (ours, theirs), (x, _) = (made(name, attention=kind) for kind in ("sdpa", "eager")), batch()
    with torch.no_grad():
        torch.testing.assert_close(ours.extractor(x), theirs.extractor(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (None, 4), (5.0, None), (5.0, 4), (None, 100)])
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_of_windows_and_caps(softcap: float | None, window: int | None, groups: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 8, dtype=torch.float64) for heads in (4, 4 // groups, 4 // groups))
    out, _ = attention.causal_attention(nn.Module(), q, k, v, None, scaling=0.3, softcap=softcap, sliding_window=window)
    for head in range(4):
        for t in range(T):
            seen = slice(max(0, t + 1 - (window or T)), t + 1)
            scores = 0.3 * (k[:, head // groups, seen] @ q[:, head, t, :, None])[:, :, 0]
            scores = attention.capped(scores, softcap)
            expected = (scores.softmax(1)[:, None] @ v[:, head // groups, seen])[:, 0]
            torch.testing.assert_close(out[:, t, head], expected)


@pytest.mark.parametrize("norm", ["none", "layer-layer-none"])
@pytest.mark.parametrize("name", NANO)
def test_nothing_of_the_future_is_known(name: str, norm: str) -> None:
    model, (x, _) = mixed(name, gate=Gate(norm=norm)).eval(), batch()
    changed = x.clone()
    changed[:, 7:] = (x[:, 7:] + 1) % V
    with torch.no_grad():
        before, after = model.program().run(x), model.program().run(changed)
        for kind, output in before.items():
            torch.testing.assert_close(output[:, :7], after[kind][:, :7], msg=kind)
            assert (output[:, 7] != after[kind][:, 7]).any(), kind
        torch.testing.assert_close(model(x)[:, :7], model(changed)[:, :7])
    assert model.weights(x).shape == (3, T, 2)


def test_batch_statistics_in_the_gate_are_refused() -> None:
    from fedmoe import meaning

    for norm in ("paper", "none-batch-none", "switch-none-none"):
        config = Config(data=TEXT, model=Model(local=("llama-nano",)), gate=Gate(norm=norm))
        with pytest.raises(UserError, match=f'gate.norm is "{norm}", but .* would tell a token of those to come'):
            meaning.check(config)


def test_gate_does_not_train_the_embeddings_that_it_reads() -> None:
    model, (x, _) = mixed("llama-nano"), batch()
    model.program().run(x)["gate"].sum().backward()
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"gate"}


def test_mixture_is_the_oracle_at_each_token() -> None:
    model, (x, y) = mixed("gpt2-nano"), batch()
    outputs = model.program().run(x)
    rows = {name: output.flatten(0, 1) for name, output in outputs.items()}
    header = model.header
    assert isinstance(header, nn.Linear)
    expected = oracle.gated_lm_head(
        rows["global"], rows["local"], rows["gate"], header.weight, header.bias, y.flatten()
    )
    for ours, theirs in zip(model.join(outputs, y), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    losses, hits = model.program().judge(outputs, y)
    assert losses.shape == hits.shape == (3,)
    torch.testing.assert_close(losses.sum() / y.numel(), expected[0])
    assert hits.sum() == expected[1]


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("tune", ["full", "lora", "frozen"])
def test_what_trains(name: str, tune: Any, checkpointing: Any) -> None:
    model = mixed(name, model={"tune": tune, "activation_checkpointing": checkpointing, "lora_rank": 4}).train()
    x, y = batch()
    model.join(model.program().run(x), y)[0].backward()
    trains = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trains == {key for key, p in model.named_parameters() if p.grad is not None}
    local = {key for key in trains if key.startswith(("local_expert", "header"))}
    everything = {key for key, _ in model.named_parameters() if key.startswith(("local_expert", "header"))}
    expected = {
        "full": everything,
        "lora": {key for key in everything if ".lora_" in key},
        "frozen": {"header.weight"} if name.startswith("llama") else set(),
    }
    assert local == expected[tune] and (tune == "frozen" or local)
    assert {key.partition(".")[0] for key in trains - local} == {"global_expert", "adapter", "gate"} - (
        {"adapter"} if not hasattr(model, "adapter") else set()
    )


@pytest.mark.parametrize("name", NANO)
def test_activation_checkpointing_changes_no_gradient(name: str) -> None:
    gradients = []
    for checkpointing in ("off", "on"):
        model, (x, y) = (
            mixed(name, model={"activation_checkpointing": checkpointing}).train(),
            batch(),
        )
        model.join(model.program().run(x), y)[0].backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], msg=key)


def test_lora_begins_as_the_model_without_it_and_frozen_weights_take_half() -> None:
    (x, _), plain, tuned = batch(), made("qwen-nano"), made("qwen-nano", tune="lora", frozen_dtype="bf16")
    wide = made("qwen-nano", tune="lora")
    with torch.no_grad():
        torch.testing.assert_close(wide.extractor(x), plain.extractor(x))
    kinds = {p.requires_grad: p.dtype for p in owned(tuned).values()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    model = mixed("qwen-nano", model={"tune": "lora", "frozen_dtype": "bf16"})
    loss, _ = model.join(model.program().run(x), batch()[1])
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("name", NANO)
def test_a_model_on_the_meta_device_has_its_shapes(name: str) -> None:
    with torch.device("meta"):
        parts = made(name)
        assert parts.extractor(torch.zeros(2, T, dtype=torch.int64)).shape == (2, T, 64)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cnn-1", "language model 'cnn-1' is none of llama-nano, .*, nor `hf/NAME`"),
        ("hf/./nowhere", "there is no such folder"),
    ],
)
def test_what_is_no_language_model_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(name)
