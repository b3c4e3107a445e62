"""A program: what a method gives an engine to run, told apart into what may run side by side and what owns what."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Branch = Callable[[Tensor], Tensor]
Outputs = Mapping[str, Tensor]

JUDGED = 1024
"""Tokens whose logits are held at a time in an evaluation: 0.5 GB of them with a vocabulary of 128256."""


@dataclass(frozen=True, slots=True)
class Program:
    """One client's step.

    `logits(run(x))` predicts; `join(run(x), y)` gives the mean loss and the number of correct predictions. A sample has
    one target, or, where it is a sequence, one at each of its T positions.
    """

    modules: nn.Module
    """Owns all parameters and buffers, in registration order."""
    branches: Mapping[str, Branch]
    """From inputs [B, ...] to [B, ...] or [B, T, ...], independent of each other: an engine may give each a stream of
    its own."""
    logits: Callable[[Outputs], Tensor]
    """From the branches' outputs to logits [B, C] or [B, T, C], row by row."""
    join: Callable[[Outputs, Tensor], tuple[Tensor, Tensor]]
    """From the branches' outputs and targets [B] or [B, T] to (loss [], correct [])."""
    segments: Mapping[str, tuple[str, ...]]
    """Names of the children of `modules` that each named segment of state holds; a child is in one segment."""
    constants: frozenset[str] = frozenset()
    """Names of parameters that never change and come with the modules: of no state more than their digest is kept."""

    def run(self, x: Tensor) -> dict[str, Tensor]:
        """Every branch's output on `x`, one after the other."""
        return {name: branch(x) for name, branch in self.branches.items()}

    def judge(self, outputs: Outputs, targets: Tensor) -> tuple[Tensor, Tensor]:
        """From the branches' outputs and targets [B] or [B, T] to each sample's loss and hits, summed over T, [B]."""
        rows, y = {name: output.flatten(0, targets.ndim - 1) for name, output in outputs.items()}, targets.flatten()
        size = JUDGED if targets.ndim > 1 else max(1, len(y))  # all of a batch of images, which a header may look at
        losses, hits = [], []
        for start in range(0, len(y), size):
            part = slice(start, start + size)
            logits = self.logits({name: output[part] for name, output in rows.items()}).float()
            losses.append(F.cross_entropy(logits, y[part], reduction="none"))
            hits.append(logits.argmax(1) == y[part])
        if targets.ndim == 1:
            return losses[0], hits[0]
        return torch.cat(losses).view(targets.shape).sum(1), torch.cat(hits).view(targets.shape).sum(1)


def batch_statistics(modules: nn.Module) -> str:
    """The kind of a module that normalizes by statistics of the batch, which must not be split; empty if none does."""
    for module in modules.modules():
        known = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if known or "running_mean" in dict(module.named_buffers(recurse=False)):  # others' kinds
            return type(module).__name__
    return ""
