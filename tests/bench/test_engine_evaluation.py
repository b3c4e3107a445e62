"""Evaluation against training: the paper's five CNNs, as many samples of each client either way."""

from dataclasses import replace
from itertools import count
from pathlib import Path

from fedmoe.engine.seam import Job
from fedmoe.engine.step import How
from fedmoe.profiling.bench import Bench
from tests.bench.federations import FASTEST, a_round, federation
from tests.engines import engine
from tests.support import begin

CLIENTS = 5


def test_evaluation(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """A round of either, as the engine takes it: as many times faster is as many times the samples a second."""
    bench = gpu_benchmark
    each = 1280 if bench.full else 192 if bench.timed else 16
    config = federation(tmp_path, CLIENTS, 2 * each, partition={"test_fraction": 0.5})
    run, numbers = begin(config, tmp_path / "run"), count(1)
    how = replace(FASTEST, precision="bf16") if bench.device.type == "cuda" else How()
    with engine(config, run, how, bench.device.type) as made:
        members = [made.site.roster[client][0] for client in range(CLIENTS)]
        batches = {member.training // member.batch_size * member.batch_size for member in members}
        held_out = {len(member.samples) - member.training for member in members}
        assert batches == held_out == {each}

        def evaluation() -> None:
            number = next(numbers)
            for _ in made.run("evaluate", [Job(client, number, {}) for client in range(CLIENTS)]):
                pass

        bench({"training": a_round(config, made), "evaluation": evaluation}, host=True)
