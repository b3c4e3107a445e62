"""Where clients' states live: device memory, host memory or files, under memory budgets."""

import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from fedmoe.engine import blocks, staging
from fedmoe.engine.blocks import Block, Buffer, Handle, Pool, Tier

ALIGNMENT = 256  # bytes; an arena is a multiple of it


class Store:
    """Keeps each client's committed version, and beside it the pending one of those saved since the last commit.

    A version is a block of bytes that is never modified: saving makes a new one. All versions together take at most
    `device_bytes` of device memory (none unless `device` is CUDA) and `host_bytes` of host memory (pinned for CUDA),
    and as much of files as it takes. What is on its way between memory and files comes on top, up to
    `staging.buffers(reads)` times the largest block, `reads` being how many are read ahead. `folder` is for this store
    alone, made when first needed and gone after `close`; what a killed process left there is removed.

    A new version goes to the fastest tier that has room, or makes room by moving what is used later than it one tier
    down, the latest first: after what is expected comes what is not, then committed versions with a pending one
    beside them; of equals the lowest client moves first. What fits is not moved, and loading moves nothing.

    All calls are made by one thread, but `read` and those of snapshots, which any may make. On CUDA copies are enqueued
    on streams of the store's own, one a direction, and regions must outlive them. The OSError of a failed write to a
    file comes from the next `add`, `prefetch`, `load`, `save` or `commit`, before that changes anything; the block is
    still in memory, and the write is tried again.
    """

    def __init__(
        self, device: torch.device, *, device_bytes: int, host_bytes: int, folder: Path, reads: int = staging.READS
    ) -> None:
        if device_bytes < 0 or host_bytes < 0:
            raise ValueError(f"a budget is negative: {device_bytes} bytes of device, {host_bytes} of host memory")
        cuda = device.type == "cuda"
        device = torch.empty(0, device=device).device  # with its index
        self.device, self.folder = device, folder
        self._budget = {Tier.DEVICE: device_bytes if cuda else 0, Tier.HOST: host_bytes}
        self._blocks: dict[Tier, set[Block]] = {tier: set() for tier in Tier}
        self._held = dict.fromkeys(Tier, 0)  # their bytes
        self._committed: dict[int, Block] = {}
        self._pending: dict[int, Block] = {}
        self._unread: list[Block] = []  # dropped but for snapshots
        self._uses: dict[int, deque[int]] = {}  # positions of each client's coming loads
        self._largest = 0
        self._closed = False
        # Held while it changes where a block is, and while a reader looks that up.
        self._lock = threading.Condition()
        self._inward, self._outward, self._aside = (torch.cuda.Stream(device) if cuda else None for _ in range(3))
        self._crossed = {"in": 0, "out": 0}  # bytes between device and host
        host = blocks.host_pool(self._lock, host_bytes, cuda)
        self._pools: dict[Tier, Pool] = {Tier.HOST: host, Tier.FILE: host}  # to files by way of the host
        if self._outward is not None:
            self._pools[Tier.DEVICE] = blocks.device_pool(self._lock, device_bytes, device, self._outward)
        self._spare = staging.buffers(reads)  # of the largest block's size, on top of the budget
        self._staging = staging.Staging(host, folder, reads)

    @property
    def held(self) -> dict[str, int]:
        """Bytes of all versions, committed and pending, by tier: "device", "host", "file"."""
        return {tier.name.lower(): n for tier, n in self._held.items()}

    @property
    def bytes_moved(self) -> dict[tuple[str, str], int]:
        """What came in from a tier and went out to it, by ("host" or "file", "in" or "out").

        For the host that is from and to the device, so nothing on the CPU.
        """
        on_file = {"in": self._staging.bytes_read, "out": self._staging.bytes_written}
        return {
            (tier, way): n for tier, ways in (("host", self._crossed), ("file", on_file)) for way, n in ways.items()
        }

    @property
    def seconds_waited(self) -> float:
        """How long the caller stood still because of files."""
        return self._staging.seconds_waited

    def __contains__(self, id: int) -> bool:
        return id in self._committed

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, id: int, block: Tensor) -> None:
        """Take a client's first state, uint8 [n] on the CPU, as committed; its n, a multiple of 256, never changes."""
        self._begin()
        n = block.numel()
        if id in self._committed:
            raise ValueError(f"client {id} already has a state, of {self._committed[id].size} bytes; got one of {n}")
        if n == 0 or n % ALIGNMENT:
            raise ValueError(f"a state is a multiple of {ALIGNMENT} bytes, that of client {id} is {n}")
        blocks.check(block, n, torch.device("cpu"))
        new = Block(id, n)
        self._largest = max(self._largest, n)
        self._pools[Tier.HOST].limit = self._budget[Tier.HOST] + self._spare * self._largest
        self._put(new, self._room(new, Tier.DEVICE), block).synchronize()
        with self._lock:
            self._committed[id] = new

    def expect(self, ids: Iterable[int]) -> None:
        """Say which clients will be loaded from now on, in order; replaces what was said before."""
        uses: defaultdict[int, deque[int]] = defaultdict(deque)
        for position, id in enumerate(ids):
            uses[id].append(position)
        self._uses = dict(uses)

    def prefetch(self, id: int) -> None:
        """Begin to read the client's latest version if that is in a file.

        Of more than are read ahead, the one that is used latest is given up.
        """
        self._begin()
        block = self._latest(id)
        if block.tier is Tier.FILE:
            self._staging.prefetch(block, self._next_use)

    def ready(self, id: int) -> bool:
        """Whether `load` would not wait for a file."""
        block = self._latest(id)
        return block.tier is not Tier.FILE or self._staging.ready(block)

    def load(self, id: int, region: Tensor, after: Handle | None = None) -> Handle:
        """Copy the client's latest version into `region[:n]`; the handle tells when it is there.

        The region is uint8 [m] on the device, m ≥ n. On CUDA the copy begins once `after` is reached, by when
        nothing may use the region any more; without it, after all that the current stream and the saves made so far
        have to do. The host waits for files only.
        """
        self._begin()
        block = self._latest(id)
        blocks.check(region, block.size, self.device)
        in_file = block.tier is Tier.FILE
        buffer = self._staging.fetch(block) if in_file else block.buffer
        assert buffer is not None
        if self._inward is not None and self._outward is not None:
            if after is None:
                self._inward.wait_stream(torch.cuda.current_stream(self.device))
                self._inward.wait_stream(self._outward)
            else:
                after.wait(self._inward)
            if block.tier is not Tier.DEVICE:
                self._crossed["in"] += block.size
        handle = blocks.copy(buffer.data, region[: block.size], self._inward, buffer)
        if in_file:
            self._pools[Tier.FILE].release(buffer)
        if self._uses.get(id):
            self._uses[id].popleft()
        return handle

    def save(self, id: int, region: Tensor) -> Handle:
        """Take `region[:n]` as the client's pending version; the handle tells when the region may be overwritten.

        The region is uint8 [m] on the device, m ≥ n. On CUDA the copy begins after all that the current stream has to
        do by now. If this raises OSError, the client keeps the version it had.
        """
        self._begin()
        old, size = self._pending.get(id), self._latest(id).size
        blocks.check(region, size, self.device)
        new = self._pending[id] = Block(id, size)  # from here on, the others are not the latest
        try:
            tier = self._room(new, Tier.DEVICE, old)
            if old is not None:
                self._drop(old)
                old = None
            if self._outward is not None:
                self._outward.wait_stream(torch.cuda.current_stream(self.device))
            return self._put(new, tier, region[:size])
        except BaseException:
            del self._pending[id]
            if old is not None:
                self._pending[id] = old
            raise

    def commit(self) -> None:
        """Make every pending version the committed one."""
        self._begin()
        while self._pending:
            id, block = self._pending.popitem()
            with self._lock:
                old, self._committed[id] = self._committed[id], block
            self._drop(old)

    def rollback(self) -> None:
        """Drop every pending version."""
        while self._pending:
            self._drop(self._pending.popitem()[1])

    def snapshot(self, id: int) -> Callable[[], Tensor]:
        """What gives a copy, uint8 [n] on the CPU, of the client's version that is committed now.

        To be called once, from any thread, whatever else goes on; it blocks the host. Until then that version stays,
        in whatever tier, within the budgets.
        """
        with self._lock:
            block = self._known(id)
            block.readers += 1

        def read() -> Tensor:
            try:
                return staging.copied(block, self._lock, self._pools, self._aside)
            finally:
                with self._lock:
                    block.readers -= 1

        return read

    def read(self, id: int) -> Tensor:  # uint8 [n], on the CPU
        """A copy of the client's committed version, whatever else goes on. For any thread; blocks the host."""
        return self.snapshot(id)()

    def close(self) -> None:
        """Free all memory and remove the files; no state is left."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.rollback()
        while self._committed:
            with self._lock:
                block = self._committed.popitem()[1]
            self._drop(block)
        while self._unread:
            self._drop(self._unread.pop())
        self._staging.close()
        for pool in self._pools.values():
            pool.clear()

    def _begin(self) -> None:
        if self._closed:
            raise ValueError(f"the store in {self.folder} is closed")
        self._staging.settle()
        with self._lock:
            unread = [block for block in self._unread if not block.readers]
        for block in unread:
            self._unread.remove(block)
            self._drop(block)

    def _known(self, id: int) -> Block:
        if id not in self._committed:
            raise ValueError(f"client {id} has no state: the store in {self.folder} has {len(self._committed)} others")
        return self._committed[id]

    def _latest(self, id: int) -> Block:
        return self._pending.get(id) or self._known(id)

    def _next_use(self, block: Block) -> tuple[bool, float]:
        """Orders blocks by their next load: its position, none, or none unless there is a rollback."""
        current = self._pending.get(block.client) or self._committed.get(block.client, block)
        uses = self._uses.get(block.client)
        return (False, uses[0] if uses else math.inf) if block is current else (True, math.inf)

    def _room(self, block: Block, fastest: Tier, spare: Block | None = None) -> Tier:
        """The fastest tier, from `fastest` on, that can take the block now; `spare` is dropped before it comes.

        A file can once there is room among the writes: raises OSError where one of those has failed.
        """
        for tier in (Tier.DEVICE, Tier.HOST):
            if tier < fastest:
                continue
            free = self._budget[tier] - self._held[tier]
            if spare is not None and spare.tier is tier:
                free += spare.size
            moving: list[Block] = []
            if free < block.size <= self._budget[tier]:
                own = self._next_use(block)
                later = [b for b in self._blocks[tier] if b is not spare and self._next_use(b) > own]
                later.sort(key=lambda b: (self._next_use(b), -b.client))
                while later and free < block.size:
                    moving.append(later.pop())
                    free += moving[-1].size
            if free >= block.size:  # all or nothing
                for other in moving:
                    self._demote(other)
                return tier
        self._staging.room()
        return Tier.FILE

    def _demote(self, block: Block) -> None:
        """Move the block to a slower tier."""
        before, buffer = block.tier, block.buffer
        assert buffer is not None
        tier = self._room(block, Tier(before + 1))
        if before is Tier.DEVICE:
            self._put(block, tier, buffer.data, buffer)
            self._pools[before].release(buffer)
        else:  # its memory goes along as a staging buffer
            self._place(block, tier, buffer)

    def _put(self, block: Block, tier: Tier, source: Tensor, *buffers: Buffer) -> Handle:
        """Copy the bytes from `source`, uint8 [n], to where there is room; `buffers` holds that of `source`, if any."""
        target = self._pools[tier].take(block.size)
        try:
            handle = blocks.copy(source, target.data, self._outward, target, *buffers)
        except BaseException:
            self._pools[tier].release(target)
            raise
        if not source.is_cpu and target.data.is_cpu:
            self._crossed["out"] += block.size
        self._place(block, tier, target)
        return handle

    def _place(self, block: Block, tier: Tier, buffer: Buffer) -> None:
        """Note that the block lives in `tier` from now on, its bytes being in `buffer`."""
        self._forget(block)
        with self._lock:
            block.tier, block.buffer = tier, buffer
        self._blocks[tier].add(block)
        self._held[tier] += block.size
        if tier is Tier.FILE:
            self._staging.write(block)
        else:
            assert self._held[tier] <= self._budget[tier]

    def _forget(self, block: Block) -> None:
        if block in self._blocks[block.tier]:  # a new one is in none
            self._blocks[block.tier].remove(block)
            self._held[block.tier] -= block.size

    def _drop(self, block: Block) -> None:
        with self._lock:
            if block.readers and not self._closed:
                self._unread.append(block)
                return
        self._forget(block)
        block.dropped = True
        self._staging.drop(block)
        with self._lock:
            if block.buffer is not None:
                self._pools[block.tier].release(block.buffer)
                block.buffer = None
