"""Opens the engine that a run uses: the one its plan describes, or the plain loop."""

import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from fedmoe import optimizer
from fedmoe.config import Config
from fedmoe.engine.device_engine import DeviceEngine
from fedmoe.engine.layout import Layout
from fedmoe.engine.plan import Plan
from fedmoe.engine.seam import Engine
from fedmoe.engine.step import How
from fedmoe.engine.store import Store
from fedmoe.errors import UserError
from fedmoe.federation import Federation
from fedmoe.files import write_atomic
from fedmoe.mixture import Mixture
from fedmoe.reference import ReferenceEngine

PLAN = "plan.json"
"""The file in a run folder; without it, the run is the plain loop's."""


@contextmanager
def opened(config: Config, run: Path, device: torch.device, stop: threading.Event | None = None) -> Iterator[Engine]:
    """The engine of the run in folder `run`, on the device that its plan was made for.

    States that no memory has room for are in a folder of the run's meanwhile. Raises UserError where there is no
    reading the plan, or it is for another device.
    """
    plan = read(run)
    if plan is None:
        yield ReferenceEngine(config, run, device, stop)
        return
    if plan.device != device.type:
        raise UserError(
            f"{run / PLAN}: is for {plan.device}, the device is {device.type}: set run.device to {plan.device}, or "
            "remove the file and go on by the plain loop"
        )
    if plan.head == "plain":
        config = replace(config, engine=replace(config.engine, head="plain"))
    config = replace(
        config,
        training=replace(config.training, micro_batch=plan.micro_batch),
        model=replace(config.model, activation_checkpointing="on" if plan.activation_checkpointing else "off"),
    )
    how = How(
        precision=plan.precision,
        optimizer=plan.optimizer,
        streams=plan.streams,
        graphs=plan.graphs,
        channels_last=device.type == "cpu" or plan.precision in ("bf16", "fp16"),
    )
    # A folder for each process: others may evaluate the run at the same time.
    place = run if os.access(run, os.W_OK) else Path(tempfile.gettempdir())
    folder = place / f".states-{uuid.uuid4().hex}"
    budgets = {"device_bytes": plan.device_bytes, "host_bytes": plan.host_bytes}
    with Store(device, **budgets, folder=folder, reads=1 + plan.lanes) as store:
        widths = {"cohort": plan.cohort, "regions": plan.regions, "lanes": plan.lanes}
        resident = plan.data == "device" or device.type == "cpu"
        yield DeviceEngine(Federation(config, run), device, store, how, resident, stop, **widths)


def sweep(run: Path) -> None:
    """Remove what processes that were killed left in the run's folder; call it where there can be no other."""
    for folder in run.glob(".states-*"):
        shutil.rmtree(folder, ignore_errors=True)


def read(run: Path) -> Plan | None:
    """The run's plan; None if it has none. Raises UserError naming the file and what is wrong with it."""
    path = run / PLAN
    try:
        return Plan.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}: restore it") from error


def write(run: Path, plan: Plan | None) -> None:
    """Keep the plan with the run: a resumed run follows it, whatever memory is free by then. None: the plain loop's."""
    if plan is None:
        (run / PLAN).unlink(missing_ok=True)  # of a start that was killed
    else:
        write_atomic(run / PLAN, plan.to_json().encode())


def check(config: Config, models: Mapping[str, Mixture]) -> None:
    """Raise UserError for a model that the engine cannot hold, though the plain loop can train it."""
    for name, model in models.items() if config.engine.kind == "fast" else ():
        layout(config, name, model)


def layout(config: Config, name: str, model: Mixture) -> Layout:
    """How the engine holds a client of this model. UserError if it cannot."""
    try:
        return Layout.of(model.program(), optimizer.rule(config.training))
    except ValueError as error:
        raise UserError(f'model {name!r}: {error}; change it, or set engine.kind to "reference"') from error
