"""A round of local training, the paper's five CNNs on images of CIFAR-10's shape: the engine and the plain loop.

On a CPU this is timed for what it is, on one thread; ratios count, not seconds.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedmoe.config import Config
from fedmoe.engine.step import How
from fedmoe.profiling.bench import Absent, Bench, Call
from tests.bench.federations import a_round, federation, plain, steps_of
from tests.engines import engine
from tests.support import begin

CLIENTS = 5
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {"optimizer": "torch", "channels_last": False},
    "channels last": {"optimizer": "torch"},
    "flat optimizer": {"optimizer": "flat", "channels_last": False},
    "streams": {"optimizer": "flat", "streams": True},
    "graph": {"optimizer": "flat", "graphs": True},
    "graph, streams": {"optimizer": "flat", "graphs": True, "streams": True},
    "graph, streams, bf16": {"optimizer": "flat", "graphs": True, "streams": True, "precision": "bf16"},
}


@pytest.fixture
def config(tmp_path: Path, gpu_benchmark: Bench) -> Config:
    """Where it is timed, every client has 1280 samples to train on, 20 steps, else 32."""
    return federation(tmp_path, CLIENTS, 1600 if gpu_benchmark.timed else 40)


def test_round(gpu_benchmark: Bench, config: Config, tmp_path: Path) -> None:
    bench, run = gpu_benchmark, begin(config, tmp_path / "run")
    gpu = bench.device.type == "cuda"
    variants: dict[str, Call | Absent] = {
        "plain loop, fused SGD": a_round(config, plain(config, run, bench.device, True)),
        "plain loop": a_round(config, plain(config, run, bench.device, False)),
    }
    names = SWITCHES if gpu else ("channels last", "plain")
    with ExitStack() as stack:
        for name in names:
            how = replace(How(), **SWITCHES[name])
            made = stack.enter_context(engine(config, run, how, bench.device.type, folder=f"store-{name}"))
            variants[f"engine: {name}"] = a_round(config, made)
        bench(variants)


def test_bookkeeping(gpu_benchmark: Bench, config: Config, tmp_path: Path) -> None:
    """What a round costs above its steps: opening, moving and checking clients, theta, metrics."""
    bench, run = gpu_benchmark, begin(config, tmp_path / "run")
    gpu = bench.device.type == "cuda"
    how = replace(How(), **SWITCHES["graph, streams" if gpu else "channels last"])
    with engine(config, run, how, bench.device.type) as made:
        whole = a_round(config, made)
        whole()
        alone = [steps_of(made, client) for client in range(CLIENTS)]

        def steps() -> None:
            for client in alone:
                client()

        bench({"steps alone": steps, "round": whole})
