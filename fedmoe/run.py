"""The life of a run folder: started, resumed, evaluated; one process at a time, nothing in it ever half written."""

import fcntl
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import fedmoe
from fedmoe import checkpoint, configfile, metrics, mixture, partition
from fedmoe.client import check_batch, load_data
from fedmoe.config import Config
from fedmoe.display import accuracies, summary
from fedmoe.engine.device import prepare
from fedmoe.errors import UserError
from fedmoe.files import write_atomic
from fedmoe.partition import Split
from fedmoe.reference import ReferenceEngine
from fedmoe.rounds import evaluation, run_rounds

STARTED = {".lock", "partition.safetensors", "environment.json"}
"""What a start that was killed can leave behind, besides temporary files; the next start overwrites it."""


def train(config: Config) -> Path:
    """Start a run, take it through its rounds, return its folder; until every check has passed nothing is written."""
    configfile.check(config)
    run = Path(config.run.dir or time.strftime("runs/%Y%m%d-%H%M%S"))
    if (run / "config.toml").exists():
        raise UserError(
            f"{run} already holds a run: continue it with `fedmoe resume {run}`, or choose another --run.dir"
        )
    if run.exists() and not (run.is_dir() and all(p.name in STARTED or p.suffix == ".tmp" for p in run.iterdir())):
        raise UserError(f"{run} exists and is not a run: choose another --run.dir")
    folder = Path(config.data.name).expanduser()
    if folder.is_dir():  # the run may be resumed from another working directory
        config = replace(config, data=replace(config.data, name=str(folder.resolve())))
    device = _prepare(config, config.run.threads)
    dataset = load_data(config.data, config.seed)
    n, classes = config.federation.clients, len(dataset.classes)
    with warnings.catch_warnings(record=True) as caught:
        split = partition.deal(dataset.labels, classes, config.partition, n, config.seed)
    for warning in caught:
        warn(str(warning.message))
    _, channels, height, width = dataset.images.shape
    models = [
        mixture.build(config, i, (channels, height, width), classes) for i in range(min(len(config.model.local), n))
    ]
    for client in range(n):
        batch = min(config.training.batch_size, len(split.train(client)))
        check_batch(client, models[client % len(models)], batch)
    run.mkdir(parents=True, exist_ok=True)
    with _locked(run):
        split.save(run / "partition.safetensors")
        facts = environment(device) | {"data": dataset.fingerprint, "partition": split.fingerprint}
        write_atomic(run / "environment.json", json.dumps(facts, indent=1).encode())
        # Last: with it, the folder is a run and can be resumed.
        write_atomic(run / "config.toml", configfile.save(config))
        _finish(config, run, device)
    return run


def resume(run: Path, rounds: int | None) -> None:
    """Continue a run from its last checkpoint, to `rounds` rounds if given."""
    config = _open(run)
    with _locked(run):
        if rounds is not None:
            config = replace(config, federation=replace(config.federation, rounds=rounds))
            configfile.check(config)
        manifest = checkpoint.read_manifest(run)
        done = manifest.round if manifest else 0
        if done >= config.federation.rounds:
            raise UserError(
                f"{run} has trained {done} of {config.federation.rounds} rounds: give --rounds to train more"
            )
        device = _restore(config, run)
        _verify(run, manifest)
        if rounds is not None:
            write_atomic(run / "config.toml", configfile.save(config))
        _finish(config, run, device)


def evaluate(run: Path, clients: list[int], aggregated: bool, as_json: bool) -> None:
    """Evaluate clients (all if none are given) as the last checkpoint has them, and print it; no file changes."""
    config = _open(run)
    n = config.federation.clients
    if wrong := [client for client in clients if not 0 <= client < n]:
        raise UserError(f"there is no client {wrong[0]}: the run has clients 0 to {n - 1}")
    manifest = checkpoint.read_manifest(run)
    if manifest is None:
        raise UserError(f"{run} has no checkpoint yet: continue it with `fedmoe resume {run}`")
    device = _restore(config, run)
    _verify(run, manifest)
    theta = checkpoint.load(run, manifest.server)
    engine = ReferenceEngine(config, run, device)
    line = {"round": manifest.round} | evaluation(engine, manifest.round, clients or list(range(n)), theta, aggregated)
    if as_json:
        print(json.dumps(line))
    else:
        accuracies(Console(), config, Split.load(run / "partition.safetensors"), line)


def environment(device: torch.device) -> dict[str, str | int]:
    """What a bit-identical repetition depends on besides the configuration."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "fedmoe": fedmoe.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": device.type,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
    }


def _finish(config: Config, run: Path, device: torch.device) -> None:
    run_rounds(config, run, device)
    console = Console()
    summary(console, config, Split.load(run / "partition.safetensors"), metrics.read(run))
    console.print(f"run folder: {run}", highlight=False, soft_wrap=True)


def _open(run: Path) -> Config:
    if not (run / "config.toml").is_file():
        raise UserError(f"{run} is not a run, it has no config.toml: start one with `fedmoe train`")
    return configfile.read(run / "config.toml")


def _prepare(config: Config, threads: int) -> torch.device:
    try:
        return prepare(config.run.device, threads, config.run.deterministic)
    except ValueError as error:
        raise UserError(str(error)) from error


def _restore(config: Config, run: Path) -> torch.device:
    """The device, with the threads the run began with; warns of what else differs, refuses data that does."""
    path = run / "environment.json"
    try:
        then = json.loads(path.read_text())
        device = _prepare(config, int(then["threads"]))
        data, dealt = then["data"], then["partition"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}); restore it from a copy") from error
    now = environment(device)
    for name, value in now.items():
        if then.get(name) != value:
            warn(f"{name} was {then.get(name)}, now {value}: the numbers may differ from an uninterrupted run's")
    if (cores := os.cpu_count() or 1) < then["threads"]:
        warn(f"the run began with {then['threads']} threads, which are kept, but this machine has {cores} cores")
    fingerprint = load_data(config.data, config.seed).fingerprint
    if fingerprint != data:
        raise UserError(
            f"data {config.data.name}: fingerprint {fingerprint[:12]}, the run began with {data[:12]}: restore it"
        )
    found = Split.load(run / "partition.safetensors").fingerprint
    if found != dealt:
        raise UserError(f"{run / 'partition.safetensors'}: fingerprint {found[:12]}, the run began with {dealt[:12]}")
    return device


def _verify(run: Path, manifest: checkpoint.Manifest | None) -> None:
    """Read every file of the checkpoint once, so that a bad one is found before anything is done with the run."""
    for entry in [manifest.server, *manifest.clients.values()] if manifest else []:
        checkpoint.load(run, entry)


def warn(text: str) -> None:
    """A warning, on the error stream."""
    Console(stderr=True).print(f"fedmoe: warning: {text}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Keep other processes out of the run; the system lets go of the lock however this process ends."""
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run} is in use by another process: wait until it ends") from None
        yield
