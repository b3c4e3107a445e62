"""The store of clients' states: versions that are saved and committed, in pieces, and constants that never change."""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from fedmoe.engine import blocks, staging
from fedmoe.engine.blocks import Block, Handle
from fedmoe.engine.residency import Residency

ALIGNMENT = 256  # bytes; an arena is a multiple of it

PIECE = 128 * 2**20
"""Bytes of a block at most. A larger state lies in several: one comes into a region as soon as another has gone out of
its place, so that both directions of a bus are busy, and each may live elsewhere. At 25 GB/s one takes 5 ms."""

Version = tuple[Block, ...]
"""One state, in the order of its bytes."""


class Store:
    """Keeps each client's committed version, and beside it the pending one of those saved since the last commit.

    A version is never modified: saving makes a new one. Constants, which clients may share, are brought in behind their
    versions and never go out. All together take at most `device_bytes` of device memory (none unless `device` is CUDA)
    and `host_bytes` of host memory (pinned for CUDA), and as much of files as it takes. What is on its way between
    memory and files comes on top, up to `staging.buffers(reads)` times the largest, `reads` being how many are read
    ahead. `folder` is for this store alone, made when first needed and gone after `close`; what a killed process left
    there is removed.

    A new version goes to the fastest tier that has room, or makes room by moving what is used later than it one tier
    down, the latest first: after what is expected comes what is not, then committed versions with a pending one
    beside them; of equals the lowest client moves first. What fits is not moved, and loading moves nothing.

    All calls are made by one thread, but `read` and those of snapshots, which any may make. On CUDA copies are enqueued
    on streams of the store's own, one a direction, and regions must outlive them. The OSError of a failed write to a
    file comes from the next `add`, `prefetch`, `load`, `save` or `commit`, before that changes anything; the block is
    still in memory, and the write is tried again.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        device_bytes: int,
        host_bytes: int,
        folder: Path,
        reads: int = staging.READS,
        piece: int = PIECE,
    ) -> None:
        device = torch.empty(0, device=device).device  # with its index
        self.device, self.folder = device, folder
        self.residency = Residency(device, device_bytes, host_bytes, folder, reads, self._next_use)
        self._committed: dict[int, Version] = {}
        self._pending: dict[int, Version] = {}
        self._constants: dict[Hashable, int] = {}  # each is kept as if it were of a client below 0
        self._constant_of: dict[int, int] = {}  # by client
        self._uses: dict[int, deque[int]] = {}  # positions of each client's coming loads
        self._piece = piece
        self._largest = 0  # bytes of a version

    @property
    def held(self) -> dict[str, int]:
        """Bytes of all versions, committed and pending, and of constants, by tier: "device", "host", "file"."""
        return self.residency.held

    @property
    def bytes_moved(self) -> dict[tuple[str, str], int]:
        """What came in from a tier and went out to it, by ("host" or "file", "in" or "out").

        For the host that is from and to the device, so nothing on the CPU.
        """
        return self.residency.bytes_moved

    @property
    def seconds_waited(self) -> float:
        """How long the caller stood still because of files."""
        return self.residency.seconds_waited

    def __contains__(self, id: int) -> bool:
        return id in self._committed

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, id: int, block: Tensor) -> None:
        """Take a client's first state, uint8 [n] on the CPU, as committed; its n, a multiple of 256, never changes."""
        n = block.numel()
        if id in self._committed:
            size = _size(self._committed[id])
            raise ValueError(f"client {id} already has a state, of {size} bytes; got one of {n}")
        if n == 0 or n % ALIGNMENT:
            raise ValueError(f"a state is a multiple of {ALIGNMENT} bytes, that of client {id} is {n}")
        blocks.check(block, n, torch.device("cpu"))
        self._add(id, n, block.split(self._piece))

    def add_constants(self, id: int, key: Hashable, n: int, make: Callable[[int, int], Tensor]) -> None:
        """From now on client `id` is loaded with constants behind its version: those of this key that are known.

        Or else n bytes, a multiple of 256, of which `make(start, stop)` gives a part, uint8 on the CPU.
        """
        self._known(id)
        if key not in self._constants:
            number = -1 - len(self._constants)
            starts = range(0, n, self._piece)
            self._add(number, n, (make(start, min(start + self._piece, n)) for start in starts))
            self._constants[key] = number
        self._constant_of[id] = self._constants[key]

    def constants(self, id: int) -> int | None:
        """Which constants the client is loaded with, equal for the same; None: with none."""
        return self._constant_of.get(id)

    def expect(self, ids: Iterable[int]) -> None:
        """Say which clients will be loaded from now on, in order; replaces what was said before."""
        uses: defaultdict[int, deque[int]] = defaultdict(deque)
        for position, id in enumerate(ids):
            for owner in self._owners(id):
                uses[owner].append(position)
        self._uses = dict(uses)

    def prefetch(self, id: int, constants: bool = True) -> None:
        """Begin to read what `load` needs and is in a file.

        Of more than are read ahead, what is used latest is given up.
        """
        self._begin()
        for block in self._needed(id, constants):
            self.residency.prefetch(block)

    def ready(self, id: int, constants: bool = True) -> bool:
        """Whether `load` would not wait for a file."""
        return all(self.residency.ready(block) for block in self._needed(id, constants))

    def load(self, id: int, region: Tensor, after: Handle | None = None, constants: bool = True) -> Handle:
        """Copy the client's latest version into `region[:n]`, its constants behind; the handle tells when it is there.

        The region is uint8 [m] on the device, with room for both. Without `constants` they are there already. On CUDA
        the copy begins once `after` is reached, by when nothing may use the region any more; if that is a save's, each
        piece does once there is room for it. Without it, after all that the current stream and the saves made so far
        have to do. The host waits for files only.
        """
        self._begin()
        version, needed = self._latest(id), self._needed(id, constants)
        blocks.check(region, _size(needed), self.device)
        if after is None:
            self.residency.begin_loads()
        for block in needed:
            self.residency.prefetch(block)
        done: Handle = blocks.Done()
        for block in needed:
            start = block.place * self._piece + (0 if block.client == id else _size(version))
            done = self.residency.load(block, region[start : start + block.size], after)
        for owner in self._owners(id):
            if self._uses.get(owner):
                self._uses[owner].popleft()
        return done

    def save(self, id: int, region: Tensor) -> Handle:
        """Take `region[:n]` as the client's pending version; the handle tells when the region may be overwritten.

        The region is uint8 [m] on the device, m ≥ n. On CUDA the copy begins after all that the current stream has to
        do by now. If this raises OSError, the client keeps the version it had, or if that was pending and in several
        pieces, perhaps the committed one.
        """
        self._begin()
        old, size = self._pending.get(id), _size(self._latest(id))
        blocks.check(region, size, self.device)
        new = self._pending[id] = self._new(id, size)  # from here on, the others are not the latest
        try:
            self.residency.begin_saves()
            return self._enter(new, region[:size].split(self._piece), old)
        except BaseException:
            del self._pending[id]
            if old is not None and not old[0].dropped:
                self._pending[id] = old
            elif old is not None:
                self.residency.drop(*(block for block in old if not block.dropped))
            raise

    def commit(self) -> None:
        """Make every pending version the committed one."""
        self._begin()
        while self._pending:
            id, version = self._pending.popitem()
            with self.residency.lock:
                old, self._committed[id] = self._committed[id], version
            self.residency.drop(*old)

    def rollback(self) -> None:
        """Drop every pending version."""
        while self._pending:
            self.residency.drop(*self._pending.popitem()[1])

    def snapshot(self, id: int) -> Callable[[], Tensor]:
        """What gives a copy, uint8 [n] on the CPU, of the client's version that is committed now.

        To be called once, from any thread, whatever else goes on; it blocks the host. Until then that version stays,
        in whatever tier, within the budgets.
        """
        with self.residency.lock:
            version = self._known(id)
            for block in version:
                block.readers += 1

        def read() -> Tensor:
            data = torch.empty(_size(version), dtype=torch.uint8)
            left = deque(zip(version, data.split(self._piece), strict=True))
            try:
                while left:
                    self.residency.read(*left[0])
                    left.popleft()
                return data
            finally:
                with self.residency.lock:
                    for block, _ in left:
                        block.readers -= 1

        return read

    def read(self, id: int) -> Tensor:  # uint8 [n], on the CPU
        """A copy of the client's committed version, whatever else goes on. For any thread; blocks the host."""
        return self.snapshot(id)()

    def close(self) -> None:
        """Free all memory and remove the files; no state is left."""
        with self.residency.lock:
            if self.residency.closed:
                return
            self.residency.closed = True
        self.rollback()
        while self._committed:
            with self.residency.lock:
                version = self._committed.popitem()[1]
            self.residency.drop(*version)
        self.residency.close()

    def _begin(self) -> None:
        if self.residency.closed:
            raise ValueError(f"the store in {self.folder} is closed")
        self.residency.settle()

    def _known(self, id: int) -> Version:
        if id not in self._committed:
            others = len(self._committed) - len(self._constants)
            raise ValueError(f"client {id} has no state: the store in {self.folder} has {others} others")
        return self._committed[id]

    def _latest(self, id: int) -> Version:
        return self._pending.get(id) or self._known(id)

    def _owners(self, id: int) -> list[int]:
        """Whose blocks `load` brings in."""
        constants = self.constants(id)
        return [id] if constants is None else [constants, id]

    def _needed(self, id: int, constants: bool) -> Version:
        """All that `load` brings in; constants first, since nothing goes out of their place."""
        owners = self._owners(id) if constants else [id]
        return tuple(block for owner in owners for block in self._latest(owner))

    def _new(self, id: int, n: int) -> Version:
        sizes = [min(self._piece, n - start) for start in range(0, n, self._piece)]
        return tuple(Block(id, size, place) for place, size in enumerate(sizes))

    def _add(self, id: int, n: int, sources: Iterable[Tensor]) -> None:
        """Take pieces, n bytes in all, as a first version, committed."""
        self._begin()
        new = self._new(id, n)
        if n > self._largest:
            self._largest = n
            self.residency.widen(len(new), min(n, self._piece))
        self._enter(new, sources).synchronize()
        with self.residency.lock:
            self._committed[id] = new

    def _enter(self, version: Version, sources: Iterable[Tensor], spare: Version | None = None) -> Handle:
        """Copy a version's bytes from pieces, uint8 [..], each in place of that of `spare`; all or nothing."""
        gone: list[tuple[int, Handle]] = []
        try:
            for block, data in zip(version, sources, strict=True):
                old = None if spare is None else spare[block.place]
                gone.append((data.data_ptr() + data.numel(), self.residency.save(block, data, old)))
        except BaseException:
            self.residency.drop(*version)
            raise
        return gone[0][1] if len(gone) == 1 else blocks.Leaving(gone)

    def _next_use(self, block: Block) -> tuple[bool, float]:
        """Orders blocks by their next load: its position, none, or none unless there is a rollback."""
        current = self._pending.get(block.client) or self._committed.get(block.client)
        if current is not None and current[block.place] is not block:
            return True, math.inf
        uses = self._uses.get(block.client)
        return False, uses[0] if uses else math.inf


def _size(version: Version) -> int:
    return sum(block.size for block in version)
