"""Batches: augmented as the plain loop has them, in training and nowhere else, however an engine takes them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe import checkpoint
from fedmoe.client import Client
from fedmoe.config import AUGMENTATIONS, Config
from fedmoe.engine.samples import Loader, epoch_order
from fedmoe.engine.seam import Job
from fedmoe.engine.step import How
from fedmoe.federation import Federation
from fedmoe.reference import ReferenceEngine
from tests.engines import Outcome, assert_close, assert_same, engine, rounds
from tests.graphs import imitate
from tests.support import SMALL, begin, changed, theta, unequal

CPU = torch.device("cpu")
PLAIN = How(channels_last=False)


@pytest.fixture
def augmented(config: Config) -> Config:
    """Two epochs a round, clients of unequal size and one architecture."""
    return unequal(config, model={"local": ("cnn-5",)}, training={"augment": "crop-flip"})


def outcome(config: Config, run: Path, **options: Any) -> Outcome:
    with engine(config, run, PLAIN, **options) as made:
        return rounds(config, made, run, 1)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_batches_are_the_plain_loops_to_the_bit(
    config: Config, tmp_path: Path, augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config, training={"augment": augment}, federation={"epochs": 2})
    run, seen = begin(config, tmp_path / "run"), []
    batch = Client.batch

    def watched(self: Client, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made = batch(self, *given)
        if self.mixture.training:
            seen.append(made)
        return made

    plain = ReferenceEngine(config, run, CPU)
    plain.client(3)  # both are measured, by a batch, before any is watched
    federation = Federation(config, run)
    member, _, _ = federation.open(3)
    monkeypatch.setattr(Client, "batch", watched)
    list(plain.run("train", [Job(3, 7, theta(config), {"epochs": 2})]))
    loader = Loader(federation.samples, CPU, True)
    orders = [epoch_order(member, federation.samples, config.seed, 7, epoch) for epoch in range(2)]
    ours = [loader.batch(named, False) for order in orders for named in order]
    assert len(ours) == len(seen) > 2
    for (x, y), (their_x, their_y) in zip(ours, seen, strict=True):
        assert torch.equal(x, their_x) and torch.equal(y, their_y)
    assert not torch.equal(orders[0][0], orders[1][0])
    first = orders[0][0]
    unchanged, _ = loader.batch(first if augment == "none" else first[:, 0], False)
    assert torch.equal(unchanged, ours[0][0]) == (augment == "none")


def test_the_engine_is_the_plain_loop_in_every_way_it_takes_batches(
    augmented: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(augmented, tmp_path / "run")
    expected = rounds(augmented, ReferenceEngine(augmented, run, CPU), run, 1)
    alone = outcome(augmented, run)
    assert_close(alone, expected, 2e-5)
    assert_same(outcome(augmented, run, resident=False), alone)
    assert_close(outcome(augmented, run, cohort=4), expected, 2e-4)
    without = outcome(changed(augmented, training={"augment": "none"}), run)
    assert not torch.equal(without.theta[0]["theta"], alone.theta[0]["theta"])
    captured = imitate(monkeypatch)
    with engine(augmented, run, How(channels_last=False, graphs=True)) as made:
        replayed = rounds(augmented, made, run, 1)
    for client, state in alone.states.items():  # an evaluation's batches are filled up, which may round otherwise
        assert all(torch.equal(replayed.states[client][name], tensor) for name, tensor in state.items())
    assert captured


def test_batches_in_parts_are_augmented_alike(augmented: Config, tmp_path: Path) -> None:
    run = begin(augmented, tmp_path / "run")
    jobs = [Job(0, 1, theta(augmented), {"epochs": 1})]
    thetas = []
    for parts in (1, 2):
        with engine(augmented, run, PLAIN) as made:
            lane = made.lanes[0]
            make = lane._step
            lane._step = lambda *given, make=make, parts=parts: _in_parts(make(*given), parts)  # type: ignore[method-assign]
            (result,) = made.run("train", jobs)
            assert result.metrics["parts"] == parts
            thetas.append(result.payload["theta"])
    torch.testing.assert_close(thetas[0], thetas[1], rtol=1e-4, atol=1e-6)


def _in_parts(step: Any, parts: int) -> Any:
    step.parts = parts
    return step


def test_a_resumed_run_is_the_uninterrupted_one(fedmoe: Any, tmp_path: Path) -> None:
    options = (
        *SMALL,
        "--training.augment=crop",
        "--federation.clients=2",
        "--data.limit=100",
        "--model.local",
        "cnn-5",
    )
    assert fedmoe("train", *options, "--run.dir=long").code == 0
    assert fedmoe("train", *options, "--federation.rounds=1", "--run.dir=short").code == 0
    assert fedmoe("resume", "short", "--rounds=2").code == 0
    manifests = [checkpoint.read_manifest(tmp_path / name) for name in ("long", "short")]
    assert manifests[0] == manifests[1]
