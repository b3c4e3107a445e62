"""The engine: trains and evaluates many clients on one device, several at the same time, each brought in and out."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fedmoe.engine.blocks import Handle
from fedmoe.engine.device import allow_tf32
from fedmoe.engine.lane import Lane, Turns
from fedmoe.engine.member import Federation
from fedmoe.engine.ranges import phase
from fedmoe.engine.rooms import Site
from fedmoe.engine.roster import Roster
from fedmoe.engine.samples import Loader
from fedmoe.engine.seam import Interrupted, Job, Result, State
from fedmoe.engine.step import How
from fedmoe.engine.store import Store
from fedmoe.engine.units import Units

TURN = 32
"""Steps of a lane before another's turn: taking turns costs the host about as much as a few steps."""


@dataclass(eq=False, slots=True)
class _Work:
    """A lane at work."""

    lane: Lane
    turns: Turns
    waits: Handle | None = None


class DeviceEngine:
    """See `fedmoe.engine.seam.Engine`.

    Up to `cohort` small clients of one architecture train as one batched model; clients and cohorts train in `lanes`
    at the same time. On a GPU a lane has two rooms (`regions`): while a unit trains in one, the next comes into the
    other and the last goes out of it. Setting `stop` makes `run` raise Interrupted after the step it is in.
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
        lanes: int = 1,
    ) -> None:
        allow_tf32(how.precision == "tf32")
        self.store, self._device = store, device
        loader, roster = Loader(federation.samples, device, resident), Roster(federation, store)
        units = Units(federation, roster, loader, how, cohort, lanes)
        stop = stop or threading.Event()
        self.site = Site(federation, device, store, how, stop, loader, roster, units)
        several, rooms = lanes > 1 and device.type == "cuda", regions if device.type == "cuda" else 1
        streams = [torch.cuda.Stream(device) if several else None for _ in range(lanes)]
        self.lanes = [Lane(self.site, number, rooms, stream) for number, stream in enumerate(streams)]
        self._changed: set[int] = set()
        self._running = False

    def run(self, kind: Literal["train", "evaluate"], jobs: Sequence[Job]) -> Iterator[Result]:
        """Yield a result for every job, in job order. Raises ValueError where a payload does not fit its client.

        Where one lane fails, the others finish what they have begun, and results are yielded before the error is
        raised, without those that are missing. One run at a time: begin the next when all results were taken.
        """
        if self._running:
            raise ValueError("another run is under way on this engine: take all its results, or close it")
        self._running = True
        done: dict[int, Result] = {}
        given = 0
        try:
            for place, result in self._results(kind, jobs):
                done[place] = result
                while given in done:
                    yield done.pop(given)
                    given += 1
        except Interrupted:
            raise
        except Exception:
            for place in sorted(done):
                yield done[place]
            raise
        finally:
            self._running = False

    def commit(self) -> None:
        """Keep the state of every client trained since the last commit."""
        self.store.commit()
        self._changed |= self.site.trained
        self.site.trained.clear()

    def rollback(self) -> None:
        """Return every client trained since the last commit to its state at that commit."""
        self.store.rollback()
        self.site.trained.clear()

    def changed(self) -> Mapping[int, Callable[[], State]]:
        """The states of all clients committed since this was last called, by client: as they are now, read when called.

        The calls may come from another thread, while training goes on.
        """
        changed = self.site.roster.states(self._changed)
        self._changed.clear()
        return changed

    def _results(self, kind: Literal["train", "evaluate"], jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
        """Results as they come, with the job's place."""
        units = self.site.units
        for job in jobs if units.opens_all else ():
            self._look_up(job.client)
        shared = units.shared(kind, jobs)
        self.store.expect([client for unit in units.in_time(kind, shared) for client in unit.clients])
        at_work = [_Work(lane, lane.work(kind, own)) for lane, own in zip(self.lanes, shared, strict=True) if own]
        self.site.failed = False
        failure: Exception | None = None
        for stream in (work.lane.stream for work in at_work):
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(self._device))
        queue = deque(at_work)
        try:
            while queue:
                work = next((w for w in queue if w.waits is None or w.waits.query()), queue[0])
                queue.remove(work)
                try:
                    ended, result = self._turn(work, alone=not queue)
                except Interrupted:
                    raise Interrupted from failure
                except Exception as error:
                    failure, self.site.failed = failure or error, True
                    continue
                if not ended:
                    queue.append(work)
                if result is not None:
                    yield result
        finally:
            for work in at_work:
                work.turns.close()
        if failure is not None:
            raise failure

    def _look_up(self, client: int) -> None:
        """Open the client, unless the engine was asked to stop: there may be many."""
        if self.site.stop.is_set():
            raise Interrupted
        self.site.roster[client]

    def _turn(self, work: _Work, alone: bool) -> tuple[bool, tuple[int, Result] | None]:
        """Let the lane do some steps, up to a result or what it must wait for: whether it has ended, and the result."""
        with work.lane.entered():
            if work.waits is not None:
                with phase("waiting"):
                    work.waits.synchronize()
                work.waits = None
            for count, turn in enumerate(work.turns, 1):
                if isinstance(turn, tuple):
                    return False, turn
                if turn is not None:
                    work.waits = turn
                    return False, None
                if count == TURN and not alone:
                    return False, None
        return True, None
