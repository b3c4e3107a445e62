"""Benchmarks: `fedmoe bench` times them; the ordinary tests run each once, at a tiny size, to see that it works."""

from collections.abc import Iterator

import pytest
import torch

from fedmoe.profiling.acceptance import TARGETS
from fedmoe.profiling.judging import Judge
from fedmoe.profiling.plugin import PROPERTY


@pytest.fixture(autouse=True)
def _compiled_afresh() -> Iterator[None]:
    """Each benchmark has its own shapes: else the second would be compiled for any, and the ninth not at all."""
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _has_what_targets_name(request: pytest.FixtureRequest) -> Iterator[None]:
    """A variant that has another name now would leave a target unmeasured, with no word before a GPU is at hand."""
    yield
    rows = dict(request.node.user_properties).get(PROPERTY, [])
    name = request.node.name.partition("[")[0].removeprefix("test_")
    for target in TARGETS:
        if rows and isinstance(target.judge, Judge) and name in {b.partition("[")[0] for b in target.benchmarks}:
            assert set(target.judge.variants) <= {row["variant"] for row in rows}, target.what
