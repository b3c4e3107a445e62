"""Stateless random numbers: each use derives its seed from what it is for, so there is nothing to save or restore."""

import hashlib

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
