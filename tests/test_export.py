"""What is exported gives the run's numbers, in every format; it is there whole or not at all."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmoe import export
from fedmoe.client import load_data
from fedmoe.configfile import read
from fedmoe.errors import UserError
from fedmoe.partition import Split
from fedmoe.serving import Served, from_export, from_run
from tests.serving import CONFIGS, images, served
from tests.support import SMALL, Command, Fedmoe, train

Both = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def evaluated(run: Path) -> dict[str, Any]:
    """What `fedmoe eval` says of client 1."""
    done = Command(run.parent, "eval", "run", "--clients", 1, "--aggregated", "--json").wait()
    return dict(json.loads(done.out))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with batch statistics one of whose clients has not trained."""
    options = (
        "--gate.norm=layer-batch-batch",
        "--training.lr=0.1",
        "--federation.fraction=0.8",
        "--training.batch_size=16",
    )
    return train(tmp_path_factory.mktemp("trained"), *SMALL, *options, "--federation.rounds=1")


def onnx(path: Path) -> Callable[[Tensor], Both]:
    """An ONNX file as a function, by onnxruntime where that is installed, else by ONNX's own evaluator."""
    pytest.importorskip("onnx")
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        from onnx.reference import ReferenceEvaluator as InferenceSession
    session: Any = InferenceSession(str(path))

    def run(x: Tensor) -> Both:
        first, second = session.run(None, {"images": x.numpy()})
        return torch.from_numpy(np.asarray(first)), torch.from_numpy(np.asarray(second))

    return run


def written(one: Served, folder: Path, what: str) -> Callable[[Tensor], Both]:
    """A model, exported and loaded."""
    export._write(what, one, one.card, folder)
    if what == "onnx":
        return onnx(folder / export.ONNX)
    return torch.export.load(folder / export.PROGRAM).module()


@pytest.mark.parametrize("kind", CONFIGS)
def test_programs_give_the_models_numbers(tmp_path: Path, kind: str) -> None:
    one = served(kind)
    for what, tolerance in (("torch.export", 1e-6), ("onnx", 1e-5)):
        if what == "onnx":
            pytest.importorskip("onnxscript")
        program = written(one, tmp_path, what)
        for n in (1, 5):
            with torch.no_grad():
                expected = one.model(images(n))
            for ours, theirs in zip(program(images(n)), expected, strict=True):
                torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=tolerance)


def held_out(run: Path, client: int) -> tuple[Tensor, Tensor]:
    config = read(run / "config.toml")
    data, chosen = load_data(config.data, config.seed), Split.load(run / "partition.safetensors").test(client)
    return data.inputs[chosen], data.labels[chosen]


@pytest.mark.parametrize("aggregated", [False, True])
def test_an_export_gives_the_runs_numbers(
    run: Path, evaluated: dict[str, Any], tmp_path: Path, aggregated: bool
) -> None:
    out = tmp_path / "out"
    export.run(run, 1, ["safetensors", "torch.export"], aggregated, out)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.pt2", "model.safetensors"]
    card = json.loads((out / "config.json").read_text())
    assert (card["client"], card["round"], card["theta"]) == (1, 1, "aggregated" if aggregated else "own")
    assert (card["shape"], card["width"], card["classes"]) == ([1, 28, 28], 50, [str(i) for i in range(10)])
    suffix = "_aggregated" if aggregated else ""
    x, y = held_out(run, 1)
    for model in (torch.export.load(out / "model.pt2").module(), from_export(out).model):
        with torch.no_grad():
            probabilities, weights = model(x)
        loss, accuracy = F.nll_loss(probabilities.log(), y), (probabilities.argmax(1) == y).float().mean()
        assert loss.item() == pytest.approx(evaluated[f"test_loss{suffix}"]["mean"], rel=1e-5)
        assert accuracy.item() == pytest.approx(evaluated[f"accuracy{suffix}"]["mean"])
        torch.testing.assert_close(weights.sum(1), torch.ones(len(x)))


def test_all_formats_go_into_the_runs_folder_unless_told(run: Path, fedmoe: Fedmoe) -> None:
    pytest.importorskip("onnxscript")
    done = fedmoe("export", run, "--client=0")
    assert done.code == 0 and not done.err, done
    out = run / "exports" / "client-0.r1"
    names = ["config.json", "model.onnx", "model.pt2", "model.safetensors"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert all(f"{out / name}  " in done.out for name in names)
    x, _ = held_out(run, 0)
    with torch.no_grad():
        expected = from_run(run, 0).model(x)
    for ours, theirs in zip(onnx(out / "model.onnx")(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"client-0\.r1 is there already: remove it, or choose another --out"):
        export.run(run, 0, [], False, None)


def test_what_cannot_be_had_is_told_and_the_rest_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    export.run(run, 0, [], False, tmp_path / "a")
    assert capsys.readouterr().err == "fedmoe: warning: no onnx: onnx is not installed: pip install onnx onnxscript\n"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.pt2", "model.safetensors"]
    with pytest.raises(UserError, match=r"^--format onnx: onnx is not installed: pip install onnx onnxscript$"):
        export.run(run, 0, ["safetensors", "onnx"], False, tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("client", "out", "line"),
    [
        ("5", "out", "there is no client 5: the run has clients 0 to 4"),
        ("-1", "out", "there is no client -1: the run has clients 0 to 4"),
        ("untrained", "out", "client [0-4] has not trained in 1 rounds, others have, such as client [0-4]: train on"),
        ("0", "file", "file is there already: remove it, or choose another --out"),
        ("0", "full", "full is there already: remove it, or choose another --out"),
    ],
)
def test_what_cannot_be_exported(run: Path, tmp_path: Path, client: str, out: str, line: str) -> None:
    trained = {int(p.name.split(".")[0].removeprefix("client-")) for p in (run / "checkpoints").glob("client-*")}
    [untrained] = set(range(5)) - trained
    (tmp_path / "full").mkdir()
    for file in (tmp_path / "file", tmp_path / "full" / "file"):
        file.touch()
    with pytest.raises(UserError, match=line):
        export.run(run, untrained if client == "untrained" else int(client), [], False, tmp_path / out)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "file", "full"]


def end(number: int) -> None:
    """Have the process get a signal when the weights are written and the card is not."""

    def killed(*args: Any) -> None:
        os.kill(os.getpid(), number)

    setattr(export, "write", killed)  # noqa: B010


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)])
def test_a_kill_leaves_nothing_under_the_name(run: Path, tmp_path: Path, number: int, code: int) -> None:
    words = ("export", run, "--client=0", "--out=out", "--format=safetensors")
    done = Command(tmp_path, *words, plant=end, plant_args=(number,)).wait()
    assert done.code == code
    left = [p.name for p in tmp_path.iterdir()]
    assert "out" not in left and len(left) == (number == signal.SIGKILL)
    assert Command(tmp_path, *words).wait().code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def deciding(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return Deciding(), nn.Linear(784, classes)


class Deciding(nn.Flatten):
    """Looks at numbers to decide what to do."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if x.sum() > 0 else -x


def test_a_model_that_does_not_export_and_one_that_has_nothing_aggregated(
    tmp_path: Path, fedmoe: Fedmoe, capfd: pytest.CaptureFixture[str]
) -> None:
    options = (f"--model.local={__name__}:deciding", "--method=local", "--federation.rounds=1", "--run.dir=run")
    assert fedmoe("train", *SMALL, *options).code == 0
    line = 'there is nothing aggregated with method = "local": leave --aggregated out'
    assert fedmoe("export", "run", "--client=0", "--aggregated").one_line() == line
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"^--format torch.export: GuardOnDataDependentSymNode: Could not guard"):
        export.run(run, 0, ["torch.export"], False, None)
    assert not (run / "exports").exists() and not capfd.readouterr().err
    export.run(run, 0, ["safetensors"], False, None)
    assert from_export(run / "exports" / "client-0.r1").card.theta == "none"
