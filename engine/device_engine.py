"""The engine: trains and evaluates many clients on one device, each brought in turn into a region of its memory."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmoe.engine.arena import Arena, Layout
from fedmoe.engine.blocks import Handle
from fedmoe.engine.cohort_jobs import Cohorts
from fedmoe.engine.device import allow_tf32
from fedmoe.engine.member import Federation, Member
from fedmoe.engine.ranges import phase
from fedmoe.engine.samples import Loader
from fedmoe.engine.seam import Interrupted, Job, Metrics, Payload, Result, State, violations
from fedmoe.engine.seeds import derive, generator, globals_kept, seed_globals
from fedmoe.engine.step import How, Step, Taken
from fedmoe.engine.store import Store


@dataclass(slots=True)
class _Room:
    """A region of the device; the arenas of all architectures that have been in it lie over each other there."""

    region: Tensor  # uint8
    steps: dict[str, Step] = field(default_factory=dict)
    left: Handle | None = None
    """When the client that was here last will have gone out, if it has to."""


class DeviceEngine:
    """See `fedmoe.engine.seam.Engine`.

    On a GPU there are two rooms: while a client trains in one, the next comes into the other and the last goes out of
    it. With `cohort` above 1, up to that many small clients of one architecture train as one batched model. Setting
    `stop` makes `run` raise Interrupted after the step it is in.
    """

    def __init__(
        self,
        federation: Federation,
        device: torch.device,
        store: Store,
        how: How,
        resident: bool = True,
        stop: threading.Event | None = None,
        cohort: int = 1,
        regions: int = 2,
    ) -> None:
        if cohort < 1:
            raise ValueError(f"cohort is {cohort}, must be at least 1")
        self.federation, self.device, self.how, self.store = federation, device, how, store
        self.stop = stop or threading.Event()
        allow_tf32(how.precision == "tf32")
        self._loader = Loader(federation.samples, device, resident)
        self._members: dict[int, Member] = {}
        self._layouts: dict[str, Layout] = {}
        self._rooms = [_Room(torch.empty(0, dtype=torch.uint8)) for _ in range(regions if device.type == "cuda" else 1)]
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" and how.graphs else None
        self._trained: set[int] = set()  # since the last commit
        self._changed: set[int] = set()
        self._cohorts = Cohorts(self, cohort) if cohort > 1 else None

    def run(self, kind: Literal["train", "evaluate"], jobs: Sequence[Job]) -> Iterator[Result]:
        """Yield a result for every job, in job order. Raises ValueError where a payload does not fit its client."""
        if kind == "train" and self._cohorts is not None:
            return self._cohorts.run(jobs)
        return self._alone(kind, jobs)

    def _alone(self, kind: Literal["train", "evaluate"], jobs: Sequence[Job]) -> Iterator[Result]:
        """One client after the other."""
        work = self._train if kind == "train" else self._evaluate
        ids = [job.client for job in jobs]
        self.store.expect(ids)
        sent: dict[int, Payload] = {}
        arrived = self._enter(ids[0], 0) if ids else None
        for i, job in enumerate(jobs):
            start = time.perf_counter()
            member, room = self._members[job.client], self._rooms[i % len(self._rooms)]
            assert arrived is not None
            with phase("transfer in"):
                arrived.wait()
            self._furnish(member, room)
            # The same client once more must come as it goes out now.
            early = len(self._rooms) > 1 and i + 1 < len(jobs) and ids[i + 1] != ids[i]
            if early:
                arrived = self._enter(ids[i + 1], i + 1)
            if (ahead := i + len(self._rooms)) < len(jobs):  # if it is in a file, it is read meanwhile
                self._open(ids[ahead])
                self.store.prefetch(ids[ahead])
            with globals_kept(), phase("client"):
                payload = self._on_device(job.payload, member, sent)
                result = work(member, room, job, payload, start)
            yield result
            if not early and i + 1 < len(jobs):
                arrived = self._enter(ids[i + 1], i + 1)

    def commit(self) -> None:
        """Keep the state of every client trained since the last commit."""
        self.store.commit()
        self._changed |= self._trained
        self._trained.clear()

    def rollback(self) -> None:
        """Return every client trained since the last commit to its state at that commit."""
        self.store.rollback()
        self._trained.clear()

    def changed(self) -> Mapping[int, Callable[[], State]]:
        """The states of all clients committed since this was last called, by client: as they are now, read when called.

        The calls may come from another thread, while training goes on.
        """
        changed = {id: self._reader(id) for id in sorted(self._changed)}
        self._changed.clear()
        return changed

    def _reader(self, id: int) -> Callable[[], State]:
        layout, read = self._layouts[self._members[id].architecture], self.store.snapshot(id)
        return lambda: layout.unpack(read())

    def _enter(self, id: int, place: int) -> Any:
        """Begin to bring a client into the room that is its turn's; what is returned can be waited for."""
        self._open(id)
        layout, room = self._layouts[self._members[id].architecture], self._rooms[place % len(self._rooms)]
        if len(room.region) < layout.size:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # copies out of the old region
            room.region, room.steps = torch.empty(layout.size, dtype=torch.uint8, device=self.device), {}
            room.left = None
        return self.store.load(id, room.region, room.left)

    def _open(self, id: int) -> None:
        """Have the client's member and block, if this is the first that is heard of it."""
        if id in self._members:
            return
        member, program, state = self.federation.open(id)
        layout = Layout.of(program)
        known = self._layouts.setdefault(member.architecture, layout)
        if known != layout:
            raise ValueError(f"client {id} is of architecture {member.architecture!r}, but its tensors are others")
        block = torch.empty(layout.size, dtype=torch.uint8)
        layout.pack(state, block)
        self.store.add(id, block)
        self._members[id] = member

    def _furnish(self, member: Member, room: _Room) -> None:
        """Have in the room what trains clients of this one's architecture."""
        if member.architecture not in room.steps:
            program = self.federation.program(member.id)
            arena = Arena(program, self._layouts[member.architecture], room.region, self.how.low)
            room.steps[member.architecture] = Step(arena, self._loader, self.federation.optimizer, self.how, self._pool)

    def _on_device(self, payload: Payload, member: Member, sent: dict[int, Payload]) -> Payload:
        """The payload, checked, on the device: moved there once for all jobs that bring the same."""
        if not payload:
            return payload
        if broken := violations(payload, member.schema):
            raise ValueError(f"client {member.id} cannot take this in: {'; '.join(broken)}")
        if id(payload) not in sent:
            sent[id(payload)] = {name: t.to(self.device) for name, t in payload.items()}
        return sent[id(payload)]

    def _train(self, member: Member, room: _Room, job: Job, payload: Payload, start: float) -> Result:
        """One client's training; where device memory does not suffice, again, in smaller parts of batches."""
        while True:
            with suppress(torch.OutOfMemoryError):
                return self._trained_in_parts(member, room, job, payload, start)
            # Here no frame holds the tensors of the step that failed any more.
            room.steps[member.architecture].halve(member.batch_size, f"client {member.id}, {member.architecture}")
            self.store.load(member.id, room.region, room.left).wait()

    def _trained_in_parts(self, member: Member, room: _Room, job: Job, payload: Payload, start: float) -> Result:
        step = room.steps[member.architecture]
        arena = step.arena
        self._receive(payload, arena.layout, arena.block)
        step.begin()
        steps = 0
        for epoch in range(int(job.settings["epochs"])):
            order = self._order(member, job, epoch)
            seed_globals(derive(self.federation.seed, "dropout", member.id, job.round, epoch))
            for _ in step.epoch(order):
                if self.stop.is_set():
                    raise Interrupted
            steps += len(order)
        finite = self._finite(member, arena)
        loss, correct, whole = torch.stack([step.loss.double(), step.correct.double(), finite.double()]).tolist()
        more: Metrics = {"parts": step.parts}
        if step.scale is not None:
            more["skipped"] = int(step.scale.skipped)
        return self._outcome(member, room, arena.layout, job, Taken(steps, loss, correct, bool(whole)), start, more)

    def _receive(self, payload: Payload, layout: Layout, block: Tensor) -> None:
        """Let the client whose block this is take in what is on the device."""
        if not payload:
            return
        self.federation.unpack(payload, [layout.entries[name].of(block) for name in layout.theta])
        if self.federation.optimizer.reset_theta:
            momenta = (name.replace("model/", "momentum/", 1) for name in layout.theta)
            shared = [layout.entries[name].of(block) for name in momenta if name in layout.entries]
            if shared:
                torch._foreach_zero_(shared)

    def _order(self, member: Member, job: Job, epoch: int) -> Tensor:
        """int64 [steps, B]: the samples of an epoch's batches; the last partial batch is dropped."""
        place, size = (member.id, job.round, epoch), member.batch_size
        drawn = torch.randperm(member.training, generator=generator(self.federation.seed, "order", *place))
        steps = member.training // size
        return member.samples[drawn[: steps * size]].view(steps, size)

    def _outcome(
        self,
        member: Member,
        room: _Room,
        layout: Layout,
        job: Job,
        taken: Taken,
        start: float,
        more: Metrics,
    ) -> Result:
        """Keep the client that is in the room, unless it is not finite, and let its result out."""
        federation, block = self.federation, room.region[: layout.size]
        samples = taken.steps * member.batch_size
        metrics: Metrics = {"samples": samples, "flops": samples * member.flops, "rolled_back": 0, **more}
        if not taken.finite or not math.isfinite(taken.loss):
            metrics |= {"rolled_back": 1, "seconds": time.perf_counter() - start}
            return federation.outgoing("train", member, job.payload, 0, metrics)
        with phase("transfer out"):
            room.left = self.store.save(member.id, block)
        self._trained.add(member.id)
        metrics |= {"loss": taken.loss / taken.steps, "accuracy": taken.correct / samples}
        theta = [layout.entries[name].of(block) for name in layout.theta]
        shared_now = federation.pack(theta) if member.schema else {}
        metrics["seconds"] = time.perf_counter() - start
        return federation.outgoing("train", member, shared_now, member.training, metrics)

    def _finite(self, member: Member, arena: Arena) -> Tensor:
        """[] whether all that must be finite is."""
        entries = (arena.layout.entries[name] for name in member.finite)
        return torch.stack([entry.of(arena.block).isfinite().all() for entry in entries]).all()

    @torch.no_grad()
    def _evaluate(self, member: Member, room: _Room, job: Job, payload: Payload, start: float) -> Result:
        """With the client's own theta, or with the job's where it brings one; neither changes the client."""
        step = room.steps[member.architecture]
        if payload:
            self.federation.unpack(payload, step.arena.theta())
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        seed_globals(derive(self.federation.seed, "evaluation", member.id, job.round))
        held_out = member.samples[member.training :]
        with phase("evaluation"):
            for logits, y in step.predictions(held_out, self.federation.evaluation_batch):
                if self.stop.is_set():
                    raise Interrupted
                loss += F.cross_entropy(logits.float(), y, reduction="sum")
                correct += (logits.argmax(1) == y).sum()
        n = len(held_out)
        total, right = torch.stack([loss.double(), correct.double()]).tolist()
        metrics: Metrics = {"accuracy": right / n, "loss": total / n, "seconds": time.perf_counter() - start}
        return self.federation.outgoing("evaluate", member, {}, n, metrics)
