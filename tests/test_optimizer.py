"""AdamW, clipping and micro-batches: the plain loop's by hand, the engine's against it, and what persists of them."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fedmoe import planning
from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.engine.facts import facts
from fedmoe.engine.seam import Job
from fedmoe.engine.seeds import generator
from fedmoe.engine.step import How
from fedmoe.gate import Gate
from fedmoe.reference import ReferenceEngine
from tests.engines import Outcome, apart, assert_close, assert_same, engine, in_pieces, rounds
from tests.support import SMALL, Done, begin, changed, theta

CPU = torch.device("cpu")
TORCH, FLAT = How(optimizer="torch", channels_last=False), How(optimizer="flat", channels_last=False)
CODED = {"optimizer": "adamw", "optimizer_states": "8bit"}


@pytest.fixture
def config(config: Config) -> Config:
    """Two clients of two architectures and unequal size, trained by AdamW."""
    return changed(
        config,
        federation={"clients": 2},
        data={"limit": 120},
        model={"local": ("cnn-5", "cnn-4")},
        partition={"kind": "dirichlet", "min_samples": 20},
        # Where gradients are near 0, eps keeps their roundings from becoming steps as long as any.
        training={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1, "eps": 1e-5},
    )


def outcome(config: Config, run: Path, how: How, number: int = 2, **options: Any) -> Outcome:
    with engine(config, run, how, **options) as made:
        return rounds(config, made, run, number)


def reference(config: Config, run: Path) -> Outcome:
    return rounds(config, ReferenceEngine(config, run, CPU), run, 2)


@pytest.mark.parametrize("policy", ["keep", "reset"])
def test_two_rounds_are_the_arithmetic_of_adamw(
    config: Config, opened: Callable[[Config], ReferenceEngine], policy: str
) -> None:
    """Against AdamW and the clip written out by hand in fp64; theta's means and the count that corrects them reset."""
    config = changed(config, training={"theta_momentum": policy, "clip_norm": 0.05, "betas": (0.8, 0.95)})
    made, by_hand = opened(config), opened(config)
    client, t = by_hand.client(0), config.training
    m = client.mixture.double()
    assert isinstance(m.gate, Gate)
    kept = {name: (torch.zeros_like(p), torch.zeros_like(p), 0) for name, p in m.named_parameters()}
    clipped = []
    for number in (1, 2):
        list(made.run("train", [Job(0, number, made.client(0).payload(), {"epochs": 1})]))
        for name, (first, second, _) in kept.items() if policy == "reset" else ():
            if name.startswith("global_expert."):
                kept[name] = torch.zeros_like(first), torch.zeros_like(second), 0
        order = torch.randperm(client.training, generator=generator(config.seed, "order", 0, number, 0))
        for start in range(0, client.training - 15, 16):
            x, y = client.batch(order[start : start + 16])
            a = m.gate.fc2(torch.sigmoid(m.gate.fc1(x.double().flatten(1)))).softmax(1)
            mixed = a[:, :1] * m.global_expert(x.double()) + a[:, 1:] * m.local_expert(x.double())
            m.zero_grad()
            F.cross_entropy(m.header(mixed), y).backward()
            gradients = {name: p.grad for name, p in m.named_parameters() if p.grad is not None}
            norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
            clipped.append(bool(norm > t.clip_norm))
            with torch.no_grad():
                for name, p in m.named_parameters():
                    g, (first, second, count) = gradients[name] * min(1, t.clip_norm / norm), kept[name]
                    first, second, count = 0.8 * first + 0.2 * g, 0.95 * second + 0.05 * g**2, count + 1
                    kept[name] = first, second, count
                    rate = (second / (1 - 0.95**count)).sqrt() + t.eps
                    p.sub_(t.lr * (t.weight_decay * p + first / (1 - 0.8**count) / rate))
    assert any(clipped)
    trained, state = dict(made.client(0).mixture.named_parameters()), made.client(0).state()
    untrained = dict(opened(config).client(0).mixture.named_parameters())
    for name, p in m.named_parameters():
        assert (trained[name] - p).norm() < 1e-3 * (p - untrained[name]).norm(), name
        assert apart(state[f"first/{name}"], kept[name][0]) < 1e-3
    assert state["step"].tolist() == [kept["header.bias"][2], kept["global_expert.fc2.bias"][2]]


WAYS: dict[str, tuple[How, dict[str, Any]]] = {
    "torch": (TORCH, {"theta_momentum": "keep"}),
    "torch, clipped, in parts": (TORCH, {"clip_norm": 0.5, "micro_batch": 7}),
    "flat": (FLAT, {}),
    "flat, clipped, in parts": (FLAT, {"theta_momentum": "keep", "clip_norm": 0.5, "micro_batch": 7}),
    "torch, bf16": (replace(TORCH, precision="bf16"), {"clip_norm": 0.5, "micro_batch": 7}),
    "flat, bf16": (replace(FLAT, precision="bf16"), {"clip_norm": 0.5, "micro_batch": 7}),
    "sgd, torch": (TORCH, {"optimizer": "sgd", "clip_norm": 0.5, "micro_batch": 7}),
    "sgd, flat": (FLAT, {"optimizer": "sgd", "clip_norm": 0.5, "micro_batch": 7}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_engine_is_the_plain_loop(config: Config, tmp_path: Path, way: str) -> None:
    how, training = WAYS[way]
    config = changed(config, training=training, gate={"norm": "layer-none-none"})
    run = begin(config, tmp_path / "run")
    assert_close(outcome(config, run, how), reference(config, run), 5e-2 if how.low else 2e-5)


def test_fp16_scales_the_loss_and_counts_steps_that_are_taken(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(
        config, model={"local": ("tests.test_optimizer:linear",), "global_expert": "tests.test_optimizer:linear"}
    )
    run, jobs = begin(config, tmp_path / "run"), [Job(0, 1, theta(config), {"epochs": 4})]
    monkeypatch.setattr(
        "fedmoe.engine.optimizers.Scale.reset", lambda self: (self.scale.fill_(2.0**20), self.skipped.zero_())
    )
    with engine(config, run, replace(FLAT, precision="fp16")) as made:
        (result,) = made.run("train", jobs)
        made.commit()
        state = made.changed()[0]()
    assert isinstance(skipped := result.metrics["skipped"], int) and isinstance(taken := result.metrics["samples"], int)
    assert 0 < skipped < taken // 16 and state["step"].tolist() == [taken // 16 - skipped] * 2


@pytest.mark.parametrize("kind", ["reference", "torch", "flat"])
def test_a_clip_is_a_bound_and_parts_make_no_difference(config: Config, tmp_path: Path, kind: str) -> None:
    """A step of plain SGD is then as long as the rate times the clip; of the batch as a whole, or in parts."""
    plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 1.0, "batch_size": 1000}
    run, made = begin(config, tmp_path / "run"), []
    for training in ({}, {"clip_norm": 0.01}, {"micro_batch": 8}):
        one = changed(config, training={**plain, **training})
        before, job = ReferenceEngine(one, run, CPU).client(0).state(), Job(0, 1, theta(one), {"epochs": 1})
        if kind == "reference":
            loop = ReferenceEngine(one, run, CPU)
            list(loop.run("train", [job]))
            after = loop.client(0).state()
        else:
            with engine(one, run, How(optimizer=kind)) as fast:
                (result,) = fast.run("train", [job])
                assert result.metrics["parts"] == 1  # it is no want of memory
                fast.commit()
                after = fast.changed()[0]()
        made.append(torch.cat([(after[n] - before[n]).flatten() for n in before if n.startswith("model/")]))
    whole, clipped, parts = made
    assert whole.norm() > 0.1 and clipped.norm().item() == pytest.approx(0.01, rel=1e-4)
    assert apart(clipped / clipped.norm(), whole / whole.norm()) < 1e-4 and apart(parts, whole) < 1e-5


@pytest.mark.parametrize(("bits", "how"), [("fp32", TORCH), ("fp32", FLAT), ("8bit", FLAT)])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(config: Config, tmp_path: Path, bits: str, how: How) -> None:
    config = changed(config, training={"optimizer_states": bits, "theta_momentum": "keep", "clip_norm": 1.0})
    run = begin(config, tmp_path / "run")
    whole = outcome(config, run, how)
    assert_same(outcome(config, run, how, memory=0, lanes=2), whole)
    assert_same(in_pieces(config, run, how, 2), whole)


def test_what_persists_of_it(config: Config, tmp_path: Path) -> None:
    config = changed(config, federation={"epochs": 2}, model={"local": ("tests.test_device_engine:lazy",)})
    run, states = begin(config, tmp_path / "run"), {}
    for name, training in {"sgd": {"optimizer": "sgd"}, "adamw": {}, "8bit": CODED}.items():
        states[name] = outcome(changed(config, training=training), run, FLAT).states[0]
        del states[name]["constants"]
    trained = {n for n in states["sgd"] if n.startswith("momentum/")}
    assert {n.partition("/")[0] for n in states["sgd"]} == {"model", "momentum"}
    assert not any("idle" in name or "frozen" in name for name in trained)
    named = {n.replace("momentum", kind) for n in trained for kind in ("first", "second")}
    assert {n for n in states["adamw"] if not n.startswith("model/")} == named | {"step"}
    assert {n for n in states["8bit"] if not n.startswith("model/")} == named | {
        "step", "first_absmax", "second_absmax"
    }  # fmt: skip
    assert {states["8bit"][n].dtype for n in named} == {torch.uint8}
    private, shared = states["adamw"]["step"].tolist()
    assert private == 2 * shared > 0  # two rounds, each with a theta that begins anew
    ones, others = (torch.cat([s[n].flatten() for n in sorted(s) if n.startswith("model/")])
                    for s in (states["8bit"], states["adamw"]))  # fmt: skip
    start = ReferenceEngine(config, run, CPU).client(0).state()
    moved = torch.cat([start[n].flatten() for n in sorted(start) if n.startswith("model/")])
    assert 0 < (ones - others).norm() < 0.2 * (others - moved).norm()


@pytest.mark.parametrize(("training", "least"), [({}, 8), (CODED, 2 + 2 / 64), ({"optimizer": "sgd"}, 4)])
def test_what_is_planned_for_a_state_is_what_it_takes(
    config: Config, tmp_path: Path, training: dict[str, Any], least: float
) -> None:
    config = changed(config, training=training)
    dataset = load_data(config.data, config.seed)
    split = planning.deal(config, dataset)
    sizes = planning.sizes(config, dataset, split, planning.models(config, dataset, split), facts(torch.device("cpu")))
    with engine(config, begin(config, tmp_path / "run"), FLAT) as made:
        for client, architecture in enumerate(sizes.architectures):
            layout = made.site.roster[client][1]
            assert architecture.state == layout.size
            assert layout.optimizer / layout.weights == pytest.approx(least, rel=1e-3)
    a = sizes.architectures[0]
    assert 0 < a.state / a.trainable - 4 - least < 0.15  # gaps


def test_lines(fedmoe: Callable[..., Done], tmp_path: Path) -> None:
    small = (*SMALL, "--training.optimizer=adamw")
    for words, line in (
        (["--training.micro_batch=8", "--gate.norm=paper"], "training.micro_batch is 8, but with model 'cnn-1' "),
        (
            ["--training.optimizer_states=8bit", "--engine.kind=reference"],
            'optimizer_states is "8bit", which the plain',
        ),
        (
            ["--training.betas", "0.9", "1.0"],
            "training.betas is [0.9, 1.0], must be two numbers from 0 on, less than 1",
        ),
    ):
        assert line in fedmoe("train", *small, *words).one_line(1)
    (tmp_path / "c.toml").write_text("[training]\nbetas = [0.9]\n")
    assert "training.betas is [0.9], must be a list of two numbers" in fedmoe("train", "c.toml").one_line(1)
    assert not (tmp_path / "runs").exists()


def test_from_the_command_line_and_on(fedmoe: Callable[..., Done], tmp_path: Path) -> None:
    words = [*SMALL, "--training.optimizer=adamw", "--training.optimizer_states=8bit", "--training.lr=0.001"]
    words += ["--training.betas", "0.8", "0.9", "--training.clip_norm=1", "--training.micro_batch=8", "--run.dir=a"]
    done = fedmoe("train", *words)
    assert done.code == 0 and done.err == ""
    assert "betas = [\n    0.8,\n    0.9,\n]" in (tmp_path / "a" / "config.toml").read_text()
    assert fedmoe("resume", "a", "--rounds=3").code == 0 and fedmoe("eval", "a").code == 0
    (tmp_path / "a" / "plan.json").unlink()
    assert fedmoe("eval", "a").code == 0
    assert "which the plain loop does not have: restore the plan" in fedmoe("resume", "a", "--rounds=4").one_line(1)


def test_a_gradient_that_is_not_finite_is_rolled_back_though_it_is_clipped(config: Config, tmp_path: Path) -> None:
    config = changed(config, training={"clip_norm": 1.0}, model={"local": ("tests.test_device_engine:exploding",)})
    run = begin(config, tmp_path / "run")
    for how in (TORCH, FLAT):
        with engine(config, run, how) as made:
            (result,) = made.run("train", [Job(0, 1, theta(config), {"epochs": 1})])
            assert result.metrics["rolled_back"] == 1 and math.isfinite(float(result.payload["theta"].norm()))


def linear(shape: tuple[int, int, int], classes: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    width = shape[0] * shape[1] * shape[2]
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(width, 50)), torch.nn.Linear(50, classes)
