"""AdamW, clipping and micro-batches on the device: every way of it against the plain loop on the CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe.config import Config
from fedmoe.engine.step import How
from fedmoe.reference import ReferenceEngine
from tests.engines import Outcome, apart, assert_close, assert_no_step_waits, assert_same, engine, in_pieces, rounds
from tests.support import begin, changed, theta

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

FLAT = How(optimizer="flat", graphs=True)
TORCH = replace(FLAT, optimizer="torch")
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 2e-2}
WAYS = {
    f"{how.optimizer}, {precision}, graphs {graphs}": replace(how, precision=precision, graphs=graphs)
    for how in (FLAT, TORCH)
    for precision in ("fp32", "bf16", "fp16")
    for graphs in (False, True)
    if (how, precision) != (TORCH, "fp16")
}


@pytest.fixture
def config(config: Config) -> Config:
    training: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3, "eps": 1e-5, "clip_norm": 0.5}
    return changed(config, engine={"head": "plain"}, training=training)


def outcome(config: Config, run: Path, how: How, **options: Any) -> Outcome:
    with engine(config, run, how, "cuda", **options) as made:
        return rounds(config, made, run)


@pytest.mark.parametrize("micro_batch", [0, 7])
@pytest.mark.parametrize("way", WAYS)
def test_is_the_plain_loop(config: Config, tmp_path: Path, way: str, micro_batch: int) -> None:
    config = changed(config, training={"micro_batch": micro_batch})
    run = begin(config, tmp_path / "run")
    expected = rounds(config, ReferenceEngine(config, run, torch.device("cpu")), run)
    assert_close(outcome(config, run, WAYS[way]), expected, TOLERANCE[WAYS[way].precision])


def test_8_bit_states_are_near_and_resumed_to_the_bit(config: Config, tmp_path: Path) -> None:
    run = begin(config, tmp_path / "run")
    coded = changed(config, run={"deterministic": True}, training={"optimizer_states": "8bit"})
    near, whole = outcome(config, run, FLAT), outcome(coded, run, FLAT)
    start = theta(config)["theta"]
    assert (
        0 < (near.theta[-1]["theta"] - whole.theta[-1]["theta"]).norm() < 0.2 * (near.theta[-1]["theta"] - start).norm()
    )
    assert_same(outcome(coded, run, FLAT, memory=0), whole)
    assert_same(in_pieces(coded, run, FLAT, 3, "cuda"), whole)


@pytest.mark.parametrize("bits", ["fp32", "8bit"])
def test_cohorts_are_clients_alone(config: Config, tmp_path: Path, bits: str) -> None:
    config = changed(config, model={"local": ("cnn-5",)}, training={"optimizer_states": bits})
    run = begin(config, tmp_path / "run")
    ours, alone = outcome(config, run, FLAT, cohort=5), outcome(config, run, FLAT)
    if bits == "fp32":
        assert_close(ours, alone, TOLERANCE["fp32"])
    assert apart(ours.theta[-1]["theta"], alone.theta[-1]["theta"]) < 1e-2


@pytest.mark.parametrize("how", [replace(FLAT, graphs=False), replace(TORCH, graphs=False)])
def test_no_step_waits(config: Config, tmp_path: Path, how: How, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_no_step_waits(config, begin(config, tmp_path / "run"), how, monkeypatch)
