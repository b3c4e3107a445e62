"""The federated loop: sample, train, average, evaluate, record, checkpoint; stopped at any step, it loses no round."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from fedmoe import metrics, mixture
from fedmoe.checkpoint import Writer, load
from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.display import Display
from fedmoe.engine.seam import Engine, Job, Payload, Result
from fedmoe.errors import UserError
from fedmoe.metrics import Line, spread
from fedmoe.reference import Interrupted, ReferenceEngine
from fedmoe.server import Server


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and did; the message says after which round and how to go on."""


def run_rounds(config: Config, run: Path, device: torch.device) -> None:
    """Take the run in folder `run` from its last checkpoint to its last round.

    Raises Stopped after SIGINT or SIGTERM, once the step in hand is done and the last whole round is on disk, and
    UserError where the disk refuses a write; the checkpoint before that stays whole.
    """
    writer = Writer(run)
    done = saved = writer.manifest.round if writer.manifest else 0
    theta = load(run, writer.manifest.server) if writer.manifest else initial_theta(config)
    server = Server(config, theta)
    rounds, hint = config.federation.rounds, f"continue with: fedmoe resume {run}"
    try:
        with _stopping() as stop, Display(rounds, done, len(server.sample(1))) as display:
            engine: Engine = ReferenceEngine(config, run, device, stop)
            log = metrics.Log(run, done)
            held_up = 0.0  # seconds that checkpoints held training up since the line before
            try:
                for number in range(done + 1, rounds + 1):
                    line, theta = _round(config, server, engine, number, display)
                    engine.commit()
                    server.theta, done = theta, number
                    line["seconds"]["checkpoint"] = held_up
                    log.append(line)
                    display.round(line)
                    held_up = 0.0
                    if number % config.checkpoint.every == 0 or number == rounds:
                        start = time.perf_counter()
                        writer.submit(number, server.theta, engine.changed())
                        saved, held_up = number, time.perf_counter() - start
            except Interrupted:
                engine.rollback()
                if saved < done:
                    writer.submit(done, server.theta, engine.changed())
                raise Stopped(f"stopped after round {done} of {rounds}; {hint}") from None
            finally:
                writer.close()
                log.close()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror}; the last checkpoint is whole: make room, then {hint}") from error


def initial_theta(config: Config) -> Payload:
    """Theta before the first round, the one every client was initialized with; {} with nothing shared."""
    if config.method == "local":
        return {}
    dataset = load_data(config.data, config.seed)
    _, channels, height, width = dataset.images.shape
    return mixture.pack(mixture.build_global(config, (channels, height, width), len(dataset.classes)))


def evaluation(engine: Engine, number: int, clients: list[int], theta: Payload, aggregated: bool) -> Line:
    """Accuracy and loss of `clients` on their held-out samples, with their own theta and, if asked, with the given."""
    line: Line = {"evaluated": clients}
    results = list(engine.run("evaluate", [Job(client, number, {}) for client in clients]))
    line["accuracy"] = spread([_number(r, "accuracy") for r in results])
    line["test_loss"] = spread([_number(r, "loss") for r in results])
    if aggregated and theta:
        results = list(engine.run("evaluate", [Job(client, number, theta) for client in clients]))
        line["accuracy_aggregated"] = spread([_number(r, "accuracy") for r in results])
    return line


def _round(config: Config, server: Server, engine: Engine, number: int, display: Display) -> tuple[Line, Payload]:
    """Round `number`: its line of metrics and the new theta."""
    start = time.perf_counter()
    results = []
    for result in engine.run("train", server.jobs(number)):
        results.append(result)
        display.trained(result)
    trained = time.perf_counter()
    theta = server.average(results)
    averaged = time.perf_counter()
    sampled = [r.client for r in results]
    counted = [r for r in results if not r.metrics["rolled_back"]]
    weight = sum(r.weight for r in counted)
    line: Line = {
        "round": number,
        "sampled": sampled,
        "rolled_back": [r.client for r in results if r.metrics["rolled_back"]],
        "loss": sum(r.weight * _number(r, "loss") for r in counted) / weight if counted else None,
        "bytes_down": len(results) * _bytes(server.theta),
        "bytes_up": sum(_bytes(r.payload) for r in counted),
        "flops": sum(_number(r, "flops") for r in results),
    }
    if number % config.evaluation.every == 0 or number == config.federation.rounds:
        everyone = list(range(config.federation.clients))
        clients = everyone if config.evaluation.clients == "all" else sampled
        line |= evaluation(engine, number, clients, theta, config.evaluation.aggregated)
    end = time.perf_counter()
    line["seconds"] = {
        "round": end - start,
        "train": trained - start,
        "aggregate": averaged - trained,
        "evaluate": end - averaged,
    }
    line["clients"] = {  # one entry for each of `sampled`, in that order
        "samples": [r.metrics["samples"] for r in results],
        "loss": [r.metrics.get("loss") for r in results],
        "train_accuracy": [r.metrics.get("accuracy") for r in results],
        "bytes_down": [_bytes(server.theta)] * len(results),
        "bytes_up": [0 if r.metrics["rolled_back"] else _bytes(r.payload) for r in results],
        "flops": [r.metrics["flops"] for r in results],
        "seconds": [r.metrics["seconds"] for r in results],
    }
    return line, theta


def _number(result: Result, metric: str) -> float:
    value = result.metrics[metric]
    assert not isinstance(value, list)
    return value


def _bytes(payload: Payload) -> int:
    return sum(tensor.nbytes for tensor in payload.values())


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second interrupts at once."""
    event = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
