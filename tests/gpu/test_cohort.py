"""Cohorts on the device: what they make of clients alone on the CPU, eager and captured, and no waiting in a step."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedmoe.config import Config
from fedmoe.engine.cohort import Cohort
from fedmoe.engine.step import How
from tests.engines import Outcome, apart, assert_close, assert_same, engine, rounds
from tests.support import begin, changed, unequal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


@pytest.fixture
def ragged(config: Config) -> Config:
    """Five clients of one architecture and of unequal size, four of them in a round, momentum kept."""
    keep = {"theta_momentum": "keep", "lr": 0.01}
    return unequal(config, model={"local": ("cnn-5",)}, federation={"fraction": 0.8}, training=keep)


def outcome(config: Config, run: Path, how: How, device: str = "cuda", cohort: int = 4) -> Outcome:
    with engine(config, run, how, device, cohort=cohort) as made:
        result = rounds(config, made, run, 2)
        assert [len(room.cohorts) for room in made.lanes[0].rooms] == [int(cohort > 1), 0]
        return result


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("norm", ["none", "layer-batch-batch", "paper"])
def test_is_training_alone_on_the_cpu(ragged: Config, tmp_path: Path, norm: str, graphs: bool) -> None:
    config = changed(ragged, gate={"norm": norm})
    run = begin(config, tmp_path / "run")
    ours = outcome(config, run, How(optimizer="flat", graphs=graphs, channels_last=False))
    assert_close(ours, outcome(config, run, How(), "cpu", 1), TOLERANCE["fp32"])


def test_bf16_is_as_near_as_alone(ragged: Config, tmp_path: Path) -> None:
    run, how = begin(ragged, tmp_path / "run"), How(precision="bf16", optimizer="flat", streams=True, graphs=True)
    ours, alone = outcome(ragged, run, how), outcome(ragged, run, how, cohort=1)
    assert_close(ours, alone, TOLERANCE["bf16"])
    plain = outcome(ragged, run, How(), "cpu", 1)
    by_ours, by_alone = (apart(o.theta[-1]["theta"], plain.theta[-1]["theta"]) for o in (ours, alone))
    assert 1e-5 < by_ours < 3 * by_alone


def test_captured_and_deterministic_it_is_the_same_bits(ragged: Config, tmp_path: Path) -> None:
    config = changed(ragged, run={"deterministic": True})
    run = begin(config, tmp_path / "run")
    one, other = (outcome(config, run, How(optimizer="flat", graphs=True)) for _ in range(2))
    assert_same(one, other)
    assert_close(one, outcome(config, run, How(optimizer="flat")), TOLERANCE["fp32"])


def test_no_step_waits_for_the_device(ragged: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(ragged, gate={"norm": "paper"})
    run, how = begin(config, tmp_path / "run"), How(optimizer="flat", streams=True)
    take, calls, planted = Cohort._take, [0], [False]

    def watched(self: Cohort, indices: Tensor) -> None:
        calls[0] += 1
        if calls[0] > 3:  # a trial, and libraries' first calls may wait
            torch.cuda.set_sync_debug_mode("error")
        try:
            take(self, indices)
            if planted[0]:
                self.loss.sum().item()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Cohort, "_take", watched)
    outcome(config, run, how)
    assert calls[0] > 8
    calls[0], planted[0] = 0, True
    with pytest.raises(RuntimeError, match="synchroniz"):
        outcome(config, run, how)
