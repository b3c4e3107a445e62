"""The life of a run folder: started, resumed, evaluated; one process at a time, nothing in it ever half written."""

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

import fedmoe
from fedmoe import checkpoint, configfile, engines, meaning, metrics, mixture, planning, report
from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.display import Output, accuracies, say, summary, warn
from fedmoe.engine.facts import facts
from fedmoe.errors import OutputLost, UserError
from fedmoe.files import check_above, check_page, write_atomic
from fedmoe.measure import measure
from fedmoe.partition import Split
from fedmoe.rounds import Whole, evaluation, run_rounds

STARTED = {".lock", "partition.safetensors", "environment.json", "plan.json", "server.r0.safetensors", "manifest.json"}
"""What a start that was killed can leave behind, besides temporary files; the next start overwrites it."""

FREE = (
    *("run.dir", "run.device", "run.threads", "run.report"),
    *("federation.rounds", "data.name", "evaluation.", "checkpoint."),
)
"""What may be changed in the configuration of a run that has begun: all else decides what its numbers are."""


def train(config: Config, whole: Whole | None = None) -> Path:
    """Start a run, take it through its rounds, return its folder; until every check has passed nothing is written.

    As part of a whole it tells of its rounds alone.
    """
    run = Path(config.run.dir or time.strftime("runs/%Y%m%d-%H%M%S")).expanduser()
    with started(config, run) as (config, device):
        _finish(config, run, device, whole)
    return run


@contextlib.contextmanager
def started(config: Config, run: Path) -> Iterator[tuple[Config, torch.device]]:
    """A new run in folder `run`, within the block for this process alone; its configuration and device.

    Raises UserError for what cannot be trained; until every check has passed nothing is written.
    """
    meaning.check(config)
    for line in meaning.ignored(config):
        warn(line)
    _check_free(run)
    source = Path(config.data.name).expanduser()
    if config.data.name != "digits" and source.exists():  # the run may be resumed from another working directory
        config = replace(config, data=replace(config.data, name=str(source.absolute())))
    device = planning.device(config, config.run.threads)
    mixture.check_head(config, device)
    dataset = load_data(config.data, config.seed)
    split = planning.deal(config, dataset)
    models = planning.models(config, dataset, split)
    engines.check(config, models)
    plan = None
    if config.engine.kind == "fast":
        on = facts(device)
        plan, lines = planning.make(config, planning.sizes(config, dataset, split, models, on), on)
        for line in lines:
            warn(line)
    theta = {}
    if config.method != "local":
        theta = mixture.pack(mixture.theta_tensors(mixture.build_global(config, dataset.shape, dataset.outputs)))
    run.mkdir(parents=True, exist_ok=True)
    with locked(run):
        _check_free(run)  # once more: another process may have been faster
        split.save(run / "partition.safetensors")
        began = {"data": dataset.fingerprint, "partition": split.fingerprint, "config": configfile.flat(config)}
        write_atomic(run / "environment.json", json.dumps(environment(device) | began, indent=1).encode())
        checkpoint.create(run, theta)
        engines.write(run, plan)
        # Last: with it, the folder is a run and can be resumed.
        write_atomic(run / "config.toml", configfile.save(config))
        yield config, device


def resume(run: Path, rounds: int | None, whole: Whole | None = None) -> None:
    """Continue a run from its last checkpoint, to `rounds` rounds if given."""
    config = _open(run)
    with locked(run):
        if rounds is not None:
            config = replace(config, federation=replace(config.federation, rounds=rounds))
            meaning.check(config)
        done, wanted = checkpoint.read_manifest(run).round, config.federation.rounds
        if done >= wanted:
            raise UserError(f"{run} has trained {done} rounds of {wanted}: give --rounds more than {done} to train on")
        device = _restore(config, run)
        held = [line["round"] for line in metrics.read(run)][:done]
        if held != list(range(1, done + 1)):
            missing = sorted(set(range(1, done + 1)) - set(held))
            raise UserError(
                f"{run / 'metrics.jsonl'}: has no line of round {missing[0]}, the checkpoint does: restore it"
            )
        if rounds is not None:
            write_atomic(run / "config.toml", configfile.save(config))
        _finish(config, run, device, whole)


def evaluate(run: Path, clients: list[int], aggregated: bool, as_json: bool) -> None:
    """Evaluate clients (all if none are given) as the last checkpoint has them, and print it; no file changes."""
    config = _open(run)
    n = config.federation.clients
    if wrong := [client for client in clients if not 0 <= client < n]:
        raise UserError(f"there is no client {wrong[0]}: the run has clients 0 to {n - 1}")
    with locked(run, fcntl.LOCK_SH):  # a run in progress would take files away in the middle
        device = _restore(config, run)
        manifest = checkpoint.read_manifest(run)
        theta = checkpoint.load(run, manifest.server)
        chosen = sorted(set(clients)) or list(range(n))
        with engines.opened(config, run, device) as engine:
            line = {"round": manifest.round} | evaluation(
                engine, manifest.round, chosen, theta, aggregated, config.data.kind == "text"
            )
    if as_json:
        print(json.dumps(line))
    else:
        accuracies(Output(), config, Split.load(run / "partition.safetensors"), line)


def write_report(run: Path, out: Path | None, target: float | None, profile: Path | None) -> None:
    """Write the report of a run to the file `out`, into its folder if that is None, and print where.

    `target` is an accuracy, of text a perplexity, whose cost is shown; `profile` the folder of a profile that is
    shown, too.
    """
    if out is not None:
        check_page(out)
    config = _open(run)
    measure(config).check_target(target)
    shown = report.read_profile(profile) if profile else None
    # Others may look at the run meanwhile, unless the report is written into its folder.
    with locked(run, fcntl.LOCK_SH if out else fcntl.LOCK_EX):
        device = _restore(config, run)
        path = report.write(config, run, device, out, target, shown)
    say(Output(), f"written to {path}")


@contextlib.contextmanager
def reading(run: Path) -> Iterator[Config]:
    """A run to read from on the CPU, as it was left: for as long as the block lasts, nobody writes to it.

    Raises UserError where it is in use, or not as it was left; checkpoint files are checked when they are loaded.
    """
    config = _open(run)
    config = replace(config, run=replace(config.run, device="cpu"))
    with locked(run, fcntl.LOCK_SH):
        _restore(config, run, whole=False)
        yield config


def environment(device: torch.device) -> dict[str, str | int]:
    """What a bit-identical repetition depends on besides the configuration."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "fedmoe": fedmoe.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "device": device.type,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    """The processor's name where the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _finish(config: Config, run: Path, device: torch.device, whole: Whole | None) -> None:
    engines.sweep(run)
    run_rounds(config, run, device, whole)
    if config.run.report:
        try:
            report.write(config, run, device)
        except Exception as error:  # all else is on disk: whatever it is, it must not cost the run
            warn(f"no report: {type(error).__name__}: {error}; `fedmoe report {run}` tries again")
    if whole is not None:
        return
    console = Output()
    with contextlib.suppress(OutputLost, OSError):  # all is on disk
        summary(console, config, Split.load(run / "partition.safetensors"), metrics.read(run))
        say(console, f"run folder: {run}")


def _check_free(run: Path) -> None:
    """Raise UserError unless a run can be started in folder `run`."""
    if (run / "config.toml").exists():
        raise UserError(f"{run} already holds a run: `fedmoe resume {run}` continues it; or choose another --run.dir")
    content = [p for folder in (run, run / "checkpoints") for p in folder.glob("*") if p != run / "checkpoints"]
    ours = all(path.name in STARTED or path.suffix == ".tmp" for path in content)
    if (
        run.is_file()
        or not ours
        or ((run / "checkpoints/manifest.json").exists() and checkpoint.read_manifest(run).round)
    ):
        raise UserError(f"{run} exists and is not a run: choose another --run.dir")
    check_above(run, "--run.dir")


def _open(run: Path) -> Config:
    if not (run / "config.toml").is_file():
        raise UserError(f"{run} is not a run, it has no config.toml: start one with `fedmoe train`")
    config = configfile.read(run / "config.toml")
    meaning.check(config)
    return config


def _restore(config: Config, run: Path, whole: bool = True) -> torch.device:
    """The device, with the threads the run began with. Warns of versions that differ.

    Raises UserError where the run is not as it was left: configuration, data, partition, and, of a `whole` run, any
    file of the checkpoint.
    """
    path = run / "environment.json"
    try:
        then = json.loads(path.read_text())
        threads, data, dealt, began = (then[name] for name in ("threads", "data", "partition", "config"))
        if not (isinstance(threads, int) and threads > 0 and isinstance(began, dict)):
            raise ValueError(f"threads is {threads!r}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is missing or damaged ({type(error).__name__}: {error}): restore it") from error
    # A field that is newer than the run was then, in effect, what it is by default.
    began = json.loads(json.dumps(configfile.flat(Config()))) | began
    for name, value in json.loads(json.dumps(configfile.flat(config))).items():
        if value != began[name] and not name.startswith(FREE):
            differs = f"{name} is {value!r}, the run began with {began[name]!r}"
            raise UserError(f"{run / 'config.toml'}: {differs}: put it back, or start a new run")
    device = planning.device(config, threads)
    for name, value in environment(device).items():
        if then.get(name) != value:
            warn(f"{name} was {then.get(name)}, now {value}: the numbers may differ from an uninterrupted run's")
    if (cores := os.cpu_count() or 1) < threads:
        warn(f"the run began with {threads} threads, which are kept, but this machine has {cores} cores")
    fingerprints = {
        f"data {config.data.name}": (load_data(config.data, config.seed).fingerprint, data),
        str(run / "partition.safetensors"): (Split.load(run / "partition.safetensors").fingerprint, dealt),
    }
    for what, (found, expected) in fingerprints.items():
        if found != expected:
            raise UserError(f"{what}: fingerprint {found[:12]}, the run began with {str(expected)[:12]}: restore it")
    manifest = checkpoint.read_manifest(run)
    if wrong := [client for client in manifest.clients if client >= config.federation.clients]:
        last = config.federation.clients - 1
        raise UserError(f"{run / 'checkpoints/manifest.json'}: names client {wrong[0]}, the last is {last}: restore it")
    for entry in [manifest.server, *manifest.clients.values()] if whole else []:
        checkpoint.load(run, entry)
    return device


@contextlib.contextmanager
def locked(run: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Keep other processes out of the folder; the system lets go of the lock however this process ends."""
    handle = os.open(run / ".lock", os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run} is in use by another process: wait until it ends") from None
        yield
    finally:
        os.close(handle)
