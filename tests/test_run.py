"""A run from the command line: what it leaves, resuming, evaluating, and the controls on the same path."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe import checkpoint, metrics, rounds, run
from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.configfile import read
from fedmoe.engine.seam import Job, Result
from fedmoe.partition import Split
from fedmoe.profiling.nvml_device import Unavailable
from fedmoe.reference import ReferenceEngine
from tests.support import SMALL, Command, Fedmoe, begin, changed, train
from tests.support import theta as initial
from tests.test_data import write

NAN = """
from torch import nn

class Nan(nn.Flatten):
    def forward(self, x):
        return super().forward(x)[:, :50] * ({training} if self.training else {evaluation})

def make(shape, classes):
    return Nan(), nn.Linear(50, classes)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds; not to be changed."""
    # A large learning rate, so that the rounds' thetas differ by more than tolerances.
    return train(tmp_path_factory.mktemp("finished"), *SMALL, "--evaluation.aggregated", "--training.lr=0.1")


def test_run_folder(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if not path.name.startswith("events.")}
    assert names == {
        ".lock",
        "config.toml",
        "environment.json",
        "plan.json",
        "partition.safetensors",
        "metrics.jsonl",
        "checkpoints",
    }
    assert read(finished / "config.toml").federation.rounds == 2
    [events] = finished.glob("events.*")
    for tag in (b"loss", b"accuracy/mean", b"accuracy_aggregated/mean", b"seconds/train", b"bytes_up"):
        assert tag in events.read_bytes()
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["threads"] == 1
    assert environment["partition"] == Split.load(finished / "partition.safetensors").fingerprint


def test_metrics_of_a_round(finished: Path) -> None:
    config = read(finished / "config.toml")
    split = Split.load(finished / "partition.safetensors")
    theta_bytes = 4 * (26 * 20 + 501 * 20 + 321 * 50 + 51 * 50)  # CNN-5 of the MNIST-size family, without classifier
    lines = metrics.read(finished)
    assert [line["round"] for line in lines] == [1, 2]
    for line in lines:
        assert line["sampled"] == line["evaluated"] == list(range(5))
        assert line["rolled_back"] == []
        assert line["bytes_up"] == line["bytes_down"] == 5 * theta_bytes
        c = line["clients"]
        steps = [len(split.train(i)) // config.training.batch_size or 1 for i in range(5)]
        batch = [min(config.training.batch_size, len(split.train(i))) for i in range(5)]
        assert c["samples"] == [s * b for s, b in zip(steps, batch, strict=True)]
        assert sum(c["flops"]) == line["flops"] > 0
        assert sum(c["bytes_up"]) == line["bytes_up"]
        weights = [len(split.train(i)) for i in range(5)]
        mean = sum(w * x for w, x in zip(weights, c["loss"], strict=True)) / sum(weights)
        assert line["loss"] == pytest.approx(mean)
        for key in ("accuracy", "accuracy_aggregated"):
            accuracy = line[key]
            assert accuracy["mean"] == pytest.approx(sum(accuracy["clients"]) / 5)
            for client, value in enumerate(accuracy["clients"]):
                held_out = len(split.test(client))
                assert value * held_out == pytest.approx(round(value * held_out))
        assert line["test_loss"] != line["test_loss_aggregated"]
        s = line["seconds"]
        assert s.keys() == {"round", "train", "aggregate", "evaluate", "checkpoint"}
        assert s["round"] == pytest.approx(s["train"] + s["aggregate"] + s["evaluate"])
        assert 0 < sum(c["seconds"]) <= s["train"]


def test_closing_table(tmp_path: Path, fedmoe: Fedmoe) -> None:
    done = fedmoe("train", *SMALL, "--run.dir=run [b]")  # what looks like markup is a name
    assert done.code == 0, done
    assert "round 2/2  accuracy 0." in done.out
    assert "fedmoe on digits after round 2, held-out samples" in done.out
    for i in range(5):
        assert f"cnn-{i + 1}" in done.out
    assert "all 5" in done.out
    assert done.out.endswith("run folder: run [b]\n")


def test_eval_gives_the_numbers_of_the_last_round_and_changes_nothing(finished: Path, fedmoe: Fedmoe) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    done = fedmoe("eval", finished, "--json", "--aggregated")
    assert done.code == 0, done
    line, last = json.loads(done.out), metrics.read(finished)[-1]
    for key in ("round", "evaluated", "accuracy", "accuracy_aggregated", "test_loss", "test_loss_aggregated"):
        assert line[key] == last[key]
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    done = fedmoe("eval", finished, "--clients", 3, 1)
    assert done.code == 0
    assert "cnn-4" in done.out
    assert "cnn-1 " not in done.out


def test_a_finished_run_can_be_trained_on_and_ends_as_a_longer_one(
    finished: Path, tmp_path: Path, fedmoe: Fedmoe
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert "has trained 2 rounds of 2: give --rounds more than 2 to train on" in fedmoe("resume", run).one_line()
    assert fedmoe("resume", run, "--rounds=3").code == 0
    options = ("--evaluation.aggregated", "--training.lr=0.1", "--federation.rounds=3")
    assert fedmoe("train", *SMALL, "--run.dir=long", *options).code == 0
    manifests = [checkpoint.read_manifest(tmp_path / name) for name in ("run", "long")]
    assert manifests[0] == manifests[1]
    assert read(run / "config.toml").federation.rounds == 3


@pytest.mark.parametrize("method", ["local", "static"])
def test_controls(tmp_path: Path, fedmoe: Fedmoe, method: str) -> None:
    done = fedmoe("train", *SMALL, "--run.dir=run", f"--method={method}", "--evaluation.aggregated")
    assert done.code == 0, done
    lines = metrics.read(tmp_path / "run")
    shared = method == "static"
    assert all((line["bytes_up"] > 0) == shared == ("accuracy_aggregated" in line) for line in lines)
    manifest = checkpoint.read_manifest(tmp_path / "run")
    state = checkpoint.load(tmp_path / "run", manifest.clients[0])
    assert any("global_expert" in name for name in state) == shared
    assert not any("gate.fc" in name for name in state)
    assert fedmoe("resume", "run", "--rounds=3").code == 0


def test_evaluation_of_sampled_clients_every_other_round(tmp_path: Path, fedmoe: Fedmoe) -> None:
    options = ("--evaluation.every=2", "--evaluation.clients=sampled", "--federation.fraction=0.4")
    assert fedmoe("train", *SMALL, *options, "--run.dir=run", "--federation.rounds=5").code == 0
    lines = metrics.read(tmp_path / "run")
    assert [line["round"] for line in lines if "accuracy" in line] == [2, 4, 5]
    assert all(line["evaluated"] == line["sampled"] for line in lines if "accuracy" in line)
    assert all(len(line["sampled"]) == 2 for line in lines)


def test_rolled_back_client_is_named_and_the_round_goes_on(tmp_path: Path, fedmoe: Fedmoe) -> None:
    (tmp_path / "models.py").write_text(NAN.format(training="float('nan')", evaluation=1.0))
    models = ("--model.local", "cnn-1", "models:make", "cnn-2", "cnn-3", "cnn-4")
    done = fedmoe("train", *SMALL, "--run.dir=run", *models)
    assert done.code == 0, done
    assert "round 1: client 1 rolled back and left out: its loss or a weight is not finite" in done.out
    lines = metrics.read(tmp_path / "run")
    assert [line["rolled_back"] for line in lines] == [[1], [1]]
    assert all(line["clients"]["loss"][1] is None for line in lines)
    assert all(line["clients"]["bytes_up"][1] == 0 for line in lines)
    manifest = checkpoint.read_manifest(tmp_path / "run")
    assert list(manifest.clients) == [0, 2, 3, 4]


def send_nonsense() -> None:
    """Clients 1 and 3 send what is not finite, and what has another shape."""
    from fedmoe.engine.device_engine import DeviceEngine

    run = DeviceEngine.run

    def lying(self: DeviceEngine, kind: str, jobs: list[Job]) -> Iterator[Result]:
        for result in run(self, kind, jobs):  # type: ignore[arg-type]
            lies = {1: lambda theta: theta * float("nan"), 3: lambda theta: theta[:-1]} if kind == "train" else {}
            lie = lies.get(result.client, lambda theta: theta)
            yield replace(result, payload={name: lie(tensor) for name, tensor in result.payload.items()})

    DeviceEngine.run = lying  # type: ignore[method-assign, assignment]


def test_unfit_results_are_named_and_too_few_leave_theta(tmp_path: Path, fedmoe: Fedmoe) -> None:
    rule = ("--server.aggregation=krum", "--server.byzantine=1")
    done = fedmoe("train", *SMALL, "--run.dir=run", *rule, plant=send_nonsense)
    assert done.code == 0, done
    assert "round 1: client 1 rejected and left out: 29140 of the 29140 numbers of 'theta' are not finite" in done.out
    assert "round 1: client 3 rejected and left out: 'theta' is torch.float32 [29139], must be" in done.out
    kept = "krum needs 5 results, 3 were fit to count"
    assert f"round 2: the global expert stays as it is: {kept}" in done.out
    lines = metrics.read(tmp_path / "run")
    assert [list(line["rejected"]) for line in lines] == [["1", "3"]] * 2
    assert [line["kept"] for line in lines] == [kept] * 2


def test_resume_from_another_working_directory(tmp_path: Path, fedmoe: Fedmoe) -> None:
    write(tmp_path / "images" / "train-00000-of-00001.parquet", [row % 3 for row in range(90)])
    options = (
        "--data.name=images",
        "--data.image_size=28",
        "--run.dir=run",
        "--federation.clients=3",
        "--run.threads=1",
    )
    done = fedmoe("train", *options, "--federation.rounds=1")
    assert done.code == 0, done
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = Command(elsewhere, "resume", "../run", "--rounds=2").wait()
    assert done.code == 0, done


def test_environment_that_differs_is_warned_of(finished: Path, tmp_path: Path, fedmoe: Fedmoe) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "environment.json"
    facts: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"torch": "2.0.0", "threads": 9}))
    done = fedmoe("eval", run)
    assert done.code == 0
    assert "fedmoe: warning: torch was 2.0.0, now " in done.err
    assert "the run began with 9 threads, which are kept, but this machine has " in done.err
    path.write_text(json.dumps(facts | {"data": "0" * 64}))
    assert "fingerprint" in fedmoe("eval", run).one_line()
    assert "the run began with 000000000000" in fedmoe("eval", run).one_line()


def test_a_run_is_the_rounds_done_by_hand(finished: Path, tmp_path: Path) -> None:
    """Theta of each round goes out in the next; the last is in the checkpoint, and was evaluated as aggregated."""
    config = read(finished / "config.toml")
    engine = ReferenceEngine(config, begin(config, tmp_path / "hand"), torch.device("cpu"))
    theta = initial(config)["theta"]
    for number in (1, 2):
        results = list(engine.run("train", [Job(c, number, {"theta": theta}, {"epochs": 1}) for c in range(5)]))
        n = [engine.client(c).training for c in range(5)]
        shares = [w / sum(n) * r.payload["theta"].double() for w, r in zip(n, results, strict=True)]
        theta = torch.stack(shares).sum(0).float()
    manifest = checkpoint.read_manifest(finished)
    torch.testing.assert_close(checkpoint.load(finished, manifest.server)["theta"], theta, rtol=1e-5, atol=1e-7)
    for client in range(5):
        saved, trained = checkpoint.load(finished, manifest.clients[client]), engine.client(client).state()
        assert saved.keys() == trained.keys()
        for name in saved:
            torch.testing.assert_close(saved[name], trained[name], rtol=1e-4, atol=1e-6)
    last = metrics.read(finished)[-1]
    for key, payload in (("test_loss", {}), ("test_loss_aggregated", {"theta": theta})):
        losses = [r.metrics["loss"] for r in engine.run("evaluate", [Job(c, 2, payload) for c in range(5)])]
        assert losses == pytest.approx(last[key]["clients"], rel=1e-5)


@pytest.mark.parametrize("lr", ["10", "1e5"])
def test_divergence_that_only_evaluation_sees_is_named_and_the_rounds_go_on(
    tmp_path: Path, fedmoe: Fedmoe, lr: str
) -> None:
    (tmp_path / "models.py").write_text(NAN.format(training=1.0, evaluation="float('nan')"))
    done = fedmoe("train", *SMALL, "--run.dir=run", "--model.local", "cnn-1", "models:make", f"--training.lr={lr}")
    assert done.code == 0, done
    lines = metrics.read(tmp_path / "run")
    assert len(lines) == 2
    for line in lines:
        assert {1, 3} <= set(line["not_finite"])
        assert line["test_loss"]["clients"][1] is None
    assert "client 1 has a test loss that is not finite" in done.out


def test_settings_without_effect_are_warned_of(fedmoe: Fedmoe) -> None:
    done = fedmoe("train", *SMALL, "--run.dir=run", "--method=local", "--static_weight=0.3")
    assert done.code == 0
    assert done.err == 'fedmoe: warning: static_weight = 0.3 has no effect with method = "local"\n'


def test_many_clients_have_a_short_table(fedmoe: Fedmoe) -> None:
    options = ("--federation.clients=40", "--federation.fraction=0.1", "--federation.rounds=1", "--run.threads=1")
    done = fedmoe("train", *options, "--run.dir=run")
    assert done.code == 0, done
    assert "median" in done.out
    assert "all 40" in done.out
    assert len(done.out.splitlines()) < 20


def test_data_is_read_once_for_all_clients(config: Any) -> None:
    assert load_data(config.data, 0) is load_data(config.data, 0)


def test_energy_of_a_round_is_there_where_it_is_counted(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a GPU's counter, which may cease to count."""
    readings = iter([100.0, 107.5, 110.0])

    def joules() -> float:
        for reading in readings:
            return reading
        raise Unavailable("the GPU is lost")

    monkeypatch.setattr(rounds, "energy_counter", lambda device: joules)
    run.train(changed(config, run={"dir": str(tmp_path / "a"), "threads": 1, "report": False}))
    assert [line.get("energy_j") for line in metrics.read(tmp_path / "a")] == [7.5, None, None]
