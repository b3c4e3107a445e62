"""Runs rounds of a federation on an engine, for comparisons of engines."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fedmoe import checkpoint
from fedmoe.config import Config
from fedmoe.engine.device import prepare
from fedmoe.engine.device_engine import DeviceEngine
from fedmoe.engine.seam import Engine, Job, Payload, Result, State
from fedmoe.engine.step import How, Step
from fedmoe.engine.store import PIECE, Store
from fedmoe.federation import Federation
from fedmoe.server import Server
from tests.synchronization import without_synchronization

FLIP = 2e-3
"""Of momentum: where a maximum or a ReLU is decided by a rounding, one way takes another than the other does. One such
flip made 7e-4 of it, on some processors; weight decay left out makes 1e-2, and all else that may be wrong more."""


class Outcome(NamedTuple):
    """All that a run of rounds gives."""

    theta: list[Payload]  # after each round
    train: list[Result]
    evaluated: list[Result]
    states: dict[int, State]


@contextmanager
def engine(
    config: Config,
    run: Path,
    how: How,
    device: str = "cpu",
    resident: bool = True,
    memory: int = 2**40,
    device_memory: int | None = None,
    folder: str = "store",
    piece: int = PIECE,
    **more: Any,
) -> Iterator[DeviceEngine]:
    """An engine over a run folder; `memory` bytes each of device and host hold states before they go to files."""
    on = prepare(device, 0, config.run.deterministic)
    device_bytes = memory if device_memory is None else device_memory
    with Store(on, device_bytes=device_bytes, host_bytes=memory, folder=run / folder, piece=piece) as store:
        yield DeviceEngine(Federation(config, run), on, store, how, resident, **more)


def rounds(
    config: Config, engine: Engine, run: Path, number: int = 3, first: int = 1, theta: Payload | None = None
) -> Outcome:
    """`number` rounds as the federated loop takes them, with an evaluation of every client after each."""
    server = Server(config, theta or checkpoint.load(run, checkpoint.read_manifest(run).server))
    out = Outcome([], [], [], {})
    for r in range(first, first + number):
        results = list(engine.run("train", server.jobs(r)))
        server.theta = server.aggregate(results)
        evaluations = [Job(client, r, {}) for client in range(config.federation.clients)]
        evaluations += [replace(job, payload=server.theta) for job in evaluations]
        out.evaluated.extend(engine.run("evaluate", evaluations))
        engine.commit()
        out.theta.append(server.theta)
        out.train.extend(results)
        out.states.update({client: state() for client, state in engine.changed().items()})
    return out


def in_pieces(config: Config, run: Path, how: How, number: int, device: str = "cpu") -> Outcome:
    """`number` rounds, with an engine of its own for each, from what the one before saved."""
    joined, last = Outcome([], [], [], {}), None
    for r in range(1, number + 1):
        with engine(config, run, how, device) as made:
            part = rounds(config, made, run, 1, r, last)
        last = part.theta[-1]
        writer = checkpoint.Writer(run)
        writer.submit(r, last, {client: lambda s=state: s for client, state in part.states.items()})  # type: ignore[misc]
        writer.wait()
        writer.close()
        joined.theta.extend(part.theta)
        joined.train.extend(part.train)
        joined.evaluated.extend(part.evaluated)
        joined.states.update(part.states)
    return joined


def assert_close(ours: Outcome, theirs: Outcome, tolerance: float) -> None:
    """Every payload and state within `tolerance`, relative to its norm; losses too; counts of samples exactly."""
    for a, b in zip(ours.theta, theirs.theta, strict=True):
        assert a.keys() == b.keys() and all(apart(a[name], b[name]) <= tolerance for name in a)
    for ours_, theirs_ in ((ours.train, theirs.train), (ours.evaluated, theirs.evaluated)):
        for x, y in zip(ours_, theirs_, strict=True):
            assert (x.client, x.weight, x.metrics.get("samples")) == (y.client, y.weight, y.metrics.get("samples"))
            assert x.metrics.get("flops") == y.metrics.get("flops")
            assert _number(x, "loss") == _number(y, "loss") or abs(_number(x, "loss") - _number(y, "loss")) <= (
                tolerance * (1 + abs(_number(y, "loss")))
            )
            assert abs(_number(x, "accuracy") - _number(y, "accuracy")) <= 0.1 * (tolerance > 1e-4)
    assert ours.states.keys() == theirs.states.keys()
    for client, state in theirs.states.items():
        mine = ours.states[client]
        for name, tensor in state.items():
            assert mine[name].dtype == tensor.dtype and mine[name].shape == tensor.shape, (client, name)
            if not tensor.is_floating_point() or name == "step":
                assert torch.equal(mine[name], tensor), (client, name)
        # As a whole: what has no gradient but roundings, as a bias before batch normalization, differs at will.
        for kind in {name.partition("/")[0] for name in state} - {"step", "constants"}:
            most = tolerance if kind == "model" else max(10 * tolerance, FLIP)
            assert apart(_whole(mine, kind), _whole(state, kind)) <= most, (client, kind)


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    """Bit for bit, but for seconds."""
    for a, b in zip(ours.theta, theirs.theta, strict=True):
        assert torch.equal(a["theta"], b["theta"])
    for x, y in zip(ours.train + ours.evaluated, theirs.train + theirs.evaluated, strict=True):
        assert (x.client, x.weight, _timeless(x)) == (y.client, y.weight, _timeless(y))
    assert ours.states.keys() == theirs.states.keys()
    for client, state in theirs.states.items():
        assert all(torch.equal(ours.states[client][name], tensor) for name, tensor in state.items()), client


def assert_no_step_waits(config: Config, run: Path, how: How, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: the host waits for nothing in a step, once what is made but once has been."""
    take = Step._take

    def watched(self: Step, indices: torch.Tensor) -> None:
        with without_synchronization():
            take(self, indices)

    payload = Server(config, checkpoint.load(run, checkpoint.read_manifest(run).server)).theta
    jobs = [Job(0, number, payload, {"epochs": 1}) for number in (1, 2)]
    with engine(config, run, how, "cuda") as made:
        list(made.run("train", jobs[:1]))  # handles, compiled kernels
        monkeypatch.setattr(Step, "_take", watched)
        list(made.run("train", jobs[1:]))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-6))


Rounds = Callable[..., Outcome]


def _whole(state: State, kind: str) -> torch.Tensor:
    named = {name: t for name, t in sorted(state.items()) if name.startswith(kind) and t.is_floating_point()}
    return torch.cat([tensor.double().flatten() for tensor in named.values()])


def _number(result: Result, name: str) -> float:
    value = result.metrics[name]
    assert not isinstance(value, list)
    return float(value)


def _timeless(result: Result) -> dict[str, Any]:
    return {name: value for name, value in result.metrics.items() if name != "seconds"}
