"""What it costs to observe: a round without observers, with a recorder of spans, and as PyTorch's profiler sees it."""

from contextlib import nullcontext
from pathlib import Path

import torch

from fedmoe.engine.ranges import observed, phase
from fedmoe.engine.step import How
from fedmoe.profiling.annotations import Annotations
from fedmoe.profiling.bench import Bench, Call
from fedmoe.profiling.spans import Recorder
from tests.bench.federations import FASTEST, a_round, federation
from tests.engines import engine
from tests.support import begin


def test_observing(gpu_benchmark: Bench, tmp_path: Path) -> None:
    bench = gpu_benchmark
    config = federation(tmp_path, 2, 1600 if bench.timed else 40, model={"local": ("cnn-5",)})
    run, gpu = begin(config, tmp_path / "run"), bench.device.type == "cuda"
    with engine(config, run, FASTEST if gpu else How(), bench.device.type) as made:
        a_whole = a_round(config, made)

        def by(observer: Recorder | Annotations) -> Call:
            def call() -> None:
                with observed(observer):
                    a_whole()

            return call

        observers: dict[str, Recorder | Annotations] = {
            "a recorder of spans": Recorder(bench.device),
            "annotations": Annotations(),
        }
        bench({"unobserved": a_whole} | {name: by(observer) for name, observer in observers.items()})


def test_markers(gpu_benchmark: Bench) -> None:
    """A thousand markers that nobody hears of, around nothing; an engine's step has nine."""

    def marked() -> None:
        for _ in range(1000):
            with phase("step"):
                pass

    def unmarked() -> None:
        for _ in range(1000):
            with nothing:
                pass

    nothing = nullcontext()
    gpu_benchmark.device = torch.device("cpu")
    gpu_benchmark({"no markers": unmarked, "markers": marked})
