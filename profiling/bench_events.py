"""Runs pytest and tells, a line of JSON each, what happens: what `fedmoe bench` listens to.

`python -m fedmoe.profiling.bench_events DESCRIPTOR ROOT ONLY PYTEST-ARGUMENT...` writes to an open file descriptor.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe.profiling.bench import PROPERTY
from fedmoe.profiling.environment import environment


class Events:
    """A pytest plugin."""

    def __init__(self, descriptor: int, root: Path, only: str) -> None:
        self._file = os.fdopen(descriptor, "w", buffering=1)
        self._only = only
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tell(event="environment", device=device, environment=environment(root))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave only the benchmarks whose name holds what is asked for."""
        chosen = [item for item in items if self._only in _name(item.nodeid)]
        self._tell(event="collected", names=[_name(item.nodeid) for item in items], chosen=len(chosen))
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A benchmark begins."""
        self._tell(event="begin", name=_name(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A benchmark has ended, or could not begin."""
        if report.when == "call" or not report.passed:
            rows: Any = dict(report.user_properties).get(PROPERTY, [])
            self._tell(event="end", name=_name(report.nodeid), outcome=report.outcome, reason=_why(report), rows=rows)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file cannot be read."""
        if report.failed:
            self._tell(event="end", name=report.nodeid, outcome="failed", reason=_why(report), rows=[])

    def _tell(self, **event: Any) -> None:
        self._file.write(json.dumps(event) + "\n")


def _name(nodeid: str) -> str:
    """`gated_head[64-10]` of `tests/bench/test_kernels_head.py::test_gated_head[64-10]`."""
    return (nodeid.partition("::")[2] or nodeid).removeprefix("test_")


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    """In one line."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # skipped
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip().splitlines()[-1 if crash is None else 0]


if __name__ == "__main__":
    descriptor, root, only, *arguments = sys.argv[1:]
    sys.exit(pytest.main(arguments, plugins=[Events(int(descriptor), Path(root), only)]))
