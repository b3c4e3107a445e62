"""The engine's phases as other tools see them: NVTX ranges for Nsight, annotations for PyTorch's profiler."""

import threading
from typing import Any

import torch


class Nvtx:
    """An observer that marks phases as NVTX ranges; by handle, since those of lanes overlap."""

    def __init__(self, library: Any = None) -> None:
        self._library = library or torch.cuda.nvtx
        self._open: dict[tuple[int, int], list[Any]] = {}

    def begin(self, phase: str, lane: int) -> None:
        """A phase begins."""
        name = f"{phase} (lane {lane})" if lane else phase
        self._open.setdefault((threading.get_ident(), lane), []).append(self._library.range_start(name))

    def end(self, phase: str, lane: int) -> None:
        """It ends."""
        self._library.range_end(self._open[threading.get_ident(), lane].pop())


class Annotations:
    """An observer that marks phases for torch.profiler, which wants them nested: `client` of other lanes is left out.

    A phase that spans turns of several lanes would end after one that began later; those inside a turn never do.
    """

    SPANNING = ("client", "evaluation")

    def __init__(self) -> None:
        self._open: dict[tuple[int, int], list[Any]] = {}

    def begin(self, phase: str, lane: int) -> None:
        """A phase begins."""
        if phase in self.SPANNING:
            return
        mark = torch.profiler.record_function(f"fedmoe::{phase}")
        mark.__enter__()
        self._open.setdefault((threading.get_ident(), lane), []).append(mark)

    def end(self, phase: str, lane: int) -> None:
        """It ends."""
        if phase not in self.SPANNING:
            self._open[threading.get_ident(), lane].pop().__exit__(None, None, None)
