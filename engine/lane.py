"""A lane: one of several places on a device where clients train at the same time, one unit after the other in each."""

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Literal

import torch
from torch import Tensor

from fedmoe.engine.arena import Arena
from fedmoe.engine.blocks import Handle
from fedmoe.engine.cohort import Cohort
from fedmoe.engine.graphs import Track
from fedmoe.engine.layout import Layout
from fedmoe.engine.member import Member
from fedmoe.engine.ranges import in_lane, phase
from fedmoe.engine.rooms import Arrival, Room, Site, free_unused
from fedmoe.engine.samples import epoch_order
from fedmoe.engine.seam import Interrupted, Job, Metrics, Payload, Refused, Result, violations
from fedmoe.engine.seeds import Globals, derive, seed_globals
from fedmoe.engine.step import Step, Taken
from fedmoe.engine.units import Unit

Turn = Handle | tuple[int, Result] | None
"""How a turn of a lane's ends: waiting for what the handle tells of, with the result of the job in this place, or with
nothing but work enqueued."""
Turns = Generator[Turn, None, None]


class Lane:
    """Takes turns with others on one thread of the host, each enqueuing work on a stream of its own.

    With two rooms, the next unit comes into one while this trains in the other, and the last goes out.
    """

    def __init__(self, site: Site, number: int, rooms: int, stream: torch.cuda.Stream | None) -> None:
        self.stream, self.rooms = stream, [Room(site.device) for _ in range(rooms)]
        self._site, self._number, self._globals = site, number, Globals()
        self._track = Track(site.device, site.how.graphs)
        self._scratch = torch.empty(0, dtype=torch.uint8)  # what cohorts use and do not keep
        self._sent: dict[int, Payload] = {}

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within the block the lane's stream is the current one, and what modules draw is the lane's."""
        with (
            self._globals.installed(),
            in_lane(self._number),
            torch.cuda.stream(self.stream) if self.stream else nullcontext(),
        ):
            yield

    def work(self, kind: Literal["train", "evaluate"], units: Sequence[Unit]) -> Turns:
        """Do the units' jobs; after another lane has failed, finish the unit in hand and no more."""
        self._sent.clear()
        for room in self.rooms:
            room.left = None  # what was not done to its end left it as it was
        coming: Arrival | None = None
        for i, unit in enumerate(units):
            if self._site.failed:
                return
            start, room = time.perf_counter(), self.rooms[i % len(self.rooms)]
            arrival = coming or Arrival(self._site, self._track, room, unit)
            with phase("transfer in"):
                arrival.wait()
            coming = None
            if i + 1 < len(units):
                coming = Arrival(self._site, self._track, self.rooms[(i + 1) % len(self.rooms)], units[i + 1])
                # The same client once more must come as it goes out now.
                coming.early = len(self.rooms) > 1 and not set(unit.clients) & set(units[i + 1].clients)
            with phase("client"):
                yield from self._done(kind, unit, room, coming, start)

    def _done(
        self, kind: Literal["train", "evaluate"], unit: Unit, room: Room, coming: Arrival | None, start: float
    ) -> Turns:
        """A unit that is in the room, while the next comes in as it can."""

        def meanwhile() -> None:
            if self._site.stop.is_set():
                raise Interrupted
            if coming is not None:
                coming.go_on()

        if kind == "evaluate":
            yield from self._evaluate(unit, room, meanwhile, start)
        elif len(unit.jobs) == 1:
            yield from self._train(unit, room, meanwhile, start)
        else:
            yield from self._train_together(unit, room, meanwhile, start)

    def _train(self, unit: Unit, room: Room, meanwhile: Callable[[], None], start: float) -> Turns:
        """A client alone; where device memory does not suffice, again, in smaller parts of batches."""
        (job,), (member, layout) = unit.jobs, self._site.roster[unit.jobs[0].client]
        step = self._step(member, layout, room)
        while True:
            with suppress(torch.OutOfMemoryError):
                self._receive(member, job, layout, step.arena.block)
                step.begin()
                steps = 0
                for epoch in range(int(job.settings["epochs"])):
                    order = self._order(member, job, epoch)
                    seed_globals(derive(self._site.federation.seed, "dropout", member.id, job.round, epoch))
                    for _ in step.epoch(order):
                        meanwhile()
                        yield None
                    steps += len(order)
                scalars = torch.stack(
                    [step.loss.double(), step.correct.double(), _finite(member, layout, step.arena.block)]
                )
                packed = self._packed(member, layout, step.arena.block)
                break
            # Here no frame holds the tensors of the step that failed any more.
            step.halve(member.batch_size, f"client {member.id}, {member.architecture}")
            self._site.store.load(member.id, room.region, constants=False).wait()
        more: Metrics = {"parts": step.parts}
        skipped = [] if step.scale is None else [step.scale.skipped]
        numbers, *rest = yield from self._fetched([scalars, *skipped, *packed.values()])
        loss, correct, finite = numbers.tolist()
        if skipped:
            more["skipped"] = int(rest.pop(0))
        payload = dict(zip(packed, rest, strict=True))
        taken = Taken(steps, loss, correct, bool(finite), payload)
        room.left = self._now()
        yield unit.places[0], self._outcome(member, layout, room, 0, job, taken, start, more)

    def _train_together(self, unit: Unit, room: Room, meanwhile: Callable[[], None], start: float) -> Turns:
        """A cohort; where device memory does not suffice, half of its clients at a time."""
        jobs, units, federation = unit.jobs, self._site.units, self._site.federation
        members, layout = [self._site.roster[job.client][0] for job in jobs], self._site.roster[jobs[0].client][1]
        fetched = None
        if len(jobs) <= units.cohort:
            with suppress(torch.OutOfMemoryError):
                cohort = self._cohort(members[0], layout, len(jobs), room)
                for row, (member, job) in enumerate(zip(members, jobs, strict=True)):
                    self._receive(member, job, layout, cohort.blocks[row])
                orders = [
                    torch.cat([self._order(member, job, epoch) for epoch in range(int(job.settings["epochs"]))])
                    for member, job in zip(members, jobs, strict=True)
                ]
                cohort.begin([len(order) for order in orders])
                # What is drawn in a cohort is not what any of its clients would draw alone.
                seed_globals(derive(federation.seed, "dropout/cohort", jobs[0].client, jobs[0].round))
                for _ in cohort.steps(orders):
                    meanwhile()
                    yield None
                finite = [_finite(m, layout, block) for m, block in zip(members, cohort.blocks, strict=True)]
                scalars = torch.stack([cohort.loss.double(), cohort.correct.double(), torch.stack(finite)])
                packed = [self._packed(m, layout, block) for m, block in zip(members, cohort.blocks, strict=True)]
                fetched = [scalars, *(tensor for payload in packed for tensor in payload.values())]
        if fetched is None:
            cohort = None  # type: ignore[assignment]  # and with it what it holds
            yield from self._train_in_halves(unit, room, meanwhile)
            return
        skipped = [] if cohort.scale is None else [cohort.scale.skipped]
        numbers, *tensors = yield from self._fetched([*fetched, *skipped])
        overflows = tensors.pop().tolist() if skipped else []
        room.left = self._now()
        share = (time.perf_counter() - start) / len(jobs)  # their seconds add up to what the cohort took
        for row, (member, job, order) in enumerate(zip(members, jobs, orders, strict=True)):
            loss, correct, whole = numbers[:, row].tolist()
            payload = {name: tensors.pop(0) for name in packed[row]}
            taken, begin = Taken(len(order), loss, correct, bool(whole), payload), time.perf_counter() - share
            more: Metrics = {"parts": 1}
            if skipped:
                more["skipped"] = int(overflows[row])
            yield unit.places[row], self._outcome(member, layout, room, row, job, taken, begin, more)

    def _train_in_halves(self, unit: Unit, room: Room, meanwhile: Callable[[], None]) -> Turns:
        # Here no frame holds the tensors of the step that failed any more.
        units, count = self._site.units, len(unit.jobs)
        if count <= units.cohort:
            units.cohort = count // 2
            warnings.warn(f"out of device memory with {count} clients together: from now on {count // 2}", stacklevel=2)
        room.clear(self._track)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        free_unused(self._site.device)
        most = units.cohort  # the first half may lower it again
        for i in range(0, count, most):
            start, part = time.perf_counter(), slice(i, i + most)
            half = Unit(unit.places[part], unit.jobs[part])
            Arrival(self._site, self._track, room, half).wait()
            yield from (self._train if len(half.jobs) == 1 else self._train_together)(half, room, meanwhile, start)

    def _evaluate(self, unit: Unit, room: Room, meanwhile: Callable[[], None], start: float) -> Turns:
        """With the client's own theta, or with the job's where it brings one; neither changes the client."""
        (job,), (member, layout) = unit.jobs, self._site.roster[unit.jobs[0].client]
        federation, step = self._site.federation, self._step(member, layout, room)
        if payload := self._on_device(job.payload, member):
            federation.unpack(payload, step.arena.theta())
        seed_globals(derive(federation.seed, "evaluation", member.id, job.round))
        held_out, size = member.samples[member.training :], federation.evaluation_batch
        try:
            with phase("evaluation"):
                for _ in step.evaluate(held_out, size):
                    meanwhile()
                    yield None
        except torch.OutOfMemoryError:
            raise Refused(
                f"client {member.id}, {member.architecture}: out of device memory while {min(size, len(held_out))} "
                "samples were evaluated at a time: lower evaluation.batch_size"
            ) from None
        (numbers,) = yield from self._fetched([torch.stack([step.loss.double(), step.correct.double()])])
        room.left = self._now()
        (total, right), n = numbers.tolist(), len(held_out)
        predictions = n * federation.samples.targets
        metrics: Metrics = {
            "accuracy": right / predictions,
            "loss": total / predictions,
            "seconds": time.perf_counter() - start,
        }
        yield unit.places[0], federation.outgoing("evaluate", member, {}, n, metrics)

    def _outcome(
        self, member: Member, layout: Layout, room: Room, row: int, job: Job, taken: Taken, start: float, more: Metrics
    ) -> Result:
        """Keep the client that is in the room, unless it is not finite, and let its result out."""
        samples = taken.steps * member.batch_size
        metrics: Metrics = {"samples": samples, "flops": samples * member.flops, "rolled_back": 0, **more}
        if not taken.whole:
            metrics |= {"rolled_back": 1, "seconds": time.perf_counter() - start}
            return self._site.federation.outgoing("train", member, job.payload, 0, metrics)
        with phase("transfer out"):
            room.left = self._site.store.save(member.id, room.row(row, layout.size))
        self._site.trained.add(member.id)
        predictions = samples * self._site.federation.samples.targets
        metrics |= {"loss": taken.loss / taken.steps, "accuracy": taken.correct / predictions}
        metrics["seconds"] = time.perf_counter() - start
        return self._site.federation.outgoing("train", member, taken.payload, member.training, metrics)

    def _step(self, member: Member, layout: Layout, room: Room) -> Step:
        """What trains clients of this one's architecture in the room."""
        site = self._site
        if member.architecture not in room.steps:
            try:
                arena = Arena(site.federation.program(member.id), layout, room.region, site.how.low)
                rule, micro = site.federation.optimizer, site.federation.micro_batch
                step = Step(arena, site.loader, rule, site.how, self._track, micro)
            except torch.OutOfMemoryError:
                raise Refused(
                    f"client {member.id}, {member.architecture}: out of device memory for its gradients: give the "
                    "states of clients less of it (engine.device_memory_mb)"
                ) from None
            room.steps[member.architecture] = step
        return room.steps[member.architecture]

    def _cohort(self, member: Member, layout: Layout, rows: int, room: Room) -> Cohort:
        site, key = self._site, (member.architecture, rows)
        if len(self._scratch) < (size := Cohort.scratch(layout, rows)):
            for other in self.rooms:
                other.cohorts.clear()  # with their views
            self._track.drop()
            self._scratch = torch.empty(0, dtype=torch.uint8)
            self._scratch = torch.empty(size, dtype=torch.uint8, device=site.device)
        if key not in room.cohorts:
            program = site.units.program(member.id)
            assert program is not None
            blocks = room.region[: rows * layout.size].view(rows, layout.size)
            given = (
                program,
                layout,
                blocks,
                self._scratch,
                site.loader,
                site.federation.optimizer,
                site.how,
                self._track,
            )
            room.cohorts[key] = Cohort(*given)
        return room.cohorts[key]

    def _on_device(self, payload: Payload, member: Member) -> Payload:
        """The payload, checked, on the device: moved there once for all jobs of the lane that bring the same."""
        if not payload:
            return payload
        if broken := violations(payload, member.schema):
            raise ValueError(f"client {member.id} cannot take this in: {'; '.join(broken)}")
        if id(payload) not in self._sent:
            self._sent[id(payload)] = {name: t.to(self._site.device) for name, t in payload.items()}
        return self._sent[id(payload)]

    def _receive(self, member: Member, job: Job, layout: Layout, block: Tensor) -> None:
        """Let the client whose block this is take in what the job brings."""
        payload, federation = self._on_device(job.payload, member), self._site.federation
        if not payload:
            return
        federation.unpack(payload, [layout.entries[name].of(block) for name in layout.theta])
        if federation.optimizer.reset_theta:
            layout.reset_theta(block)

    def _packed(self, member: Member, layout: Layout, block: Tensor) -> Payload:
        """What the client whose block this is shares, on the device."""
        theta = [layout.entries[name].of(block) for name in layout.theta]
        return self._site.federation.pack(theta) if member.schema else {}

    def _order(self, member: Member, job: Job, epoch: int) -> Tensor:
        federation = self._site.federation
        return epoch_order(member, federation.samples, federation.seed, job.round, epoch)

    def _fetched(self, tensors: Sequence[Tensor]) -> Generator[Turn, None, list[Tensor]]:
        """The tensors on the host; until they are there, others have their turn."""
        if self._site.device.type == "cpu":
            return list(tensors)
        hosts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for host, tensor in zip(hosts, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        there = self._now()
        assert there is not None
        yield there
        return hosts

    def _now(self) -> Handle | None:
        """Tells when all that the lane has enqueued is done; None on a CPU, where it is."""
        return torch.cuda.current_stream().record_event() if self._site.device.type == "cuda" else None


def _finite(member: Member, layout: Layout, block: Tensor) -> Tensor:
    """fp64 [] 1 if all that must be finite is, else 0."""
    names, weights = set(member.finite), {f"model/{name}" for name in layout.trainable}
    whole = weights <= names  # then they are looked at as one
    tensors = [layout.entries[name].of(block) for name in member.finite if not (whole and name in weights)]
    tensors += [layout.flat("model", block)] if whole else []
    return torch.stack([tensor.isfinite().all() for tensor in tensors]).all().double()
