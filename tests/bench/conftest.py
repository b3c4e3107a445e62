"""Benchmarks: `fedmoe bench` times them; the ordinary tests run each once, at a tiny size, to see that it works."""

from collections.abc import Iterator

import pytest
import torch

from fedmoe.profiling.bench import (  # noqa: F401 — a fixture and hooks, which pytest finds by their names
    gpu_benchmark,
    pytest_collection_modifyitems,
    pytest_generate_tests,
)


@pytest.fixture(autouse=True)
def _compiled_afresh() -> Iterator[None]:
    """Each benchmark has its own shapes: else the second would be compiled for any, and the ninth not at all."""
    yield
    torch.compiler.reset()
