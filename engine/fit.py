"""What training takes of a memory, and the widest way of doing it that fits; plain arithmetic over the sizes."""

from dataclasses import dataclass
from math import ceil

from fedmoe.engine.facts import Architecture, Sizes
from fedmoe.engine.store import PIECE

LARGE = 16_000_000
"""Trainable parameters from which a client runs alone: it fills a GPU by itself, and several take its memory."""

MOST_LANES = 4
"""Lanes that the plan chooses by itself at most; each has graphs and regions of its own."""

WORKSPACE = 512 * 10**6
"""Bytes of device memory set aside for the libraries' workspaces, the graphs' own pool and the allocator's rests."""


@dataclass(frozen=True, slots=True)
class Work:
    """A way of training, and the bytes it takes while it runs, wherever states lie between rounds."""

    lanes: int
    cohort: int
    regions: int
    """Regions a lane: with 2, the next client comes in while one trains."""
    states: int
    """In all regions."""
    gradients: int
    low_precision: int
    activations: int

    @property
    def fixed(self) -> int:
        """Bytes that no smaller batch makes less."""
        return self.states + self.gradients + self.low_precision

    @property
    def total(self) -> int:
        """All bytes."""
        return self.fixed + self.activations


def small(sizes: Sizes) -> list[Architecture]:
    """The architectures whose clients may train together or side by side."""
    return [a for a in sizes.architectures if a.trainable < LARGE]


def in_round(architecture: Architecture, sizes: Sizes) -> int:
    """Clients of an architecture in a round, on average, rounded up; a round with more takes one cohort more."""
    return ceil(sizes.sampled * architecture.clients / sizes.clients)


def together(architecture: Architecture, sizes: Sizes) -> int:
    """Clients of an architecture that can train as one batched model at all."""
    alone = architecture.trainable >= LARGE or sizes.backward < sizes.batch
    return 1 if alone else min(architecture.clients, sizes.sampled)


def work(sizes: Sizes, lanes: int, cohort: int, regions: int, low: int, device: bool) -> Work:
    """What training takes with so many lanes and regions a lane, and at most `cohort` clients together.

    A region holds the largest client or cohort that a lane may get; large clients train in the first lane alone. `low`
    is the size of an element of the low-precision copy, 0 for none.

    The activations' reserve is that of as many clients as train at once; on a device, WORKSPACE on top.
    """

    def members(a: Architecture) -> int:
        return min(cohort, together(a, sizes))

    def gradients(a: Architecture) -> int:
        # Those of micro-batches add up in fp32, beside their own in low precision.
        return members(a) * (4 + low * (sizes.backward < sizes.batch)) * a.trainable

    def region(a: Architecture) -> int:
        return members(a) * (a.state + low * a.trainable) + gradients(a)

    def batch(a: Architecture) -> int:
        return members(a) * a.activations

    every, others = sizes.architectures, small(sizes)
    held = [max(every, key=region)]
    if others:
        held += [max(others, key=region)] * (lanes - 1)
    running = max(map(batch, every)) + (lanes - 1) * max(map(batch, others), default=0)
    return Work(
        lanes,
        cohort,
        regions,
        states=regions * sum(members(a) * a.state for a in held),
        gradients=regions * sum(map(gradients, held)),
        low_precision=regions * sum(members(a) * low * a.trainable for a in held),
        activations=running + WORKSPACE * device,
    )


def widest(
    sizes: Sizes, lanes: int, cohort: int, low: int, device: bool, room: int, most: int, *, cohort_first: bool
) -> Work:
    """The widest work within `room` bytes, from `lanes` and `cohort` down; more than one client at a time takes `most`.

    The cohort is halved before a lane is given up, or with `cohort_first` the other way round. Where nothing fits, it
    is one client alone in one region, whose activations are then too large for the room.
    """
    cohorts, numbers = [cohort >> i for i in range(cohort.bit_length())], range(lanes, 0, -1)
    ways = [(n, c) for c in cohorts for n in numbers] if cohort_first else [(n, c) for n in numbers for c in cohorts]
    for n, c in ways:
        made = work(sizes, n, c, 1 + device, low, device)
        if made.total <= (room if (n, c) == (1, 1) else min(room, most)):
            return made
    return work(sizes, 1, 1, 1, low, device)


def place(sizes: Sizes, device: int, host: int) -> tuple[int, int, int]:
    """Bytes of all clients' states that lie on the device, on the host and in files, in this order."""
    placed, left = [0, 0, 0], [device, host]
    kinds = [(a.state - a.constants, a.clients) for a in sizes.architectures]
    kinds += [(a.constants, 1 if a.same else a.clients) for a in sizes.architectures]
    for size, count in kinds:
        waiting, unit = size * count, max(1, min(size, PIECE))
        for tier in range(2):
            here = min(waiting, left[tier] // unit * unit)
            placed[tier] += here
            left[tier] -= here
            waiting -= here
        placed[2] += waiting
    return placed[0], placed[1], placed[2]
