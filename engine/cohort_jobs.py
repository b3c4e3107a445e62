"""Trains jobs in cohorts: which go together, bringing them in and out, and results in the jobs' order."""

import math
import time
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmoe.engine.arena import Layout
from fedmoe.engine.cohort import Cohort, cohort_supported
from fedmoe.engine.fit import LARGE
from fedmoe.engine.member import Member
from fedmoe.engine.program import Program
from fedmoe.engine.ranges import phase
from fedmoe.engine.seam import Interrupted, Job, Payload, Result
from fedmoe.engine.seeds import derive, globals_kept, seed_globals
from fedmoe.engine.step import Taken

if TYPE_CHECKING:
    from fedmoe.engine.device_engine import DeviceEngine


def grouped(keys: Sequence[Hashable], clients: Sequence[int], most: int) -> list[list[int]]:
    """The places of jobs in groups of up to `most` of one key, no client twice in a group.

    Each job goes to its key's first group with room after the last one that its client is in. So the groups of a key,
    taken in order, train a client in the order of its jobs. And they still do if those of one job come after all
    others: behind a group that has room are only clients that it has too, of which a group of one has one.
    """
    groups: dict[Hashable, list[list[int]]] = {}
    after: dict[tuple[Hashable, int], int] = {}
    for place, (key, client) in enumerate(zip(keys, clients, strict=True)):
        own = groups.setdefault(key, [])
        first = after.get((key, client), 0)
        at = next((i for i in range(first, len(own)) if len(own[i]) < most), len(own))
        if at == len(own):
            own.append([])
        own[at].append(place)
        after[key, client] = at + 1
    return sorted(group for own in groups.values() for group in own)


class Cohorts:
    """Trains the jobs of `engine`, up to `most` clients of one architecture and batch size at a time.

    It is a part of the engine and works on what is inside. Clients that nobody goes with, large ones, and those whose
    modules cannot be batched (with a warning) train alone, after the others. The next cohort comes in when one has
    gone out, not while it trains.
    """

    def __init__(self, engine: "DeviceEngine", most: int) -> None:
        self._engine, self._most = engine, most
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._cohorts: dict[tuple[str, int], Cohort] = {}  # by architecture and rows, all over the same memory
        self._programs: dict[str, Program | None] = {}  # None: cannot be batched

    def run(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Yield a result for every job, in job order."""
        done: dict[int, Result] = {}
        given = 0
        for place, result in self._results(jobs):
            done[place] = result
            while given in done:
                yield done.pop(given)
                given += 1

    def _results(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
        """Results as they come, with the job's place."""
        together, alone = self._shared_out(jobs)
        self._engine.store.expect([jobs[place].client for group in [*together, alone] for place in group])
        sent: dict[int, Payload] = {}
        for group in together:
            yield from zip(group, self._train([jobs[place] for place in group], sent), strict=True)
        yield from zip(alone, self._engine._alone("train", [jobs[place] for place in alone]), strict=True)

    def _shared_out(self, jobs: Sequence[Job]) -> tuple[list[list[int]], list[int]]:
        """Which jobs, by place, make a cohort, and which are done alone."""
        keys: list[Hashable] = []
        for place, job in enumerate(jobs):
            member, layout = self._known(job.client)
            large = _trainable(layout) >= LARGE
            keys.append(place if large else (member.architecture, member.batch_size))
        together, alone = [], []
        for group in grouped(keys, [job.client for job in jobs], self._most):
            if len(group) > 1 and self._program(jobs[group[0]].client) is not None:
                together.append(group)
            else:
                alone += group
        return together, sorted(alone)

    def _program(self, client: int) -> Program | None:
        """The architecture's program for cohorts; None if it cannot be batched."""
        engine = self._engine
        member, layout = self._known(client)
        if member.architecture not in self._programs:
            program = engine.federation.batchable(client)
            assert Layout.of(program) == layout
            able, why = cohort_supported(program, layout, engine._loader, engine.how)
            if not able:
                warnings.warn(f"clients of architecture {member.architecture!r} train alone: {why}", stacklevel=2)
            self._programs[member.architecture] = program if able else None
        return self._programs[member.architecture]

    def _cohort(self, client: int, rows: int) -> Cohort:
        engine = self._engine
        member, layout = self._known(client)
        key = member.architecture, rows
        if len(self._memory) < (size := Cohort.bytes(layout, rows)):
            self._cohorts.clear()  # with their views
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(size, dtype=torch.uint8, device=engine.device)
        if key not in self._cohorts:
            program = self._program(client)
            assert program is not None
            optimizer = engine.federation.optimizer
            given = program, layout, rows, self._memory, engine._loader, optimizer, engine.how, engine._pool
            self._cohorts[key] = Cohort(*given)
        return self._cohorts[key]

    def _train(self, jobs: Sequence[Job], sent: dict[int, Payload]) -> list[Result]:
        """Of clients that go together; where device memory does not suffice, half of them at a time."""
        if len(jobs) == 1:
            return list(self._engine._alone("train", jobs))
        if len(jobs) <= self._most:
            trained = None
            with suppress(torch.OutOfMemoryError):
                trained = self._trained(jobs, sent)
            if trained is not None:
                return self._taken_out(jobs, *trained)
            # Here no frame holds the tensors of the step that failed any more.
            self._cohorts.clear()
            self._memory = torch.empty(0, dtype=torch.uint8)
            if self._engine.device.type == "cuda":
                torch.cuda.empty_cache()
            self._most = len(jobs) // 2
            warnings.warn(
                f"out of device memory with {len(jobs)} clients together: from now on {self._most}", stacklevel=2
            )
        most = self._most
        return [result for i in range(0, len(jobs), most) for result in self._train(jobs[i : i + most], sent)]

    def _trained(self, jobs: Sequence[Job], sent: dict[int, Payload]) -> tuple[Cohort, list[Taken], float]:
        """Bring the clients in and take their steps: the cohort, what came of each, and each one's share of seconds."""
        engine, start = self._engine, time.perf_counter()
        members = [self._known(job.client)[0] for job in jobs]
        cohort = self._cohort(jobs[0].client, len(jobs))
        with globals_kept(), phase("client"):
            for row, (member, job) in enumerate(zip(members, jobs, strict=True)):
                for following in jobs[row + 1 : row + 2]:  # if it is in a file, it is read meanwhile
                    engine.store.prefetch(following.client)
                cohort.put(row, self._brought(member, job, row, cohort.layout, sent))
            orders = [
                torch.cat([engine._order(member, job, epoch) for epoch in range(int(job.settings["epochs"]))])
                for member, job in zip(members, jobs, strict=True)
            ]
            cohort.begin(orders)
            # What is drawn in a cohort is not what any of its clients would draw alone.
            seed_globals(derive(engine.federation.seed, "dropout/cohort", jobs[0].client, jobs[0].round))
            for _ in cohort.steps():
                if engine.stop.is_set():
                    raise Interrupted
            names = sorted({name for member in members for name in member.finite})
            scalars = torch.stack([cohort.loss.double(), cohort.correct.double()])
            loss, correct, *finite = torch.cat([scalars, cohort.finite(names).double()]).tolist()
        whole = [all(finite[names.index(name)][row] for name in m.finite) for row, m in enumerate(members)]
        taken = [Taken(*of_one) for of_one in zip(map(len, orders), loss, correct, whole, strict=True)]
        return cohort, taken, (time.perf_counter() - start) / len(jobs)

    def _taken_out(self, jobs: Sequence[Job], cohort: Cohort, taken: list[Taken], seconds: float) -> list[Result]:
        """Keep the clients and let their results out; their seconds add up to what the cohort took."""
        engine, results = self._engine, []
        for row, job in enumerate(jobs):
            start = time.perf_counter() - seconds
            member, layout = self._known(job.client)
            room = engine._rooms[row % len(engine._rooms)]
            if room.left is not None:
                room.left.wait()
                room.left = None  # unless this client is kept, nothing else says when the room is free
            cohort.get(row, room.region[: layout.size])
            results.append(engine._outcome(member, room, layout, job, taken[row], start, {"parts": 1}))
        return results

    def _brought(self, member: Member, job: Job, row: int, layout: Layout, sent: dict[int, Payload]) -> Tensor:
        """The client's block, uint8 [size], in a room of the engine's, with the job's payload taken in."""
        engine = self._engine
        room, arrived = engine._rooms[row % len(engine._rooms)], engine._enter(member.id, row)
        with phase("transfer in"):
            arrived.wait()
        room.left = None  # who comes next waits for the current stream, which will have copied the block
        block = room.region[: layout.size]
        engine._receive(engine._on_device(job.payload, member, sent), layout, block)
        return block

    def _known(self, client: int) -> tuple[Member, Layout]:
        self._engine._open(client)
        member = self._engine._members[client]
        return member, self._engine._layouts[member.architecture]


def _trainable(layout: Layout) -> int:
    """Parameters."""
    return sum(math.prod(entry.shape) for name, entry in layout.entries.items() if name.startswith("momentum/"))
