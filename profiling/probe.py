"""Tries out steps of an engine's clients, away from their rooms: operator by operator, and with larger batches."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from fedmoe.engine.arena import Arena
from fedmoe.engine.device_engine import DeviceEngine
from fedmoe.engine.graphs import Track
from fedmoe.engine.seeds import globals_kept
from fedmoe.engine.step import Step
from fedmoe.profiling.operators import Operators
from fedmoe.profiling.profile import BatchSize
from fedmoe.profiling.timing import settle

LAPS = 5
STEPS = {"cpu": 2, "cuda": 20}
"""Steps that are timed at once."""
LONGEST = 2.0
"""Seconds of a step from which no larger batch is tried."""


def architectures(engine: DeviceEngine) -> dict[str, int]:
    """A client of each architecture that the engine has trained."""
    found: dict[str, int] = {}
    for client in sorted(engine.site.roster):
        found.setdefault(engine.site.roster[client][0].architecture, client)
    return found


def operators(engine: DeviceEngine, clients: Sequence[int]) -> Operators:
    """Every operator of one training step of each client, after one that is not looked at."""
    device = engine.site.device
    with globals_kept():
        steps = [_step(engine, client, graphs=False) for client in clients]
        for client, step in zip(clients, steps, strict=True):
            _take(engine, client, step, 1, engine.site.roster[client][0].batch_size)
        with Operators(device) as seen:
            for client, step in zip(clients, steps, strict=True):
                _take(engine, client, step, 1, engine.site.roster[client][0].batch_size)
    return seen


def batch_sizes(engine: DeviceEngine, client: int, factors: Sequence[int] = (1, 2, 4, 8)) -> list[BatchSize]:
    """What a step takes with batches so many times as large, in turns, as far as samples, memory and patience go."""
    member = engine.site.roster[client][0]
    sizes = [factor * member.batch_size for factor in factors if factor * member.batch_size <= member.training]
    taken: dict[int, list[float]] = {}
    with globals_kept():
        step = _step(engine, client, graphs=engine.site.how.graphs)
        for lap in range(LAPS + 1):
            for size in sizes:
                try:
                    seconds = _take(engine, client, step, STEPS[engine.site.device.type], size)
                except torch.OutOfMemoryError:
                    sizes = sizes[: sizes.index(size)]
                    taken.pop(size, None)
                    break
                if lap:  # the first warms up
                    taken.setdefault(size, []).append(seconds)
                elif seconds > LONGEST:
                    sizes = sizes[: sizes.index(size) + 1]
                    break
    return [BatchSize(size, statistics.median(found)) for size, found in taken.items() if size in sizes]


def _step(engine: DeviceEngine, client: int, graphs: bool) -> Step:
    """A step over a copy of the client's state."""
    site, (_, layout) = engine.site, engine.site.roster[client]
    region = engine.store.read(client).to(site.device)
    arena = Arena(site.federation.program(client), layout, region, site.how.low)
    how = replace(site.how, graphs=graphs)
    return Step(arena, site.loader, site.federation.optimizer, how, Track(site.device, graphs))


def _take(engine: DeviceEngine, client: int, step: Step, count: int, size: int) -> float:
    """Take steps; seconds of one."""
    samples = engine.site.roster[client][0].samples
    order = samples[torch.arange(count * size).remainder(len(samples))].view(count, size)
    step.begin()
    settle(engine.site.device)
    start = time.perf_counter()
    for _ in step.epoch(order):
        pass
    settle(engine.site.device)
    return (time.perf_counter() - start) / count
