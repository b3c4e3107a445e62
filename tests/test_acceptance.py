"""The numbers to reach: every verdict, from invented rows on either side of the number; what is measured where."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedmoe import bench
from fedmoe.profiling import acceptance
from fedmoe.profiling.acceptance import BUDGET, GRAPHS, HEADS, LIMITS, LOOPS, TARGETS, Target, judged
from fedmoe.profiling.judging import Judge, Unmeasured, all_beaten, faster, outside, takes
from tests.support import ROOT

Seconds = dict[str, float]

SLOW: Seconds = dict.fromkeys([*LOOPS, *GRAPHS], 99.0)
CASES: list[tuple[str, str, Seconds, Seconds]] = [
    # what, number, seconds by variant that reach it, seconds that miss it
    (
        "vocabulary head",
        "1.10×",
        {"ours, step": 1.09, "three products, 2 chunks": 1.2, "three products, whole": 1.0},
        {"ours, step": 1.11, "three products, 2 chunks": 1.2, "three products, whole": 1.0},
    ),
    (
        "vocabulary head",
        "baseline",
        {"ours, step": 1.0, "three products, 2 chunks": 0.5, "three products, whole": 0.5, "Liger": 1.01, "CCE": 3},
        {"ours, step": 1.0, "three products, 2 chunks": 0.5, "three products, whole": 0.5, "Liger": 0.99, "CCE": 3},
    ),
    ("class head", "15× eager", {"ours, step, graph": 1, "eager": 15.1}, {"ours, step, graph": 1, "eager": 14.9}),
    ("class head", "6×", {"ours, step, graph": 1, "eager, graph": 6.1}, {"ours, step, graph": 1, "eager, graph": 5.9}),
    (
        "class head",
        "2×",
        {"ours, step, graph": 1, "compile, graph": 2.1},
        {"ours, step, graph": 1, "compile, graph": 1.9},
    ),
    ("class head", "9 µs", {"ours, step, graph": 8.9e-6}, {"ours, step, graph": 9.1e-6}),
    (
        "whole step: ",
        "6× an eager loop",
        SLOW | {"engine": 1, "engine, bf16": 2, "eager loop": 7, "eager loop, bf16": 6.1},
        SLOW | {"engine": 1, "engine, bf16": 2, "eager loop": 7, "eager loop, channels-last": 5.9},
    ),
    (
        "whole step: ",
        "under a graph",
        SLOW | {"engine": 2, "engine, bf16": 1, "eager loop, graph": 1.6, "eager loop, graph, bf16": 2},
        SLOW | {"engine": 2, "engine, bf16": 1, "eager loop, graph, channels-last, bf16": 1.4},
    ),
    (
        "whole step: ",
        "moonshot",
        SLOW | {"engine": 1, "engine, bf16": 2, "eager loop": 10.1, "eager loop, bf16": 11},
        SLOW | {"engine": 1, "engine, bf16": 2, "eager loop": 9.9, "eager loop, bf16": 11},
    ),
    (
        "in a cohort",
        "20×",
        SLOW | {"together": 2, "together, bf16": 1, "eager loop": 20.1, "eager loop, bf16": 30},
        SLOW | {"together": 2, "together, bf16": 1, "eager loop": 19.9, "eager loop, bf16": 30},
    ),
    (
        "the paper's",
        "60 s",
        {"start and first rounds, to an evaluation": 10.0, "rounds, to the next evaluation": 1.0},
        {"start and first rounds, to an evaluation": 11.1, "rounds, to the next evaluation": 1.0},
    ),
    (
        "large client",
        "3%",
        {"engine": 1.02, "transformers alone, autocast": 1, "transformers alone, all bf16": 1.5},
        {"engine": 1.02, "transformers alone, autocast": 1, "transformers alone, all bf16": 0.9},
    ),
    ("two streams", "1.6×", {"two streams": 1, "one stream": 1.61}, {"two streams": 1, "one stream": 1.59}),
    ("paging", "90%", {"ours": 1, "bare copies": 0.91}, {"ours": 1, "bare copies": 0.89}),
    (
        "paging",
        "2% of the round",
        {"in host memory": 1, "in device memory": 0.981},
        {"in host memory": 1, "in device memory": 0.979},
    ),
    (
        "start",
        "20 s",
        {"start to the end of a run of one step": 19.9},
        {"start to the end of a run of one step": 20.1},
    ),
    ("evaluation", "3×", {"evaluation": 1, "training": 3.1}, {"evaluation": 1, "training": 2.9}),
    (
        "checkpoint stall",
        "longer",
        {"a checkpoint every round": 1, "a checkpoint at the end": 0.991},
        {"a checkpoint every round": 1, "a checkpoint at the end": 0.989},
    ),
    (
        "checkpoint stall",
        "held up",
        {"held up by checkpoints": 0.0099, "a checkpoint every round": 1},
        {"held up by checkpoints": 0.0101, "a checkpoint every round": 1},
    ),
    ("bookkeeping", "3%", {"round": 1, "steps alone": 0.971}, {"round": 1, "steps alone": 0.969}),
    ("whole round", "0.95×", {"engine": 0.949, "plain loop": 1}, {"engine": 0.951, "plain loop": 1}),
    (
        "whole round",
        "1.00×",
        {"engine": 0.999, "plain loop, fused SGD": 1},
        {"engine": 1.001, "plain loop, fused SGD": 1},
    ),
    *(
        (
            f"averaging {size}",
            number,
            {"ours, native": 1, than: least + 0.01},
            {"ours, native": 1, than: least - 0.01},
        )
        for size in ("100 clients × 0.67 M", "100 clients × 11 M", "1000 clients × 0.67 M")
        for number, than, least in (("0.9×", "read", 0.9), ("1.4×", "torch loop", 1.4), ("2.3×", "NumPy", 2.3))
    ),
    *(
        (rule, "5×", {"ours, native": 1, "torch.sort": 5.01}, {"ours, native": 1, "torch.sort": 4.99})
        for rule in ("median of", "trimmed mean of")
    ),
]


def timed(variant: str, seconds: float | None, **more: Any) -> dict[str, Any]:
    """A row, with no noise."""
    known = {"median": seconds, "quartiles": (seconds, seconds), "called": None, "peak_bytes": None}
    known["called_quartiles"] = (more.get("called"), more.get("called"))
    return {"variant": variant, "status": "timed", "reason": "", **known, **more}


def ran(target: Target, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All benchmarks of the target's, each with these rows."""
    return [{"name": name, "outcome": "passed", "reason": "", "rows": rows} for name in target.benchmarks]


def device_of(target: Target) -> str:
    return "cpu" if target.on == "CPU" else "cuda"


def verdict(target: Target, benchmarks: list[dict[str, Any]], device: str = "") -> dict[str, Any]:
    """The target's own, among all."""
    made = judged(device or device_of(target), benchmarks)
    assert len(made) == len(TARGETS)
    return made[TARGETS.index(target)]


def found(what: str, number: str) -> Target:
    """The one target with these words."""
    [target] = [t for t in TARGETS if what in t.what and number in t.number]
    return target


@pytest.mark.parametrize(
    ("what", "number", "reaching", "missing"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_number_decides(what: str, number: str, reaching: Seconds, missing: Seconds) -> None:
    target = found(what, number)
    assert isinstance(target.judge, Judge) and set(target.judge.variants) <= set(reaching)
    for seconds, expected in ((reaching, "reached"), (missing, "not yet" if target.hoped else "missed")):
        benchmarks = ran(target, [timed(variant, taken) for variant, taken in seconds.items()])
        made = verdict(target, benchmarks)
        assert (made["verdict"], made["why"]) == (expected, ""), made
        assert re.match(r"-?\d", made["figure"])


def test_rate_decides() -> None:
    target = found("large client", "MFU")
    for rate, expected in ((495.0, "reached"), (494.0, "missed")):
        assert verdict(target, ran(target, [timed("engine", 1.0, tflop_per_s=rate)]))["verdict"] == expected
    unknown = verdict(target, ran(target, [timed("engine", 1.0, tflop_per_s=None)]))
    assert unknown["why"] == "engine: what is computed in a second is not known here"


def test_memory_decides() -> None:
    target = found("vocabulary head", "1.3 GB")
    for count, expected in ((1_300_000_000, "reached"), (1_300_000_001, "missed")):
        assert verdict(target, ran(target, [timed("ours, step", 1.0, peak_bytes=count)]))["verdict"] == expected
    assert verdict(target, ran(target, [timed("ours, step", 1.0)]))["why"] == "ours, step: its memory is not known here"


def test_every_judge_has_a_case() -> None:
    judges = {id(target) for target in TARGETS if isinstance(target.judge, Judge)}
    others = found("vocabulary head", "1.3 GB"), found("large client", "MFU")
    cases = {id(found(what, number)) for what, number, _, _ in CASES} | set(map(id, others))
    assert judges == cases


def test_worst_case_decides_and_is_named() -> None:
    target = found("class head", "15× eager")
    benchmarks = ran(target, [timed("ours, step, graph", 1.0), timed("eager", 20.0)])
    benchmarks[1]["rows"] = [timed("ours, step, graph", 1.0), timed("eager", 14.0)]
    made = verdict(target, benchmarks)
    assert made["verdict"] == "missed" and made["figure"].startswith("14.00×") and HEADS[1] in made["figure"]


def test_times_as_called_count_where_a_loop_is_compared() -> None:
    rows = {"a": timed("a", 1.0, called=2.0), "b": timed("b", 1.0, called=10.0)}
    assert faster(("a",), ("b",), 5.0).find({"x": rows}).reached
    assert not faster(("a",), ("b",), 5.0, "median").find({"x": rows}).reached


def test_noise_is_that_of_the_times_that_are_compared() -> None:
    called = {"called": 2.0, "called_quartiles": (1.4, 2.6)}
    rows = {"a": timed("a", 1.0, quartiles=(0.5, 1.5), **called), "b": timed("b", 8.0, quartiles=(8.0, 8.0))}
    assert faster(("a",), ("b",), 1.0).find({"x": rows}).figure == "4.00× ± 1.20 (a against b)"
    assert faster(("a",), ("b",), 1.0, "median").find({"x": rows}).figure == "8.00× ± 4.00 (a against b)"


def test_what_took_no_time_is_compared_with_nothing() -> None:
    rows = {"a": timed("a", 1.0, quartiles=(1.0, 1.0)), "none": timed("none", 0.0, quartiles=(0.0, 0.0))}
    assert takes(("none",), ("a",), 0.01).find({"x": rows}).figure == "0.00% ± 0.00% (none against a)"
    for judge in (takes(("a",), ("none",), 1.0), faster(("none",), ("a",), 1.0), outside("a", "none", 0.1)):
        with pytest.raises(Unmeasured, match=r"^none: no time passed by the clock$"):
            judge.find({"x": rows})


def test_noise_is_shown() -> None:
    rows = {"a": timed("a", 2.0, quartiles=(1.7, 2.3)), "b": timed("b", 1.0, quartiles=(0.8, 1.2))}
    assert takes(("a",), ("b",), 3.0).find({"x": rows}).figure == "2.000× ± 0.500 (a against b)"


def test_number_within_the_noise_is_told() -> None:
    rows = {"a": timed("a", 2.0, quartiles=(1.7, 2.3)), "b": timed("b", 1.0, quartiles=(0.8, 1.2))}
    for most, reached, close in ((1.4, False, False), (1.6, False, True), (2.4, True, True), (2.6, True, False)):
        found = takes(("a",), ("b",), most).find({"x": rows})
        assert (found.reached, found.close) == (reached, close)
    for least, reached, close in ((0.3, True, False), (0.4, True, True), (0.6, False, True), (0.7, False, False)):
        found = faster(("a",), ("b",), least).find({"x": rows})
        assert (found.reached, found.close) == (reached, close)
    rows["a"] = timed("a", 1.25, quartiles=(1.25, 1.25))  # 20% more than b, give or take 16
    for most, reached, close in ((0.03, False, False), (0.05, False, True), (0.35, True, True), (0.37, True, False)):
        found = outside("b", "a", most).find({"x": rows})
        assert (found.reached, found.close) == (reached, close)
    found = all_beaten("ours", ()).find({"x": {"ours": timed("ours", 0.9), "b": rows["b"]}})  # 1.11 times ± 0.22
    assert (found.reached, found.close) == (True, True)


def test_absent_baselines_are_listed_and_beat_nobody() -> None:
    target = found("vocabulary head", "baseline")
    rows = [timed("ours, step", 2.0), timed("Liger", 3.0, quartiles=(2.4, 3.6)), timed("CCE", None, status="absent")]
    made = verdict(target, ran(target, rows))
    assert made["verdict"] == "reached" and made["figure"] == "1.50× ± 0.30 the fastest, Liger; not there: CCE"
    assert verdict(target, ran(target, rows[:1]))["verdict"] == "not measured"


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        ({"outcome": "left out", "reason": "the time was up"}, "bookkeeping left out: the time was up"),
        ({"outcome": "failed", "reason": "boom"}, "bookkeeping failed: boom"),
        ({"rows": []}, "there is no variant 'steps alone'"),
        ({"rows": [timed("steps alone", 1.0)]}, "there is no variant 'round'"),
        ({"rows": [timed("round", 1.0)]}, "there is no variant 'steps alone'"),
    ],
)
def test_what_did_not_run_through_is_not_measured(spoilt: dict[str, Any], why: str) -> None:
    target = found("bookkeeping", "3%")
    [benchmark] = ran(target, [timed("round", 1.0), timed("steps alone", 0.99)])
    made = verdict(target, [benchmark | spoilt])
    assert (made["verdict"], made["figure"], made["why"]) == ("not measured", "", why)


def test_some_of_its_benchmarks_are_not_enough() -> None:
    target = found("class head", "15× eager")
    benchmarks = ran(target, [timed("ours, step, graph", 1.0), timed("eager", 20.0)])
    made = verdict(target, benchmarks[:-1])
    assert (made["verdict"], made["why"]) == ("not measured", f"{HEADS[-1]} was not run")


def test_variant_that_is_absent_says_why() -> None:
    target = found("averaging 100 clients × 11 M", "NumPy")
    row = {**timed("ours, native", None), "status": "absent", "reason": "the native extension is missing"}
    made = verdict(target, ran(target, [row, timed("NumPy", 1.0)]))
    assert (made["verdict"], made["why"]) == ("not measured", "ours, native: absent: the native extension is missing")


def test_what_counts_elsewhere_is_listed_with_the_reason() -> None:
    on_gpu, on_cpu = found("class head", "9 µs"), found("whole round", "0.95×")
    assert verdict(on_gpu, [], "cpu")["why"] == "not measurable here: needs a GPU"
    assert verdict(on_cpu, [], "cuda")["why"].startswith("not measurable here: needs a machine without a GPU")
    assert {made["verdict"] for made in judged("cpu", [])} == {"not measured"} and all(
        made["why"] for made in judged("cpu", [])
    )


def test_of_a_part_only_what_was_run_is_told() -> None:
    target = found("bookkeeping", "3%")
    [made] = judged("cpu", ran(target, [timed("round", 1.0), timed("steps alone", 0.99)]), partly=True)
    assert made["what"] == target.what


def test_benchmarks_of_each_device_are_those_that_count_there() -> None:
    for device, limits in LIMITS.items():
        assert set(limits) == {name for target in TARGETS if target.counts_on(device) for name in target.benchmarks}
        assert sum(limits.values()) <= BUDGET - 30  # for the start, and another after one that was ended
        assert all(isinstance(target.judge, Judge) == bool(target.benchmarks) for target in TARGETS)


@pytest.mark.parametrize("device", LIMITS)
def test_benchmarks_are_there_under_these_names(tmp_path: Path, device: str) -> None:
    """As pytest collects them where they are timed, on either kind of machine."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "pretend.py").write_text(
        f"from fedmoe.profiling import plugin\nplugin._gpu = lambda: {device == 'cuda'}\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "pretend", "--collect-only", "-q"]
    command += ["--benchmark", "tests/bench"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line.partition("::test_")[2] for line in done.stdout.splitlines() if "::test_" in line]
    assert len(names) == len(set(names))  # a name is all that tells benchmarks apart
    assert set(LIMITS[device]) <= set(names)


def test_command_writes_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pytest_benchmark")
    folder = tmp_path / "tests" / "bench"
    folder.mkdir(parents=True)
    (folder / "test_sample_one.py").write_text("""
def test_pair(gpu_benchmark):
    gpu_benchmark({"first": lambda: None, "second": lambda: None})

def test_other(gpu_benchmark):
    raise AssertionError("not one of the targets' benchmarks")
""")
    judges = {"slow enough": faster(("first",), ("second",), 0.0), "far too fast": faster(("first",), ("second",), 1e9)}
    targets = acceptance.about("a pair", "anywhere", ["pair"], *judges.items(), ("never | seen", "nobody | looks"))
    monkeypatch.setattr(acceptance, "TARGETS", targets)
    monkeypatch.setattr(acceptance, "LIMITS", {device: {"pair": 100.0} for device in LIMITS})
    as_json, markdown = tmp_path / "out.json", tmp_path / "out.md"
    assert bench.run("acceptance", "", as_json, markdown, tmp_path) == 0
    report = json.loads(as_json.read_text())
    assert [benchmark["name"] for benchmark in report["benchmarks"]] == ["pair"]
    verdicts = {target["number"]: target["verdict"] for target in report["targets"]}
    assert verdicts == {"slow enough": "reached", "far too fast": "missed", "never | seen": "not measured"}
    shown, page = capsys.readouterr().out, markdown.read_text()
    for word in ("reached", "missed", "not measured", report["targets"][0]["figure"]):
        assert word in shown and word in page
    assert "nobody | looks" in shown and "nobody \\| looks" in page
