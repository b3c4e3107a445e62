"""Every kernel in every configuration that is shipped: what the tests compile, and `fedmoe doctor --kernels` lists."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fedmoe.kernels import flat_optimizer_shipped as flat
from fedmoe.kernels import gated_head_launch as head
from fedmoe.kernels import gated_mix as mix
from fedmoe.kernels.gated_head import BUFFERS
from fedmoe.kernels.gated_head_kernels import SHIPPED
from fedmoe.kernels.launch import Launch


class Shipped(NamedTuple):
    """A launch on tensors without memory, and what its code must hold."""

    kernel: str
    configuration: str
    launch: Launch
    tensor_cores: bool  # must use them; without, must not
    copy: int  # bytes that its widest asynchronous copy must have at least


def shipped() -> Iterator[Shipped]:
    """All of them, kernel by kernel."""
    with torch.device("meta"):
        for dtype, width, classes, full in SHIPPED:
            yield from _heads(getattr(torch, dtype), width, classes, full)
        for kind in (torch.bfloat16, torch.float32):
            yield from _mixes(kind)
        for kernel, configuration, launch in flat.configurations():
            yield Shipped(kernel, configuration, launch, False, 0)


def _heads(dtype: torch.dtype, width: int, classes: int, full: bool, rows: int = 64) -> Iterator[Shipped]:
    fp32, size = torch.empty(()), dtype.itemsize
    inputs: head.Inputs = (
        torch.empty(rows, width, dtype=dtype),
        torch.empty(rows, width, dtype=dtype),
        torch.empty(rows, 2, dtype=dtype),
        torch.empty(classes, width, dtype=dtype),
        torch.empty(classes, dtype=dtype) if full else None,
        torch.empty(rows, dtype=torch.int64),
        torch.empty(classes) if full else None,
    )
    options = head.Options(-100, 0.1, 1e-4, 30.0) if full else head.Options()
    add = BUFFERS if full else ()
    scratch = head.Scratch.empty(rows, classes, "meta")
    correct = torch.empty((), dtype=torch.int64)
    gradients = torch.empty(classes, width), torch.empty(classes) if full else None
    tensor_cores, widest = size == 2, min(16, size * (width & -width))  # as wide as D's divisibility allows

    def named(kernel: str, call: Launch, how: str = "") -> Shipped:
        copy = widest if kernel == "header" or width > call.constants["BLOCK_D"] else 0  # else nothing to overlap with
        text = f"{_name(dtype)} D={width} C={classes} {'all options' if full else 'plain'}{how}"
        return Shipped(f"gated_head {kernel}", text, call, tensor_cores, copy)

    yield named("rows", head.rows_launch(inputs, options, scratch, fp32, fp32, inputs[:3], add))
    yield named("header", head.header_launch(inputs, scratch, fp32, fp32, fp32, correct, gradients, add))
    if (width, classes) == (500, 100):
        scales: Tensor = torch.empty(rows)
        yield named("forward", head.rows_launch(inputs, options, scratch))
        one_each = ", a factor a row"
        yield named("rows", head.rows_launch(inputs, options, scratch, scales, fp32, inputs[:3], add), one_each)
        yield named("header", head.header_launch(inputs, scratch, scales, fp32, None, None, gradients), one_each)
    if (width, classes, full, size) == (500, 10, True, 4):
        yield Shipped("gated_head totals", "mean", head.totals_launch(scratch, fp32, correct, fp32, True), False, 0)


def _mixes(dtype: torch.dtype) -> Iterator[Shipped]:
    r, gate = torch.empty(64, 500, dtype=dtype), torch.empty(64, 2, dtype=dtype)
    text = f"{_name(dtype)} D=500"
    yield Shipped("gated_mix forward", text, mix.forward_launch(r, r, gate, r), False, 0)
    yield Shipped("gated_mix backward", text, mix.backward_launch(r, r, r, gate, (r, r, gate)), False, 0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
