"""Two clients of ten that send what they should not: what the plain mean comes to, and what a robust rule does."""

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from torch import nn

from tests.support import Command, Fedmoe

SEEDS = (0, 1)
BAD = ("1", "4")
GRID = (
    "--run.threads=1", "--run.no-report", "--checkpoint.every=12", "--federation.rounds=12", "--evaluation.every=4",
    "--evaluation.aggregated", "--data.image_size=8", "--partition.kind=iid", f"--model.global_expert={__name__}:fine",
    f"--model.local={__name__}:coarse", "--training.batch_size=16", "--training.lr=0.1", "--server.byzantine=2",
    "--attack.kind=none,scale,flip", f"--attack.clients={'+'.join(BAD)}", "--server.aggregation=mean,multi_krum",
    "--seeds", str(len(SEEDS)),
)  # fmt: skip
POINTS = 0.02


def fine(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    """Of every pixel: what clients share."""
    channels, height, width = shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 32), nn.ReLU()), nn.Linear(32, classes)


def coarse(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    """Of the mean of each quarter of an image: a client's own expert, which can do little alone."""
    extractor = nn.Sequential(nn.AvgPool2d(shape[1] // 2), nn.Flatten(), nn.Linear(shape[0] * 4, 32), nn.ReLU())
    return extractor, nn.Linear(32, classes)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sweep."""
    folder = tmp_path_factory.mktemp("swept")
    done = Command(folder, "sweep", *GRID).wait()
    assert done.code == 0, done
    (folder / "out").write_text(done.out)
    return folder / "runs" / "sweep"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


KINDS = ("accuracy", "accuracy_aggregated")
"""On held-out samples with clients' own trained θ_k, and with the aggregated θ."""


def accuracy(sweep: Path, attack: str, aggregation: str, kind: str) -> float:
    """Mean over clients and seeds, in the last round."""
    runs = [sweep / f"attack.kind={attack},server.aggregation={aggregation},seed={seed}" for seed in SEEDS]
    return fmean(lines(run)[-1][kind]["mean"] for run in runs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attack", ["scale", "flip"])
def test_plain_mean_is_spoilt(swept: Path, attack: str, kind: str) -> None:
    assert accuracy(swept, attack, "mean", kind) < accuracy(swept, "none", "mean", kind) - 3 * POINTS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attack", ["scale", "flip"])
def test_robust_rule_ends_within_two_points_of_the_clean_run(swept: Path, attack: str, kind: str) -> None:
    """Of the clean run with the mean, which no robustness costs anything."""
    clean = accuracy(swept, "none", "mean", kind)
    assert clean > 0.8
    assert accuracy(swept, attack, "multi_krum", kind) > clean - POINTS


def test_comparison_shows_the_spoilt_and_the_robust_curves(swept: Path) -> None:
    told = json.loads((swept / "sweep.json").read_text())["comparison"]
    assert told["fields"] == ["server.aggregation", "attack.kind"]
    accuracy = {(row["values"]["attack.kind"], row["values"]["server.aggregation"]): row["accuracy"]
                for row in told["variants"]}  # fmt: skip
    assert len(accuracy) == 6 and accuracy["scale", "mean"] < accuracy["scale", "multi_krum"] - 3 * POINTS
    page = (swept / "compare.html").read_text()
    curves = re.search(r'aria-label="(Mean accuracy by round: [^"]*)', page)
    assert curves
    for name in ("mean attack.kind=scale", "multi_krum attack.kind=scale", "mean attack.kind=flip"):
        assert f"server.aggregation={name}" in curves[1]
    attacked = "Attacked, 4 runs: 2 of 10 clients (1, 4) send θ {} 10 (θ_k − θ) instead of θ_k."
    assert all(attacked.format(sign) in page for sign in "+−")
    out = (swept.parents[1] / "out").read_text()
    assert out.count("\nattacked: 2 of 10 clients (1, 4) send θ + 10 (θ_k − θ) instead of θ_k\n") == 4


def test_report_of_an_attacked_run_tells(swept: Path, tmp_path: Path, fedmoe: Fedmoe) -> None:
    assert fedmoe("report", swept / "attack.kind=scale,server.aggregation=mean,seed=0", "--out", "a.html").code == 0
    page = (tmp_path / "a.html").read_text()
    assert "simulated: 2 of 10 clients (1, 4) send θ + 10 (θ_k − θ) instead of θ_k" in page


def test_what_is_not_finite_is_rejected_under_every_rule(swept: Path, tmp_path: Path, fedmoe: Fedmoe) -> None:
    """So the mean stands it: it is that of the other eight."""
    words = [word for word in GRID[:-2] if not word.startswith(("--attack.", "--server."))]
    done = fedmoe("train", *words, "--attack.kind=nan", "--attack.clients", *BAD, "--run.dir=run")
    assert done.code == 0, done
    found = lines(tmp_path / "run")
    assert all(list(line["rejected"]) == list(BAD) and not line["rolled_back"] for line in found)
    assert all("numbers of 'theta' are not finite" in why for why in found[0]["rejected"].values())
    assert found[-1]["bytes_up"] == found[-1]["bytes_down"]
    clean = lines(swept / "attack.kind=none,server.aggregation=mean,seed=0")[-1]
    assert all(found[-1][kind]["mean"] > clean[kind]["mean"] - POINTS for kind in KINDS)
