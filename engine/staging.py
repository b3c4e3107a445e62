"""Blocks on their way between memory and files: a thread writes, another reads ahead, both behind the caller."""

import errno
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from fedmoe.engine.blocks import Block, Buffer, Pool, Tier, copy

WRITES = 2  # on their way to files at once: one being written, one being copied from the device meanwhile
READS = 2  # read ahead at once, unless more are asked for: the one that is about to be loaded, and the next


def buffers(reads: int = READS) -> int:
    """Most that are held with so many reads ahead: one more for one that was not asked for, two for those given up."""
    return WRITES + reads + 3


@dataclass(slots=True)
class _Transfer:
    """A read or write of a buffer, which it holds."""

    buffer: Buffer
    done: "Future[None]"
    failed: bool = False
    """A write that is to be tried again; its error was raised."""


class Staging:
    """Writes blocks to `folder` and reads them from there, by way of `pool`'s buffers: `buffers(reads)` at a time.

    With `wide` each of these may be as many blocks: the pieces of a large state.

    Nothing here moves a block but `write`, and only `settle` ends a write, so that whoever calls these methods, a
    single thread, is the only one to change where a block is; that is done under the pool's lock.
    """

    def __init__(self, pool: Pool, folder: Path, reads: int) -> None:
        self.seconds_waited = 0.0
        self.bytes_written = 0
        self.bytes_read = 0
        self.wide = 1
        self._pool, self._folder, self._reads = pool, folder, reads
        self._files = 0
        self._writing: dict[Block, _Transfer] = {}
        self._reading: dict[Block, _Transfer] = {}
        self._given_up: list[_Transfer] = []
        self._writer = ThreadPoolExecutor(1, "staging-writer")
        self._reader = ThreadPoolExecutor(1, "staging-reader")
        self._sweep()

    def settle(self) -> None:
        """Take note of what the threads have done. Raises the OSError of a write that failed, naming the file.

        The block keeps its buffer then, and the call after that tries again.
        """
        for reading in [reading for reading in self._given_up if reading.done.done()]:
            self._given_up.remove(reading)
            self._pool.release(reading.buffer)
        failed: BaseException | None = None
        for block, write in list(self._writing.items()):
            if not write.done.done():
                continue
            if block.dropped:
                del self._writing[block]
                self._pool.release(write.buffer)
                _remove(self._path(block))
            elif write.failed:
                self._retry(block)
            elif error := write.done.exception():
                failed, write.failed = error, True
            else:
                del self._writing[block]
                with self._pool.lock:
                    self._pool.release(write.buffer)
                    self._pool.release(write.buffer)  # the block's own hold
                    block.buffer = None
        if failed is not None:
            raise failed

    def room(self) -> None:
        """Wait until one more block may be written. Raises OSError as `settle` does."""
        while len(self._writing) >= WRITES * self.wide:
            block, write = next(iter(self._writing.items()))
            if write.failed:
                self._retry(block)
            self._wait(self._writing[block].done)
            self.settle()

    def write(self, block: Block) -> None:
        """Begin to move the block, which is in the pool's memory, to a file. There must be `room`."""
        assert len(self._writing) < WRITES * self.wide and block.buffer is not None
        self._files += 1
        block.path = self._folder / f"client-{block.client}.{self._files}.block"
        self._pool.hold(block.buffer)
        done = self._writer.submit(self._write_file, block.path, block.buffer)
        self._writing[block] = _Transfer(block.buffer, done)

    def prefetch(self, block: Block, next_use: Callable[[Block], tuple[bool, float, int]]) -> None:
        """Begin to read the block; of more than `reads` the one that is used latest is given up."""
        if block in self._reading:
            return
        if len(self._reading) >= self._reads * self.wide:
            latest = max(self._reading, key=next_use)
            if next_use(latest) < next_use(block):
                return
            self._give_up(latest)
        self._reading[block] = self._read(block)

    def ready(self, block: Block) -> bool:
        """Whether `fetch` would not wait."""
        return block in self._reading and self._reading[block].done.done()

    def fetch(self, block: Block) -> Buffer:
        """The block's bytes in memory, held for the caller. Waits for the file; raises its OSError."""
        if block not in self._reading:
            self._reading[block] = self._read(block)
        self._wait(self._reading[block].done)
        reading = self._reading.pop(block)
        if error := reading.done.exception():
            self._pool.release(reading.buffer)
            raise error
        return reading.buffer

    def drop(self, block: Block) -> None:
        """The block is not needed any more: remove what is here of it."""
        assert block.dropped
        if block in self._reading:
            self._give_up(block)
        if block in self._writing:  # `settle` removes the file
            self._writing[block].done.cancel()
        elif block.path is not None:
            _remove(block.path)

    def close(self) -> None:
        """End the threads and remove the files. All blocks have been dropped."""
        self._writer.shutdown(wait=True, cancel_futures=True)
        self._reader.shutdown(wait=True, cancel_futures=True)
        self.settle()
        assert not self._writing and not self._reading and not self._given_up
        self._sweep()

    def _read(self, block: Block) -> _Transfer:
        if block.buffer is not None:  # still on its way out: as good as read, and it stays while this holds it
            self._pool.hold(block.buffer)
            done: Future[None] = Future()
            done.set_result(None)
            return _Transfer(block.buffer, done)
        buffer = self._pool.take(block.size)
        return _Transfer(buffer, self._reader.submit(self._read_file, self._path(block), buffer))

    def _give_up(self, block: Block) -> None:
        reading = self._reading.pop(block)
        if reading.done.cancel() or reading.done.done():
            self._pool.release(reading.buffer)
        else:
            self._given_up.append(reading)

    def _retry(self, block: Block) -> None:
        write = self._writing[block]
        done = self._writer.submit(self._write_file, self._path(block), write.buffer)
        self._writing[block] = _Transfer(write.buffer, done)

    def _path(self, block: Block) -> Path:
        assert block.path is not None
        return block.path

    def _wait(self, future: "Future[None]") -> None:
        if not future.done():
            start = time.perf_counter()
            wait([future])
            self.seconds_waited += time.perf_counter() - start

    def _write_file(self, path: Path, buffer: Buffer) -> None:
        """On the writer's thread. Nothing is flushed: a scratch file means nothing to the next process."""
        if buffer.last is not None:
            buffer.last.synchronize()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, buffer.data)
        except OSError as error:
            _remove(path)
            raise OSError(error.errno, error.strerror, str(path)) from error
        self.bytes_written += buffer.data.numel()

    def _read_file(self, path: Path, buffer: Buffer) -> None:
        """On the reader's thread."""
        if buffer.last is not None:
            buffer.last.synchronize()
        with path.open("rb") as file:
            fill(buffer.data, file)
        self.bytes_read += buffer.data.numel()

    def _sweep(self) -> None:
        for path in self._folder.glob("client-*.block"):
            path.unlink()
        with suppress(OSError):  # it is not there, or holds what is not ours
            self._folder.rmdir()


def copy_out(
    block: Block,
    data: Tensor,  # uint8 [n] on the CPU
    lock: threading.Condition,
    pools: Mapping[Tier, Pool],
    stream: torch.cuda.Stream | None,
) -> None:
    """Copy the block's bytes, wherever they are; on any thread, with `lock` held where that is looked up."""
    with lock:
        buffer, pool = block.buffer, pools[block.tier]
        if buffer is not None:
            last = buffer.last
            pool.lend(buffer)
        else:
            assert block.path is not None
            file = block.path.open("rb")  # once open, its bytes outlive its name
    if buffer is None:
        with file:
            fill(data, file)
        return
    try:
        # A buffer of its own, so that `last`, which the other thread sets meanwhile, is left alone.
        copy(buffer.data, data, stream, Buffer(buffer.data, last)).synchronize()
    finally:
        pool.give_back(buffer)


def _remove(path: Path) -> None:
    """A file that cannot be removed takes room, no more; the next to start in the folder tries again."""
    with suppress(OSError):
        path.unlink()


def write_bytes(path: Path, data: Tensor) -> None:
    """Write uint8 [n] to the file."""
    with path.open("wb") as file:
        file.write(data.numpy().data)


def fill(data: Tensor, file: BufferedReader) -> None:
    """Fill uint8 [n] from the file. Raises OSError naming it where it holds less."""
    got = file.readinto(data.numpy().data)
    if got != data.numel():
        raise OSError(errno.EIO, f"holds {got} of {data.numel()} bytes", file.name)
