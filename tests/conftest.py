"""Fixtures: a small federation on the embedded digits, its run folder, and the command line in a process of its own."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedmoe.config import Config, Data, Federation, Training
from fedmoe.profiling.plugin import add_option, asked
from fedmoe.reference import ReferenceEngine
from tests.support import Command, Fedmoe, begin

CPU = torch.device("cpu")

pytest_plugins = ["fedmoe.profiling.plugin"]
"""Where the project is installed, pytest has it already."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--benchmark`, for which the plugin is too late where a conftest names it."""
    add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Have pytest-benchmark, too, know that nothing is timed unless that is asked for: or it warns under xdist."""
    if not asked(config):
        config.option.benchmark_disable = True


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small models are fastest on one thread, and equality is then independent of the machine's load.

    Of processes that tests start, too: threads of several that wait for each other on few cores made some take thrice
    as long.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def config() -> Config:
    """Five clients, one for each CNN, 300 digits."""
    return Config(
        federation=Federation(clients=5, rounds=3),
        data=Data(limit=300),
        training=Training(batch_size=16, lr=0.05),
    )


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[Config], ReferenceEngine]:
    """Makes an engine over a fresh run folder, with its partition dealt."""
    count = 0

    def make(config: Config) -> ReferenceEngine:
        nonlocal count
        count += 1
        return ReferenceEngine(config, begin(config, tmp_path / f"engine-{count}"), CPU)

    return make


@pytest.fixture
def fedmoe(tmp_path: Path) -> Fedmoe:
    """Runs the command line to its end, in an empty working directory."""
    return lambda *words, **options: Command(tmp_path, *words, **options).wait()
