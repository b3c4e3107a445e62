"""How long a user waits before anything trains: a process of its own, nothing compiled or tuned before."""

import os
import subprocess
import sys
import time
from pathlib import Path

from fedmoe import configfile, metrics
from fedmoe.profiling.bench import Bench
from tests.bench.federations import federation
from tests.support import ROOT, changed


def test_start(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """From the command to the end of a run of one step, captured on a GPU: its first step was over before."""
    config = changed(federation(tmp_path / "data", 1, 80), federation={"rounds": 1}, run={"threads": 1})
    (tmp_path / "one-step.toml").write_bytes(configfile.save(config))
    seconds = []
    for number in range(2 if gpu_benchmark.timed else 1):
        caches = tmp_path / f"caches-{number}"
        caches.mkdir()
        kinds = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "TRITON_HOME", "XDG_CACHE_HOME")
        env = {**os.environ, **{kind: str(caches / kind) for kind in kinds}}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        run = tmp_path / f"run-{number}"
        start = time.perf_counter()
        command = [sys.executable, "-m", "fedmoe", "train", "one-step.toml", "--run.dir", str(run)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        [line] = metrics.read(run)
        assert line["clients"]["samples"] == [64]
    gpu_benchmark.record({"start to the end of a run of one step": seconds})
