"""The store of clients' states: its versions against a plain dictionary, budgets, who moves and who stays, files."""

import errno
import threading
import time
import weakref
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from fedmoe.engine import blocks, staging
from fedmoe.engine.store import Store
from tests.stores import UNIT, Machine, by_tier, content

CPU = torch.device("cpu")
Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstADictionary = Machine.TestCase


def opened(folder: Path, host: int, clients: int = 0, device: int = 0) -> Store:
    """A store with room for `host` blocks of one unit in host memory, and clients of one unit each."""
    store = Store(CPU, device_bytes=device, host_bytes=host * UNIT, folder=folder / "scratch")
    for id in range(clients):
        store.add(id, content(id, UNIT))
    return store


def region(number: int, n: int = UNIT) -> Tensor:
    return content(number, n)


def in_memory(store: Store) -> set[int]:
    """The clients with a version in host memory."""
    return {block.client for block in store.residency._blocks[blocks.Tier.HOST]}


def loaded(store: Store, id: int) -> Tensor:
    target = torch.empty(UNIT, dtype=torch.uint8)
    store.load(id, target)
    return target


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Fills the disk, and empties it again."""
    real = staging.write_bytes

    def write(path: Path, data: Tensor) -> None:
        path.write_bytes(b"the part that fitted")
        raise OSError(errno.ENOSPC, "No space left on device")

    return lambda full: monkeypatch.setattr(staging, "write_bytes", write if full else real)


def test_first_to_go_is_what_is_used_last(tmp_path: Path) -> None:
    with opened(tmp_path, 5, 5) as store:
        store.expect([2, 0, 1, 4, 3, 2])
        store.load(2, region(0))
        store.save(2, region(100))  # next used after all others; but its old version not at all
        assert in_memory(store) == {0, 1, 2, 3, 4} and store.held["file"] == UNIT
        store.commit()
        assert store.held == {"device": 0, "host": 5 * UNIT, "file": 0}
        store.load(0, region(0))  # it is not expected any more
        store.add(5, content(5, UNIT))  # and the new one neither: nothing moves for it
        assert in_memory(store) == {0, 1, 2, 3, 4}
        store.expect([5, 4, 2, 3, 0, 1])
        for id in (6, 7):  # not expected
            store.add(id, content(id, UNIT))
            assert in_memory(store) == {0, 1, 2, 3, 4}
        for id, gone in ((8, {1}), (9, {0, 1}), (10, {0, 1, 3})):
            store.expect([8, 9, 10, 5, 4, 2, 3, 0, 1])
            store.add(id, content(id, UNIT))
            assert not in_memory(store) & gone and len(in_memory(store)) == 5
        assert in_memory(store) == {2, 4, 8, 9, 10}
        for id in range(11):
            assert torch.equal(loaded(store, id), content(100 if id == 2 else id, UNIT))


def test_of_those_not_expected_the_lowest_goes_first(tmp_path: Path) -> None:
    with opened(tmp_path, 3, 3) as store:
        store.expect([9, 8])
        store.add(9, content(9, UNIT))
        assert in_memory(store) == {1, 2, 9}
        store.add(8, content(8, UNIT))
        assert in_memory(store) == {2, 8, 9}


def test_a_load_that_happened_is_not_expected_any_more(tmp_path: Path) -> None:
    with opened(tmp_path, 3, 3) as store:
        store.expect([0, 9, 1, 2])
        store.load(0, region(0))
        store.add(9, content(9, UNIT))
        assert in_memory(store) == {1, 2, 9}


def test_a_large_block_moves_several_or_none(tmp_path: Path) -> None:
    with opened(tmp_path, 4, 4) as store:
        store.expect([0, 1, 10, 2, 3])
        store.add(10, content(10, 3 * UNIT))  # only two are used later than it
        assert in_memory(store) == {0, 1, 2, 3} and store.held["file"] == 3 * UNIT
        store.expect([0, 11, 2, 1, 3])
        store.add(11, content(11, 3 * UNIT))
        assert in_memory(store) == {0, 11}
        store.add(12, content(12, 5 * UNIT))  # more than the whole budget
        assert in_memory(store) == {0, 11}


def test_what_fits_is_not_moved(tmp_path: Path) -> None:
    with opened(tmp_path, 8, 4, device=10**9) as store:  # there is no device: its budget is ignored
        for number in range(1000):
            store.expect([3, 1, 0, 2])
            for id in (3, 1, 0, 2):
                store.prefetch(id)
                store.load(id, region(0))
                store.save(id, region(number + id))
                store.save(id, region(number + id + 1))
            (store.commit if number % 3 else store.rollback)()
        assert set(store.bytes_moved.values()) == {0} and store.seconds_waited == 0
        assert store.held == {"device": 0, "host": 4 * UNIT, "file": 0}
        assert not store.folder.exists()


def test_a_thousand_rounds_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    made, threads = 0, threading.active_count()
    memory = blocks.host_memory

    def counted(n: int) -> Tensor:
        nonlocal made
        made += 1
        data = memory(n)
        alive.add(data)
        return data

    monkeypatch.setattr(blocks, "host_memory", counted)
    with opened(tmp_path, 3, 5) as store:
        for number in range(1000):
            ids = [(number + i) % 5 for i in range(2)]
            store.expect(ids)
            for id in ids:
                store.prefetch(id)
            for id in ids:
                store.load(id, region(0))
                store.save(id, region(number))
            (store.commit if number % 3 else store.rollback)()
        assert made <= 3 + staging.buffers()  # then they are used again
        assert sum(store.held.values()) == 5 * UNIT == sum(by_tier(store).values())
        store.prefetch(0)  # what is done is taken note of
        assert len(list(store.folder.iterdir())) <= 5 + 2 * staging.WRITES
        assert threading.active_count() <= threads + 3
        assert store.bytes_moved["file", "in"] > 0 < store.bytes_moved["file", "out"]
        assert store.bytes_moved["host", "in"] == store.bytes_moved["host", "out"] == 0
    assert len(alive) == 0
    assert not store.folder.exists()


def test_memory_of_another_size_makes_room(tmp_path: Path) -> None:
    with opened(tmp_path, 8) as store:
        for id in range(16):
            store.add(id, content(id, (1 + id % 8) * UNIT))
            store.expect([id])
        for id in range(16):
            assert torch.equal(store.read(id), content(id, (1 + id % 8) * UNIT))
        assert store.residency._pools[blocks.Tier.HOST].allocated <= (8 + 8 * staging.buffers()) * UNIT


def test_committed_bytes_stay_while_new_versions_come(tmp_path: Path) -> None:
    """Of every client a block full of one number, so that a reader sees any mixture."""
    n = 64 * UNIT
    store = Store(CPU, device_bytes=0, host_bytes=4 * n, folder=tmp_path / "scratch")
    stop = threading.Event()
    wrong: list[object] = []
    reads = 0

    def read() -> None:
        nonlocal reads
        before = [0] * 4
        try:
            while not stop.is_set():
                for id in range(4):
                    found = store.read(id)
                    value = int(found[0])
                    if not (found == value).all() or value % 2 or value < before[id]:
                        wrong.append((id, before[id], found.unique()))
                    before[id] = value
                    reads += 1
        except BaseException as error:
            wrong.append(error)

    with store:
        for id in range(4):
            store.add(id, torch.zeros(n, dtype=torch.uint8))
        thread = threading.Thread(target=read)
        thread.start()
        target = torch.empty(n, dtype=torch.uint8)
        for number in range(1, 120):
            store.expect([(number + i) % 4 for i in range(4)])
            for id in range(4):
                store.load(id, target)
                assert (target == 2 * (number - 1)).all()
                store.save(id, target.fill_(255))  # never committed
                store.save(id, target.fill_(2 * number))
            if number % 10 == 0:
                store.rollback()
                for id in range(4):
                    store.save(id, target.fill_(2 * number))
            store.commit()
        stop.set()
        thread.join()
    assert not wrong and reads > 50


def test_a_full_disk_loses_nothing_committed(tmp_path: Path, full_disk: Callable[[bool], None]) -> None:
    with opened(tmp_path, 2, 4) as store:
        full_disk(True)
        errors: list[OSError] = []
        for id in (0, 1, 2, 3) * 4:
            try:
                store.load(id, region(0))
                store.save(id, region(100 + id))
            except OSError as error:
                errors.append(error)
        assert errors
        for told in errors:
            assert told.errno == errno.ENOSPC and Path(told.filename).parent == store.folder
        for id in range(4):
            assert torch.equal(store.read(id), content(id, UNIT))
        store.rollback()
        for id in range(4):
            assert torch.equal(store.read(id), content(id, UNIT))
        full_disk(False)
        for id in range(4):
            for _ in range(2):  # one that failed before may tell of it now
                try:
                    store.save(id, region(100 + id))
                    break
                except OSError:
                    continue
        store.commit()
        for id in range(4):
            assert torch.equal(store.read(id), content(100 + id, UNIT))
            assert torch.equal(loaded(store, id), content(100 + id, UNIT))


def test_what_a_failed_save_was_to_replace_stays(tmp_path: Path, full_disk: Callable[[bool], None]) -> None:
    with opened(tmp_path, 0, 3) as store:
        for id in range(3):
            store.save(id, region(10 + id))
        time.sleep(0.05)  # written
        full_disk(True)
        failed = 0
        for _ in range(4):
            for id in range(3):
                try:
                    store.save(id, region(20 + id))
                except OSError:
                    failed += 1
        assert failed
        full_disk(False)
        latest: list[Tensor] = []
        while len(latest) < 3:
            try:
                latest.append(loaded(store, len(latest)))
            except OSError:
                continue
        for id in range(3):
            assert any(torch.equal(latest[id], content(number + id, UNIT)) for number in (10, 20))
            assert torch.equal(store.read(id), content(id, UNIT))


def test_a_file_that_is_short_or_gone_is_named(tmp_path: Path) -> None:
    with opened(tmp_path, 0, 3) as store:
        while store.residency._staging._writing:
            store.prefetch(0)
        path = store._committed[1][0].path
        assert path is not None
        path.write_bytes(b"short")
        with pytest.raises(OSError, match="holds 5 of 256 bytes") as caught:
            store.load(1, region(0))
        assert caught.value.filename == str(path)
        with pytest.raises(OSError, match="holds 5 of 256 bytes"):
            store.read(1)
        path.unlink()
        with pytest.raises(FileNotFoundError) as caught:
            store.load(1, region(0))
        assert caught.value.filename == str(path)
        assert torch.equal(loaded(store, 2), content(2, UNIT))


def test_leftovers_of_a_killed_process_go_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    (folder / "client-3.7.block").write_bytes(b"left")
    opened(tmp_path, 0).close()
    assert not folder.exists()
    folder.mkdir()
    (folder / "client-3.7.block").write_bytes(b"left")
    (folder / "notes").write_text("mine")
    with opened(tmp_path, 0, 2):
        assert not (folder / "client-3.7.block").exists()
    assert [path.name for path in folder.iterdir()] == ["notes"]


def test_reading_ahead_spares_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, slow = staging.fill, 0.05

    def slowly(data: Tensor, file: Any) -> None:
        time.sleep(slow)
        read(data, file)

    monkeypatch.setattr(staging, "fill", slowly)
    with opened(tmp_path, 0, 4) as store:
        while store.residency._staging._writing:
            store.prefetch(0)
        loaded(store, 0)
        before = store.seconds_waited
        store.prefetch(1)
        time.sleep(3 * slow)
        assert torch.equal(loaded(store, 1), content(1, UNIT))
        assert store.seconds_waited == before
        assert torch.equal(loaded(store, 2), content(2, UNIT))
        assert store.seconds_waited > before + slow / 2
        store.expect([1, 2, 3])
        for id in (3, 1, 2):  # the last of them is given up
            store.prefetch(id)
        assert {block.client for block in store.residency._staging._reading} == {1, 2}


def test_a_large_state_lies_in_pieces_wherever_there_is_room(tmp_path: Path) -> None:
    with Store(CPU, device_bytes=0, host_bytes=5 * UNIT, folder=tmp_path / "scratch", piece=2 * UNIT) as store:
        store.add(0, content(0, 7 * UNIT))  # two pieces find room, one and the rest do not
        assert store.held == {"device": 0, "host": 5 * UNIT, "file": 2 * UNIT}
        store.add(1, content(1, 2 * UNIT))
        store.expect([1, 0])
        store.save(1, region(5, 2 * UNIT))  # used before, so the last two of what the other has in memory make room
        assert [block.tier.name for block in store._pending[1]] == ["HOST"]
        assert [block.tier.name for block in store._committed[0]] == ["HOST", "FILE", "FILE", "FILE"]
        target = torch.zeros(9 * UNIT, dtype=torch.uint8)
        store.load(0, target)
        assert torch.equal(target[: 7 * UNIT], content(0, 7 * UNIT)) and not target[7 * UNIT :].any()
        assert torch.equal(store.read(0), content(0, 7 * UNIT))


def test_a_piece_of_what_is_used_soon_stays(tmp_path: Path) -> None:
    with Store(CPU, device_bytes=0, host_bytes=3 * UNIT, folder=tmp_path / "scratch", piece=UNIT) as store:
        store.add(0, content(0, 2 * UNIT))
        store.add(1, content(1, UNIT))
        store.expect([0, 2, 1])
        store.add(2, content(2, UNIT))
        assert [block.tier.name for id in (0, 1, 2) for block in store._committed[id]] == [
            "HOST",
            "HOST",
            "FILE",
            "HOST",
        ]


def test_all_pieces_of_a_state_are_written_and_read_behind_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, write = threading.Event(), staging.write_bytes

    def late(path: Path, data: Tensor) -> None:
        go_on.wait(5)
        write(path, data)

    monkeypatch.setattr(staging, "write_bytes", late)
    with Store(CPU, device_bytes=0, host_bytes=0, folder=tmp_path / "scratch", piece=UNIT) as store:
        store.add(0, content(0, 6 * UNIT))
        assert store.seconds_waited == 0
        go_on.set()
        while store.residency._staging._writing:
            store.expect([0])
            store.prefetch(0)
        store.load(0, torch.zeros(6 * UNIT, dtype=torch.uint8))
        store.prefetch(0)
        until = time.monotonic() + 5
        while not store.ready(0) and time.monotonic() < until:
            time.sleep(0.001)
        assert store.ready(0)


def test_a_save_that_fails_half_way_leaves_the_committed_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited, write, real = threading.Event(), staging.write_bytes, futures.wait

    def fail(path: Path, data: Tensor) -> None:
        waited.wait()
        raise OSError(errno.ENOSPC, "No space left on device")

    def begin_to_wait(writes: Any) -> None:
        waited.set()
        real(writes)

    with Store(CPU, device_bytes=0, host_bytes=0, folder=tmp_path / "scratch", piece=UNIT) as store:
        store.add(0, content(0, 6 * UNIT))
        while store.residency._staging._writing:
            store.prefetch(0)
        monkeypatch.setattr(staging, "write_bytes", fail)
        monkeypatch.setattr("fedmoe.engine.staging.wait", begin_to_wait)
        store.add(1, content(1, 3 * UNIT))
        store.save(0, region(1, 6 * UNIT))
        with pytest.raises(OSError, match="No space"):  # of twelve writes there is room for half of this
            store.save(0, region(2, 6 * UNIT))
        monkeypatch.setattr(staging, "write_bytes", write)
        for _ in range(20):  # one that failed before may tell of it now
            try:
                store.load(0, target := torch.zeros(6 * UNIT, dtype=torch.uint8))
                break
            except OSError:
                continue
        assert torch.equal(target, content(0, 6 * UNIT))
        assert sum(store.held.values()) == 9 * UNIT
        assert torch.equal(store.read(1), content(1, 3 * UNIT))


class Event:
    """Of a copy, in a list of those that were waited for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait(self, stream: object = None) -> None:
        self.log.append(self.name)

    def query(self) -> bool:
        return self.name == "c"

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


def test_what_comes_in_waits_for_what_goes_out_of_its_place() -> None:
    log: list[str] = []
    place = torch.zeros(10 * UNIT, dtype=torch.uint8)
    start = place.data_ptr()
    ends = {"a": 2 * UNIT, "b": 4 * UNIT, "c": 5 * UNIT}
    leaving = blocks.Leaving([(start + end, Event(name, log)) for name, end in ends.items()])
    for part in (place[:UNIT], place[: 2 * UNIT], place[UNIT : 3 * UNIT], place[4 * UNIT : 5 * UNIT]):
        blocks.until(leaving, part).wait()
    assert log == ["a", "a", "b", "c"]
    blocks.until(leaving, place[6 * UNIT :]).wait()  # nothing goes out from there, but who was there has to be done
    leaving.wait()
    assert log[4:] == ["c", "c"] and leaving.query()
    blocks.Leaving([(0, Event("a", log)), (0, blocks.Done())]).synchronize()  # a state of which some stays on the host
    assert log[6:] == ["host waits for a"]
    whole = Event("whole", log)
    assert blocks.until(whole, place) is whole


def test_one_region_serves_clients_of_any_size(tmp_path: Path) -> None:
    with opened(tmp_path, 2) as store:
        target = torch.empty(9 * UNIT, dtype=torch.uint8)
        for id, units in enumerate((1, 5, 9)):
            store.add(id, content(id, units * UNIT))
        for id, units in enumerate((1, 5, 9)):
            target.fill_(77)
            store.load(id, target)
            assert torch.equal(target[: units * UNIT], content(id, units * UNIT))
            assert (target[units * UNIT :] == 77).all()
            target += 1
            store.save(id, target)
            store.commit()
            assert torch.equal(store.read(id), content(id, units * UNIT) + 1)


def test_misuse_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="negative: 0 bytes of device, -256"):
        opened(tmp_path, -1)
    store = opened(tmp_path, 1, 1)
    assert 0 in store and 1 not in store
    store.add_constants(0, "shared", UNIT, lambda start, stop: content(9, stop - start))
    for wrong, message in (
        (lambda: store.add(0, content(0, 2 * UNIT)), "client 0 already has a state, of 256 bytes; got one of 512"),
        (lambda: store.add(1, content(0, 100)), "a multiple of 256 bytes, that of client 1 is 100"),
        (lambda: store.add(1, torch.zeros(UNIT)), r"need contiguous uint8 \[256\], got torch.float32 \[256\]"),
        (lambda: store.load(0, content(0, 255)), "the region has 255 bytes, the state 512"),
        (lambda: store.save(0, content(0, 255)), "the region has 255 bytes, the state 256"),
        (lambda: store.load(0, content(0, 2 * UNIT)[::2]), "contiguous"),
        (lambda: store.load(0, torch.empty(UNIT, dtype=torch.uint8, device="meta")), "cpu, the region is on meta"),
        (lambda: store.save(7, content(0, UNIT)), "client 7 has no state: the store in .* has 1 others"),
        (lambda: store.read(7), "client 7 has no state"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    store.close()
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.commit()


def test_a_snapshot_that_cannot_be_read_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(block: blocks.Block, *rest: object) -> None:
        if block.place == 1:
            raise OSError(errno.EIO, "Input/output error")

    with Store(CPU, device_bytes=0, host_bytes=9 * UNIT, folder=tmp_path / "scratch", piece=UNIT) as store:
        store.add(0, content(0, 3 * UNIT))
        read = store.snapshot(0)
        store.save(0, region(1, 3 * UNIT))
        store.commit()
        assert store.held["host"] == 6 * UNIT
        with monkeypatch.context() as patch:
            patch.setattr(staging, "copy_out", fail)
            with pytest.raises(OSError, match="output error"):
                read()
        store.commit()
        assert store.held["host"] == 3 * UNIT


@pytest.mark.parametrize("host", [0, 3, 100])
def test_a_snapshot_is_of_when_it_was_taken(tmp_path: Path, host: int) -> None:
    with opened(tmp_path, host, 3) as store:
        taken = {client: store.snapshot(client) for client in range(3)}
        for version in (10, 20, 30):
            for client in range(3):
                store.save(client, region(version + client))
            store.commit()
        for client, read in taken.items():
            assert torch.equal(read(), content(client, UNIT))
            assert torch.equal(store.read(client), region(30 + client))
        store.expect([])
        store.commit()
        assert sum(store.held.values()) == 3 * UNIT  # the old versions are gone
