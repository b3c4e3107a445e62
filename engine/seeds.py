"""Stateless random numbers: each use derives its seed from what it is for, so there is nothing to save or restore."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

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
    """Seed every global generator that a model may draw from: PyTorch's on all devices, NumPy's and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def globals_kept() -> Iterator[None]:
    """Put the global generators back as they were at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
