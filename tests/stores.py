"""A store against a plain dictionary, on any device: what a caller may do, in any order, under any budgets."""

import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from fedmoe.engine import staging
from fedmoe.engine.blocks import Tier
from fedmoe.engine.store import Store

UNIT = 256
SIZES = [UNIT, 2 * UNIT, 5 * UNIT]
"""Bytes of a client's state, by client modulo 3."""
CLIENTS = st.integers(0, 7)


def content(number: int, n: int) -> Tensor:
    """Bytes, uint8 [n], that differ with the number and the place."""
    return ((torch.arange(n) * 7 + number * 13 + number // 256) % 256).to(torch.uint8)


def by_tier(store: Store) -> dict[str, int]:
    """What the store's versions take, by looking at each of them."""
    versions = [*store._committed.values(), *store._pending.values()]
    blocks = [block for version in versions for block in version]
    return {tier.name.lower(): sum(block.size for block in blocks if block.tier is tier) for tier in Tier}


class Machine(RuleBasedStateMachine):
    device = torch.device("cpu")

    @initialize(
        device=st.integers(0, 20),
        host=st.integers(0, 20),
        regions=st.integers(1, 2),
        piece=st.sampled_from([UNIT, 2 * UNIT, 100 * UNIT]),
    )
    def open(self, device: int, host: int, regions: int, piece: int) -> None:
        self.folder = Path(tempfile.mkdtemp()) / "scratch"
        self.budgets = {"device": device * UNIT, "host": host * UNIT}
        budgets = {f"{tier}_bytes": n for tier, n in self.budgets.items()}
        self.store = Store(self.device, **budgets, folder=self.folder, piece=piece)
        self.piece = piece
        self.regions = [torch.empty(10 * UNIT, dtype=torch.uint8, device=self.device) for _ in range(regions)]
        self.constants: dict[int, Tensor] = {}
        self.committed: dict[int, Tensor] = {}
        self.pending: dict[int, Tensor] = {}
        self.number = 0

    def new(self, id: int) -> Tensor:
        self.number += 1
        return content(self.number, SIZES[id % 3])

    @rule(id=CLIENTS)
    def add(self, id: int) -> None:
        if id not in self.store:
            self.committed[id] = self.new(id)
            self.store.add(id, self.committed[id].clone())

    @rule(id=CLIENTS, key=st.integers(0, 2))
    def add_constants(self, id: int, key: int) -> None:
        if id in self.store and id not in self.constants:
            made = content(1000 + key, (1 + key) * UNIT)
            self.constants[id] = made
            self.store.add_constants(id, key, len(made), lambda start, stop: made[start:stop].clone())

    @rule(ids=st.lists(CLIENTS))
    def expect(self, ids: list[int]) -> None:
        self.store.expect(ids)

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        self.store.prefetch(data.draw(st.sampled_from(sorted(self.committed))))

    @precondition(lambda self: self.committed)
    @rule(data=st.data(), region=st.integers(0, 1), constants=st.booleans())
    def load(self, data: st.DataObject, region: int, constants: bool) -> None:
        id = data.draw(st.sampled_from(sorted(self.committed)))
        target = self.regions[region % len(self.regions)]
        target.fill_(99)
        self.store.load(id, target, constants=constants).wait()
        expected = (self.committed | self.pending)[id]
        if constants and id in self.constants:
            expected = torch.cat([expected, self.constants[id]])
        assert torch.equal(target[: len(expected)].cpu(), expected)
        assert (target[len(expected) :] == 99).all()

    @precondition(lambda self: self.committed)
    @rule(data=st.data(), region=st.integers(0, 1))
    def save(self, data: st.DataObject, region: int) -> None:
        id = data.draw(st.sampled_from(sorted(self.committed)))
        source = self.regions[region % len(self.regions)]
        self.pending[id] = self.new(id)
        source.fill_(98)
        source[: len(self.pending[id])] = self.pending[id].to(self.device)
        self.store.save(id, source).wait()
        source.fill_(97)  # the store has its own copy

    @rule()
    def commit(self) -> None:
        self.store.commit()
        self.committed |= self.pending
        self.pending.clear()

    @rule()
    def rollback(self) -> None:
        self.store.rollback()
        self.pending.clear()

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.committed)))
        assert torch.equal(self.store.read(id), self.committed[id])

    @invariant()
    def budgets_hold(self) -> None:
        if not hasattr(self, "store"):
            return
        held = self.store.held
        assert held == by_tier(self.store)
        once = {len(constant): constant for constant in self.constants.values()}
        kept = [*self.committed.values(), *self.pending.values(), *once.values()]
        assert sum(held.values()) == sum(map(len, kept))
        assert held["host"] <= self.budgets["host"]
        assert held["device"] <= (self.budgets["device"] if self.device.type == "cuda" else 0)
        # In whole pieces.
        largest = max((n if n < self.piece else -(-n // self.piece) * self.piece for n in map(len, kept)), default=0)
        pools = self.store.residency._pools
        assert pools[Tier.HOST].allocated <= self.budgets["host"] + staging.buffers() * largest
        if Tier.DEVICE in pools:
            assert pools[Tier.DEVICE].allocated <= self.budgets["device"]

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            assert not any(self.store.held.values())
            assert not self.folder.exists()
            shutil.rmtree(self.folder.parent)
