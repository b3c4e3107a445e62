"""The pytest plugin, in a sample project of its own: the fixture, `--benchmark`, and pytest-benchmark's options."""

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmoe.profiling import plugin
from tests.support import ROOT

pytest.importorskip("pytest_benchmark")

SAMPLE = """
import pathlib
import torch
from fedmoe.profiling.bench import Floor

def test_twice(gpu_benchmark):
    calls = []
    x = torch.ones(1000)
    def double():
        calls.append(1)
        return 2 * x
    floor = Floor(bytes=8000, flops=1000, dtype=x.dtype)
    gpu_benchmark({"double": double, "sum": lambda: x + x}, floor=floor, check=torch.testing.assert_close)
    pathlib.Path("calls").write_text(str(len(calls)))

def test_theirs(benchmark):
    assert benchmark(sum, [1, 2]) == 3

def test_no_benchmark():
    pass
"""
CLOCK = """
import itertools, types
from fedmoe.profiling import timing

ticks = itertools.count()
timing.time = types.SimpleNamespace(perf_counter=lambda: 1e-3 * next(ticks))
"""
"""A conftest: a millisecond passes whenever somebody looks at the clock."""

EDITABLE = "ignore:Module already imported so cannot be rewritten; _editable"
"""What pytest says of any plugin that is installed from a checkout: the module that finds it was there before."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Someone's project, with two benchmarks and a test that is none."""
    made = tmp_path / "project"
    made.mkdir()
    (made / "test_sample.py").write_text(SAMPLE)
    (made / "pytest.ini").write_text("[pytest]\n")
    return made


@pytest.fixture
def run(project: Path, tmp_path: Path) -> Run:
    """Runs pytest in the project, where FedMoE is installed as its pyproject.toml says, and there is no GPU."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    installed = tmp_path / "site" / "fedmoe-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: fedmoe\nVersion: 0\n")
    lines = "".join(f"{name} = {module}\n" for name, module in points.items())
    (installed / "entry_points.txt").write_text(f"[pytest11]\n{lines}")

    def pytest_(*words: object, as_installed: bool = True) -> subprocess.CompletedProcess[str]:
        found = [str(installed.parent), str(ROOT)] if as_installed else [str(ROOT)]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
        env |= {"PYTHONPATH": os.pathsep.join(found), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, words), "-W", EDITABLE]
        return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)

    return pytest_


def entries(path: Path) -> dict[str, dict[str, Any]]:
    """A run's, by name."""
    found = {entry["name"]: entry for entry in json.loads(path.read_text())["benchmarks"]}
    assert len({entry["fullname"] for entry in found.values()}) == len(found)  # by which saved runs are compared
    return found


def test_entry_point_is_the_plugin() -> None:
    """A name other than the module's would be registered a second time beside a conftest's."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert points == {plugin.__name__: plugin.__name__}


def test_without_a_request_benchmarks_run_once(run: Run, project: Path) -> None:
    done = run("-W", "error", "-k", "not theirs")
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
    assert "sum" not in done.stdout and "warning" not in done.stdout  # no table, no complaint
    assert (project / "calls").read_text() == "1"


def test_benchmark_selects_and_times(run: Run, project: Path) -> None:
    done = run("--benchmark", "--benchmark-json=out.json")
    assert done.returncode == 0 and "2 passed, 1 deselected" in done.stdout, done.stdout + done.stderr
    assert int((project / "calls").read_text()) > 5
    found = entries(project / "out.json")
    assert set(found) == {"test_twice double", "test_twice sum", "test_theirs"}
    for name in ("test_twice double", "test_twice sum"):
        assert name in done.stdout
        info, stats = found[name]["extra_info"], found[name]["stats"]
        assert info["status"] == "timed" and info["median"] == pytest.approx(stats["median"])
        assert info["rounds"] == stats["rounds"] == len(stats["data"])
        assert info["gb_per_s"] == pytest.approx(8000 / info["median"] / 1e9)
        assert info["tflop_per_s"] == pytest.approx(1000 / info["median"] / 1e12)
        assert (info["floor_bytes"], info["floor_flops"]) == (8000, 1000)
        # What a CPU does not tell is not 0.
        unknown = ("peak_bytes", "cold", "called", "floor_share", "energy_j")
        assert [info[key] for key in unknown] == [None] * len(unknown)
    assert found["test_twice sum"]["extra_info"]["relative"] > 0


def test_cpu_is_timed_by_the_monotonic_clock(run: Run, project: Path) -> None:
    """The clock moves on by 1 ms a look: two calls a lap then, of half a millisecond each."""
    assert time.get_clock_info("perf_counter").monotonic
    (project / "conftest.py").write_text(CLOCK)
    done = run("--benchmark", "--benchmark-json=out.json", "-k", "twice")
    assert done.returncode == 0, done.stdout + done.stderr
    for entry in entries(project / "out.json").values():
        assert entry["extra_info"]["calls"] == 2
        assert entry["stats"]["data"] == pytest.approx([5e-4] * entry["stats"]["rounds"])


def test_saved_runs_are_compared_variant_by_variant(run: Run, project: Path) -> None:
    assert run("--benchmark", "--benchmark-save=one", "-k", "twice").returncode == 0
    [saved] = project.glob(".benchmarks/*/0001_one.json")
    assert set(entries(saved)) == {"test_twice double", "test_twice sum"}
    as_saved = saved.read_text()
    compare = ("--benchmark-compare=0001", "--benchmark-compare-fail=median:100%", "--benchmark-autosave")
    for factor, regressed in ((1e6, False), (1e-6, True)):  # the earlier run was much slower; much faster
        content = json.loads(as_saved)
        for entry in content["benchmarks"]:
            entry["stats"] |= {key: factor * entry["stats"][key] for key in ("median", "min", "max", "mean")}
        saved.write_text(json.dumps(content))
        done = run("--benchmark", *compare, "-k", "twice")
        assert ("Performance has regressed" in done.stdout + done.stderr) == regressed, done.stdout + done.stderr
        assert (done.returncode != 0) == regressed
        for name in ("test_twice double", "test_twice sum"):
            assert f"{name} (0001_one)" in done.stdout and f"{name} (NOW)" in done.stdout
    assert len(list(project.glob(".benchmarks/*/*.json"))) == 3


@pytest.mark.parametrize(
    ("ini", "words", "timed"),
    [
        ("", ["--benchmark-only"], True),
        ("", ["--benchmark-json=out.json"], True),
        ("--benchmark-disable", ["--benchmark"], True),
        ("--benchmark-skip", ["--benchmark"], True),
        ("", ["--benchmark", "--benchmark-disable"], False),
        ("--benchmark-disable", ["--benchmark-only", "--benchmark-enable"], True),
    ],
)
def test_options_mean_what_they_say(run: Run, project: Path, ini: str, words: list[str], timed: bool) -> None:
    (project / "pytest.ini").write_text(f"[pytest]\naddopts = {ini}\n")
    done = run(*words, "test_sample.py::test_twice")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    assert (int((project / "calls").read_text()) > 1) == timed
    assert ("test_twice double" in done.stdout) == timed


def test_benchmark_skip_skips_ours(run: Run) -> None:
    done = run("--benchmark-skip")
    assert "1 passed, 2 skipped" in done.stdout, done.stdout + done.stderr


def test_help_and_fixtures_tell_of_it(run: Run) -> None:
    shown = run("--help").stdout
    assert "  --benchmark  " in shown and "Run benchmarks alone, and time them" in shown
    assert "gpu_benchmark({name: callable, ...}" in run("--fixtures").stdout


def test_a_suite_without_benchmarks_is_left_alone(run: Run, project: Path) -> None:
    (project / "test_sample.py").write_text("""
import sys

def test_light():
    assert "fedmoe.profiling.plugin" in sys.modules
    assert not {"torch", "numpy", "rich"} & set(sys.modules)
""")
    done = run()
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    assert run("--benchmark").returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_a_suite_whose_own_option_has_that_name_keeps_it(run: Run, project: Path) -> None:
    (project / "conftest.py").write_text("""
def pytest_addoption(parser):
    parser.addoption("--benchmark", default="theirs")
""")
    (project / "test_sample.py").write_text("""
def test_option(request):
    assert request.config.getoption("--benchmark") == "given"
""")
    done = run("--benchmark", "given")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_without_pytest_benchmark(run: Run, project: Path) -> None:
    done = run("-p", "no:benchmark", "-rs", "-k", "not theirs")
    assert "1 passed, 1 skipped" in done.stdout and "needs pytest-benchmark: pip install" in done.stdout, done.stdout
    done = run("-p", "no:benchmark", "--benchmark")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip() == "ERROR: --benchmark needs pytest-benchmark: pip install pytest-benchmark"


def test_benchmarks_are_not_timed_side_by_side(run: Run) -> None:
    pytest.importorskip("xdist")
    done = run("--benchmark", "-n", "2")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert (
        done.stderr.strip() == "ERROR: --benchmark times one benchmark at a time: leave out --numprocesses and --dist"
    )


def test_whoever_names_it_as_well_gets_it_once(run: Run, project: Path) -> None:
    """A conftest, as this project's own; -p, as `fedmoe bench`; installed or not."""
    (project / "conftest.py").write_text(f"pytest_plugins = [{plugin.__name__!r}]\n")
    for words, as_installed in (([], True), (["-p", plugin.__name__], True), ([], False)):
        done = run("-k", "twice", *words, as_installed=as_installed)
        assert done.returncode == 0 and "1 passed, 2 deselected" in done.stdout, done.stdout + done.stderr
        assert "warning" not in done.stdout
