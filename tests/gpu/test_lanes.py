"""Lanes on the device: side by side they give what one after the other gives; dropout, parts of batches, and paging."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe.config import Config
from fedmoe.engine.seam import Job, Refused
from fedmoe.engine.step import How, Step
from tests.engines import Outcome, assert_close, assert_same, engine, rounds
from tests.support import begin, changed, theta, unequal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

EAGER = How(optimizer="flat")
ALL = How(optimizer="flat", streams=True, graphs=True)


@pytest.fixture
def ragged(config: Config) -> Config:
    """Three architectures, one with dropout; clients of unequal size; the same bits each time."""
    return unequal(
        config,
        model={"local": ("cnn-5", "tests.test_device_engine:dropping", "cnn-4")},
        training={"theta_momentum": "keep", "lr": 0.01},
        run={"deterministic": True},
    )


def outcome(config: Config, run: Path, how: How, **options: Any) -> Outcome:
    with engine(config, run, how, "cuda", **options) as made:
        return rounds(config, made, run)


@pytest.mark.parametrize("how", [EAGER, ALL, replace(ALL, precision="fp16")], ids=str)
@pytest.mark.parametrize("options", [{}, {"memory": 0}, {"resident": False}, {"regions": 1}], ids=str)
def test_are_one_after_the_other_bit_for_bit(ragged: Config, tmp_path: Path, how: How, options: dict[str, Any]) -> None:
    run = begin(ragged, tmp_path / "run")
    expected = outcome(ragged, run, how, **options)
    for lanes in (2, 3, 5):
        assert_same(outcome(ragged, run, how, lanes=lanes, **options), expected)


def test_cohorts_in_lanes(ragged: Config, tmp_path: Path) -> None:
    config = changed(ragged, model={"local": ("cnn-5", "cnn-4")})
    run = begin(config, tmp_path / "run")
    expected = outcome(config, run, ALL, cohort=2)
    assert_same(outcome(config, run, ALL, cohort=2, lanes=2), expected)
    assert_same(outcome(config, run, ALL, cohort=2, lanes=2, memory=0), expected)


def test_dropout_draws_anew_in_each_replay(ragged: Config, tmp_path: Path) -> None:
    run = begin(ragged, tmp_path / "run")
    eager, graphed = outcome(ragged, run, EAGER), outcome(ragged, run, replace(EAGER, graphs=True))
    assert_close(graphed, eager, 1e-3)


def test_a_client_that_comes_twice_in_a_row_and_one_larger_than_the_last(config: Config, tmp_path: Path) -> None:
    """The second must come as the first went out; rooms grow while something runs."""
    config = changed(config, model={"local": ("cnn-5", "cnn-1")}, run={"deterministic": True})
    run = begin(config, tmp_path / "run")
    jobs = [Job(c, 1, theta(config), {"epochs": 1}) for c in (0, 0, 2, 1, 1, 0, 3)]
    losses = []
    for options in ({"regions": 1}, {}, {"memory": 0}):
        with engine(config, run, ALL, "cuda", **options) as made:  # type: ignore[arg-type]
            losses.append([result.metrics["loss"] for result in made.run("train", jobs)])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("how", [EAGER, ALL], ids=str)
def test_out_of_memory_halves_the_batches_parts(
    config: Config, tmp_path: Path, how: How, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(config, tmp_path / "run")
    expected = outcome(config, run, how)
    take = Step._take

    def short(self: Step, indices: torch.Tensor) -> None:
        if self.parts < 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        take(self, indices)

    monkeypatch.setattr(Step, "_take", short)
    found = outcome(config, run, how)
    assert {result.metrics.pop("parts") for result in found.train} == {4}
    assert_close(found, expected, 1e-3)


def test_a_real_lack_of_memory_is_one_line(config: Config, tmp_path: Path) -> None:
    """Of the device's memory this process may have as much as it has, and no more."""
    run = begin(config, tmp_path / "run")
    with engine(config, run, ALL, "cuda") as made:
        torch.cuda.empty_cache()
        share = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
        try:
            with pytest.raises(Refused, match="out of device memory"):
                list(made.run("train", [Job(0, 1, theta(config), {"epochs": 1})]))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        made.rollback()
        (result,) = made.run("train", [Job(0, 1, theta(config), {"epochs": 1})])
        assert result.weight > 0


def test_a_client_rolled_back_last_does_not_let_the_next_come_too_soon(ragged: Config, tmp_path: Path) -> None:
    """The others of its cohort are still going out; all states are on the host, so what comes in is fast."""
    config = changed(ragged, model={"local": ("cnn-5",)}, partition={"kind": "iid"})
    run = begin(config, tmp_path / "run")
    jobs = [Job(client, 1, theta(config), {"epochs": 1}) for client in (0, 1, 2, 3)]
    jobs[1] = replace(jobs[1], payload={"theta": torch.full_like(theta(config)["theta"], torch.inf)})
    states = []
    for memory in (2**40, 0):
        with engine(config, run, ALL, "cuda", cohort=2, regions=1, device_memory=memory) as made:
            for _ in range(20):
                list(made.run("train", jobs))
            made.commit()
            states.append({client: state() for client, state in made.changed().items()})
    assert sorted(states[0]) == sorted(states[1]) == [0, 2, 3]
    assert all(torch.equal(t, states[1][c][name]) for c, state in states[0].items() for name, t in state.items())


@pytest.mark.parametrize("optimizer", ["flat", "torch"])
def test_a_run_that_was_given_up_leaves_nothing_behind(config: Config, tmp_path: Path, optimizer: str) -> None:
    """And graphs are captured anew where a room has to grow, whatever still lies in their memory."""
    config = changed(config, model={"local": ("cnn-5", "cnn-1")}, run={"deterministic": True})
    run, how = begin(config, tmp_path / "run"), replace(ALL, optimizer=optimizer)
    jobs = [Job(client, 1, theta(config), {"epochs": 2}) for client in (0, 2, 1, 3, 4)]
    with engine(config, run, how, "cuda") as made, warnings.catch_warnings():
        warnings.simplefilter("error")
        given_up = made.run("train", jobs)
        next(given_up)
        given_up.close()  # type: ignore[attr-defined]
        made.rollback()
        losses = [result.metrics["loss"] for result in made.run("train", jobs)]
    with engine(config, run, how, "cuda") as fresh:
        assert losses == [result.metrics["loss"] for result in fresh.run("train", jobs)]


def test_a_capture_that_fails_leaves_dropout_as_it_was(
    ragged: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(ragged, tmp_path / "run")
    expected = outcome(ragged, run, EAGER)
    take = Step._take

    def waiting(self: Step, indices: torch.Tensor) -> None:
        take(self, indices)
        if torch.cuda.is_current_stream_capturing():
            self.loss.item()

    monkeypatch.setattr(Step, "_take", waiting)
    with pytest.warns(UserWarning, match="no CUDA graph of this step"):
        assert_close(outcome(ragged, run, replace(EAGER, graphs=True)), expected, 1e-3)
