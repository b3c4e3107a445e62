"""Where blocks live: device memory, host memory or files, under memory budgets; and how they go from one to another."""

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fedmoe.engine import blocks, staging
from fedmoe.engine.blocks import Block, Buffer, Handle, Pool, Tier


class Residency:
    """Keeps blocks until they are dropped, in the fastest tier that has room; see `fedmoe.engine.store.Store`.

    `next_use` orders blocks by when they are needed: to make room, what is needed later goes one tier down, the latest
    first. Of equals the lowest client moves first, and of its blocks the last.
    """

    def __init__(
        self,
        device: torch.device,
        device_bytes: int,
        host_bytes: int,
        folder: Path,
        reads: int,
        next_use: Callable[[Block], tuple[bool, float]],
    ) -> None:
        if device_bytes < 0 or host_bytes < 0:
            raise ValueError(f"a budget is negative: {device_bytes} bytes of device, {host_bytes} of host memory")
        cuda = device.type == "cuda"
        self._next_use = next_use
        self._budget = {Tier.DEVICE: device_bytes if cuda else 0, Tier.HOST: host_bytes}
        self._blocks: dict[Tier, set[Block]] = {tier: set() for tier in Tier}
        self._held = dict.fromkeys(Tier, 0)  # their bytes
        self._unread: list[Block] = []  # dropped but for readers
        self.closed = False
        self.lock = threading.Condition()
        """Held while it changes where a block is, and while a reader looks that up."""
        self._inward, self._outward, self._aside = (torch.cuda.Stream(device) if cuda else None for _ in range(3))
        self._device = device
        self._crossed = {"in": 0, "out": 0}  # bytes between device and host
        host = blocks.host_pool(self.lock, host_bytes, cuda)
        self._pools: dict[Tier, Pool] = {Tier.HOST: host, Tier.FILE: host}  # to files by way of the host
        if self._outward is not None:
            self._pools[Tier.DEVICE] = blocks.device_pool(self.lock, device_bytes, device, self._outward)
        self._spare = staging.buffers(reads)  # of the widest version's size, on top of the budget
        self._staging = staging.Staging(host, folder, reads)

    @property
    def held(self) -> dict[str, int]:
        """See Store."""
        return {tier.name.lower(): n for tier, n in self._held.items()}

    @property
    def bytes_moved(self) -> dict[tuple[str, str], int]:
        """See Store."""
        on_file = {"in": self._staging.bytes_read, "out": self._staging.bytes_written}
        return {
            (tier, way): n for tier, ways in (("host", self._crossed), ("file", on_file)) for way, n in ways.items()
        }

    @property
    def seconds_waited(self) -> float:
        """See Store."""
        return self._staging.seconds_waited

    def widen(self, count: int, size: int) -> None:
        """Have staging buffers for versions of so many blocks of so many bytes."""
        self._staging.wide = count
        self._pools[Tier.HOST].limit = self._budget[Tier.HOST] + self._spare * count * size

    def settle(self) -> None:
        """Take note of what has been written and read meanwhile. Raises the OSError of a failed write."""
        self._staging.settle()
        with self.lock:
            unread = [block for block in self._unread if not block.readers]
        for block in unread:
            self._unread.remove(block)
            self.drop(block)

    def prefetch(self, block: Block) -> None:
        """Begin to read the block if it is in a file; of more than are read ahead, what is used latest is given up."""
        if block.tier is Tier.FILE:
            self._staging.prefetch(block, lambda b: (*self._next_use(b), b.place))

    def ready(self, block: Block) -> bool:
        """Whether `load` would not wait for a file."""
        return block.tier is not Tier.FILE or self._staging.ready(block)

    def begin_loads(self) -> None:
        """Let loads begin after all that the current stream and the saves made so far have to do."""
        if self._inward is not None and self._outward is not None:
            self._inward.wait_stream(torch.cuda.current_stream(self._device))
            self._inward.wait_stream(self._outward)

    def load(self, block: Block, region: Tensor, after: Handle | None) -> Handle:
        """Copy the block into uint8 [n] of a region, once `after` is reached."""
        in_file = block.tier is Tier.FILE
        buffer = self._staging.fetch(block) if in_file else block.buffer
        assert buffer is not None
        if self._inward is not None:
            if after is not None:
                blocks.until(after, region).wait(self._inward)
            if block.tier is not Tier.DEVICE:
                self._crossed["in"] += block.size
        handle = blocks.copy(buffer.data, region, self._inward, buffer)
        if in_file:
            self._pools[Tier.FILE].release(buffer)
        return handle

    def begin_saves(self) -> None:
        """Let saves begin after all that the current stream has to do by now."""
        if self._outward is not None:
            self._outward.wait_stream(torch.cuda.current_stream(self._device))

    def save(self, block: Block, source: Tensor, spare: Block | None = None) -> Handle:
        """Take `source`, uint8 [n], as the block's bytes, and drop `spare`; neither where this raises OSError."""
        tier = self._room(block, Tier.DEVICE, spare)
        if spare is not None:
            self.drop(spare)
        return self._put(block, tier, source)

    def drop(self, *gone: Block) -> None:
        """Forget the blocks, as soon as nobody reads them."""
        for block in gone:
            with self.lock:
                if block.readers and not self.closed:
                    self._unread.append(block)
                    continue
            self._forget(block)
            block.dropped = True
            self._staging.drop(block)
            with self.lock:
                if block.buffer is not None:
                    self._pools[block.tier].release(block.buffer)
                    block.buffer = None

    def read(self, block: Block, data: Tensor) -> None:
        """Copy the block's bytes to uint8 [n] on the CPU, wherever they are; on any thread. Ends one reader."""
        staging.copy_out(block, data, self.lock, self._pools, self._aside)
        with self.lock:
            block.readers -= 1

    def close(self) -> None:
        """Free all memory and remove the files, once all blocks but those for readers have been dropped."""
        self.drop(*self._unread)
        self._unread.clear()
        self._staging.close()
        for pool in self._pools.values():
            pool.clear()

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
                later.sort(key=lambda b: (self._next_use(b), -b.client, b.place))
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

    def _put(self, block: Block, tier: Tier, source: Tensor, *held: Buffer) -> Handle:
        """Copy the bytes from `source`, uint8 [n], to where there is room; `held` holds that of `source`, if any."""
        target = self._pools[tier].take(block.size)
        try:
            handle = blocks.copy(source, target.data, self._outward, target, *held)
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
        with self.lock:
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
