"""The plain loop against a loop written out from the paper, and what its faults would look like."""

import random
import threading
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.engine.seam import Interrupted, Job, State
from fedmoe.engine.seeds import generator
from fedmoe.gate import Gate
from fedmoe.reference import ReferenceEngine
from tests.support import changed

Opened = Callable[[Config], ReferenceEngine]


def job(engine: ReferenceEngine, client: int, number: int = 1, epochs: int = 1) -> Job:
    return Job(client, number, engine.client(client).payload(), {"epochs": epochs})


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("policy", ["keep", "reset"])
def test_two_rounds_are_the_papers_arithmetic(config: Config, opened: Opened, policy: str) -> None:
    """Against SGD with momentum written out by hand in fp64, over two rounds of two epochs."""
    config = changed(config, training={"theta_momentum": policy, "batch_size": 8}, data={"limit": 150})
    engine, by_hand = opened(config), opened(config)
    client = by_hand.client(0)
    m = client.mixture.double()
    gate = m.gate
    assert isinstance(gate, Gate)
    momenta = {name: torch.zeros_like(p) for name, p in m.named_parameters()}
    t = config.training
    for number in (1, 2):
        list(engine.run("train", [job(engine, 0, number, epochs=2)]))
        if policy == "reset":
            momenta |= {n: torch.zeros_like(v) for n, v in momenta.items() if n.startswith("global_expert.")}
        for epoch in (0, 1):
            order = torch.randperm(client.training, generator=generator(config.seed, "order", 0, number, epoch))
            for start in range(0, client.training - 7, 8):
                chosen = order[start : start + 8]
                x, y = (client.inputs[chosen].double() / 255 - 0.5) / 0.5, client.labels[chosen]
                a = gate.fc2(torch.sigmoid(gate.fc1(x.flatten(1)))).softmax(1)
                mixed = a[:, :1] * m.global_expert(x) + a[:, 1:] * m.local_expert(x)
                m.zero_grad()
                F.cross_entropy(m.header(mixed), y).backward()
                with torch.no_grad():
                    for name, p in m.named_parameters():
                        assert p.grad is not None
                        momenta[name] = t.momentum * momenta[name] + p.grad + t.weight_decay * p
                        p.sub_(t.lr * momenta[name])
    trained = dict(engine.client(0).mixture.named_parameters())
    untrained = dict(opened(config).client(0).mixture.named_parameters())
    for name, p in m.named_parameters():
        moved = (p - untrained[name]).norm()
        assert moved > 0
        assert (trained[name] - p).norm() < 1e-4 * moved, name


def test_an_epoch_drops_the_last_partial_batch_and_small_clients_train_on_all(config: Config, opened: Opened) -> None:
    engine = opened(changed(config, training={"batch_size": 16}))
    n = engine.client(0).training
    assert n % 16 != 0
    [result] = engine.run("train", [job(engine, 0, epochs=3)])
    assert result.metrics["samples"] == 3 * (n // 16) * 16
    assert result.weight == n
    engine = opened(changed(config, training={"batch_size": 1000}))
    [result] = engine.run("train", [job(engine, 0)])
    assert result.metrics["samples"] == n


def test_flops_are_forward_and_backward_of_products_and_convolutions(config: Config, opened: Opened) -> None:
    engine = opened(config)
    [result] = engine.run("train", [job(engine, 4)])  # CNN-5: local and global expert alike
    conv1, conv2 = 24 * 24 * 20 * 25, 8 * 8 * 20 * 20 * 25
    fc = 320 * 50 + 50 * 50
    gate, header = 784 * 128 + 128 * 2, 50 * 10
    forward = 2 * (conv1 + conv2 + fc) + gate + header
    # Backward: twice the forward, but no gradient with respect to the images (conv1 of both, the gate's first layer).
    backward = 2 * forward - 2 * conv1 - 784 * 128
    samples = result.metrics["samples"]
    assert isinstance(samples, int)
    assert result.metrics["flops"] == 2 * (forward + backward) * samples


def test_evaluation_is_on_held_out_samples_by_the_full_mixture(config: Config, opened: Opened) -> None:
    engine = opened(config)
    list(engine.run("train", [job(engine, 1)]))
    [result] = engine.run("evaluate", [Job(1, 1, {})])
    client = engine.client(1)
    held_out = torch.arange(client.training, len(client.labels))
    x = (client.inputs[held_out].float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        logits = client.mixture.eval()(x)
    hits = (logits.argmax(1) == client.labels[held_out]).float().mean()
    assert result.metrics["accuracy"] == pytest.approx(hits.item())
    assert result.weight == len(held_out)
    expected = F.cross_entropy(logits, client.labels[held_out]).item()
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_training_and_test_samples_are_disjoint_and_all_used(config: Config, opened: Opened) -> None:
    engine = opened(config)
    data = load_data(config.data, config.seed)
    seen = [engine.client(c) for c in range(5)]
    assert sum(len(c.labels) for c in seen) == len(data.labels)
    for c in seen:
        assert len(c.held_out) == pytest.approx(0.2 * len(c.labels), abs=1)
        assert c.held_out.tolist() == list(range(c.training, len(c.labels)))


def test_evaluation_with_another_theta_uses_it_and_changes_nothing(config: Config, opened: Opened) -> None:
    engine = opened(config)
    list(engine.run("train", [job(engine, 0)]))
    client = engine.client(0)
    before = client.state()
    [own] = engine.run("evaluate", [Job(0, 1, {})])
    [other] = engine.run("evaluate", [Job(0, 1, {"theta": torch.zeros_like(client.payload()["theta"])})])
    assert own.metrics["loss"] != other.metrics["loss"]
    assert same(client.state(), before)


def test_not_finite_client_is_rolled_back_and_asks_to_be_left_out(config: Config, opened: Opened) -> None:
    engine = opened(changed(config, training={"lr": 1e18}))
    before, sent = engine.client(0).state(), job(engine, 0)
    [result] = engine.run("train", [sent])
    assert (result.metrics["rolled_back"], result.weight) == (1, 0)
    assert "loss" not in result.metrics
    assert torch.equal(result.payload["theta"], sent.payload["theta"])
    assert same(engine.client(0).state(), before)
    engine.commit()
    assert engine.changed() == {}


def test_weights_made_infinite_by_the_last_step_alone_count_as_not_finite(config: Config, opened: Opened) -> None:
    engine = opened(changed(config, training={"lr": 3e38, "batch_size": 1000, "weight_decay": 10.0}))
    [result] = engine.run("train", [job(engine, 0)])  # one step: its loss is finite, what it leaves is not
    assert result.metrics["rolled_back"] == 1


def test_commit_and_rollback(config: Config, opened: Opened) -> None:
    engine = opened(config)
    list(engine.run("train", [job(engine, 0)]))
    engine.commit()
    kept = engine.client(0).state()
    assert same(engine.changed()[0](), kept)
    assert engine.changed() == {}
    untouched = engine.client(1).state()
    list(engine.run("train", [job(engine, c, 2) for c in (0, 1)]))
    assert not same(engine.client(0).state(), kept)
    engine.rollback()
    assert same(engine.client(0).state(), kept)
    assert same(engine.client(1).state(), untouched)
    assert engine.changed() == {}


def test_stop_ends_after_a_step_and_rollback_forgets_it(config: Config, opened: Opened) -> None:
    stop = threading.Event()
    engine = opened(config)
    engine.stop = stop
    before = engine.client(0).state()
    steps = []
    client = engine.client(0)
    step = client.optimizer.step

    def step_and_stop() -> None:
        step()
        steps.append(1)
        stop.set()

    client.optimizer.step = step_and_stop  # type: ignore[method-assign, assignment]
    with pytest.raises(Interrupted):
        list(engine.run("train", [job(engine, 0)]))
    assert len(steps) == 1
    engine.rollback()
    assert same(engine.client(0).state(), before)


def test_results_come_in_job_order_and_do_not_depend_on_it(config: Config, opened: Opened) -> None:
    one, other = opened(config), opened(config)
    forward = list(one.run("train", [job(one, c) for c in (0, 1, 2)]))
    backward = list(other.run("train", [job(other, c) for c in (2, 1, 0)]))
    assert [r.client for r in backward] == [2, 1, 0]
    for a, b in zip(forward, backward[::-1], strict=True):
        assert torch.equal(a.payload["theta"], b.payload["theta"])
        assert same(one.client(a.client).state(), other.client(a.client).state())


def test_two_trainings_between_commits_are_one_transaction(config: Config, opened: Opened) -> None:
    engine = opened(config)
    before = engine.client(0).state()
    list(engine.run("train", [job(engine, 0, 1)]))
    list(engine.run("train", [job(engine, 0, 2)]))
    engine.rollback()
    assert same(engine.client(0).state(), before)
    list(engine.run("train", [job(engine, 0, 1)]))
    after_first = engine.client(0).state()
    engine.client(0).optimizer.param_groups[0]["lr"] = 1e18
    [result] = engine.run("train", [job(engine, 0, 2)])
    assert result.metrics["rolled_back"] == 1
    engine.commit()
    assert same(engine.changed()[0](), after_first)


def seen_orders(engine: ReferenceEngine, jobs: list[Job]) -> list[torch.Tensor]:
    """The order in which each epoch of the jobs drew its samples."""
    orders: list[torch.Tensor] = []
    for each in jobs:
        client = engine.client(each.client)
        batch = client.batch
        drawn: list[torch.Tensor] = []

        def record(indices: torch.Tensor, augmentation=None, *, batch=batch, drawn=drawn):  # type: ignore[no-untyped-def]
            drawn.append(indices)
            return batch(indices, augmentation)

        client.batch = record  # type: ignore[method-assign]
        list(engine.run("train", [each]))
        client.batch = batch  # type: ignore[method-assign]
        orders += list(torch.cat(drawn).chunk(int(each.settings["epochs"])))
    return orders


def test_every_client_round_and_epoch_has_an_order_of_its_own(config: Config, opened: Opened) -> None:
    engine = opened(changed(config, partition={"kind": "iid"}, training={"batch_size": 48}))
    jobs = [job(engine, client, number, epochs=2) for client in (0, 1) for number in (1, 2)]
    orders = seen_orders(engine, jobs)
    assert len(orders) == 8
    assert len({tuple(order.tolist()) for order in orders}) == 8
    assert all(sorted(order.tolist()) == list(range(48)) for order in orders)


class Recorder(torch.nn.Module):
    """Dropout that remembers its masks and the modes it ran in."""

    masks: ClassVar[list[torch.Tensor]] = []
    modes: ClassVar[list[bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.nn.functional.dropout(torch.ones_like(x), 0.5, self.training)
        Recorder.modes.append(self.training)
        if self.training:
            Recorder.masks.append(mask)
        return x * mask


def make_recorder(shape: tuple[int, int, int], classes: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    layers = torch.nn.Flatten(), torch.nn.Linear(784, 50), Recorder()
    return torch.nn.Sequential(*layers), torch.nn.Linear(50, classes)


def test_masks_differ_by_client_round_and_epoch_and_evaluation_has_none(config: Config, opened: Opened) -> None:
    config = changed(config, model={"local": (f"{__name__}:make_recorder",)}, training={"batch_size": 32})
    engine = opened(changed(config, partition={"kind": "iid"}))
    for client in (0, 1):
        engine.client(client)
    Recorder.masks.clear()
    Recorder.modes.clear()
    for number in (1, 2):
        list(engine.run("train", [job(engine, client, number, epochs=2) for client in (0, 1)]))
        list(engine.run("evaluate", [Job(client, number, {}) for client in (0, 1)]))
    assert Recorder.modes == [True] * 4 + [False] * 2 + [True] * 4 + [False] * 2
    assert len({tuple(mask.flatten().tolist()) for mask in Recorder.masks}) == 8


def test_randomness_outside_is_neither_used_nor_changed(config: Config, opened: Opened) -> None:
    config = changed(config, model={"local": (f"{__name__}:make_random",)})
    one, other = opened(config), opened(config)
    results = list(one.run("train", [job(one, 0)])) + list(one.run("evaluate", [Job(0, 1, {})]))
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    again = list(other.run("train", [job(other, 1), job(other, 0)]))[1:] + list(other.run("evaluate", [Job(0, 1, {})]))
    drawn = torch.rand(1).item(), np.random.rand(), random.random()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    assert drawn == (torch.rand(1).item(), np.random.rand(), random.random())
    assert same(one.client(0).state(), other.client(0).state())
    assert [r.metrics["loss"] for r in results] == [r.metrics["loss"] for r in again]


class Noisy(torch.nn.Module):
    """Draws from three generators, in training and in evaluation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + torch.rand(1) + float(np.random.rand()) + random.random())


def make_random(shape: tuple[int, int, int], classes: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    linear = torch.nn.Linear(784, 50)
    linear.weight.data *= float(np.random.rand()) + random.random()
    return torch.nn.Sequential(torch.nn.Flatten(), linear, Noisy()), torch.nn.Linear(50, classes)
