"""CUDA graphs imitated on a CPU: what surrounds a capture happens, and a replay takes the step."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmoe.engine.graphs import Track


def imitate(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have every track made from now on have graphs; in the list is each that was captured."""
    captured: list[Any] = []
    init = Track.__init__

    def made(self: Track, device: torch.device, graphs: bool = False) -> None:
        init(self, device, graphs)
        self.graphs = graphs

    def capture(self: Track, step: Callable[[], None], changing: Sequence[Tensor], restart: Callable[[], None]) -> Any:
        kept, random = [tensor.clone() for tensor in changing], torch.get_rng_state()
        for _ in range(3):
            step()
        torch.set_rng_state(random)
        for tensor, value in zip(changing, kept, strict=True):
            tensor.copy_(value)
        restart()
        captured.append(SimpleNamespace(replay=step))
        return captured[-1]

    monkeypatch.setattr(Track, "__init__", made)
    monkeypatch.setattr(Track, "captured", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    return captured
