"""Markers of the engine's phases: nothing until somebody observes, who then hears of each begin and end."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol

PHASES = (
    "round", "client", "transfer in", "transfer out", "step", "batch", "global", "local", "gate", "header", "backward",
    "optimizer", "averaging", "evaluation", "copy", "waiting",
)  # fmt: skip
"""`global`, `local` and `gate` are the branches of FedMoE's program; another program's are named as it names them.
`copy` is of a client's state, on the stream that it takes; `waiting` is the host's, for the device."""


class Observer(Protocol):
    """Hears of phases; they nest: those of one thread and lane end in the reverse order of their beginnings."""

    def begin(self, phase: str, lane: int) -> None:
        """A phase begins, on the current stream; `lane` is 0 for what is in none."""

    def end(self, phase: str, lane: int) -> None:
        """It ends, on the current stream; also if it failed."""


_observers: tuple[Observer, ...] = ()
_lane: ContextVar[int] = ContextVar("lane", default=0)
_nothing = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """Mark the block as a phase. Inside a CUDA graph that is replayed nothing is marked: the host is not there."""
    return _marked(name) if _observers else _nothing


@contextmanager
def in_lane(number: int) -> Iterator[None]:
    """Phases that begin within the block are this lane's."""
    token = _lane.set(number)
    try:
        yield
    finally:
        _lane.reset(token)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Within the block `observer` hears of all phases, of every thread."""
    global _observers
    _observers = (*_observers, observer)
    try:
        yield
    finally:
        _observers = tuple(o for o in _observers if o is not observer)


@contextmanager
def _marked(name: str) -> Iterator[None]:
    observers, lane = _observers, _lane.get()
    for observer in observers:
        observer.begin(name, lane)
    try:
        yield
    finally:
        for observer in reversed(observers):
            observer.end(name, lane)
