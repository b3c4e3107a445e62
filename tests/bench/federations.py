"""Federations on images of CIFAR-10's shape, and rounds of them as what a benchmark calls."""

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import torch

from fedmoe.config import Config, Data, Federation, Partition
from fedmoe.engine.device_engine import DeviceEngine
from fedmoe.engine.seam import Engine, Job
from fedmoe.engine.step import How
from fedmoe.profiling.bench import Absent, Bench, Call
from fedmoe.reference import ReferenceEngine
from tests.engines import engine
from tests.support import changed, theta
from tests.test_data import picture, write

FASTEST = How(optimizer="flat", streams=True, graphs=True)
"""On a GPU."""


def federation(folder: Path, clients: int, each: int, **sections: dict[str, Any]) -> Config:
    """Ten classes; every client has `each` samples, four fifths of them to train on."""
    labels = [row % 10 for row in range(clients * each)]
    classes = [f"class {label}" for label in range(10)]
    pictures = [picture(row, (32, 32)) for row in range(50)]
    write(folder / "train-0.parquet", labels, [pictures[row % 50] for row in range(len(labels))], classes)
    config = Config(
        federation=Federation(clients=clients),
        data=Data(name=str(folder)),
        partition=Partition(kind="iid"),
    )
    return changed(config, **sections)


def a_round(config: Config, made: Engine, epochs: int = 1) -> Call:
    """Trains every client from where it is, with the theta that all began with, where there is one."""
    sent, numbers = {} if config.method == "local" else theta(config), count(1)

    def call() -> None:
        number = next(numbers)
        jobs = [Job(client, number, sent, {"epochs": epochs}) for client in range(config.federation.clients)]
        for _ in made.run("train", jobs):
            pass
        made.commit()

    return call


def steps_of(made: DeviceEngine, client: int) -> Call:
    """The steps of an epoch of the client's, on whoever is where it trains; after a round in one lane."""
    member, rooms = made.site.roster[client][0], made.lanes[0].rooms
    step = rooms[client % len(rooms)].steps[member.architecture]
    size, count = member.batch_size, member.training // member.batch_size
    order = member.samples[: size * count].view(count, size)

    def call() -> None:
        for _ in step.epoch(order):
            pass

    return call


def rounds_of(
    bench: Bench,
    config: Config,
    run: Path,
    ways: Mapping[str, dict[str, Any] | Absent],
    first: Mapping[str, Engine] | None = None,
    epochs: int = 1,
) -> None:
    """Compare rounds of the engines `first` and of the device's, made in each of `ways`, as fast as it can be."""
    fastest = FASTEST if bench.device.type == "cuda" else How()
    variants: dict[str, Call | Absent] = {name: a_round(config, made, epochs) for name, made in (first or {}).items()}
    with ExitStack() as stack:
        for name, way in ways.items():
            if isinstance(way, Absent):
                variants[name] = way
                continue
            options = {"how": fastest, "device": bench.device.type, "folder": f"store-{name}", **way}
            made = stack.enter_context(engine(config, run, **options))
            variants[name] = a_round(config, made, epochs)
        bench(variants)


def plain(config: Config, run: Path, device: torch.device, fused: bool) -> ReferenceEngine:
    """The plain loop, in PyTorch's operators alone, with its default SGD or its fused one."""
    made = ReferenceEngine(changed(config, engine={"kind": "reference"}), run, device)
    for client in range(config.federation.clients) if fused else ():
        opened, t = made.client(client), config.training
        opened.optimizer = torch.optim.SGD(
            opened.mixture.parameters(), lr=t.lr, momentum=t.momentum, weight_decay=t.weight_decay, fused=True
        )
    return made
