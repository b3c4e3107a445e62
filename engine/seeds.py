"""Stateless random numbers: each use derives its seed from what it is for, so there is nothing to save or restore."""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive(seed: int, stream: str, *index: int) -> int:
    """A 63-bit seed for one use.

    `stream` names the use ("partition", "sampling", "init/gate", "order", ...); `index` places it, in the order
    client, round, epoch, as far as the use has them. Equal arguments give equal seeds on every machine; different
    ones are independent (BLAKE2b), so adding a use never shifts another's numbers.
    """
    text = f"{seed}:{stream}:{','.join(map(str, index))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, stream: str, *index: int) -> torch.Generator:
    """A CPU generator seeded by `derive`."""
    return torch.Generator().manual_seed(derive(seed, stream, *index))


def seed_globals(seed: int) -> None:
    """Seed every global generator that a model may draw from: PyTorch's on CPU and GPUs, NumPy's and Python's."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed asks for every kind of device: 0.2 ms
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def globals_kept() -> Iterator[None]:
    """Put the global generators back as they were at the end of the block."""
    with Globals().installed():
        yield


class Globals:
    """States of the global generators for one of several that take turns; they begin as those at hand are."""

    def __init__(self) -> None:
        self._states = _states()
        # A captured step goes on reading the state that it was captured with, so this is an object, not numbers.
        self._gpu = [torch.cuda.default_generators[torch.cuda.current_device()]] if torch.cuda.is_initialized() else []
        self._own = [gpu.clone_state() for gpu in self._gpu]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block these are the global generators' states; afterwards those are as they were before it."""
        others, theirs = _states(), [gpu.graphsafe_get_state() for gpu in self._gpu]
        try:
            _restore(self._states)
            for gpu, own in zip(self._gpu, self._own, strict=True):
                gpu.graphsafe_set_state(own)
            yield
        finally:
            self._states = _states()
            _restore(others)
            self._own = [gpu.graphsafe_get_state() for gpu in self._gpu]
            for gpu, their in zip(self._gpu, theirs, strict=True):
                gpu.graphsafe_set_state(their)


@contextmanager
def host_kept() -> Iterator[Callable[[], bool]]:
    """Put the host's global generators back at the end of the block; within, tell whether any has been drawn from."""

    def comparable(states: tuple[Any, ...]) -> tuple[object, ...]:
        ours, numpys, pythons = states
        return ours.numpy().tobytes(), numpys[1].tobytes(), numpys[2:], pythons

    before = _states()
    try:
        yield lambda: comparable(_states()) != comparable(before)
    finally:
        _restore(before)


def renew_gpu_state() -> None:
    """Have the current GPU's generator go on from where it is, but with a state that no capture knows."""
    if torch.cuda.is_initialized():
        gpu = torch.cuda.default_generators[torch.cuda.current_device()]
        gpu.graphsafe_set_state(gpu.clone_state())


def _states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _restore(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
