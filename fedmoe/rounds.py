"""The federated loop: sample, train, average, evaluate, record, checkpoint; stopped at any step, it loses no round."""

import math
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from rich.console import Console

from fedmoe import engines
from fedmoe.attack import attacked, described
from fedmoe.checkpoint import Writer, load
from fedmoe.config import Config
from fedmoe.display import Display, Output, say
from fedmoe.engine.ranges import phase
from fedmoe.engine.seam import Engine, Interrupted, Job, Payload, Refused, Result
from fedmoe.errors import DiskError, OutputLost, UserError
from fedmoe.metrics import Line, Log, spread
from fedmoe.profiling.nvml import energy_counter
from fedmoe.profiling.nvml_device import Unavailable
from fedmoe.profiling.timing import Meter
from fedmoe.server import Arrivals, Server
from fedmoe.signals import handling


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and did; the message says after which round and how to go on."""


@dataclass(frozen=True, slots=True)
class Whole:
    """What a run may be part of, as a sweep."""

    console: Console
    """Where its rounds are told of."""
    hint: str
    """How the whole is continued."""


def run_rounds(config: Config, run: Path, device: torch.device, whole: Whole | None = None) -> None:
    """Take the run in folder `run` from its last checkpoint to its last round.

    Raises Stopped after SIGINT, SIGTERM or SIGHUP, or where nobody takes the output any more, once the step in hand is
    done and the last whole round is on disk; and UserError where the disk refuses a write. Whatever else goes wrong,
    the rounds that are over are saved first.
    """
    whole = whole or Whole(Output(), f"continue with: fedmoe resume {shlex.quote(str(run))}")
    hint = whole.hint
    with ExitStack() as stack:
        stop = stack.enter_context(_stopping())
        engine = stack.enter_context(engines.opened(config, run, device, stop.event))
        writer = Writer(run)
        stack.callback(writer.close)  # before the engine is: what it writes comes from there
        done = saved = writer.manifest.round
        server = Server(config, load(run, writer.manifest.server))
        log = stack.enter_context(Log(run, done))
        rounds = config.federation.rounds
        if bad := described(config):
            say(whole.console, f"attacked: {bad}")
        display = stack.enter_context(Display(config, done, len(server.sample(1)), whole.console))

        def save() -> None:
            with _disk(hint):
                writer.wait()
                log.sync()  # the manifest must not be ahead of the metrics
                writer.submit(done, server.theta, engine.changed())

        meter = energy_counter(device)
        held_up = 0.0  # seconds that checkpoints held training up since the line before
        try:
            for number in range(done + 1, rounds + 1):
                before = _joules(meter)
                with _disk(hint):  # states may be in files
                    line, theta = take_round(config, server, engine, number, display)
                if before is not None and (after := _joules(meter)) is not None:
                    line["energy_j"] = after - before
                engine.commit()
                server.theta, done = theta, number
                line["seconds"]["checkpoint"] = held_up
                held_up = 0.0
                with _disk(hint):
                    log.append(line)
                if number % config.checkpoint.every == 0 or number == rounds:
                    start = time.perf_counter()
                    save()
                    saved, held_up = number, time.perf_counter() - start
                display.round(line)
            stop.patient = True
            with _disk(hint):
                writer.wait()
        except KeyboardInterrupt:
            raise Stopped(f"stopped at once, the last checkpoint is whole; {hint}") from None
        except DiskError:
            raise
        except Exception as error:
            stop.patient = True
            engine.rollback()
            if saved < done:
                save()
            with _disk(hint):
                writer.wait()
            if isinstance(error, Interrupted | OutputLost):
                why = f" ({error})" if isinstance(error, OutputLost) else ""
                raise Stopped(f"stopped after round {done} of {rounds}{why}; {hint}") from None
            if isinstance(error, Refused):
                raise UserError(f"{error}; the run holds {done} rounds, {hint}") from error
            raise


def evaluation(
    engine: Engine,
    number: int,
    clients: list[int],
    theta: Payload,
    aggregated: bool,
    text: bool,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Line:
    """Accuracy and loss of `clients` on their held-out samples, with their own theta and, if asked, with the given.

    Of text perplexity, too, which is e to the power of the mean loss of a token. Clients whose loss is not finite are
    named. `progress` hears how many of how many evaluations are done.
    """
    line: Line = {"evaluated": clients}
    kinds: dict[str, Payload] = {"": {}} | ({"_aggregated": theta} if aggregated and theta else {})
    not_finite: set[int] = set()
    for i, (suffix, payload) in enumerate(kinds.items()):
        results = []
        for result in engine.run("evaluate", [Job(client, number, payload) for client in clients]):
            results.append(result)
            progress(i * len(clients) + len(results), len(kinds) * len(clients))
        line[f"accuracy{suffix}"] = spread([_number(r, "accuracy") for r in results])
        losses = [_number(r, "loss") for r in results]
        line[f"test_loss{suffix}"] = spread(losses)
        if text:
            line[f"perplexity{suffix}"] = spread([math.exp(loss) if loss < 700 else math.inf for loss in losses])
        not_finite |= {r.client for r in results if not math.isfinite(_number(r, "loss"))}
    line["not_finite"] = sorted(not_finite)
    return line


class Watcher(Protocol):
    """Hears how a round gets on."""

    def trained(self, result: Result) -> None:
        """One of its clients has trained."""

    def evaluating(self, done: int, of: int) -> None:
        """`done` of its evaluations are done."""


def take_round(config: Config, server: Server, engine: Engine, number: int, watcher: Watcher) -> tuple[Line, Payload]:
    """Round `number`: its line of metrics and the new theta; neither server nor clients keep what came of it yet."""
    with phase("round"):
        return _round(config, server, engine, number, watcher)


def _round(config: Config, server: Server, engine: Engine, number: int, display: Watcher) -> tuple[Line, Payload]:
    start = time.perf_counter()
    results, sent, aggregating = [], [], 0.0
    arrivals = Arrivals(config.server, server.theta)
    jobs = server.jobs(number)
    for result in attacked(config.attack, jobs, engine.run("train", jobs)):
        arrived = time.perf_counter()
        with phase("averaging"):
            arrivals.add(result)
        sent.append(0 if result.metrics["rolled_back"] else _bytes(result.payload))
        results.append(replace(result, payload={}))  # a round must not hold what K clients sent
        aggregating += time.perf_counter() - arrived
        display.trained(result)
        del result
    trained = time.perf_counter()
    with phase("averaging"):
        theta = arrivals.theta()
    rejected, kept = arrivals.rejected, arrivals.kept
    del arrivals
    averaged = time.perf_counter()
    sampled = [r.client for r in results]
    counted = [r for r in results if r.client not in rejected and not r.metrics["rolled_back"]]
    weight = sum(r.weight for r in counted)
    line: Line = {
        "round": number,
        "sampled": sampled,
        "rolled_back": [r.client for r in results if r.metrics["rolled_back"]],
        "rejected": {str(client): reason for client, reason in rejected.items()},
        "loss": sum(r.weight * _number(r, "loss") for r in counted) / weight if counted else None,
        "bytes_down": len(results) * _bytes(server.theta),
        "bytes_up": sum(sent),
        "flops": sum(_number(r, "flops") for r in results),
    }
    if kept:
        line["kept"] = kept
    if parts := {str(r.client): r.metrics["parts"] for r in results if r.metrics.get("parts", 1) != 1}:
        line["parts"] = parts
    if any("skipped" in r.metrics for r in results):
        line["skipped"] = sum(int(_number(r, "skipped")) for r in results)
    if number % config.evaluation.every == 0 or number == config.federation.rounds:
        everyone = list(range(config.federation.clients))
        clients = everyone if config.evaluation.clients == "all" else sampled
        text = config.data.kind == "text"
        line |= evaluation(engine, number, clients, theta, config.evaluation.aggregated, text, display.evaluating)
    end = time.perf_counter()
    line["seconds"] = {
        "round": end - start,
        "train": trained - start - aggregating,
        "aggregate": averaged - trained + aggregating,
        "evaluate": end - averaged,
    }
    line["clients"] = {  # one entry for each of `sampled`, in that order
        "samples": [r.metrics["samples"] for r in results],
        "loss": [_told(r, "loss") for r in results],
        "train_accuracy": [_told(r, "accuracy") for r in results],
        "bytes_down": [_bytes(server.theta)] * len(results),
        "bytes_up": sent,
        "flops": [r.metrics["flops"] for r in results],
        "seconds": [r.metrics["seconds"] for r in results],
    }
    return line, theta


def _number(result: Result, metric: str) -> float:
    value = result.metrics[metric]
    assert not isinstance(value, list)
    return value


def _told(result: Result, metric: str) -> float | None:
    """What a client says of itself, None where that is nothing or no finite number."""
    value = result.metrics.get(metric)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _joules(meter: Meter | None) -> float | None:
    """None where nothing counts them, or does no longer."""
    with suppress(Unavailable):
        return None if meter is None else meter()
    return None


def _bytes(payload: Payload) -> int:
    return sum(tensor.nbytes for tensor in payload.values())


@contextmanager
def _disk(hint: str) -> Iterator[None]:
    """What the disk refuses, in one line."""
    try:
        yield
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
        raise DiskError(f"{why}; the last checkpoint is whole: make room, then {hint}") from error


@dataclass
class _Stop:
    """How a run is asked to stop."""

    event: threading.Event = field(default_factory=threading.Event)
    """Set by the first signal."""
    patient: bool = False
    """Whether a second Ctrl-C waits, too: the run is ending and saves what it has."""


@contextmanager
def _stopping() -> Iterator[_Stop]:
    """The first signal asks the run to stop; a second Ctrl-C interrupts it."""
    stop = _Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.event.is_set() and number == signal.SIGINT and not stop.patient:
            raise KeyboardInterrupt
        stop.event.set()

    with handling(handle):
        yield stop
