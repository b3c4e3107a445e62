"""The pytest plugin: `pytest --benchmark`, and the `gpu_benchmark` fixture for anybody's tests.

Installed, it is loaded by every pytest of the environment, so it imports no torch before a benchmark asks for it. A
checkout that is not installed names it in a conftest: the name of its entry point is the module's, so that pytest
registers it once whichever comes first. It holds no assertions, hence PYTEST_DONT_REWRITE.
"""

from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fedmoe.profiling.bench import Bench

PROPERTY = "gpu_benchmark"
"""The name under which a test's report carries its rows, as dictionaries, to whoever listens to pytest."""
SIZES = "_benchmark_sizes"
"""The attribute of a test function that holds what `fedmoe.profiling.bench.sizes` was given."""
OPTION = "benchmark_run"
"""Where the value of `--benchmark` is."""
ASKING = (
    OPTION,
    *(f"benchmark_{name}" for name in ("only", "enable", "save", "autosave", "json", "compare", "histogram")),
)
"""Options that ask for times."""


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(parser: pytest.Parser) -> Generator[None]:
    """Add the option after conftests have added theirs."""
    yield
    add_option(parser)


def add_option(parser: pytest.Parser) -> None:
    """Add `--benchmark` to what pytest-benchmark has, unless a project's own option is called that.

    A conftest that names this plugin calls it; elsewhere the plugin does.
    """
    groups = (parser._anonymous, *parser._groups)
    if "--benchmark" in {name for group in groups for option in group.options for name in option.names()}:
        return
    parser.getgroup("benchmark").addoption(
        "--benchmark",
        action="store_true",
        default=False,
        dest=OPTION,
        help="Run benchmarks alone, and time them: all tests that use the fixture gpu_benchmark or benchmark. Wins "
        "over a --benchmark-disable or --benchmark-skip of the configuration.",
    )


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark, and conftests that disable it, read the options after this
def pytest_configure(config: pytest.Config) -> None:
    """Turn timing on where `--benchmark` asks for it."""
    if not config.getoption(OPTION, False):
        return
    if not _available(config):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install pytest-benchmark")
    if config.getoption("dist", "no") != "no":
        raise pytest.UsageError("--benchmark times one benchmark at a time: leave out --numprocesses and --dist")
    said = config.invocation_params.args  # without what the configuration adds
    config.option.benchmark_enable = "--benchmark-disable" not in said
    config.option.benchmark_skip = "--benchmark-skip" in said


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Hand out what `sizes` was given."""
    if given := getattr(metafunc.function, "__dict__", {}).get(SIZES):
        names, full, tiny = given
        metafunc.parametrize(names, full if timed(metafunc.config) and _gpu() else tiny)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have pytest-benchmark take our benchmarks for its own, and leave nothing else under `--benchmark`."""
    for item in items if _available(config) else []:
        names = getattr(item, "fixturenames", [])
        if "gpu_benchmark" in names and "benchmark" not in names:
            names.append("benchmark")
    if config.getoption(OPTION, False):
        chosen: dict[bool, list[pytest.Item]] = {True: [], False: []}
        for item in items:
            chosen["benchmark" in getattr(item, "fixturenames", [])].append(item)
        config.hook.pytest_deselected(items=chosen[False])
        items[:] = chosen[True]


@pytest.fixture
def gpu_benchmark(request: pytest.FixtureRequest) -> "Bench":
    """Compare variants of one piece of work: `gpu_benchmark({name: callable, ...}, floor=..., check=...)`.

    `floor` is a `fedmoe.profiling.bench.Floor`: bytes and FLOPs that the work cannot do without. `check(first, other)`
    raises AssertionError where a variant's result differs from the first one's. Variants are called once, and timed in
    turns if that is asked for, as by `--benchmark`: on a GPU by events, with hot and cold L2 cache, else by the host's
    monotonic clock. Each becomes an entry of pytest-benchmark's, with memory, GB/s, TFLOP/s and share of the floor in
    `extra_info`. See `fedmoe.profiling.bench.Bench`.
    """
    if not _available(request.config):
        pytest.skip("needs pytest-benchmark: pip install pytest-benchmark")
    from fedmoe.profiling.bench import Bench, energy

    benchmark = request.getfixturevalue("benchmark")
    return Bench(benchmark, request.node, timed(request.config) and benchmark.enabled, energy())


def asked(config: pytest.Config) -> bool:
    """Whether an option asks for times; without one, benchmarks run once, to see that they work."""
    return any(config.getoption(name, None) for name in ASKING)


def timed(config: pytest.Config) -> bool:
    """Whether benchmarks are to be timed."""
    disabled = config.getoption("benchmark_disable", True) and not config.getoption("benchmark_enable", False)
    return asked(config) and not disabled


def _available(config: pytest.Config) -> bool:
    """Whether pytest-benchmark is there, and not turned off."""
    return hasattr(config.option, "benchmark_timer")  # which nobody else sets


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()
