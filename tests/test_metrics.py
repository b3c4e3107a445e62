"""Metrics: a line a round, cut back to what the checkpoint holds, whatever a kill left behind."""

import json
import math
from pathlib import Path

import pytest

from fedmoe.metrics import Log, read, spread


def write(run: Path, rounds: int, done: int = 0) -> None:
    log = Log(run, done)
    for number in range(done + 1, rounds + 1):
        log.append({"round": number, "loss": 1 / number, "accuracy": spread([0.5, 1.0])})
    log.close()


def test_lines_are_read_back(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    write(tmp_path, 3)
    assert [line["round"] for line in read(tmp_path)] == [1, 2, 3]
    assert list(tmp_path.glob("events.*"))


@pytest.mark.parametrize("tail", [b"", b'{"round": 4, "lo', b'{"round": 4}'])
def test_opening_cuts_back_to_the_checkpoint(tmp_path: Path, tail: bytes) -> None:
    write(tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    whole = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert [line["round"] for line in read(tmp_path)] == [1, 2, 3]
    Log(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(whole[:2])
    write(tmp_path, 4, done=2)
    assert [json.loads(raw)["round"] for raw in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_not_finite_numbers_never_enter_the_file(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    with pytest.raises(ValueError, match="Out of range float"):
        log.append({"round": 1, "loss": math.nan})
    log.close()
    assert read(tmp_path) == []


def test_spread() -> None:
    s = spread([1.0, 3.0])
    assert (s["mean"], s["std"], s["clients"]) == (2.0, 1.0, [1.0, 3.0])
