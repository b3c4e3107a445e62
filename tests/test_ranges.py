"""Phases are heard in order, nested, also where they fail; without observers they are nothing."""

from pathlib import Path

import pytest

from fedmoe.config import Config
from fedmoe.engine.ranges import PHASES, observed, phase
from fedmoe.engine.step import How
from tests.engines import engine, rounds
from tests.support import begin


class Heard:
    def __init__(self) -> None:
        self.all: list[str] = []

    def begin(self, phase: str, lane: int) -> None:
        self.all.append(f"+{phase}" + f" in {lane}" * bool(lane))

    def end(self, phase: str, lane: int) -> None:
        self.all.append(f"-{phase}" + f" in {lane}" * bool(lane))


def test_phases() -> None:
    heard = Heard()
    with phase("round"):
        pass
    with observed(heard), phase("round"), phase("client"):
        pass
    with pytest.raises(ZeroDivisionError), observed(heard), phase("batch"):
        raise ZeroDivisionError
    with phase("round"):
        pass
    assert heard.all == ["+round", "+client", "-client", "-round", "+batch", "-batch"]
    assert phase("round") is phase("client")  # one object that does nothing


def test_a_round_on_the_engine_is_marked(config: Config, tmp_path: Path) -> None:
    run, heard = begin(config, tmp_path / "run"), Heard()
    with engine(config, run, How()) as made, observed(heard):
        rounds(config, made, run, 1)
    count = {name: heard.all.count(f"+{name}") for name in PHASES}
    assert all(heard.all.count(f"-{name}") == n for name, n in count.items())
    steps = count["optimizer"]
    assert steps == count["backward"] == count["header"] == count["batch"] - count["evaluation"] > 0
    assert count["client"] == 15 and count["evaluation"] == 10 and count["transfer out"] == 5
    assert count["global"] == count["local"] == count["gate"] > steps  # evaluation, too
    client = heard.all.index("+client")
    step = ["batch", "global", "local", "gate", "header", "backward", "optimizer"]
    expected = ["+step", *(f"{sign}{name}" for name in step for sign in "+-"), "-step"]
    assert heard.all[client + 1 :][: len(expected)] == expected
