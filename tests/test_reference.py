"""The plain loop against a loop written out from the paper, and what its faults would look like."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.engine.seam import Job, State
from fedmoe.engine.seeds import generator
from fedmoe.gate import Gate
from fedmoe.reference import Interrupted, ReferenceEngine
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
                x, y = (client.images[chosen].double() / 255 - 0.5) / 0.5, client.labels[chosen]
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
    x = (client.images[held_out].float() / 255 - 0.5) / 0.5
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
    assert same(engine.changed()[0], kept)
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


def test_dropout_is_seeded_by_client_round_and_epoch(config: Config, opened: Opened) -> None:
    config = changed(config, model={"local": (f"{__name__}:make_dropout",)})
    one, other = opened(config), opened(config)
    list(one.run("train", [job(one, 0)]))
    torch.rand(100)
    list(other.run("train", [job(other, 1), job(other, 0)]))
    assert same(one.client(0).state(), other.client(0).state())


def make_dropout(shape: tuple[int, int, int], classes: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    layers = torch.nn.Flatten(), torch.nn.Linear(784, 50), torch.nn.Dropout(0.5)
    return torch.nn.Sequential(*layers), torch.nn.Linear(50, classes)
