"""Profiles of a GPU: every phase has its time there, graphs are told from what is inside of them, meters answer."""

import json
from pathlib import Path

import pytest
import torch

from fedmoe import profiler
from fedmoe.config import Config
from tests.support import changed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("graphs", ["on", "off"])
def test_a_profile(config: Config, tmp_path: Path, graphs: str) -> None:
    config = changed(config, run={"device": "cuda"}, engine={"graphs": graphs}, federation={"epochs": 2})
    profiler.run(config, 2, 2, tmp_path / "out", False)
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    sources = {r["phase"]: r["source"] for r in found["ranges"]}
    assert sources["round"] == sources["step"] == "events"
    assert sources["backward"] == sources["global"] == ("uncaptured" if graphs == "on" else "events")
    assert all(r["device_seconds"] > 0 for r in found["ranges"] if r["phase"] in ("step", "backward", "local"))
    assert sum(r["seconds"] for r in found["ranges"]) == pytest.approx(sum(found["observed_seconds"]), rel=0.02)
    assert 0 < found["device"]["busy"] <= 1 and 0 <= found["device"]["overlap"] <= 1
    assert found["steps"] and min(found["steps"]) > 0
    assert {m["where"] for m in found["memory"]} >= {"device"}
    pytest.importorskip("pynvml")
    assert found["meters"]["gpu_power"]["mean"] > 0 and found["energy"][0]["joules_a_round"] > 0


def test_a_record_of_memory(config: Config, tmp_path: Path) -> None:
    profiler.run(changed(config, run={"device": "cuda"}), 1, 1, tmp_path / "out", False, True)
    assert (tmp_path / "out" / "memory.pickle").stat().st_size > 0
