"""Comparing two runs: what exceeds the noise and what does not, and the command that shows it."""

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmoe import cli, comparison
from fedmoe.config import Config
from fedmoe.engine.samples import Loader
from fedmoe.errors import UsageError
from fedmoe.profiling.compare import differences, interval
from tests.support import changed


def measurements(values: list[float], **others: float) -> list[dict[str, float]]:
    return [{"round": value, **others} for value in values]


def test_drift_that_hits_both_alike_is_no_difference_and_a_small_one_is_seen() -> None:
    drift = [1.0, 1.4, 0.8, 2.0, 1.1, 0.9, 1.7]
    noise = [1.01, 0.99, 1.0, 1.005, 0.995, 1.01, 0.98]
    alike = [d * n for d, n in zip(drift, noise, strict=True)]
    (same,) = differences(measurements(drift), measurements(alike))
    assert not same.exceeds_noise and same.low < 1 < same.high
    (more,) = differences(measurements(drift), measurements([1.05 * value for value in alike]))
    assert more.exceeds_noise and more.ratio == pytest.approx(1.05) and more.first == 1.1
    assert more.low == pytest.approx(0.98 * 1.05) and more.high == pytest.approx(1.01 * 1.05)
    (equal,) = differences(measurements(drift), measurements(drift))
    assert (equal.ratio, equal.low, equal.high) == (1, 1, 1) and not equal.exceeds_noise


@pytest.mark.parametrize("n", [6, 9, 10, 20, 31])
def test_the_interval_holds_the_median_as_often_as_it_says(n: int) -> None:
    """And would not, were it one rank narrower at each end."""
    drawn = np.sort(np.random.default_rng(n).lognormal(0, 1, (20_000, n)), axis=1)
    low, high = interval(list(range(n)))
    low, high = int(low), int(high)
    assert low == n - 1 - high
    holds = ((drawn[:, low] <= 1) & (drawn[:, high] >= 1)).mean()
    assert holds >= 0.95 - 3 * (0.05 * 0.95 / 20_000) ** 0.5
    narrower = ((drawn[:, low + 1] <= 1) & (drawn[:, high - 1] >= 1)).mean()
    assert narrower < 0.95 + 3 * (0.05 * 0.95 / 20_000) ** 0.5


def test_only_what_all_measurements_have_is_compared() -> None:
    first = measurements([1.0] * 6, zero=0.0, own=1.0)
    second = measurements([2.0] * 6, zero=1.0)
    assert [row.name for row in differences(first, second)] == ["round"]
    with pytest.raises(ValueError, match="5 and 6 measurements, expected as many of each, at least 6"):
        differences(first[:5], second)


@pytest.fixture
def small(config: Config) -> Config:
    return changed(
        config, run={"threads": 1, "device": "cpu"}, federation={"fraction": 0.4}, data={"limit": 300},
        model={"local": ("cnn-5",)},
    )  # fmt: skip


def test_what_is_slower_in_one_is_named(
    small: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = Loader.batch

    def slow(self: Loader, indices: Any, **options: Any) -> Any:
        if len(indices) == 8:
            time.sleep(0.03)
        return batch(self, indices, **options)

    monkeypatch.setattr(
        Loader, "batch", lambda self, indices, channels_last: slow(self, indices, channels_last=channels_last)
    )
    other = changed(small, training={"batch_size": 8})
    comparison.run((small, other), 6, 1, as_json=True)
    made = json.loads(capsys.readouterr().out)
    assert made["configuration"] == [["training.batch_size", "16", "8"]] and made["rounds"] == 6
    rows = {row["name"]: row for row in made["differences"]}
    assert rows["in batch"]["ratio"] > 5 and rows["in batch"]["exceeds_noise"]
    assert rows["round"]["ratio"] > 1 and rows["samples/s"]["ratio"] < 1
    comparison.run((small, small), 6, 0, as_json=False)
    said = capsys.readouterr().out
    assert "A and B are configured alike" in said and "in backward" in said and "only" not in said


def test_a_phase_that_only_one_has_is_told(small: Config, capsys: pytest.CaptureFixture[str]) -> None:
    comparison.run((changed(small, method="local"), small), 6, 0, as_json=False)
    assert re.search(r"^in B only: global \(\d+\.\d ms\), gate \(\d+\.\d ms\)$", capsys.readouterr().out, re.M)


def test_the_command(small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("a.toml", 16), ("b.toml", 32)):
        (tmp_path / name).write_text(f"[training]\nbatch_size = {size}\n")
    given: list[Any] = []
    monkeypatch.setattr(comparison, "run", lambda *args: given.append(args))
    a, b = str(tmp_path / "a.toml"), str(tmp_path / "b.toml")
    assert cli.main(["profile", "--compare", a, b, "--training.lr", "0.5", "--rounds", "7", "--json"]) == 0
    ((configs, rounds, warmup, as_json),) = given
    assert [c.training.batch_size for c in configs] == [16, 32] and {c.training.lr for c in configs} == {0.5}
    assert (rounds, warmup, as_json) == (7, 1, True)
    assert cli.main(["profile", "--compare", a, b, "--out", "x"]) == 2
    assert cli.main(["profile", a, "--compare", a, b]) == 2
    with pytest.raises(UsageError, match="--rounds is 5 and --warmup 1, expected at least 6 to compare"):
        monkeypatch.undo()
        comparison.run((small, small), 5, 1, False)
