"""Which engine a run gets: by its plan, by none, by one that does not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe import engines, planning
from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.engine.device_engine import DeviceEngine
from fedmoe.engine.facts import facts
from fedmoe.engine.plan import Plan
from fedmoe.engine.seam import Job
from fedmoe.errors import UserError
from fedmoe.reference import ReferenceEngine
from tests.support import SMALL, Fedmoe, begin, changed, theta

CPU = torch.device("cpu")


def plan(config: Config) -> Plan:
    dataset = load_data(config.data, config.seed)
    split = planning.deal(config, dataset)
    sizes = planning.sizes(config, dataset, split, planning.models(config, dataset, split), facts(torch.device("cpu")))
    return planning.make(config, sizes, facts(CPU))[0]


def test_the_plan_decides(config: Config, tmp_path: Path) -> None:
    run = begin(config, tmp_path / "run")
    with engines.opened(config, run, CPU) as made:
        assert isinstance(made, ReferenceEngine)
    config = changed(config, engine={"precision": "fp16", "host_memory_mb": 1})
    engines.write(run, plan(config))
    with engines.opened(config, run, CPU) as made:
        assert isinstance(made, DeviceEngine)
        assert made.site.how.optimizer == "flat" and made.site.how.precision == "fp16"
        jobs = [Job(client, 1, theta(config), {"epochs": 1}) for client in range(5)]
        assert all(result.weight > 0 for result in made.run("train", jobs))
        assert made.store.held["file"] > 0 and made.store.held["host"] <= 10**6
        assert list(run.glob(".states-*"))
    assert not list(run.glob(".states-*"))


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda p: replace(p, device="cuda").to_json(), "is for cuda, the device is cpu: set run.device to cuda, or"),
        (lambda p: "{", "the plan is not JSON"),
        (lambda p: p.to_json().replace('"lanes"', '"lines"'), "the plan lacks 'lanes'"),
    ],
)
def test_a_plan_that_does_not_fit(config: Config, tmp_path: Path, spoil: Any, line: str) -> None:
    run = begin(config, tmp_path / "run")
    (run / engines.PLAN).write_text(spoil(plan(config)))
    with pytest.raises(UserError, match=line), engines.opened(config, run, CPU):
        pass


def test_runs_keep_their_plan_and_the_plain_loop_has_none(tmp_path: Path, fedmoe: Fedmoe) -> None:
    for kind in ("fast", "reference"):
        assert fedmoe("train", *SMALL, f"--engine.kind={kind}", f"--run.dir={kind}").code == 0
        assert (tmp_path / kind / engines.PLAN).exists() == (kind == "fast")
        (tmp_path / kind / ".states-1").mkdir()
        (tmp_path / kind / ".states-1" / "client-0.1.block").write_bytes(b"left by a kill")
        before = (tmp_path / kind / engines.PLAN).read_bytes() if kind == "fast" else b""
        assert fedmoe("resume", kind, "--rounds=3").code == 0
        assert fedmoe("eval", kind).code == 0
        assert not list((tmp_path / kind).glob(".states-*"))
        assert not before or (tmp_path / kind / engines.PLAN).read_bytes() == before
