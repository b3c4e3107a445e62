"""What several test files share: changing a configuration, and running the command line in a process of its own.

A process is forked from a server that has everything imported already: a command then takes its own time and not two
seconds more, so that every failure can be tested as a user meets it.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fedmoe import checkpoint, mixture, partition
from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.engine.seam import Payload

ROOT = Path(__file__).parent.parent
SMALL = ("--data.limit=300", "--federation.clients=5", "--federation.rounds=2", "--run.threads=1", "--run.no-report")
"""Command-line options of a run of about a second; its report would take another."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["fedmoe.run", "fedmoe.cli", "sklearn.datasets", "sklearn.manifold", "tensorboardX", "torch._dynamo"]
)


def changed(config: Config, **sections: Any) -> Config:
    """`config` with fields of its sections replaced: `changed(c, training={"lr": 1.0}, method="local")`."""
    new = {name: replace(getattr(config, name), **v) if isinstance(v, dict) else v for name, v in sections.items()}
    return replace(config, **new)


def begin(config: Config, run: Path) -> Path:
    """Lay down what a run has before its first round, in folder `run`; returns it."""
    run.mkdir()
    data = load_data(config.data, config.seed)
    n = config.federation.clients
    dealt = partition.deal(data.labels, len(data.classes), config.partition, n, config.seed, data.classes, data.column)
    dealt.save(run / "partition.safetensors")
    checkpoint.create(run, {} if config.method == "local" else theta(config))
    return run


def theta(config: Config) -> Payload:
    """Theta before the first round."""
    data = load_data(config.data, config.seed)
    return mixture.pack(mixture.theta_tensors(mixture.build_global(config, data.shape, data.outputs)))


def unequal(config: Config, **sections: Any) -> Config:
    """`config` with clients of unequal size and two epochs a round, and with more of its sections changed."""
    return changed(
        changed(config, partition={"kind": "dirichlet", "min_samples": 20}, federation={"epochs": 2}), **sections
    )


def size(*modules: nn.Module) -> int:
    """Numbers of all their parameters."""
    return sum(p.numel() for module in modules for p in module.parameters())


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code (negative: the signal that ended it) and what it printed."""

    code: int
    out: str
    err: str

    def one_line(self, code: int = 1) -> str:
        """The single line a failed command printed on its error stream; asserts that it did no more than that."""
        assert self.code == code, self
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("fedmoe: error: "), lines[0]
        return lines[0].removeprefix("fedmoe: error: ")


Fedmoe = Callable[..., Done]
"""What the fixture `fedmoe` is."""


class Command:
    """`fedmoe WORDS` running in a process of its own, in the working directory `cwd`.

    `plant` is called in the process before the command: a function of a test module, to break something on purpose.
    """

    def __init__(
        self,
        cwd: Path,
        *words: object,
        env: Mapping[str, str] | None = None,
        plant: Callable[..., object] | None = None,
        plant_args: tuple[object, ...] = (),
    ) -> None:
        self._files = [cwd / f".{os.urandom(4).hex()}.{name}" for name in ("out", "err")]
        args = (cwd, [str(word) for word in words], dict(env or {}), self._files, plant, plant_args)
        self.process = _processes.Process(target=_run, args=args)
        self.process.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, seconds: float = 120) -> Done:
        """Wait until it ends."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s")
        # A process that was killed at once may not have made its files.
        out, err = (file.read_text() if file.exists() else "" for file in self._files)
        for file in self._files:
            file.unlink(missing_ok=True)
        return Done(self.process.exitcode, out, err)


def train(folder: Path, *words: object) -> Path:
    """`fedmoe train WORDS` to its end in the working directory `folder`; the run's folder below that."""
    done = Command(folder, "train", *words, "--run.dir=run").wait()
    assert done.code == 0, done
    return folder / "run"


def _run(
    cwd: Path,
    words: list[str],
    env: dict[str, str],
    files: list[Path],
    plant: Callable[..., object] | None,
    args: tuple[object, ...],
) -> None:
    os.chdir(cwd)
    os.environ.update(env)
    for stream, file in zip((1, 2), files, strict=True):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, stream)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    if plant:
        plant(*args)
    from fedmoe.cli import main

    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
