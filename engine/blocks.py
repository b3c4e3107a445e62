"""Blocks of bytes, the memory they sit in, made once and used again, and copies between host and device."""

import mmap
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fedmoe.engine.ranges import phase


class Tier(IntEnum):
    """Where a block lives, from fast to slow."""

    DEVICE = 0
    HOST = 1
    FILE = 2


@dataclass(eq=False, slots=True)
class Buffer:
    """Memory of one block, of a `Pool`."""

    data: Tensor  # uint8 [n], on the host (pinned where there is CUDA) or on the device
    last: torch.cuda.Event | None = None
    """Behind the latest copy from or to it: whoever writes into it next, or reads it on the host, waits for this."""
    holds: int = 1
    """Who still needs the bytes: a block, a write to a file, a reader. Without any it is free for another use."""


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a version of a client's state, or all of it. Its bytes never change; where they are does."""

    client: int
    size: int  # bytes
    place: int = 0
    """Which of the version's pieces it is."""
    tier: Tier = Tier.FILE
    buffer: Buffer | None = None
    """Of a block in memory, or on its way to a file."""
    path: Path | None = None
    """Where to read it, if there is no buffer."""
    dropped: bool = False
    readers: int = 0
    """Snapshots that have not been read yet; until then it is kept, though its client may have gone on."""


class Pool:
    """Buffers of one kind of memory, at most `limit` bytes of them, free ones included.

    Pinning costs as much as several copies, so what is given back is kept for the next block of its size, and really
    freed only when another size needs the room. `make` takes a number of bytes; `unmake` gets a buffer that nobody
    holds. `lock` is the one that its owner decides under who holds what.
    """

    def __init__(
        self,
        lock: threading.Condition,
        limit: int,
        make: Callable[[int], Tensor],
        unmake: Callable[[Buffer], None] = lambda buffer: None,
    ) -> None:
        self.lock = lock
        self.limit = limit
        self.allocated = 0
        self.lent = 0
        self._make, self._unmake = make, unmake
        self._free: defaultdict[int, list[Buffer]] = defaultdict(list)

    def take(self, n: int) -> Buffer:
        """A buffer of `n` bytes, held once.

        The owner never wants more than the limit; it waits here only while other threads read what it has dropped.
        """
        with self.lock:
            while not self._free[n]:
                if self.allocated + n <= self.limit:
                    data = self._make(n)
                    self.allocated += n
                    return Buffer(data)
                if not self._free_one():
                    assert self.lent, f"{n} bytes more than the {self.allocated} of {self.limit} that are in use"
                    self.lock.wait()
            buffer = self._free[n].pop()
            buffer.holds = 1
            return buffer

    def hold(self, buffer: Buffer) -> None:
        """Begin one more hold, which `release` ends."""
        with self.lock:
            buffer.holds += 1

    def release(self, buffer: Buffer) -> None:
        """End one hold."""
        with self.lock:
            assert buffer.holds > 0
            buffer.holds -= 1
            if not buffer.holds:
                self._free[buffer.data.numel()].append(buffer)
                self.lock.notify_all()

    def lend(self, buffer: Buffer) -> None:
        """Hold it for a reader on another thread, until `give_back`."""
        with self.lock:
            self.lent += 1
            buffer.holds += 1

    def give_back(self, buffer: Buffer) -> None:
        """End a reader's hold."""
        with self.lock:
            self.lent -= 1
            self.release(buffer)

    def clear(self) -> None:
        """Free all memory, once readers have given back theirs; by then nobody else holds any."""
        with self.lock:
            while self.lent:
                self.lock.wait()
            while self._free_one():
                pass
            assert not self.allocated, f"{self.allocated} bytes are still held"

    def _free_one(self) -> bool:
        size = max((n for n, buffers in self._free.items() if buffers), default=0)
        if size:
            self._unmake(self._free[size].pop())
            self.allocated -= size
        return size > 0


def host_memory(n: int) -> Tensor:
    """`n` bytes, uint8 [n]."""
    return torch.empty(n, dtype=torch.uint8)


def pinned_memory(n: int) -> Tensor:
    """`n` bytes that CUDA copies from and to without a detour, uint8 [n]; `unpin` before it goes.

    PyTorch's own pinned memory is rounded up to a power of two and never given back, which would make a budget
    mean half of what it says. A mapping of its own starts at a page, and pages are what is pinned.
    """
    data = torch.frombuffer(mmap.mmap(-1, n), dtype=torch.uint8)
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(data.data_ptr(), n, 0)))
    return data


def unpin(buffer: Buffer) -> None:
    """Undo `pinned_memory`, after the last copy."""
    if buffer.last is not None:
        buffer.last.synchronize()
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(buffer.data.data_ptr())))


def host_pool(lock: threading.Condition, limit: int, pinned: bool) -> Pool:
    """A pool of host memory."""
    return Pool(lock, limit, pinned_memory, unpin) if pinned else Pool(lock, limit, host_memory)


def device_pool(lock: threading.Condition, limit: int, device: torch.device, stream: torch.cuda.Stream) -> Pool:
    """A pool of CUDA memory, which PyTorch hands on in the order of `stream` once it is freed."""

    def make(n: int) -> Tensor:
        with torch.cuda.stream(stream):
            return torch.empty(n, dtype=torch.uint8, device=device)

    def unmake(buffer: Buffer) -> None:
        if buffer.last is not None:
            stream.wait_event(buffer.last)

    return Pool(lock, limit, make, unmake)


class Handle(Protocol):
    """Tells when a copy is done, as a torch.cuda.Event does (which it is on CUDA)."""

    def wait(self, stream: torch.cuda.Stream | None = None) -> None:
        """Let what is enqueued on `stream` (the current one) from now on begin after the copy."""
        ...

    def query(self) -> bool:
        """Whether it is done."""
        ...

    def synchronize(self) -> None:
        """Block the host until it is done."""
        ...


class Done:
    """The handle of a copy that is done."""

    def wait(self, stream: torch.cuda.Stream | None = None) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It is done."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Leaving:
    """The handle of copies out of a region one after the other, of which each may let the next tenant follow it."""

    def __init__(self, gone: list[tuple[int, Handle]]) -> None:
        self._gone = gone  # where each ended, an address, and when; in order

    def wait(self, stream: torch.cuda.Stream | None = None) -> None:
        """As Handle's, for all."""
        self._gone[-1][1].wait(stream)

    def query(self) -> bool:
        """As Handle's."""
        return self._gone[-1][1].query()

    def synchronize(self) -> None:
        """As Handle's; of those from the host, some may not be on a stream."""
        for _, handle in self._gone:
            handle.synchronize()

    def until(self, end: int) -> Handle:
        """Tells when all that lies before the address `end` has gone."""
        return next((handle for stop, handle in self._gone if stop >= end), self._gone[-1][1])


def until(handle: Handle, region: Tensor) -> Handle:
    """Tells when this part of a region is free, if `handle` does so of all of it; no earlier than must be."""
    if isinstance(handle, Leaving):
        return handle.until(region.data_ptr() + region.numel())
    return handle


def copy(source: Tensor, target: Tensor, stream: torch.cuda.Stream | None, *buffers: Buffer) -> Handle:
    """Copy bytes, uint8 [n] both; `buffers` are those of the two that belong to a pool.

    Where the device takes part it is enqueued on `stream`, after the latest copies from and to the buffers.
    """
    before = [buffer.last for buffer in buffers if buffer.last is not None]
    if stream is None or (source.is_cpu and target.is_cpu):
        for event in before:
            event.synchronize()
        with phase("copy"):
            target.copy_(source)
        return Done()
    for event in before:
        stream.wait_event(event)
    with torch.cuda.stream(stream), phase("copy"):
        target.copy_(source, non_blocking=True)
    done = stream.record_event()
    for buffer in buffers:
        buffer.last = done
    return done


def check(region: Tensor, n: int, device: torch.device) -> None:
    """Raises ValueError unless `n` bytes can be copied from or to the region."""
    if region.dtype is not torch.uint8 or region.dim() != 1 or not region.is_contiguous():
        raise ValueError(f"need contiguous uint8 [{n}], got {region.dtype} {list(region.shape)}")
    if region.device != device:
        raise ValueError(f"the store copies from and to {device}, the region is on {region.device}")
    if region.numel() < n:
        raise ValueError(f"the region has {region.numel()} bytes, the state {n}")
