"""The optimizer's step over one client's parameters: a flat arena in one kernel, and what works tensor by tensor.

The baselines leave the gradients as they are; ours does too, but in the variants called "zeroing", whose 4 bytes an
element are not in the floor.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmoe.kernels.flat_optimizer import Moments, adamw_step, flat_optimizer_supported, sgd_step
from fedmoe.profiling.bench import Absent, Bench, Call, Floor, Unavailable, attempt, sizes
from tests.bench.variants import Graphed, agreement

CNN_1 = [(16, 3, 5, 5), (16,), (32, 16, 5, 5), (32,), (2000, 800), (2000,), (500, 2000), (500,), (10, 500), (10,)]
"""The paper's largest CNN."""
FULL = [pytest.param(CNN_1, id="cnn-1"), pytest.param([(4096, 4096)] * 8, id="134m")]
TINY = [pytest.param([(3, 5), (7,)], id="tiny")]

Made = tuple[Tensor, Callable[[], object]]
"""Weights [P], and what takes a step on them."""


@sizes("shapes", full=FULL, tiny=TINY)
def test_sgd(gpu_benchmark: Bench, shapes: list[tuple[int, ...]]) -> None:
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3}
    operands = Operands(gpu_benchmark, shapes, options)

    def ours(zero: bool) -> Made:
        weights, gradients, rate = operands.flat()
        buffer = torch.zeros_like(weights)
        return weights, partial(
            sgd_step, weights, gradients, buffer, lr=rate, momentum=options["momentum"], weight_decay=1e-3, zero=zero
        )

    # Weights, momentum and gradient read; weights and momentum written.
    variants = {"ours": partial(ours, False), "ours, zeroing": partial(ours, True)}
    operands.compare(torch.optim.SGD, "FusedSGD", variants, 20)


@sizes("shapes", full=FULL, tiny=TINY)
def test_adamw(gpu_benchmark: Bench, shapes: list[tuple[int, ...]]) -> None:
    operands = Operands(gpu_benchmark, shapes, {"lr": 0.01, "weight_decay": 1e-3})

    def ours(bits: int, zero: bool = False) -> Made:
        weights, gradients, rate = operands.flat()
        moments, step = Moments.zeros(weights, bits), torch.zeros_like(rate)

        def take() -> None:
            step.add_(1)
            adamw_step(weights, gradients, moments, step=step, lr=rate, weight_decay=1e-3, zero=zero)

        return weights, take

    # Weights, both moments and gradient read; weights and moments written. With 8-bit states it is 16 of these 28.
    variants = {
        "ours": partial(ours, 32),
        "ours, zeroing": partial(ours, 32, True),
        "ours, 8-bit states": partial(ours, 8),
    }
    operands.compare(torch.optim.AdamW, "FusedAdam", variants, 28, capturable=True)


class Operands:
    """Weights and gradients that are the same for every variant, each with its own copy."""

    def __init__(self, bench: Bench, shapes: list[tuple[int, ...]], options: dict[str, float]) -> None:
        torch.manual_seed(0)
        self.bench, self.shapes, self.options = bench, shapes, options
        self.counts = [torch.Size(shape).numel() for shape in shapes]
        self.weights, self.gradients = torch.randn(2, sum(self.counts), device=bench.device)

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, gradients and learning rate, as ours takes them."""
        return self.weights.clone(), self.gradients.clone(), self.weights.new_tensor(self.options["lr"])

    def library(self, optimizer: Any, whole: bool = False, **more: Any) -> Made:
        """An optimizer over tensors, or over the whole as one."""
        weights, gradients, _ = self.flat()
        parts = [weights] if whole else self._views(weights)
        for part, gradient in zip(parts, [gradients] if whole else self._views(gradients), strict=True):
            part.grad = gradient
        return weights, optimizer(parts, **self.options, **more).step

    def compare(
        self, optimizer: Any, apex: str, ours: Mapping[str, Callable[[], Made]], bytes_: int, **capturable: bool
    ) -> None:
        """Time them; `bytes_` an element is what a step cannot do without."""
        supported, why = flat_optimizer_supported(self.weights, self.gradients)
        variants: dict[str, Call | Absent] = {
            "torch": _checked(self.library(optimizer)),
            "torch, fused": _checked(self.library(optimizer, fused=True)),
            "torch, fused, graph": attempt(lambda: _graphed(self.library(optimizer, fused=True, **capturable))),
            "torch, fused, one tensor": _checked(self.library(optimizer, True, fused=True)),
            "apex": attempt(lambda: _checked(self.library(_apex(apex)))),
        }
        for name, make in ours.items():
            variants[name] = _checked(make()) if supported else Absent(why)
            variants[f"{name}, graph"] = attempt(partial(_graphed_from, make)) if supported else Absent(why)
        floor = Floor(bytes=bytes_ * sum(self.counts), flops=0, dtype=torch.float32)
        self.bench(variants, floor=floor, check=agreement(("weights",), 1e-5))

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(flat.split(self.counts), self.shapes, strict=True)]


def _checked(made: Made) -> Call:
    """A call that returns the weights: compared after the first step."""
    weights, step = made

    def call() -> tuple[Tensor]:
        step()
        return (weights,)

    return call


def _graphed(made: Made) -> Call:
    """Not compared: capturing has taken steps before the first call."""
    return Graphed(lambda: (made[1](), None)[1])


def _graphed_from(make: Callable[[], Made]) -> Call:
    return _graphed(make())


def _apex(name: str) -> Any:
    try:
        return getattr(importlib.import_module("apex.optimizers"), name)
    except (ImportError, AttributeError) as error:  # the package of that name on PyPI is another
        raise Unavailable(f"NVIDIA apex: {error}") from error
