"""Experts of different width train together by an adapter: in the engine, in a resumed run, and it never leaves."""

from pathlib import Path

import torch
from torch import nn

from fedmoe import checkpoint, metrics
from fedmoe.client import measured
from fedmoe.config import Config
from fedmoe.engine.step import How
from fedmoe.reference import ReferenceEngine
from tests.engines import assert_close, engine, rounds
from tests.support import SMALL, Fedmoe, begin, changed

NARROW = """
from torch import nn

def make(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU()), nn.Linear(32, classes)
"""
CPU = torch.device("cpu")


def test_engine_and_cohort_are_the_plain_loop(config: Config, tmp_path: Path) -> None:
    config = changed(
        config,
        data={"limit": 200},
        model={"local": ("cnn-4", "tests.test_mixture:make_narrow"), "adapter": "linear"},
        training={"theta_momentum": "keep"},
    )
    run = begin(config, tmp_path / "run")
    reference = ReferenceEngine(config, run, CPU)
    theirs = rounds(config, reference, run, 2)
    for cohort in (1, 3):
        with engine(config, run, How(), cohort=cohort) as made:
            assert_close(rounds(config, made, run, 2), theirs, 2e-4)
    assert [("model/adapter.weight" in state) for _, state in sorted(theirs.states.items())] == [False, True] * 2 + [
        False
    ]
    before = begin(config, tmp_path / "other")
    start = ReferenceEngine(config, before, CPU).client(1).state()
    assert not torch.equal(start["model/adapter.weight"], theirs.states[1]["model/adapter.weight"])


def test_products_of_the_adapter_are_counted(config: Config, tmp_path: Path) -> None:
    config = changed(
        config,
        model={"local": ("tests.test_mixture:make_narrow",), "global_expert": f"{__name__}:wide", "adapter": "linear"},
    )
    client = ReferenceEngine(config, begin(config, tmp_path / "run"), CPU).client(0)
    # Each product forward and for the weights' gradient; and, but for what takes the images, for the input's.
    first, behind = 784 * (32 + 50 + 128), 50 * 32 + 128 * 2 + 32 * 10
    assert measured(client)[0] == 2 * (2 * first + 3 * behind)


def wide(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 50)), nn.Linear(50, classes)


def test_a_run_is_resumed_bit_for_bit_and_sends_theta_alone(tmp_path: Path, fedmoe: Fedmoe) -> None:
    (tmp_path / "narrow.py").write_text(NARROW)
    models = ("--model.local", "cnn-1", "narrow:make", "--engine.cohort=2")
    for rounds_, run in ((3, "whole"), (1, "run")):
        words = (*SMALL, *models, "--model.adapter=linear", f"--federation.rounds={rounds_}", f"--run.dir={run}")
        done = fedmoe("train", *words)
        assert done.code == 0 and not done.err, done
    assert fedmoe("resume", "run", "--rounds=3").code == 0
    whole, resumed = (checkpoint.read_manifest(tmp_path / run) for run in ("whole", "run"))
    assert whole == resumed
    state = checkpoint.load(tmp_path / "run", resumed.clients[1])
    assert state["model/adapter.weight"].shape == state["momentum/adapter.weight"].shape == (32, 50)
    sent = {line["bytes_up"] for line in metrics.read(tmp_path / "run")}
    assert sent == {5 * checkpoint.load(tmp_path / "run", resumed.server)["theta"].nbytes}


def test_an_adapter_that_nobody_needs_is_warned_of(fedmoe: Fedmoe) -> None:
    done = fedmoe("plan", *SMALL, "--model.adapter=linear")
    assert done.code == 0
    assert done.err == "fedmoe: warning: model.adapter = linear has no effect where all experts are of one width\n"
    done = fedmoe("plan", *SMALL, "--model.adapter=linear", "--method=local")
    assert (
        done.err.splitlines()[0] == ('fedmoe: warning: model.adapter = linear has no effect with method = "local"')
        and len(done.err.splitlines()) == 1
    )
