"""Phases are heard in order, nested, also where they fail; without observers they are nothing."""

import pytest

from fedmoe.engine.ranges import observed, phase


class Heard:
    def __init__(self) -> None:
        self.all: list[str] = []

    def begin(self, phase: str) -> None:
        self.all.append(f"+{phase}")

    def end(self, phase: str) -> None:
        self.all.append(f"-{phase}")


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
