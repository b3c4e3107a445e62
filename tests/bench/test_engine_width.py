"""How wide to train: clients of one architecture together, architectures side by side, and the paper's round.

On a CPU nothing runs side by side; what is timed there, on one thread, is what being wide costs.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmoe.profiling.bench import Bench
from tests.bench.federations import FASTEST, federation, plain, rounds_of
from tests.support import begin

Ways = dict[str, dict[str, Any]]


def test_cohort(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """CNN-5 clients, alone and ever more of them as one batched model."""
    bench = gpu_benchmark
    clients, each = (16, 800) if bench.full else (4, 200 if bench.timed else 40)
    config = federation(tmp_path, clients, each, model={"local": ("cnn-5",)})
    ways: Ways = {"alone": {}} | {f"{n} together": {"cohort": n} for n in (2, 4, 8, 16) if n <= clients}
    rounds_of(bench, config, begin(config, tmp_path / "run"), ways)


def test_lanes(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """The paper's five architectures, two clients of each; also with those two together."""
    bench = gpu_benchmark
    config = federation(tmp_path, 10, 800 if bench.full else 40)
    ways: Ways = {f"{n} lanes": {"lanes": n} for n in (1, 2, 3, 4, 5)[:: 1 if bench.full else 4]}
    ways |= {f"{n} lanes of pairs": {"lanes": n, "cohort": 2} for n in ((1, 2, 4, 5) if bench.full else (5,))}
    rounds_of(bench, config, begin(config, tmp_path / "run"), ways)


def test_paper(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """A round of the paper's CIFAR-10 setting: 10 of 100 clients, ten epochs of 400 samples in batches of 64."""
    bench, gpu = gpu_benchmark, gpu_benchmark.device.type == "cuda"
    config = federation(tmp_path, 10, 500 if bench.full else 40)
    run, epochs = begin(config, tmp_path / "run"), 10 if bench.full else 1
    ways: Ways = {"engine": {}, "engine, 4 lanes of pairs": {"lanes": 4, "cohort": 2}}
    if gpu:
        low = {"how": replace(FASTEST, precision="bf16")}
        ways |= {f"{name}, bf16": way | low for name, way in ways.items()}
    first = {"plain loop, fused SGD": plain(config, run, bench.device, True)}
    rounds_of(bench, config, run, ways, first, epochs)
