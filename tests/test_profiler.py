"""`fedmoe profile`: what it measures adds up, and what is wrong with a run it says, and with no other."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe import profiler
from fedmoe.config import Config
from fedmoe.engine.samples import Loader
from fedmoe.engine.store import Store
from fedmoe.errors import UserError
from fedmoe.profiling import findings, probe, profile
from fedmoe.profiling.profile import BatchSize, DeviceUse, Profile, Range, Round, Transfers
from fedmoe.profiling.roofline import Ceilings
from fedmoe.profiling.spans import Recorder, Span
from tests.support import changed


@pytest.fixture
def small(config: Config) -> Config:
    return changed(config, run={"threads": 1, "device": "cpu"}, federation={"fraction": 0.6}, data={"limit": 400})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The roof takes seconds, and how high it is matters to no test here."""
    monkeypatch.setattr(profiler, "measured", lambda device, dtype: Ceilings(2e10, 5e10))


def profiled(config: Config, folder: Path, rounds: int = 2) -> dict[str, Any]:
    profiler.run(config, rounds, 1, folder, False)
    return dict(json.loads((folder / "profile.json").read_text()))


def names(found: dict[str, Any]) -> list[str]:
    return [finding["name"] for finding in found["findings"]]


def test_times_by_range_add_up_to_the_rounds(small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out [b]"  # what looks like markup is a name
    found = profiled(small, out)
    assert sum(r["seconds"] for r in found["ranges"]) == pytest.approx(sum(found["observed_seconds"]), rel=0.02)
    assert sum(r["share"] for r in found["ranges"]) == pytest.approx(1)
    counts = {r["phase"]: r["count"] for r in found["ranges"]}
    assert counts["round"] == 2 and counts["transfer out"] == 6
    assert counts["optimizer"] == counts["backward"] == len(found["steps"])
    assert len(found["rounds"]) == 2 and found["rounds"][0]["samples"] == 16 * len(found["steps"]) / 2
    assert found["samples_per_second"] > 0 and found["flops_per_second"] > 0
    assert found["step_seconds"]["p50"] <= found["step_seconds"]["p95"]
    assert found["device"] is None and found["notes"] == []
    assert found["config"]["training.batch_size"] == 16 and found["plan"]["device"] == "cpu"
    kinds = {(m["what"], m["where"]): m["bytes"] for m in found["memory"]}
    assert all(kinds.values()) and len(kinds) == 5
    assert {o["name"] for o in found["operators"]} >= {"convolution", "convolution_backward", "addmm"}
    assert found["meters"]["memory_resident"]["max"] > 1e8 and found["meters"]["cpu_time"]["increase"] > 0
    assert "cpu_energy" in found["missing"] or found["energy"][0]["joules_a_round"] > 0
    assert "gpu_power" not in found["meters"] | found["missing"]
    said = capsys.readouterr().out
    assert "backward" in said and "samples/s" in said and f"written to {out}" in said.replace("\n", " ")
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert sum(e["name"] == "round" for e in events) == 2
    assert any(e["name"] == "memory_resident" for e in events)
    page = (out / "profile.html").read_text()
    assert "convolution_<wbr>backward" in page and 'id="plot-timeline"' in page and "<h3>memory resident" in page
    assert {path.name for path in tmp_path.iterdir()} == {out.name}  # what was measured in is gone


def test_states_that_go_to_files_are_counted(small: Config, tmp_path: Path) -> None:
    found = profiled(changed(small, engine={"host_memory_mb": 1}), tmp_path / "out")
    moved = found["transfers"]["bytes"]
    assert moved["file in"] > 0 and moved["file out"] > 0
    assert ("clients' optimizer state", "files") in {(m["what"], m["where"]) for m in found["memory"]}


def test_a_slow_data_path_is_named(small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "data" not in names(profiled(small, tmp_path / "as it is"))
    batch = Loader.batch

    def slow(self: Loader, *given: Any) -> Any:
        time.sleep(0.02)
        return batch(self, *given)

    monkeypatch.setattr(Loader, "batch", slow)
    found = profiled(small, tmp_path / "slow")
    (finding,) = [f for f in found["findings"] if f["name"] == "data"]
    assert finding["figures"]["share"] >= 0.02 * len(found["steps"]) / sum(found["observed_seconds"])
    assert finding["text"].startswith(f"{finding['figures']['share']:.0%} of the round is making batches")


def test_a_blocked_transfer_is_named(small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Store.load

    def blocked(self: Store, *given: Any) -> Any:
        time.sleep(0.1)
        return load(self, *given)

    monkeypatch.setattr(Store, "load", blocked)
    found = profiled(small, tmp_path / "out")
    assert names(found)[0] == "transfer"
    # Three clients train in each of two rounds, and five are evaluated.
    assert found["findings"][0]["figures"]["share"] >= 16 * 0.1 / sum(found["observed_seconds"])


def test_a_tiny_batch_is_named(small: Config, tmp_path: Path) -> None:
    found = profiled(changed(small, training={"batch_size": 1}), tmp_path / "out", rounds=1)
    (finding,) = [f for f in found["findings"] if f["name"] == "batch"]
    assert finding["figures"]["size"] == 1 and finding["figures"]["gain"] > 1.5
    assert "raise training.batch_size" in finding["text"]


def test_a_capture_among_observed_steps_hides_nothing() -> None:
    """What is heard inside of a step that is replayed otherwise is the capture's, and counts as the step's."""
    replayed, eager = Recorder(torch.device("cpu")), Recorder(torch.device("cpu"))
    replayed.spans = [Span("step", 0, (), 0.0, 4.0), Span("backward", 0, ("step",), 1.0, 2.0)]
    replayed.exclusive |= {"step": 3.0, "backward": 1.0}
    eager.spans = [Span("backward", 0, ("step",), 0.0, 1.0, 1, (0.0, 2.0))] * 3
    found = {r.phase: (r.count, r.seconds, r.device_seconds, r.source) for r in profile.ranges(replayed, eager)}
    assert found == {"step": (1, 4.0, None, "host"), "backward": (3, 0.0, 6.0, "uncaptured")}


def test_waiting_for_transfers_is_what_no_step_covers() -> None:
    recorder = Recorder(torch.device("cpu"))
    recorder.spans = [
        Span("transfer in", 0, (), 0.0, 4.0), Span("transfer in", 1, (), 2.0, 6.0), Span("step", 1, (), 5.0, 9.0),
        Span("copy", 0, (), 0.0, 8.0),
    ]  # fmt: skip
    assert profile.transfers(recorder, {"host in": 3}, 0.5) == Transfers({"host in": 3}, 5.0, 8.0, 0.5)


def test_rounds_come_in_pairs_that_are_evaluated_alike(small: Config, tmp_path: Path) -> None:
    found = profiled(changed(small, evaluation={"every": 2}), tmp_path / "out", rounds=3)
    assert [r["evaluated"] for r in found["rounds"]] == [False, True, True]
    assert {r["phase"]: r["count"] for r in found["ranges"]}["evaluation"] == 2 * 5
    assert "a run is evaluated every 2 rounds; of these 3, 2 were" in found["notes"]
    assert found["config"]["evaluation.every"] == 2 and found["config"]["federation.rounds"] == small.federation.rounds


def test_what_stops_it_leaves_nothing_behind(small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    with pytest.raises(UserError):
        profiler.run(changed(small, data={"name": "/nowhere/at/all"}), 1, 0, tmp_path / "out", False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(probe, "operators", interrupted)
        profiler.run(small, 1, 0, tmp_path / "out", False)
    assert not list(tmp_path.iterdir())

    def short(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(probe, "operators", short)
    found = profiled(small, tmp_path / "out", rounds=1)
    assert found["operators"] == [] and found["notes"] == [
        "device memory did not suffice to look at operators and batch sizes"
    ]


def test_probing_changes_no_client(small: Config, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    with profiler.subject(small, tmp_path / "run") as made:
        made.round()
        before = {client: made.engine.store.read(client) for client in made.engine.site.roster}
        kinds = probe.architectures(made.engine)
        assert list(kinds) == [f"cnn-{number}" for number in range(1, 6)]
        probe.operators(made.engine, list(kinds.values()))
        sizes = probe.batch_sizes(made.engine, 0, (1, 2))
        assert [size.size for size in sizes] == [16, 32] and all(size.rate > 0 for size in sizes)
        assert all(torch.equal(made.engine.store.read(client), block) for client, block in before.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_wrong_is_one_line(small: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only the engine tells what it does"):
        profiler.run(changed(small, engine={"kind": "reference"}), 1, 0, tmp_path / "out", False)
    with pytest.raises(UserError, match="--rounds is 0 and --warmup 1"):
        profiler.run(small, 0, 1, tmp_path / "out", False)
    with pytest.raises(UserError, match="--memory-snapshot is of a GPU's memory, and the run is on a CPU"):
        profiler.run(small, 1, 0, tmp_path / "out", False, True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    with pytest.raises(UserError, match="exists and is not an empty folder: choose another --out"):
        profiler.run(small, 1, 0, tmp_path / "full", False)


def invented(**changes: Any) -> Profile:
    """A run on a GPU with nothing to say of it."""
    made = Profile(
        title="", environment={}, plan={"streams": True, "data": "device"}, config={},
        rounds=[Round(1.0, 0.9, 0.1, 1000, 1e9)], observed_seconds=[1.0],
        steps=[0.1] * 9, ranges=[Range("step", 9, 0.97, 0.97, 0.9, "events")],
        device=DeviceUse(0.95, 0.8), transfers=Transfers({"host in": 10**6}, 0.0, 0.5, 0.0), memory=[],
        meters={}, missing={}, energy=[],
        roof=Ceilings(1e12, 1e13), operators=[], batches=[BatchSize(64, 0.1), BatchSize(128, 0.19)],
    )  # fmt: skip
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("changes", "name", "text"),
    [
        ({}, "nothing", "nothing stands out: 95% of the round are steps"),
        ({"transfers": Transfers({"host in": 3 * 10**6}, 0.17, 0.5, 0.0)}, "transfer",
         r"17% of the round is waiting .*\(0% for files\), 3 MB of which .*\(engine.device_memory_mb\)"),
        ({"transfers": Transfers({"file in": 10**6}, 0.2, 0.5, 0.2)}, "transfer",
         r"\(20% for files\).*\(engine.host_memory_mb\)"),
        ({"device": DeviceUse(0.6, 0.8)}, "idle", "no step is under way on the GPU for 40% of the round"),
        ({"device": DeviceUse(0.95, 0.1), "plan": {"streams": True}}, "overlap", "overlap for 10% of the shorter"),
        ({"rounds": [Round(1.0, 0.5, 0.5, 1000, 1e9)]}, "evaluation", "50% of a run is evaluation, every round"),
        ({"batches": [BatchSize(8, 0.1), BatchSize(64, 0.2)]}, "batch", "a step of 64 trains 4.0 times"),
        ({"ranges": [Range("client", 9, 0.2, 0.2, None, "host")]}, "bookkeeping", "20% of the round is neither"),
        ({"meters": {"gpu_throttle": {"shares": {"power cap": 0.3, "idle": 0.5}}}}, "throttling",
         "held back for 30% of the time: power cap"),
        # With graphs, the host of a run without may be what kept them apart.
        ({"device": DeviceUse(0.95, 0.1), "plan": {"streams": True, "graphs": True}}, "nothing", "nothing stands out"),
        ({"rounds": [Round(1.0, 0.9, 0.1, 9, 1e9), Round(4.0, 0.9, 3.1, 9, 1e9)], "config": {"evaluation.every": 9}},
         "nothing", "nothing stands out"),
        # Of a step, 0.97 of the round, a quarter is making batches, as a run without graphs has it.
        ({"plan": {"data": "host"}, "ranges": [Range("step", 9, 0.97, 0.97, 0.9, "events"),
                                              Range("batch", 9, 0, 0, 1.0, "uncaptured"),
                                              Range("backward", 9, 0, 0, 3.0, "uncaptured")]}, "data",
         '24% of the round is making batches: keep the samples on the device'),
    ],
)  # fmt: skip
def test_findings(changes: dict[str, Any], name: str, text: str) -> None:
    (found,) = findings.find(invented(**changes))
    assert found.name == name
    assert re.search(text, found.text), found.text


def test_ranges_of_graphs_come_from_a_run_without() -> None:
    replayed, eager = Recorder(torch.device("cpu")), Recorder(torch.device("cpu"))
    replayed.spans = [
        Span("round", 0, (), 0.0, 10.0, 1, (0.0, 10.0)),
        Span("step", 0, ("round",), 1.0, 2.0, 1, (1.0, 4.0)),
        Span("step", 1, (), 2.0, 3.0, 2, (3.0, 6.0)),
        Span("step", 0, ("round", "client", "evaluation"), 4.0, 5.0, 1, (7.0, 8.0)),
    ]
    replayed.exclusive |= {"round": 7.0, "step": 3.0}
    eager.spans = [
        Span("global", 0, (), 0.0, 1.0, 1, (0.0, 2.0)),
        Span("local", 0, (), 1.0, 2.0, 2, (1.5, 5.5)),
        Span("step", 0, (), 0.0, 3.0, 1, (0.0, 6.0)),
    ]
    eager.exclusive |= {"global": 1.0, "local": 1.0, "step": 1.0}
    found = {r.phase: (r.count, r.seconds, r.device_seconds, r.source) for r in profile.ranges(replayed, eager)}
    assert found == {
        "round": (1, 7.0, 10.0, "events"),
        "step": (3, 3.0, 7.0, "events"),
        "global": (1, 0.0, 2.0, "uncaptured"),
        "local": (1, 0.0, 4.0, "uncaptured"),
    }
    assert profile.step_seconds(replayed) == [3.0, 3.0]
    assert profile.device_use(replayed, eager) == DeviceUse(busy=0.6, overlap=0.25)
    assert profile.device_use(Recorder(torch.device("cpu"))) is None
