"""Rooms: regions of the device where clients' states lie while they train, and how states come into them."""

import gc
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmoe.engine.blocks import Handle
from fedmoe.engine.cohort import Cohort
from fedmoe.engine.graphs import Track
from fedmoe.engine.member import Federation
from fedmoe.engine.roster import Roster
from fedmoe.engine.samples import Loader
from fedmoe.engine.seam import Refused
from fedmoe.engine.step import How, Step
from fedmoe.engine.store import Store
from fedmoe.engine.units import Unit, Units


@dataclass(slots=True)
class Site:
    """What all lanes of an engine have in common."""

    federation: Federation
    device: torch.device
    store: Store
    how: How
    stop: threading.Event
    loader: Loader
    roster: Roster
    units: Units
    trained: set[int] = field(default_factory=set)
    """Clients, since the last commit."""
    failed: bool = False
    """Whether some lane has, in this run."""


class Room:
    """A region; the arenas of all architectures and cohorts that have been in it lie over each other there."""

    def __init__(self, device: torch.device) -> None:
        self.region = torch.empty(0, dtype=torch.uint8)
        self.steps: dict[str, Step] = {}  # by architecture
        self.cohorts: dict[tuple[str, int], Cohort] = {}  # by architecture and rows
        self.left: Handle | None = None
        """When those that were here last will have gone out, if they have to."""
        self._constants: dict[int, int | None] = {}  # those in each row, which outlast the client that had them
        self._size = 0  # of a row
        self._device = device

    def row(self, number: int, size: int) -> Tensor:
        """uint8 [size], where the block of a unit's client lies."""
        return self.region[number * size : (number + 1) * size]

    def has(self, row: int, size: int, constants: int | None) -> bool:
        """Whether a row of so many bytes has these constants already."""
        return size == self._size and self._constants.get(row) == constants

    def taken(self, row: int, size: int, constants: int | None) -> None:
        """Note that a client with these constants has come into the row."""
        if size != self._size:
            self._size, self._constants = size, {}
        self._constants[row] = constants

    def fit(self, size: int, track: Track) -> None:
        """Have a region of at least `size` bytes."""
        if len(self.region) < size:
            if len(self.region):
                self.clear(track)
            self.region = torch.empty(size, dtype=torch.uint8, device=self._device)

    def clear(self, track: Track) -> None:
        """Give up the region and all that is bound to it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # copies out of it, and graphs
        self.steps, self.cohorts, self.left, self._size = {}, {}, None, 0
        track.drop()  # the other room's, too, but it is seldom
        self.region = torch.empty(0, dtype=torch.uint8)
        gc.collect()  # steps and their graphs know each other, and all of them the region


class Arrival:
    """A unit's clients on their way into a room, each as soon as it is out of its file."""

    def __init__(self, site: Site, track: Track, room: Room, unit: Unit) -> None:
        self.early = True
        """Whether `go_on` may bring them in already."""
        self._site, self._track, self._room = site, track, room
        self._rest = unit.clients
        self._size = site.roster[self._rest[0]][1].size
        # Cohorts differ in size from round to round; a room that has to grow loses its graphs.
        self._rows = max(len(self._rest), site.units.widest(self._rest[0]) if len(self._rest) > 1 else 1)
        self._last: Handle | None = None
        self._row = 0
        self._read_ahead()

    def go_on(self) -> None:
        """Begin to bring in who can come without waiting, if that is allowed and there is memory."""
        try:
            while self.early and self._rest and self._site.store.ready(self._rest[0], self._anew()):
                self._load()
        except torch.OutOfMemoryError:  # until the unit before has gone
            self.early = False

    def wait(self) -> None:
        """Bring in the rest; what is enqueued from now on begins when all are there."""
        try:
            while self._rest:
                self._load()
        except torch.OutOfMemoryError:
            raise Refused(
                f"client {self._rest[0]}: out of device memory for {self._rows} states of {self._size} bytes: give the "
                "states of other clients less device memory (engine.device_memory_mb), or train fewer together "
                "(engine.cohort, engine.lanes)"
            ) from None
        if self._last is not None:
            self._last.wait()

    def _load(self) -> None:
        room, store, client = self._room, self._site.store, self._rest[0]
        room.fit(self._rows * self._size, self._track)
        region, anew = room.row(self._row, self._size), self._anew()
        room.taken(self._row, self._size, None)  # a load that fails may have brought in a part
        self._last = store.load(client, region, room.left, anew)
        room.taken(self._row, self._size, store.constants(client))
        self._row += 1
        del self._rest[0]
        self._read_ahead()

    def _read_ahead(self) -> None:
        for client in self._rest[:1]:
            self._site.roster[client]
            self._site.store.prefetch(client, self._anew())

    def _anew(self) -> bool:
        """Whether the constants of who comes next have to come, too."""
        return not self._room.has(self._row, self._size, self._site.store.constants(self._rest[0]))


def free_unused(device: torch.device) -> None:
    """Give memory that nothing refers to any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
