"""The seam: what passes between an engine and whoever drives it, a job in and a result out, and nothing else.

Because a job and a result hold plain numbers and tensors, the same ones fit a round in one process, an all-reduce
over several, or a message of a federated transport.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

Payload = dict[str, Tensor]
Metrics = dict[str, float | int | list[float] | list[int]]
State = dict[str, Tensor]
"""Everything a client owns that outlives a round, by name, on the CPU."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one tensor of a payload must be."""

    dtype: torch.dtype
    shape: tuple[int, ...]


Schema = Mapping[str, TensorSpec]
"""What a payload must hold: exactly these names, dtypes and shapes. A method declares it."""


@dataclass(frozen=True, slots=True)
class Job:
    """One client's work in one round."""

    client: int
    round: int
    payload: Payload
    """What the server sends: the schema's tensors; empty for an evaluation with what the client has."""
    settings: Mapping[str, float | int | str] = field(default_factory=dict)
    """What the server may set for this round, e.g. `epochs`."""


@dataclass(frozen=True, slots=True)
class Result:
    """What comes back from one job."""

    client: int
    payload: Payload
    weight: float
    """Samples behind the payload (train) or behind the metrics (evaluate); 0 asks to be left out of the average."""
    metrics: Metrics


class Interrupted(Exception):  # it is no error
    """An engine was asked to stop, by the event it was made with; the step in hand was finished."""


class Refused(Exception):
    """An engine cannot do what it was asked to; the message says what, and what to do."""


class Engine(Protocol):
    """Runs jobs on one device. Training is a transaction: `commit` keeps what clients became, `rollback` undoes it.

    A client may train any number of times between two commits. A client whose training is not finite is put back to
    where that training began, and its result has weight 0.
    """

    def run(self, kind: Literal["train", "evaluate"], jobs: Sequence[Job]) -> Iterator[Result]:
        """Yield a result for every job, in job order. Raises Interrupted; then the caller rolls back."""
        ...

    def commit(self) -> None:
        """Keep the state of every client trained since the last commit."""
        ...

    def rollback(self) -> None:
        """Return every client trained since the last commit to its state at that commit."""
        ...

    def changed(self) -> Mapping[int, Callable[[], State]]:
        """What gives the states of all clients committed since this was last called, by client.

        Each may be called later and from another thread; it gives the state as it is now.
        """
        ...


def violations(payload: Payload, schema: Schema) -> list[str]:
    """What in `payload` breaks `schema`, a clause each; empty if nothing does."""
    found = [f"{name!r} is missing" for name in schema.keys() - payload.keys()]
    found += [f"{name!r} must not be there" for name in payload.keys() - schema.keys()]
    for name in sorted(schema.keys() & payload.keys()):
        spec, tensor = schema[name], payload[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            found.append(f"{name!r} is {tensor.dtype} {list(tensor.shape)}, must be {spec.dtype} {list(spec.shape)}")
    return sorted(found)
