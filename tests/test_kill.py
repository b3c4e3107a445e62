"""A run killed at any moment and resumed ends bit for bit where it would have ended unharmed."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe import checkpoint, metrics
from fedmoe.engine.samples import Loader
from tests.support import Command

OPTIONS = (
    "--data.limit=200",
    "--federation.clients=6",
    "--federation.fraction=0.5",
    "--federation.rounds=12",
    "--gate.norm=paper",  # buffers persist too
    "--training.theta_momentum=keep",
    "--training.batch_size=16",
    "--evaluation.aggregated",
    "--evaluation.clients=sampled",  # so that clients are opened late
    "--model.local",
    *("cnn-1", "cnn-2", "models:dropout", "cnn-4"),
    "--model.global_expert=models:normed",
    "--run.threads=1",
)


End = tuple[list[dict[str, Any]], dict[str, Any]]


MODELS = """
import random
from torch import nn

class Skip(nn.Module):
    def forward(self, x):  # draws from Python's generator
        return x if self.training and random.random() < 0.5 else x.relu()

def dropout(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 50), Skip(), nn.Dropout()), nn.Linear(50, classes)

def normed(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.BatchNorm1d(50)), nn.Linear(50, classes)
"""


def end(run: Path) -> End:
    """All that must be equal: every metric but time, and the hash of every file of the last checkpoint."""
    lines = metrics.read(run)
    for line in lines:
        del line["seconds"], line["clients"]["seconds"]
    return lines, json.loads((run / "checkpoints" / "manifest.json").read_text())


def start(folder: Path, run: Path, every: int, plant: Callable[..., object] | None = None, *args: object) -> Command:
    """Resume the run if there is one, else start it."""
    (folder / "models.py").write_text(MODELS)
    if (run / "config.toml").exists():
        return Command(folder, "resume", run, plant=plant, plant_args=args)
    words = ("train", "--run.dir", run, *OPTIONS, f"--checkpoint.every={every}")
    return Command(folder, *words, plant=plant, plant_args=args)


def die_at(call: int) -> None:
    """Have this process die just before or after the `call`-th of the system calls that order a checkpoint's writes."""
    count = 0

    def counted(function: Callable[..., Any], before: bool) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if before and count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    os.fsync = counted(os.fsync, before=False)
    Path.replace = counted(Path.replace, before=True)  # type: ignore[method-assign]
    Path.unlink = counted(Path.unlink, before=False)  # type: ignore[method-assign]


def die_in_the_middle_of_file(number: int) -> None:
    """Have this process die with the `number`-th file of its checkpoints half written."""
    write, count = checkpoint.write_state, 0

    def half(folder: Path, name: str, state: Any) -> checkpoint.Entry:
        nonlocal count
        count += 1
        entry = write(folder, name, state)
        if count == number:
            os.truncate(folder / name, entry.bytes // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return entry

    checkpoint.write_state = half


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> End:
    folder = tmp_path_factory.mktemp("unharmed")
    done = start(folder, folder / "run", 1).wait()
    assert done.code == 0, done
    return end(folder / "run")


def test_same_seed_gives_the_same_run(unharmed: End, tmp_path: Path) -> None:
    assert start(tmp_path, tmp_path / "run", 1).wait().code == 0
    assert end(tmp_path / "run") == unharmed


def test_another_seed_gives_another(unharmed: End, tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    assert Command(tmp_path, "train", "--run.dir=run", "--seed=1", *OPTIONS).wait().code == 0
    lines, _ = end(tmp_path / "run")
    assert lines[0]["loss"] != unharmed[0][0]["loss"]
    assert [line["sampled"] for line in lines] != [line["sampled"] for line in unharmed[0]]


def test_killed_at_20_moments_and_resumed_ends_the_same(unharmed: End, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown if the test fails
    rng = random.Random(seed)
    ways = ["time"] * 8 + ["call"] * 8 + ["file"] * 4
    rng.shuffle(ways)
    kills, attempt, run = 0, 0, tmp_path / "run-0"
    finished = []
    while kills < len(ways):
        way = ways[kills]
        if way == "time":
            command = start(tmp_path, run, 1)
            command.process.join(rng.uniform(0.0, 1.5))
            command.process.kill()
        elif way == "call":
            command = start(tmp_path, run, 1, die_at, rng.randint(1, 40))
        else:
            command = start(tmp_path, run, 1, die_in_the_middle_of_file, rng.randint(1, 8))
        done = command.wait()
        assert done.code in (0, -signal.SIGKILL), done
        kills += done.code != 0
        if rounds_saved(run) == 12:  # it was done before the kill: the next run takes the kills that are left
            finished.append(run)
            attempt += 1
            run = tmp_path / f"run-{attempt}"
    if run.exists():
        finished.append(run)
        done = start(tmp_path, run, 1).wait()
        assert done.code == 0, done
    for each in finished:
        assert end(each) == unharmed, each


def rounds_saved(run: Path) -> int:
    """Rounds in the run's last checkpoint."""
    return checkpoint.read_manifest(run).round if (run / "config.toml").exists() else 0


def test_checkpoints_every_few_rounds_end_the_same_too(unharmed: End, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # One file at the start; the first checkpoint has at most seven, the server's and six clients', the second over two.
    assert start(tmp_path, run, 5, die_in_the_middle_of_file, 11).wait().code == -signal.SIGKILL
    assert rounds_saved(run) == 5
    assert len(metrics.read(run)) >= 5
    assert start(tmp_path, run, 5).wait().code == 0
    lines, manifest = end(run)
    expected_lines, expected = unharmed
    assert lines == expected_lines
    assert hashes(manifest) == hashes(expected)


def hashes(manifest: dict[str, Any]) -> dict[str, str]:
    """By client; the files' names hold the round of the checkpoint, which may differ."""
    return {"server": manifest["server"]["sha256"]} | {c: e["sha256"] for c, e in manifest["clients"].items()}


def signal_at(batch: int, number: signal.Signals) -> None:
    """Have this process send itself a signal when it takes its `batch`-th batch, of training or of evaluation."""
    take, count = Loader.batch, 0

    def counted(self: Loader, indices: torch.Tensor, channels_last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal count
        count += 1
        if count == batch:
            os.kill(os.getpid(), number)
        return take(self, indices, channels_last)

    Loader.batch = counted  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("batch", "every", "number"),
    # A round takes nine batches: three clients train on one each and are evaluated twice.
    [
        (30, 1, signal.SIGINT),
        (60, 5, signal.SIGINT),
        (63, 5, signal.SIGTERM),
        (66, 5, signal.SIGHUP),
        (69, 5, signal.SIGINT),
    ],
)
def test_interrupted_run_saves_the_last_whole_round_and_says_how_to_go_on(
    unharmed: End, tmp_path: Path, batch: int, every: int, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    done = start(tmp_path, run, every, signal_at, batch, number).wait()
    assert done.code == 130, done
    rounds = rounds_saved(run)
    assert 1 <= rounds < 12
    assert len(metrics.read(run)) == rounds
    assert done.err == f"fedmoe: stopped after round {rounds} of 12; continue with: fedmoe resume {run}\n"
    assert start(tmp_path, run, every).wait().code == 0
    lines, manifest = end(run)
    expected_lines, expected = unharmed
    assert lines == expected_lines
    assert hashes(manifest) == hashes(expected)
