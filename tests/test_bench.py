"""The benchmark instrument: how it times, on a simulated GPU too; what it refuses, and what `fedmoe bench` writes."""

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from fedmoe import bench, benchprocess
from fedmoe.benchtable import markdown
from fedmoe.errors import UsageError, UserError
from fedmoe.profiling import environment, timing
from fedmoe.profiling.bench import Absent, Bench, Floor, Unavailable, _row, attempt
from fedmoe.profiling.bench_selection import Selection
from fedmoe.profiling.plugin import PROPERTY
from fedmoe.profiling.timing import GAPS, DeviceWatch, Limits, Times, interleave, joules, memory, steady
from tests.support import ROOT

CPU = torch.device("cpu")
THREE = Limits(warm_seconds=0, seconds=0, min_rounds=3, max_rounds=3)

SAMPLE = """
import torch
from fedmoe.profiling.bench import Absent, Floor, sizes

@sizes("size", full=[4096], tiny=[3])
def test_good(gpu_benchmark, size):
    def missing():
        raise RuntimeError("no such | kernel")
    x = torch.ones(size)
    gpu_benchmark(
        {"first": lambda: x + x, "second": lambda: 2 * x, "third": Absent("not built"), "fourth": missing},
        floor=Floor(bytes=8 * size, flops=0, dtype=x.dtype),
        check=torch.testing.assert_close,
    )

def test_wrong(gpu_benchmark):
    def check(expected, actual):
        assert expected == actual, "not the same"
    gpu_benchmark({"first": lambda: 1, "ours": lambda: 2}, check=check)

def test_odd(gpu_benchmark):
    def check(expected, actual):
        assert expected == actual, "not the same"
    gpu_benchmark({"first": lambda: 1, "another": lambda: 2, "ours": lambda: 1}, check=check)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A project with one suite, `sample`, of a good and a wrong benchmark."""
    folder = tmp_path / "tests" / "bench"
    folder.mkdir(parents=True)
    (folder / "test_sample_one.py").write_text(SAMPLE)
    return tmp_path


def test_variants_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times, failed = interleave(calls, CPU, THREE)
    turns = [name for name, _ in itertools.groupby(order)]
    assert turns == ["a", "b", "c"] * 4  # once to see how long it takes, then three rounds
    assert not failed and [len(t.seconds) for t in times.values()] == [3, 3, 3]
    assert not any(t.called for t in times.values())


def test_variant_that_fails_later_is_named_and_others_go_on() -> None:
    left = [3]

    def tires() -> None:
        left[0] -= 1
        if not left[0]:
            raise MemoryError("out of it\nin many lines")

    times, failed = interleave({"tires": tires, "lasts": lambda: None}, CPU, THREE)
    assert failed == {"tires": "MemoryError: out of it"}
    assert list(times) == ["lasts"]


def test_steady() -> None:
    assert not steady([1.0] * 5)
    assert steady([9.0, 1.0, 1.0, 1.0, 1.01, 1.0, 1.0])
    assert not steady([2.0, 2.0, 2.0, 1.0, 1.0, 1.0])


def test_row_has_median_and_shares() -> None:
    times = Times(calls=7, seconds=[1.0, 2.0, 9.0], called=[3.0, 5.0, 4.0])
    floor = Floor(bytes=4 * 10**9, flops=6 * 10**12, dtype=torch.float32)
    row = _row("x", times, floor, (8e9, 6e12))  # the bytes take half a second, the FLOPs one
    assert (row.median, row.called, row.rounds, row.calls) == (2.0, 4.0, 3, 7)
    assert (row.gb_per_s, row.tflop_per_s, row.floor_share) == (2.0, 3.0, 0.5)
    assert _row("x", times, floor, None).floor_share is None
    assert _row("x", times, None, None).gb_per_s is None


def test_shares_are_of_the_time_with_a_cold_cache_where_that_is_known() -> None:
    """Bytes in the cache need no memory, so that with a hot one a share of the memory's bandwidth means nothing."""
    times = Times(calls=7, seconds=[1.0], called=[3.0], cold=[2.0, 4.0, 3.0])
    row = _row("x", times, Floor(bytes=6 * 10**9, flops=3 * 10**12, dtype=torch.float32), (8e9, 2e12))
    assert (row.median, row.cold) == (1.0, 3.0)
    assert (row.gb_per_s, row.tflop_per_s, row.floor_share) == (2.0, 1.0, 0.5)


def test_energy_is_that_of_many_calls() -> None:
    calls: list[None] = []
    used = joules(lambda: calls.append(None), 0.01, lambda: 3.0 * len(calls), CPU)
    assert len(calls) == 50 and used == 3.0
    joules(lambda: calls.append(None), 7.0, lambda: 0.0, CPU)
    assert len(calls) == 51


def test_memory_of_a_cpu_is_not_known() -> None:
    assert memory(lambda: torch.zeros(1000), CPU) is None


class Gpu:
    """A host and a GPU with clocks of their own: work that is queued begins when both are ready."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.device = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = gpu.device = max(gpu.host, gpu.device)

            def query(self) -> bool:
                return gpu.host >= self.at

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, other: "Event") -> float:
                return (other.at - self.at) * 1e3

        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.host))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(0, cycles / 2e9))
        self.cold = False  # whether what lies in the cache is of no use

    def wait(self) -> None:
        self.host = max(self.host, self.device)

    def launch(self, queueing: float, work: float) -> None:
        self.host += queueing
        self.device = max(self.host, self.device) + work

    def launch_reading(self, queueing: float, hot: float, cold: float) -> None:
        self.launch(queueing, cold if self.cold else hot)
        self.cold = False

    def overwrite(self) -> None:
        self.launch(5e-6, 25e-6)
        self.cold = True


def test_gaps_of_a_starved_gpu_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    watch = DeviceWatch(lambda: gpu.launch(100e-6, 20e-6))
    watch.lap()
    assert watch.times.seconds == pytest.approx([20e-6])
    assert watch.times.called == pytest.approx([101e-6], rel=0.01)  # the last one's work is not hidden
    assert watch.times.note == ""


def test_calls_with_a_cold_cache_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    watch = DeviceWatch(lambda: gpu.launch_reading(100e-6, 20e-6, 70e-6), gpu.overwrite)
    watch.lap()
    assert watch.times.calls > 1
    assert watch.times.seconds == pytest.approx([20e-6])
    assert watch.times.cold == pytest.approx([70e-6])  # neither the overwriting nor the host's gaps
    assert watch.times.note == ""


def test_cold_lap_whose_host_falters_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, stalls = Gpu(monkeypatch), iter([0.0, 1.0])
    watch = DeviceWatch(lambda: gpu.launch(100e-6, 20e-6), lambda: gpu.launch(next(stalls, 0.0), 25e-6))
    watch.lap()
    assert watch.times.cold == []
    watch.lap()
    assert watch.times.cold == pytest.approx([20e-6])


def test_long_calls_have_no_cold_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    watch = DeviceWatch(lambda: gpu.launch(100e-6, 3e-3), gpu.overwrite)
    watch.lap()
    assert watch.times.calls == 1 and watch.times.cold == []


def test_host_that_falters_is_given_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, stalls = Gpu(monkeypatch), iter([0.0, 20e-3])  # the first call of the first lap stalls
    watch = DeviceWatch(lambda: gpu.launch(100e-6 + next(stalls, 5e-3), 20e-6))
    calls = watch.times.calls
    watch.lap()
    assert watch.times.seconds == pytest.approx([20e-6])
    assert watch.times.calls == calls and watch.times.note == ""


def test_variant_that_waits_for_the_gpu_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)

    def reads_back() -> None:
        gpu.launch(100e-6, 20e-6)
        gpu.wait()

    watch = DeviceWatch(reads_back)
    watch.lap()
    assert watch.times.note == GAPS
    assert watch.times.seconds == pytest.approx([120e-6])


class Fixture:
    """As much of pytest-benchmark's as is used."""

    name, fullname, group, extra_info = "test_made", "file::test_made", None, None

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def _make_stats(self, iterations: int) -> Any:
        entry = SimpleNamespace(name=self.name, fullname=self.fullname, extra_info=self.extra_info, seconds=[])
        entry.update = entry.seconds.append
        self.entries.append(entry)
        return entry


def made(timed: bool = False, fixture: Any = None, **more: Any) -> tuple[Bench, list[Any]]:
    told: list[Any] = []
    node: Any = SimpleNamespace(user_properties=told, name="test_made", nodeid="file::test_made")
    return Bench(fixture or SimpleNamespace(), node, timed, **more), told


def test_ordinary_tests_time_nothing() -> None:
    ours, told = made()
    count: list[int] = []
    rows = ours({"once": lambda: count.append(1), "absent": Absent("why")})
    assert count == [1]
    assert [(row.status, row.median, row.peak_bytes) for row in rows] == [("ran", None, None), ("absent", None, None)]
    assert [name for name, _ in told] == [PROPERTY]


def test_ordinary_tests_fail_with_a_variant_that_raises() -> None:
    ours, told = made()
    with pytest.raises(ZeroDivisionError):
        ours({"breaks": lambda: 1 / 0})
    assert told[0][1][0]["reason"] == "ZeroDivisionError: division by zero"


def test_times_that_a_benchmark_took_itself_become_rows_and_entries() -> None:
    fixture = Fixture()
    ours, told = made(True, fixture)
    rows = ours.record({"slow": [4.0, 6.0, 5.0], "absent": Absent("why"), "fast": [1.0]})
    assert [(row.status, row.median, row.relative) for row in rows] == [
        ("timed", 5.0, 1.0),
        ("absent", None, None),
        ("timed", 1.0, 0.2),
    ]
    assert [row["variant"] for row in told[0][1]] == ["slow", "absent", "fast"]
    entries = [(entry.name, entry.fullname, entry.seconds) for entry in fixture.entries]
    assert entries == [
        ("test_made slow", "file::test_made slow", [4.0, 6.0, 5.0]),
        ("test_made fast", "file::test_made fast", [1.0]),
    ]
    assert fixture.entries[1].extra_info["relative"] == 0.2 and fixture.fullname == "file::test_made"
    plain, _ = made(False)
    assert [row.status for row in plain.record({"slow": []})] == ["ran"]


def test_calls_in_one_test_add_up() -> None:
    ours, told = made(True, Fixture())
    ours.record({"a": [1.0]})
    ours.record({"b": [2.0, 4.0]})
    assert [(name, [row["variant"] for row in rows]) for name, rows in told] == [(PROPERTY, ["a", "b"])]
    with pytest.raises(ValueError, match=r"^variant 'b' was given in an earlier call of the same test: name it "):
        ours.record({"c": [1.0], "b": [3.0]})


def test_no_time_at_all_is_shown_as_that() -> None:
    """A clock may not have moved: nothing is divided by that, and no rate is made up."""
    rows = made(True, Fixture())[0].record({"nothing": [0.0, 0.0], "one": [1.0]})
    assert [(row.median, row.relative) for row in rows] == [(0.0, None), (1.0, None)]
    floor = Floor(bytes=8, flops=8, dtype=torch.float32)
    row = _row("nothing", Times(seconds=[0.0]), floor, (1.0, 1.0))
    assert (row.gb_per_s, row.tflop_per_s, row.floor_share) == (None, None, None)
    report = {"suite": "s", "device": "cpu", "benchmarks": [{"name": "n", "outcome": "passed", "rows": [asdict(row)]}]}
    assert "| nothing | 0 ns |" in markdown(report)


def test_energy_of_each_variant_where_there_is_a_meter() -> None:
    used = [0.0]

    def costs(joules: float) -> Any:
        return lambda: used.__setitem__(0, used[0] + joules)

    fixture = Fixture()
    ours, _ = made(True, fixture, meter=lambda: used[0])
    rows = ours({"dear": costs(3.0), "cheap": costs(0.5)})
    assert [row.energy_j for row in rows] == [pytest.approx(3.0), pytest.approx(0.5)]
    assert [entry.extra_info["energy_j"] for entry in fixture.entries] == [row.energy_j for row in rows]
    assert [row.energy_j for row in made(True, Fixture())[0]({"dear": costs(3.0)})] == [None]


@pytest.mark.parametrize(("timed", "astray"), [(True, "ours, astray"), (False, "ours, astray"), (False, "another")])
def test_variant_that_differs_fails_before_anything_is_timed(timed: bool, astray: str) -> None:
    ours, told = made(timed)  # timing would need more of pytest-benchmark than there is here

    def check(expected: int, actual: int) -> None:
        assert expected == actual, "not the same"

    with pytest.raises(AssertionError, match=f"^{astray} differs from reference: AssertionError: not the same"):
        ours({"yardstick": lambda: None, "reference": lambda: 1, astray: lambda: 2}, check=check)
    assert [row["status"] for row in told[0][1]] == ["ran", "ran", "wrong"]


def test_variant_of_others_that_differs_is_timed_with_a_note(checkout: Path) -> None:
    """Some leave work out on purpose, which is no fault of ours and not a reason to know nothing."""
    pytest.importorskip("pytest_benchmark")
    assert bench.run("sample", "odd", checkout / "out.json", None, checkout) == 0
    [benchmark] = json.loads((checkout / "out.json").read_text())["benchmarks"]
    rows = {row["variant"]: row for row in benchmark["rows"]}
    assert {row["status"] for row in rows.values()} == {"timed"}
    assert "differs from first: AssertionError: not the same" in rows["another"]["note"]
    assert "differs" not in rows["ours"]["note"] + rows["first"]["note"]


def test_attempt_says_why_not() -> None:
    def unavailable() -> Any:
        raise Unavailable("needs a GPU")

    def broken() -> Any:
        raise ImportError("no library")

    assert attempt(unavailable) == Absent("needs a GPU")
    assert attempt(broken) == Absent("ImportError: no library")


def test_command_names_every_variant_everywhere(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pytest_benchmark")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--benchmark-skip")  # what a user has set for other tests
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    as_json, markdown = checkout / "out.json", checkout / "out.md"
    assert bench.run("sample", "good", as_json, markdown, checkout) == 0
    report = json.loads(as_json.read_text())
    assert {"gpu", "driver", "power_limit", "cuda", "cublas", "torch", "liger-kernel", "commit", "cpu"} <= set(
        report["environment"]
    )
    assert report["environment"]["torch"] == torch.__version__
    [benchmark] = report["benchmarks"]
    rows = {row["variant"]: row for row in benchmark["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "first": "timed",
        "second": "timed",
        "third": "absent",
        "fourth": "failed",
    }
    assert rows["first"]["relative"] == 1 and rows["second"]["median"] > 0
    if not torch.cuda.is_available():
        assert report["device"] == "cpu" and benchmark["name"] == "good[3]"
        assert rows["first"]["peak_bytes"] is None and rows["first"]["called"] is None
    shown, page = capsys.readouterr().out, markdown.read_text()
    for word in (*rows, "absent: not built", "failed: RuntimeError: no such"):
        assert word in shown and word in page
    assert "no such | kernel" in shown and "no such \\| kernel" in page


def test_command_fails_with_a_wrong_variant(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pytest_benchmark")
    with pytest.raises(UserError, match=r"^1 of 3 benchmarks failed: wrong: AssertionError: ours differs from first"):
        bench.run(None, "", None, None, checkout)
    assert "wrong: differs from first: AssertionError: not the same" in capsys.readouterr().out


BOTH = ("cpu", "cuda")


def ended(checkout: Path, selection: Selection) -> dict[str, dict[str, Any]]:
    """What became of each benchmark of the sample."""
    files = [checkout / "tests" / "bench" / "test_sample_one.py"]
    told = [event for event in benchprocess.events(checkout, files, selection) if event["event"] == "end"]
    assert len(told) == len({event["name"] for event in told})
    return {event["name"]: event for event in told}


def test_benchmark_beyond_its_limit_is_left_out_and_others_go_on(checkout: Path) -> None:
    """Ended with all it has started, and what it has measured is not shown."""
    pytest.importorskip("pytest_benchmark")
    (checkout / "tests" / "bench" / "test_sample_one.py").write_text(f"""{SAMPLE}
import pathlib, subprocess
def test_endless(gpu_benchmark):
    gpu_benchmark({{"quick": lambda: 1}})
    child = subprocess.Popen(["sleep", "600"])
    pathlib.Path("child.pid").write_text(str(child.pid))
    child.wait()
""")
    limits = {"endless": 5.0, "odd": 1000.0}
    outcomes = ended(checkout, Selection(limits=dict.fromkeys(BOTH, limits)))
    assert {name: event["outcome"] for name, event in outcomes.items()} == {"endless": "left out", "odd": "passed"}
    assert outcomes["endless"]["reason"] == "not done within its limit of 5 s" and outcomes["endless"]["rows"] == []
    state = Path(f"/proc/{(checkout / 'child.pid').read_text()}/stat")
    for _ in range(100):  # until the signal has come through; who buries it is not our business
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the benchmark had started still runs")


def test_benchmark_that_ends_its_process_has_failed_and_others_go_on(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pytest_benchmark")
    (checkout / "tests" / "bench" / "test_sample_one.py").write_text("""
import os, signal
def test_before(gpu_benchmark):
    gpu_benchmark({"quick": lambda: 1})
def test_fatal(gpu_benchmark):
    os.kill(os.getpid(), signal.SIGSEGV)
def test_silent(gpu_benchmark):
    os._exit(0)
def test_after(gpu_benchmark):
    gpu_benchmark({"quick": lambda: 1})
""")
    unread = "tests/bench/test_sample_two.py"
    (checkout / unread).write_text("import nothing_of_that_name")
    with pytest.raises(UserError, match=r"^3 of 5 benchmarks failed: "):
        bench.run(None, "", checkout / "report.json", None, checkout)
    report = json.loads((checkout / "report.json").read_text())
    told = [(b["name"], b["outcome"], [row["status"] for row in b["rows"]]) for b in report["benchmarks"]]
    assert told == [
        (unread, "failed", []),
        ("before", "passed", ["timed"]),
        ("fatal", "failed", []),
        ("silent", "failed", []),
        ("after", "passed", ["timed"]),
    ]
    reasons = [b["reason"] for b in report["benchmarks"]]
    assert reasons[2].startswith("pytest was ended by SIGSEGV: ")
    assert reasons[3] == "pytest ended with code 0 before it was done"
    assert "quick" in capsys.readouterr().out


def test_process_that_ends_between_benchmarks_costs_the_one_before() -> None:
    """Which was being torn down; and where none had begun, all: another process would fare no better."""
    watch = benchprocess._Watch(Selection())
    watch.hear({"event": "environment", "device": "cpu"})
    watch.hear({"event": "collected", "chosen": ["a", "b", "c"]})
    watch.hear({"event": "begin", "name": "a"})
    watch.hear({"event": "end", "name": "a"})
    assert [event["name"] for event in watch.died("")] == ["a"] and watch.left() == ["b", "c"]
    watch.again()
    assert [event["name"] for event in watch.died("")] == ["b", "c"] and watch.left() == []


def test_benchmark_that_may_need_more_than_is_left_does_not_begin(checkout: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    limits = {"wrong": 10_000.0, "odd": 100.0}
    outcomes = ended(checkout, Selection(limits=dict.fromkeys(BOTH, limits), ends=time.monotonic() + 5000))
    assert {name: event["outcome"] for name, event in outcomes.items()} == {"wrong": "left out", "odd": "passed"}
    assert re.match(r"it may take 10000 s, of the time there are \d+ s left$", outcomes["wrong"]["reason"])


def test_time_that_is_up_before_anything_began_is_one_line(checkout: Path) -> None:
    with pytest.raises(UserError, match=r"^the time was up before the first benchmark: give --budget-seconds more$"):
        ended(checkout, Selection(ends=time.monotonic()))


def test_time_that_is_up_leaves_out_what_runs_and_what_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(benchprocess, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    watch = benchprocess._Watch(Selection(limits={"cpu": {"a": 50, "b": 70, "c": 10}}, ends=200.0))
    assert watch.until == 200
    assert watch.hear({"event": "environment", "device": "cpu"})
    assert watch.hear({"event": "collected", "chosen": ["a", "b", "c"]})
    watch.hear({"event": "begin", "name": "a"})
    assert watch.until == 150  # its own limit comes first
    watch.hear({"event": "end", "name": "a"})
    assert watch.until == 200
    clock[0] = 140.0
    watch.hear({"event": "begin", "name": "b"})
    assert watch.until == 200
    assert not watch.hear({"event": "collected", "chosen": ["b", "c"]})  # another process, for what is left
    clock[0] = 200.0
    assert [(event["name"], event["outcome"], event["reason"]) for event in watch.late()] == [
        ("b", "left out", "the time was up before it was done"),
        ("c", "left out", "the time was up before it began"),
    ]


def test_command_names_a_file_that_cannot_be_read(checkout: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    (checkout / "tests" / "bench" / "test_sample_one.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match=r"test_sample_one\.py: .*No module named 'nothing_of_that_name'"):
        bench.run("sample", "", None, None, checkout)


def test_what_cannot_be_run_is_one_line(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"^unknown suite 'samples', expected one of: sample, acceptance$"):
        bench.run("samples", "", None, None, checkout)
    with pytest.raises(UserError, match=r"^there are no benchmarks in .*works in a checkout, not from a wheel$"):
        bench.run("sample", "", None, None, tmp_path_factory.mktemp("wheel"))
    with pytest.raises(UserError, match=r"nowhere does not exist$"):
        bench.run("sample", "", checkout / "nowhere" / "out.json", None, checkout)
    with pytest.raises(UserError, match=r"is a folder, expected the name of a file$"):
        bench.run("sample", "", None, checkout, checkout)
    with pytest.raises(UsageError, match=r"^--budget-seconds is 0, must be more than 0 and at most 86400, a day$"):
        bench.run("sample", "", None, None, checkout, budget=0)
    with monkeypatch.context() as patched:
        patched.setattr(benchprocess, "PYTEST", [*benchprocess.PYTEST, "--no-such-option"])
        with pytest.raises(UserError, match=r"code 4: .*error: unrecognized arguments: --no-such-option$"):
            bench.run("sample", "", None, None, checkout)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^fedmoe bench needs pytest-benchmark: pip install --editable '.\[bench\]'$"):
        bench.run("sample", "", None, None, checkout)


def test_the_table_is_shown_even_if_files_cannot_be_written(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    report = {"benchmarks": [], "device": "cpu", "environment": {"torch": "2.13"}}
    monkeypatch.setattr(bench, "_collect", lambda *_: report)
    monkeypatch.setattr(bench, "write_atomic", full)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(OSError, match="No space left"):
        bench.run("sample", "", checkout / "out.json", None, checkout)
    assert "torch 2.13" in capsys.readouterr().out


def test_environment_has_what_the_device_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*command: str) -> str | None:
        return "580.1, 700.00 W, 1980 MHz, 3201 MHz, [N/A]" if command[0] == "nvidia-smi" else None

    monkeypatch.setattr(environment, "_said", said)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    facts = environment.environment(ROOT)
    assert (facts["driver"], facts["power_limit"]) == ("580.1", "700.00 W")
    assert (facts["max_sm_clock"], facts["max_memory_clock"], facts["set_sm_clock"]) == ("1980 MHz", "3201 MHz", None)
    monkeypatch.setattr(environment, "_said", lambda *_: None)
    assert environment.environment(ROOT)["power_limit"] is None


def test_without_pytest_benchmark_they_are_skipped() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "tests/bench/test_kernels_mix.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout and "needs pytest-benchmark" in done.stdout


def test_our_variants_in_the_interpreter(tmp_path: Path) -> None:
    """On a CPU they are absent otherwise, and mistakes in how they are called would wait for a GPU."""
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("triton")
    files = sorted((ROOT / "tests" / "bench").glob("test_kernels_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={tmp_path / 'out.xml'}"]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, files)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    told = ElementTree.parse(tmp_path / "out.xml").iterfind(f".//property[@name='{PROPERTY}']")
    benchmarks = [ast.literal_eval(property.attrib["value"]) for property in told]
    assert len(benchmarks) >= len(files) > 3
    for rows in benchmarks:
        status = {row["variant"]: row["status"] for row in rows if "graph" not in row["variant"]}
        assert "ours" in status
        assert all(is_ == "ran" for name, is_ in status.items() if name.startswith("ours")), status
