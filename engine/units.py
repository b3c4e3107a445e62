"""What an engine does at once, and where: jobs in units, a client or a cohort each, and units in lanes."""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fedmoe.engine.cohort import cohort_supported
from fedmoe.engine.fit import LARGE
from fedmoe.engine.layout import Layout
from fedmoe.engine.member import Federation
from fedmoe.engine.program import Program
from fedmoe.engine.roster import Roster
from fedmoe.engine.samples import Loader
from fedmoe.engine.seam import Job, Refused
from fedmoe.engine.step import How


@dataclass(frozen=True, slots=True)
class Unit:
    """Jobs that are done together: one, or several of a cohort."""

    places: tuple[int, ...]
    """Of the jobs, among all of a run."""
    jobs: tuple[Job, ...]

    @property
    def clients(self) -> list[int]:
        """Theirs, in order."""
        return [job.client for job in self.jobs]


class Units:
    """Shares jobs out: up to `cohort` clients of one architecture and batch size to a unit, units to `lanes` lanes.

    Clients that nobody goes with, large ones, those that take batches in parts, and those whose modules cannot be
    batched (with a warning) are units of their own. An architecture has lanes of its own as far as there are enough,
    since a lane captures graphs for each that it gets; large clients all go to the first.
    """

    def __init__(self, federation: Federation, roster: Roster, loader: Loader, how: How, cohort: int, lanes: int):
        if cohort < 1 or lanes < 1:
            raise ValueError(f"cohort is {cohort} and lanes {lanes}, both must be at least 1")
        self.cohort, self._lanes = cohort, lanes
        """Clients together at most; lower it where memory does not suffice."""
        self._federation, self._roster, self._loader, self._how = federation, roster, loader, how
        self._programs: dict[str, Program | None] = {}  # None: cannot be batched
        self._widest: dict[str, int] = {}  # by architecture, the most clients that went together
        self._homes: dict[str, int] = {}  # by architecture, in the order in which they came up

    @property
    def opens_all(self) -> bool:
        """Whether all clients of a run have to be known before the first trains."""
        return self.cohort > 1 or self._lanes > 1

    def shared(self, kind: Literal["train", "evaluate"], jobs: Sequence[Job]) -> list[list[Unit]]:
        """Each lane's units in order; those of all lanes together train a client in the order of its jobs."""
        units = (
            self._together(jobs) if kind == "train" and self.cohort > 1 else self._one_by_one(range(len(jobs)), jobs)
        )
        if self._lanes == 1 or (kind == "train" and len({job.client for job in jobs}) < len(jobs)):
            return [units, *([] for _ in range(self._lanes - 1))]
        for client in (job.client for job in jobs):
            if not self._large(client):
                self._homes.setdefault(self._roster[client][0].architecture, len(self._homes))
        shared: list[list[Unit]] = [[] for _ in range(self._lanes)]
        busy = [0.0] * self._lanes
        for unit in units:
            lane = min(self._open_to(unit.clients[0]), key=lambda lane: (busy[lane], lane))
            busy[lane] += self._work(kind, unit)
            shared[lane].append(unit)
        return shared

    def in_time(self, kind: Literal["train", "evaluate"], shared: Sequence[Sequence[Unit]]) -> list[Unit]:
        """The units of all lanes in the order in which they are likely to begin."""
        if sum(map(bool, shared)) < 2:
            return [unit for units in shared for unit in units]
        begins: list[tuple[float, int, Unit]] = []
        for lane, units in enumerate(shared):
            at = 0.0
            for unit in units:
                begins.append((at, lane, unit))
                at += self._work(kind, unit)
        return [unit for _, _, unit in sorted(begins, key=lambda begin: begin[:2])]

    def program(self, client: int) -> Program | None:
        """The architecture's program for cohorts; None if it cannot be batched."""
        member, layout = self._roster[client]
        if member.architecture not in self._programs:
            program = self._federation.batchable(client)
            assert Layout.of(program, self._federation.optimizer) == layout
            try:
                able, why = cohort_supported(program, layout, self._loader, self._federation.optimizer, self._how)
            except torch.OutOfMemoryError:
                raise Refused(
                    f"out of device memory for two clients of architecture {member.architecture!r} together: set "
                    "engine.cohort to 1, or give the states of clients less of it (engine.device_memory_mb)"
                ) from None
            if not able:
                warnings.warn(f"clients of architecture {member.architecture!r} train alone: {why}", stacklevel=2)
            self._programs[member.architecture] = program if able else None
        return self._programs[member.architecture]

    def widest(self, client: int) -> int:
        """The most clients of this one's architecture that went together so far."""
        return self._widest.get(self._roster[client][0].architecture, 1)

    def _one_by_one(self, places: Sequence[int], jobs: Sequence[Job]) -> list[Unit]:
        return [Unit((place,), (jobs[place],)) for place in places]

    def _together(self, jobs: Sequence[Job]) -> list[Unit]:
        keys: list[Hashable] = []
        for place, job in enumerate(jobs):
            member, _ = self._roster[job.client]
            apart = self._large(job.client) or 0 < self._federation.micro_batch < member.batch_size
            keys.append(place if apart else (member.architecture, member.batch_size))
        together, alone = [], []
        for group in grouped(keys, [job.client for job in jobs], self.cohort):
            if len(group) > 1 and self.program(jobs[group[0]].client) is not None:
                together.append(unit := Unit(tuple(group), tuple(jobs[place] for place in group)))
                kind = self._roster[unit.clients[0]][0].architecture
                self._widest[kind] = max(len(group), self._widest.get(kind, 0))
            else:
                alone += group
        return together + self._one_by_one(sorted(alone), jobs)

    def _open_to(self, client: int) -> list[int]:
        """The lanes that clients of this one's architecture may get."""
        if self._large(client):
            return [0]
        home = self._homes[self._roster[client][0].architecture]
        apart = min(len(self._homes), self._lanes)
        return [lane for lane in range(self._lanes) if lane % apart == home % apart]

    def _large(self, client: int) -> bool:
        return self._roster.trainable(client) >= LARGE

    def _work(self, kind: Literal["train", "evaluate"], unit: Unit) -> float:
        """In proportion to its FLOPs."""
        members = [self._roster[client][0] for client in unit.clients]
        if kind == "evaluate":
            return float(sum(m.flops * (len(m.samples) - m.training) for m in members))
        return float(
            sum(m.flops * m.training * int(j.settings["epochs"]) for m, j in zip(members, unit.jobs, strict=True))
        )


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
