"""The plain loop on a GPU: the CPU's numbers within fp32, and the same bits from run to run where that is asked for."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmoe.config import Config
from fedmoe.engine.device import prepare
from fedmoe.engine.seam import Job, State
from fedmoe.reference import ReferenceEngine
from tests.support import begin, changed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    prepare("cpu", 0, False)


def trained(config: Config, run: Path, device: str) -> tuple[list[float], dict[int, State]]:
    """Two rounds of all clients: their losses, and the states they end with."""
    engine = ReferenceEngine(config, begin(config, run), prepare(device, 0, config.run.deterministic))
    losses, n = [], config.federation.clients
    for number in (1, 2):
        jobs = [Job(client, number, engine.client(client).payload(), {"epochs": 1}) for client in range(n)]
        for result in engine.run("train", jobs):
            loss = result.metrics["loss"]
            assert isinstance(loss, float)
            losses.append(loss)
        assert all(r.weight > 0 for r in engine.run("evaluate", [replace(job, payload={}) for job in jobs]))
    engine.commit()
    return losses, {client: state() for client, state in engine.changed().items()}


@pytest.mark.parametrize("norm", ["none", "paper", "layer-batch-batch"])
def test_gpu_gives_the_cpus_numbers(config: Config, tmp_path: Path, norm: str) -> None:
    config = changed(config, gate={"norm": norm}, training={"lr": 0.01})
    cpu, cpu_states = trained(config, tmp_path / "cpu", "cpu")
    gpu, gpu_states = trained(config, tmp_path / "gpu", "cuda")
    assert gpu == pytest.approx(cpu, rel=1e-4)
    for client, state in cpu_states.items():
        for name, tensor in state.items():
            # As a whole: single elements of a ReLU network may differ where a sum rounds to the other side of zero.
            assert (gpu_states[client][name].double() - tensor.double()).norm() <= 1e-3 * tensor.double().norm(), name


def test_deterministic_runs_are_bit_identical(config: Config, tmp_path: Path) -> None:
    config = changed(config, run={"deterministic": True})
    (first, one), (second, other) = (trained(config, tmp_path / name, "cuda") for name in ("a", "b"))
    assert first == second
    assert all(torch.equal(one[client][name], other[client][name]) for client in one for name in one[client])
