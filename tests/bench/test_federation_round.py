"""Rounds of the federated loop as `fedmoe train` takes them: training, averaging, evaluation, metrics, checkpoints.

On a CPU this is timed for what it is, on one thread; ratios count, not seconds.
"""

from pathlib import Path
from typing import Any

from fedmoe.config import Config
from fedmoe.profiling.bench import Bench
from tests.bench.federations import federation
from tests.bench.runs import in_turns, rounds_of
from tests.support import changed


def small(bench: Bench, folder: Path, **sections: dict[str, Any]) -> Config:
    """The paper's five CNNs in CIFAR-10's shape; where it is timed, each client has six steps in an epoch."""
    clients, rounds = (10, 8) if bench.full else (5, 4 if bench.timed else 2)
    sections["federation"] = {"rounds": rounds} | sections.get("federation", {})
    return federation(folder / "data", clients, 480 if bench.timed else 40, **sections)


def test_federated_round(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """The engine, as the plan has it, against the plain loop, both with an evaluation and a checkpoint every round."""
    engine = small(gpu_benchmark, tmp_path)
    plain = changed(engine, engine={"kind": "reference"})
    ways = {"plain loop": plain, "plain loop, fused SGD": plain, "engine": engine}
    taken = in_turns(ways, tmp_path, 3 if gpu_benchmark.timed else 1)
    gpu_benchmark.record({name: own.rounds for name, own in taken.items()})


def test_checkpoints(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """What checkpoints of every round cost: how long they hold training up, and what they add to a round in all.

    They are written while the next round trains, so a round is as long as the paper's on a GPU, of ten epochs.
    """
    bench = gpu_benchmark
    every = small(bench, tmp_path, federation={"epochs": 10 if bench.full else 1})
    ways = {"a checkpoint at the end": changed(every, checkpoint={"every": 10**6}), "a checkpoint every round": every}
    taken = in_turns(ways, tmp_path, 3 if bench.timed else 1)
    seconds = {name: own.rounds for name, own in taken.items()}
    bench.record(seconds | {"held up by checkpoints": taken["a checkpoint every round"].held_up})


def test_paper_run(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """The paper's CIFAR-10: N 100, fraction 0.1, E 10; all clients evaluated every 10 rounds, checkpoints every round.

    60,000 images. The start (data read, partition dealt, models checked) with the first 10 rounds, captures included;
    and those from one evaluation to the next; 50 of its 500.
    """
    bench = gpu_benchmark
    clients, each, rounds, every, epochs = (100, 600, 51, 10, 10) if bench.full else (10, 40, 7, 2, 1)
    config = federation(
        tmp_path / "data",
        clients,
        each,
        federation={"fraction": 0.1, "rounds": rounds, "epochs": epochs},
        evaluation={"every": every},
    )
    start, seconds, lines = rounds_of(config, tmp_path / "run")
    assert [line["round"] for line in lines if "accuracy" in line] == [*range(every, rounds, every), rounds]
    first, *later = (sum(seconds[i : i + every]) for i in range(0, rounds - 1, every))
    bench.record({"start and first rounds, to an evaluation": [start + first], "rounds, to the next evaluation": later})
