"""CUDA graphs imitated on a CPU: a capture takes a step that is then undone, and a replay takes the step."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmoe.engine.graphs import Track
from fedmoe.engine.seeds import globals_kept


class Stream:
    """On a CPU all is done when it is said."""

    def wait_stream(self, other: "Stream") -> None:
        """Nothing to wait for."""


def imitate(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have every track made from now on have graphs; in the list is each that was captured."""
    captured: list[Any] = []
    init, real = Track.__init__, Track.captured

    def made(self: Track, device: torch.device, graphs: bool = False) -> None:
        init(self, device, graphs)
        self.graphs, self._stream = graphs, Stream()  # type: ignore[assignment]

    def capture(self: Track, step: Callable[[], None], changing: Sequence[Tensor], restart: Callable[[], None]) -> Any:
        graph: Any = real(self, step, changing, restart)
        graph.replay = step
        captured.append(graph)
        return graph

    monkeypatch.setattr(Track, "__init__", made)
    monkeypatch.setattr(Track, "captured", capture)
    for name, fake in {
        "synchronize": lambda *_: None,
        "graph_pool_handle": lambda: None,
        "current_stream": Stream,
        "stream": lambda _: nullcontext(),
        "set_stream": lambda _: None,
        "get_rng_state": lambda: None,
        "set_rng_state": lambda _: None,
        "CUDAGraph": SimpleNamespace,
        "graph": lambda *_, **__: globals_kept(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    return captured
