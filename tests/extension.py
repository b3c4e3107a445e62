"""What tests of the native extension share: its instruction sets, and taking one of them for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from fedmoe.kernels import native

INSTRUCTION_SETS: list[str] = native.module.instruction_sets() if native.module else ["none"]


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Within the block the extension uses this one."""
    assert native.module is not None
    before = native.module.instruction_set()
    native.module.use_instruction_set(name)
    try:
        yield
    finally:
        native.module.use_instruction_set(before)
