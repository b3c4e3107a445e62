"""Every client that an engine has heard of: what it must know of it, and where its state lies in a block."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from fedmoe.engine.layout import Layout
from fedmoe.engine.member import Federation, Member
from fedmoe.engine.seam import State
from fedmoe.engine.store import Store


class Roster:
    """Opens clients of the federation when they are first asked for, their states going to the store."""

    def __init__(self, federation: Federation, store: Store) -> None:
        self._federation, self._store = federation, store
        self._members: dict[int, Member] = {}
        self._layouts: dict[str, Layout] = {}

    def __getitem__(self, client: int) -> tuple[Member, Layout]:
        if client not in self._members:
            member, program, state = self._federation.open(client)
            layout = Layout.of(program, self._federation.optimizer)
            known = self._layouts.setdefault(member.architecture, layout)
            if known != layout:
                raise ValueError(f"client {client} is of architecture {member.architecture!r}, but its tensors differ")
            block = torch.empty(layout.moving, dtype=torch.uint8)
            layout.pack(state, block)
            if client not in self._store:  # where its constants could not be added, it is
                self._store.add(client, block)
            if layout.size > layout.moving:
                key, modules = bytes(state["constants"].tolist()), program.modules
                self._store.add_constants(client, key, layout.size - layout.moving, partial(layout.constants, modules))
            self._members[client] = member
        member = self._members[client]
        return member, self._layouts[member.architecture]

    def __iter__(self) -> Iterator[int]:
        return iter(self._members)

    def trainable(self, client: int) -> int:
        """The client's trainable parameters."""
        layout = self[client][1]
        return sum(math.prod(layout.entries[f"model/{name}"].shape) for name in layout.trainable)

    def states(self, clients: set[int]) -> Mapping[int, Callable[[], State]]:
        """What gives the states of clients, as they are committed now, when it is called."""
        return {client: self._reader(client) for client in sorted(clients)}

    def _reader(self, client: int) -> Callable[[], State]:
        layout, read = self[client][1], self._store.snapshot(client)
        return lambda: layout.unpack(read())
