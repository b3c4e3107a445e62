"""Metrics: a line a round, cut back to what the checkpoint holds, whatever a kill left behind."""

import json
import math
from pathlib import Path

import pytest

from fedmoe.errors import UserError
from fedmoe.metrics import Log, read, spread


def write(run: Path, rounds: int, done: int = 0) -> None:
    with Log(run, done) as log:
        for number in range(done + 1, rounds + 1):
            log.append({"round": number, "loss": 1 / number, "accuracy": spread([0.5, 1.0])})


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
    with Log(tmp_path, 2):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(whole[:2])
    write(tmp_path, 4, done=2)
    assert [json.loads(raw)["round"] for raw in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_not_finite_numbers_never_enter_the_file(tmp_path: Path) -> None:
    with Log(tmp_path, 0) as log, pytest.raises(ValueError, match="Out of range float"):
        log.append({"round": 1, "loss": math.nan})
    assert read(tmp_path) == []


def test_spread() -> None:
    s = spread([1.0, 3.0])
    assert (s["mean"], s["std"], s["clients"]) == (2.0, 1.0, [1.0, 3.0])


def test_spread_leaves_out_what_is_not_finite() -> None:
    assert spread([1.0, math.inf, 3.0, math.nan]) == {"mean": 2.0, "std": 1.0, "clients": [1.0, None, 3.0, None]}
    assert spread([math.nan]) == {"mean": None, "std": None, "clients": [None]}


@pytest.mark.parametrize("raw", [b"garbage\n", b"{}\n", b"[]\n", b'{"round": "1"}\n', b"\xff\n"])
def test_damaged_line_is_named(tmp_path: Path, raw: bytes) -> None:
    write(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(raw)
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is no round's metrics"):
        read(tmp_path)


def test_tensorboard_is_a_copy_whose_loss_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboardX.event_file_writer import EventsWriter

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with Log(tmp_path, 0) as log:
        monkeypatch.setattr(EventsWriter, "write_event", refuse)
        for number in range(1, 30):
            log.append({"round": number, "loss": 0.5})
    assert len(read(tmp_path)) == 29
