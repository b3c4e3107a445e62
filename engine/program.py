"""A program: what a method gives an engine to run, told apart into what may run side by side and what owns what."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

Branch = Callable[[Tensor], Tensor]
Outputs = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Program:
    """One client's step.

    `logits(run(x))` predicts; `join(run(x), y)` gives the mean loss and the number of correct predictions.
    """

    modules: nn.Module
    """Owns all parameters and buffers, in registration order."""
    branches: Mapping[str, Branch]
    """From inputs [B, ...], independent of each other: an engine may give each a stream of its own."""
    logits: Callable[[Outputs], Tensor]
    """From the branches' outputs to logits [B, C]."""
    join: Callable[[Outputs, Tensor], tuple[Tensor, Tensor]]
    """From the branches' outputs and targets [B] to (loss [], correct [])."""
    segments: Mapping[str, tuple[str, ...]]
    """Names of the children of `modules` that each named segment of state holds; a child is in one segment."""

    def run(self, x: Tensor) -> dict[str, Tensor]:
        """Every branch's output on `x`, one after the other."""
        return {name: branch(x) for name, branch in self.branches.items()}


def batch_statistics(modules: nn.Module) -> str:
    """The kind of a module that normalizes by statistics of the batch, which must not be split; empty if none does."""
    for module in modules.modules():
        known = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if known or "running_mean" in dict(module.named_buffers(recurse=False)):  # others' kinds
            return type(module).__name__
    return ""
