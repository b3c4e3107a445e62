"""The store on a card: the same versions, copies beside computation, and no wait of the host for what is in memory."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from fedmoe.engine.blocks import Handle, Tier
from fedmoe.engine.store import Store
from tests.stores import Machine, content
from tests.synchronization import without_synchronization

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LARGE = 16 << 20  # bytes; a copy of them takes long enough to be overtaken


class CudaMachine(Machine):
    device = torch.device("cuda")


CudaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstADictionary = CudaMachine.TestCase


def opened(folder: Path, device: int, host: int, clients: int, pieces: int = 1) -> Store:
    """A store with room for so many states in each tier, and clients of one state of so many pieces each."""
    budgets = {"device_bytes": device * LARGE, "host_bytes": host * LARGE}
    store = Store(torch.device("cuda"), **budgets, folder=folder / "scratch", piece=LARGE // pieces)
    for id in range(clients):
        store.add(id, content(id, LARGE))
    return store


def regions(count: int) -> list[torch.Tensor]:
    return list(torch.zeros(count, LARGE, dtype=torch.uint8, device="cuda"))


@pytest.mark.parametrize(("device", "host"), [(20, 0), (3, 20), (0, 20), (2, 2), (0, 0)])
def test_loads_and_saves_overlap_training(tmp_path: Path, device: int, host: int) -> None:
    """Two regions in turn, as an engine does it; each client is trained by adding 1 after some work."""
    two = regions(2)
    work = torch.randn(2048, 2048, device="cuda") / 64
    order = [(7 * i) % 6 for i in range(30)]
    rounds = {id: order.count(id) for id in range(6)}
    with opened(tmp_path, device, host, 6) as store:
        for _ in range(2):
            store.expect(order)
            leaving: list[Handle | None] = [None, None]
            coming = store.load(order[0], two[0])
            for i, id in enumerate(order):
                here, there = i % 2, (i + 1) % 2
                coming.wait()
                torch.linalg.multi_dot([work, work, work, work])
                two[here] += 1
                leaving[here] = store.save(id, two[here])
                if i + 1 < len(order):
                    if i + 2 < len(order):
                        store.prefetch(order[i + 2])
                    coming = store.load(order[i + 1], two[there], leaving[there])
            store.commit()
        for id in range(6):
            assert torch.equal(store.read(id), content(id, LARGE) + 2 * rounds[id])


def test_a_load_without_a_handle_waits_for_the_region(tmp_path: Path) -> None:
    (one,) = regions(1)
    work = torch.randn(4096, 4096, device="cuda")
    with opened(tmp_path, 2, 2, 2) as store:
        store.load(0, one).wait()
        torch.linalg.multi_dot([work, work, work, work])  # keeps the stream busy, so that a load could come too early
        one += 1
        store.save(0, one)
        store.load(1, one).wait()
        assert torch.equal(one.cpu(), content(1, LARGE))
        store.commit()
        assert torch.equal(store.read(0), content(0, LARGE) + 1)


def part(data: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return data[start:stop]


@pytest.mark.parametrize(("device", "host"), [(20, 0), (0, 20), (2, 2), (0, 0)])
@pytest.mark.parametrize("pieces", [1, 8])
def test_one_client_follows_another_out_of_a_single_region(tmp_path: Path, device: int, host: int, pieces: int) -> None:
    """Piece by piece, with constants behind them that clients 0 and 1 share."""
    work = torch.randn(2048, 2048, device="cuda") / 64
    region = torch.zeros(LARGE + LARGE // 2, dtype=torch.uint8, device="cuda")
    order = [(5 * i + i // 3) % 3 for i in range(24)]
    with opened(tmp_path, device, host, 3, pieces) as store:
        tails = {key: content(100 + key, LARGE // 2) for key in (0, 2)}
        for id in range(3):
            store.add_constants(id, key := 2 * (id // 2), LARGE // 2, partial(part, tails[key]))
        store.expect(order)
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        left, known = None, None
        for id in order:
            constants = store.constants(id)
            store.load(id, region, left, constants != known).wait()
            known = constants
            wrong += (region[LARGE:] != tails[2 * (id // 2)].cuda()).sum()
            torch.linalg.multi_dot([work, work, work, work])
            region[:LARGE] += 1
            left = store.save(id, region)
        store.commit()
        assert not wrong
        for id in range(3):
            assert torch.equal(store.read(id), content(id, LARGE) + order.count(id))


@pytest.mark.parametrize(("device", "host"), [(6, 0), (0, 6), (3, 3)])
def test_the_host_waits_for_nothing_in_memory(tmp_path: Path, device: int, host: int) -> None:
    two = regions(2)
    with opened(tmp_path, device, host, 3) as store:
        for id in range(3):  # makes the buffers
            store.save(id, two[0])
        store.rollback()
        torch.cuda.synchronize()
        with without_synchronization():
            store.expect([0, 1, 2])
            for id in range(3):
                store.load(id, two[id % 2]).wait()
                two[id % 2] += 1
                store.save(id, two[id % 2])
            torch.cuda._sleep(10**9)  # half a second; what is enqueued behind it is not waited for
            store.save(0, two[0])
            left = store.save(1, two[1])
            assert not left.query()
        store.commit()
        torch.cuda.synchronize()
        assert left.query() and store.seconds_waited == 0
        assert (store.bytes_moved["host", "out"] > 0) == (host > 0)
        if not host:
            assert not any(store.bytes_moved.values())


def test_memory_is_given_back(tmp_path: Path) -> None:
    (one,) = regions(1)
    before = torch.cuda.memory_allocated()
    with opened(tmp_path, 4, 2, 5) as store:
        for number in range(100):
            store.save(number % 5, one)
            store.commit()
        assert torch.cuda.memory_allocated() - before <= 4 * LARGE
        assert store.residency._pools[Tier.DEVICE].allocated <= 4 * LARGE
    assert torch.cuda.memory_allocated() == before
