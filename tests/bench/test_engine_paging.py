"""Clients that do not fit: how fast states come and go, and what of that a round does not hide."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedmoe.engine.store import Store
from fedmoe.profiling.bench import Absent, Bench
from tests.bench.federations import federation, rounds_of
from tests.support import begin


def test_paging(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """A round of CNN-1 clients whose states are on the device, on the host, in files: all that is above 1 shows."""
    bench, gpu = gpu_benchmark, gpu_benchmark.device.type == "cuda"
    config = federation(tmp_path, 8 if bench.full else 3, 1600 if bench.timed else 40, model={"local": ("cnn-1",)})
    run = begin(config, tmp_path / "run")
    ways: dict[str, dict[str, Any] | Absent] = {
        "in device memory": {} if gpu else Absent("a CPU has the host's memory only"),
        "in host memory": {"device_memory": 0},
        "in files": {"memory": 0},
    }
    rounds_of(bench, config, run, ways)


def test_bandwidth(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """States that come in and go out with nothing in between, and bare copies of as many bytes both ways at once."""
    bench = gpu_benchmark
    count, size = (16, 64 * 2**20) if bench.full else (3, 2**20)
    regions = [torch.zeros(size, dtype=torch.uint8, device=bench.device) for _ in range(2)]
    with Store(bench.device, device_bytes=0, host_bytes=4 * count * size, folder=tmp_path / "states") as store:
        for id in range(count):
            store.add(id, torch.full((size,), id, dtype=torch.uint8))

        def paged() -> None:
            left: list[Any] = [None, None]
            store.expect(range(count))
            for id in range(count):
                store.load(id, regions[id % 2], left[id % 2]).wait()
                left[id % 2] = store.save(id, regions[id % 2])
            for handle in left:
                handle.wait()
            store.commit()

        bench({"ours": paged, "bare copies": bare(bench.device, regions, count)})  # the floor itself


def bare(device: torch.device, regions: list[torch.Tensor], count: int) -> Callable[[], None]:
    """In and out at the same time, on two streams, to and from pinned memory."""
    pinned = [torch.zeros(len(regions[0]), dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []

    def copies() -> None:
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(device))
        for k, (source, target) in enumerate(((pinned[0], regions[0]), (regions[1], pinned[1]))):
            with torch.cuda.stream(streams[k] if streams else None):
                for _ in range(count):
                    target.copy_(source, non_blocking=True)
        for stream in streams:
            torch.cuda.current_stream(device).wait_stream(stream)

    return copies
