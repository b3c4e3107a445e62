"""The engine on a GPU: every switch alone and all together against the plain loop, there and on the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmoe.config import Config
from fedmoe.engine.step import How
from fedmoe.reference import ReferenceEngine
from tests.engines import Outcome, assert_close, assert_no_step_waits, assert_same, engine, rounds
from tests.support import begin, changed, unequal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PLAIN = How(optimizer="torch", channels_last=False)
ALL = How(optimizer="flat", streams=True, graphs=True, channels_last=True)
TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}
SWITCHES = {
    "nothing": PLAIN,
    "flat optimizer": replace(PLAIN, optimizer="flat"),
    "channels last": replace(PLAIN, channels_last=True),
    "streams": replace(PLAIN, streams=True),
    "graphs": replace(PLAIN, graphs=True),
    "graphs and streams": replace(PLAIN, graphs=True, streams=True),
    "all": ALL,
    "tf32": replace(ALL, precision="tf32"),
    "bf16": replace(ALL, precision="bf16"),
    "fp16": replace(ALL, precision="fp16"),
}


@pytest.fixture
def ragged(config: Config) -> Config:
    return unequal(config, federation={"fraction": 0.6}, training={"theta_momentum": "keep", "lr": 0.01})


def outcome(config: Config, run: Path, how: How, **options: object) -> Outcome:
    with engine(config, run, how, "cuda", **options) as made:  # type: ignore[arg-type]
        return rounds(config, made, run)


@pytest.mark.parametrize("head", ["plain", "auto"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_is_the_plain_loop(ragged: Config, tmp_path: Path, switch: str, head: str) -> None:
    config = changed(ragged, engine={"head": head})
    run = begin(config, tmp_path / "run")
    expected = rounds(config, ReferenceEngine(changed(config, engine={"head": "plain"}), run, torch.device("cpu")), run)
    how = SWITCHES[switch]
    assert_close(outcome(config, run, how), expected, TOLERANCE[how.precision])


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("how", [PLAIN, ALL])
def test_augmented_batches_are_the_plain_loops(ragged: Config, tmp_path: Path, how: How, resident: bool) -> None:
    config = changed(ragged, training={"augment": "crop-flip"})
    run = begin(config, tmp_path / "run")
    expected = rounds(config, ReferenceEngine(changed(config, engine={"head": "plain"}), run, torch.device("cpu")), run)
    assert_close(outcome(config, run, how, resident=resident), expected, TOLERANCE["fp32"])


@pytest.mark.parametrize("how", [PLAIN, ALL])
def test_paged_is_unpaged_bit_for_bit_and_so_is_a_second_run(ragged: Config, tmp_path: Path, how: How) -> None:
    config = changed(ragged, run={"deterministic": True})
    run = begin(config, tmp_path / "run")
    whole = outcome(config, run, how)
    for memory in (2**40, 2**20, 0):
        assert_same(outcome(config, run, how, memory=memory), whole)
    assert_same(outcome(config, run, how, resident=False), outcome(config, run, how, resident=False))


@pytest.mark.parametrize("how", [replace(ALL, graphs=False), replace(ALL, graphs=False, precision="fp16")])
def test_no_step_waits(config: Config, tmp_path: Path, how: How, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_no_step_waits(config, begin(config, tmp_path / "run"), how, monkeypatch)
