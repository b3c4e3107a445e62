"""Federations on text: the engine against the plain loop, under every budget, and through the commands."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe import data, federation
from fedmoe.client import open_client
from fedmoe.config import Config, Data, Federation, Model, Partition, Training
from fedmoe.engine.step import How
from fedmoe.reference import ReferenceEngine
from tests.engines import Outcome, assert_close, assert_same, engine, rounds
from tests.support import Fedmoe, begin, changed

T = 16
LOCAL = ("llama-nano", "qwen-nano", "gpt2-nano", "gemma-nano")
ADAMW = Training(optimizer="adamw", lr=2e-3, batch_size=8, clip_norm=1.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sources of 25 windows or more, each of other words."""
    folder = tmp_path_factory.mktemp("corpus")
    for i, words in enumerate(("one two three four", "red green blue", "north south east west", "do re mi fa sol")):
        (folder / f"{i}.txt").write_text(
            " ".join(words.split()[(7 * n * n + n) % len(words.split())] for n in range(120))
        )
    return folder


def config(corpus: Path, **sections: Any) -> Config:
    made = Config(
        data=Data(kind="text", name=str(corpus), sequence_length=T),
        federation=Federation(clients=4, rounds=2),
        partition=Partition(kind="natural", column="source"),
        model=Model(local=LOCAL, global_expert="llama-nano", adapter="linear"),
        training=ADAMW,
    )
    return changed(made, **sections)


def outcome(made: Config, folder: Path, how: How | None = None, **more: Any) -> Outcome:
    run = begin(made, folder)
    if how is None:
        return rounds(made, ReferenceEngine(made, run, torch.device("cpu")), run, 2)
    with engine(made, run, how, **more) as on:
        return rounds(made, on, run, 2)


@pytest.mark.parametrize(
    ("sections", "how"),
    [
        ({}, How()),
        ({}, How(optimizer="flat")),
        ({"model": {"tune": "lora", "lora_rank": 4}, "training": {"micro_batch": 3}}, How()),
        ({"model": {"tune": "frozen", "activation_checkpointing": "on"}}, How()),
        ({"method": "static", "training": {"optimizer": "sgd", "lr": 0.05}}, How()),
        ({"method": "local"}, How()),
    ],
)
def test_engine_is_the_plain_loop(corpus: Path, tmp_path: Path, sections: dict[str, Any], how: How) -> None:
    made = config(corpus, **sections)
    expected, found = outcome(made, tmp_path / "plain"), outcome(made, tmp_path / "fast", how)
    assert_close(found, expected, 1e-4)
    losses = [result.metrics["loss"] for result in found.train]
    assert all(isinstance(loss, float) and math.isfinite(loss) for loss in losses)


def test_a_federation_of_four_times_the_budget_gives_the_same(corpus: Path, tmp_path: Path) -> None:
    made = config(corpus)
    expected = outcome(made, tmp_path / "all", How())
    size = sum(tensor.nbytes for state in expected.states.values() for tensor in state.values())
    run = begin(made, tmp_path / "few")
    with engine(made, run, How(), memory=size // 4) as on:
        found = rounds(made, on, run, 2)
        assert on.store.bytes_moved["file", "in"] > size and on.store.held["host"] <= size // 4
    assert_same(found, expected)


def test_a_program_without_memory_trains_what_the_client_s_own_does(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federation, "measured", lambda client: (1, ("header.weight",)))  # as if it had no gradient
    made = config(corpus)
    members = federation.Federation(made, begin(made, tmp_path / "run"))
    programs = [members.open(0)[1], members.program(0)]
    weights = [dict(program.modules.named_parameters()) for program in programs]
    assert [{p.is_meta for p in named.values()} for named in weights] == [{False}, {True}]
    assert [(n, p.requires_grad) for n, p in weights[0].items()] == [
        (n, p.requires_grad) for n, p in weights[1].items()
    ]
    assert programs[0].constants == programs[1].constants


def test_bf16_trains_alike(corpus: Path, tmp_path: Path) -> None:
    made = config(corpus, model={"frozen_dtype": "bf16", "tune": "lora"})
    how = How(precision="bf16", optimizer="flat")
    low, full = outcome(made, tmp_path / "low", how), outcome(made, tmp_path / "full", How())
    for a, b in zip(low.evaluated, full.evaluated, strict=True):
        assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=0.03)


def test_loss_and_accuracy_are_of_tokens(corpus: Path, tmp_path: Path) -> None:
    made = config(corpus)
    run = begin(made, tmp_path / "run")
    found = rounds(made, ReferenceEngine(made, run, torch.device("cpu")), run, 1)
    client = open_client(made, 2, run, torch.device("cpu"))
    client.load_state(found.states[2])
    x, y = client.batch(client.held_out)
    with torch.no_grad():
        shares = client.mixture.eval()(x).double().log_softmax(2)
    result = next(r for r in found.evaluated if r.client == 2)
    assert result.weight == len(client.held_out)
    assert result.metrics["loss"] == pytest.approx(-shares.gather(2, y[..., None]).mean().item(), rel=1e-5)
    assert result.metrics["accuracy"] == pytest.approx((shares.argmax(2) == y).double().mean().item())


def test_samples_are_windows_and_a_limit_draws_them(corpus: Path) -> None:
    whole = data.load(config(corpus).data, 0)
    assert whole.shape == (T,) and whole.outputs == 257 and whole.classes == ("0.txt", "1.txt", "2.txt", "3.txt")
    some, again, other = (data.load(changed(config(corpus), data={"limit": 50}).data, seed) for seed in (1, 1, 2))
    assert len(some.inputs) == 50 and torch.equal(some.inputs, again.inputs)
    assert not torch.equal(some.labels, other.labels)
    assert some.column("source") == [some.classes[label] for label in some.labels]


WORDS = (
    *("--data.kind", "text", "--data.sequence-length", str(T), "--federation.clients", "4"),
    *("--partition.kind", "natural", "--partition.column", "source", "--model.global-expert", "llama-nano"),
    *("--model.local", *LOCAL, "--model.adapter", "linear", "--training.optimizer", "adamw", "--training.lr", "0.002"),
    *("--training.batch-size", "8", "--run.threads", "1"),
)


def test_commands_take_text(corpus: Path, fedmoe: Fedmoe, tmp_path: Path) -> None:
    words = (*WORDS, "--data.name", str(corpus))
    done = fedmoe("train", *words, "--federation.rounds", "2", "--run.dir", "run", "--evaluation.aggregated")
    assert done.code == 0, done
    assert "perplexity" in done.out and "tokens/s" in done.out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for kind in ("", "_aggregated"):
            for loss, perplexity in zip(
                line[f"test_loss{kind}"]["clients"], line[f"perplexity{kind}"]["clients"], strict=True
            ):
                assert perplexity == pytest.approx(math.exp(loss))
    first, last = (line["perplexity"]["clients"] for line in (lines[0], lines[-1]))
    assert all(after < before for before, after in zip(first, last, strict=True))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Perplexity over rounds" in page and f"{math.exp(lines[-1]['test_loss']['mean']):,.2f}" in page
    done = fedmoe("eval", "run", "--json")
    assert json.loads(done.out)["perplexity"]["clients"] == last
    done = fedmoe("plan", *words, "--json")
    assert done.code == 0 and json.loads(done.out)["predicted"]["activations"] > 0


def test_a_sweep_takes_text(corpus: Path, fedmoe: Fedmoe, tmp_path: Path) -> None:
    text = ("--data.kind", "text", "--data.name", str(corpus), "--data.sequence-length", str(T), "--data.limit", "40")
    few = ("--federation.clients", "2", "--federation.rounds", "1", "--partition.kind", "iid", "--run.threads", "1")
    words = ("sweep", *text, *few, "--model.global-expert", "llama-nano", "--method", "fedmoe,local", "--run.no-report")
    done = fedmoe(*words, "--model.local", "llama-nano", "--dir", "swept")
    assert done.code == 0, done
    assert {path.name for path in (tmp_path / "swept").iterdir()} > {"method=fedmoe,seed=0", "method=local,seed=0"}
    assert "perplexity" in done.out
    assert "language model 'cnn-1' is none of" in fedmoe(*words, "--model.local", "cnn-1", "--dir", "other").one_line()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.local", "cnn-1"], "language model 'cnn-1' is none of llama-nano"),
        (["--model.adapter", "none", "--model.local", "llama-tiny"], "represents a token in 128 numbers"),
        (["--gate.norm", "paper"], "norm would tell a token of those to come"),
        (["--data.sequence-length", "4000"], "needs 4001: give more text or set less"),
        (["--data.name", "digits"], 'data.name is "digits" with data.kind = "text"'),
        (["--data.tokenizer", "./nowhere"], "nowhere"),
        (["--model.local", "hf/./nowhere"], "there is no such folder"),
    ],
)
def test_what_text_cannot_be_is_one_line(corpus: Path, fedmoe: Fedmoe, words: list[str], said: str) -> None:
    done = fedmoe("train", *WORDS, "--data.name", str(corpus), *words, "--run.dir", "run")
    assert said in done.one_line()
