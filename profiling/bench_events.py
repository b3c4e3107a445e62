"""Runs pytest and tells, a line of JSON each, what happens: what `fedmoe bench` listens to.

`python -m fedmoe.profiling.bench_events DESCRIPTOR ROOT SELECTION PYTEST-ARGUMENT...` writes to an open file
descriptor; SELECTION is a `Selection` as JSON.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedmoe.profiling.bench_selection import Selection
from fedmoe.profiling.plugin import PROPERTY


class Events:
    """A pytest plugin."""

    def __init__(self, descriptor: int, root: Path, selection: Selection) -> None:
        import torch

        from fedmoe.profiling.environment import environment

        self._file = os.fdopen(descriptor, "w", buffering=1)
        self._selection, self._left_out = selection, set[str]()
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tell(event="environment", device=self._device, environment=environment(root))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave only the benchmarks that are selected."""
        named = [(name_of(item.nodeid), item) for item in items]
        if self._selection.limits is not None:
            order = list(self._selection.limits[self._device])
            named = sorted(((n, i) for n, i in named if n in order), key=lambda pair: order.index(pair[0]))
        chosen = [(name, item) for name, item in named if self._selection.only in name]
        self._tell(event="collected", names=[name for name, _ in named], chosen=[name for name, _ in chosen])
        left = [item for name, item in chosen if name not in self._selection.skip]
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = left

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A benchmark begins."""
        self._tell(event="begin", name=name_of(nodeid))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Leave a benchmark out that there may be no time for."""
        name, ends = name_of(item.nodeid), self._selection.ends
        if ends is None:
            return
        needed, left = self._selection.seconds(self._device, name) or 0, ends - time.monotonic()
        if left <= needed:
            self._left_out.add(name)
            pytest.skip(f"it may take {needed:.0f} s, of the time there are {max(0, left):.0f} s left")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A benchmark has ended, or could not begin."""
        if report.when == "call" or not report.passed:
            name = name_of(report.nodeid)
            rows: Any = dict(report.user_properties).get(PROPERTY, [])
            outcome = "left out" if name in self._left_out else report.outcome
            self._tell(event="end", name=name, outcome=outcome, reason=_why(report), rows=rows)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file cannot be read; another process has no need to say so again."""
        if report.failed and report.nodeid not in self._selection.skip:
            self._tell(event="end", name=report.nodeid, outcome="failed", reason=_why(report), rows=[])

    def _tell(self, **event: Any) -> None:
        self._file.write(json.dumps(event) + "\n")


def name_of(nodeid: str) -> str:
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
    descriptor, root, selection, *arguments = sys.argv[1:]
    selected = Selection(**json.loads(selection))
    sys.exit(pytest.main(arguments, plugins=[Events(int(descriptor), Path(root), selected)]))
