"""What the benchmarks set their variants up with: gradients, compilation, CUDA graphs, and agreement of results.

A baseline is what a good user would write: static inputs, results that nobody copies, nothing zeroed or accumulated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedmoe.profiling.bench import Bench, Check, Unavailable

Head = Callable[..., tuple[Tensor, ...]]
"""Takes operands and returns the loss, and what else it has."""


def plain_mix(global_: Tensor, local: Tensor, gate: Tensor) -> Tensor:
    """The mix in the fewest operators: two fewer, and half of those on [B, D], than weights times representations."""
    return torch.lerp(local, global_, gate.softmax(1)[:, :1])


def differentiated(head: Head, leaves: Sequence[Tensor], *others: Any) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives what `head` does, and the gradients of the leaves.

    As new tensors: autograd hands over what it computed, where `.grad` would have to be zeroed and added to.
    """
    ones: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        first, *rest = head(*leaves, *others)
        if not ones:  # or autograd makes it anew in each call, which is a kernel
            ones.append(torch.ones_like(first))
        return first.detach(), *rest, *torch.autograd.grad(first, leaves, ones)

    return call


def compiled(function: Callable[..., Any], bench: Bench, mode: str | None = None) -> Callable[..., Any]:
    """Compiled for these shapes; where nothing is timed only traced and differentiated, which takes no minute."""
    if bench.full:
        return torch.compile(function, mode=mode, dynamic=False)
    return torch.compile(function, backend="aot_eager", dynamic=False)


def compiler(bench: Bench) -> str:
    """What a variant that is `compiled` is called: no table shall pass one for the other."""
    return "compile" if bench.full else "compile (aot_eager)"


class Graphed:
    """A call captured as a CUDA graph, and replayed; its results are in the same buffers each time."""

    def __init__(self, call: Callable[[], object]) -> None:
        if not torch.cuda.is_available():
            raise Unavailable("CUDA graphs need a GPU")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=side):
            self._output = call()
        torch.cuda.synchronize()
        self.peak_bytes = torch.cuda.max_memory_allocated() - before
        """What the capture allocated, and every replay uses."""

    def __call__(self) -> object:
        self._graph.replay()
        return self._output


def agreement(names: Sequence[str], tolerance: float) -> Check:
    """A check that results agree in norm, relatively; a correct count may be off where two classes come out equal."""

    def check(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> None:
        for name, one, other in zip(names, expected, actual, strict=True):
            assert one.shape == other.shape, f"{name} has shape {tuple(other.shape)}, not {tuple(one.shape)}"
            if name == "correct":
                assert abs(int(one) - int(other)) <= 1 + tolerance * int(one), f"{int(other)} correct, not {int(one)}"
                continue
            apart = float((other.float() - one.float()).norm() / one.float().norm())
            assert apart <= tolerance, f"{name} is {apart:.1e} apart, more than {tolerance:.0e}"

    return check


def tolerance(dtype: torch.dtype) -> float:
    """How far a sound variant may be from another: a few roundings; a missing factor or term is far beyond."""
    return 1e-4 if dtype == torch.float32 else 4e-2
