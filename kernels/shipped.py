"""Every kernel in every configuration that is shipped: what the tests compile, and `fedmoe doctor --kernels` lists."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fedmoe.kernels import accumulate, gather
from fedmoe.kernels import flat_optimizer_shipped as optimizer
from fedmoe.kernels import gated_head_launch as head
from fedmoe.kernels import gated_lm_head_launch as lm_head
from fedmoe.kernels import gated_mix as mix
from fedmoe.kernels.gated_head import BUFFERS
from fedmoe.kernels.gated_head_kernels import SHIPPED
from fedmoe.kernels.gated_lm_head_kernels import SHIPPED as LM_SHIPPED
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
        for dtype, width, classes, full, breadth in LM_SHIPPED:
            yield from _lm_heads(getattr(torch, dtype), width, classes, full, breadth)
        for kind in (torch.bfloat16, torch.float32):
            yield from _mixes(kind)
        for made in (*gather.shipped(), *accumulate.shipped(), *optimizer.shipped()):
            yield Shipped(*made, False, 0)


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


def _lm_heads(
    dtype: torch.dtype, width: int, classes: int, full: bool, breadth: int, rows: int = 4096
) -> Iterator[Shipped]:
    def optional(size: int, kind: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(size, dtype=kind) if full else None

    options = head.Options(-100, 0.1, 1e-4, 30.0) if full else head.Options()
    global_ = torch.empty(rows, width, dtype=dtype)
    chunk = rows if breadth == classes else rows // lm_head.MAX_CHUNKS
    scratch = lm_head.Scratch.empty(global_, classes, chunk * dtype.itemsize * (-(-breadth // 64) * 64))
    logits = scratch.slab[:, :breadth]
    factors = optional(rows), torch.empty(()), torch.empty(())
    out = scratch.losses, scratch.hits
    own = optional(classes, dtype), torch.empty(rows, dtype=torch.int64), *factors, *out
    text = f"{_name(dtype)} C={classes} {'all options' if full else 'plain'}"
    passes = [("losses and gradient", True, True)]
    if breadth < classes:
        text += f", {breadth} at a time"
        passes = [("losses", True, False), ("gradient", False, True)]
    for name, statistics, gradient in passes:
        call = lm_head.losses_launch(own, options, scratch, logits, 0, classes, statistics, gradient)
        yield Shipped(f"gated_lm_head {name}", text, call, False, 0)
    if full and breadth == classes:
        bias = lm_head.bias_launch(logits, torch.empty(classes), True)
        yield Shipped("gated_lm_head bias", text, bias, False, 0)
        mixed, wide = logits.new_empty(rows, width), torch.empty(rows, width)
        gate = mixed.new_empty(rows, 2)
        call = mix.backward_launch(wide, mixed, mixed, gate, (mixed, mixed, gate))
        yield Shipped("gated_mix backward", f"{_name(dtype)} D={width}, from fp32", call, False, 0)


def _mixes(dtype: torch.dtype) -> Iterator[Shipped]:
    r, gate = torch.empty(64, 500, dtype=dtype), torch.empty(64, 2, dtype=dtype)
    text = f"{_name(dtype)} D=500"
    yield Shipped("gated_mix forward", text, mix.forward_launch(r, r, gate, r), False, 0)
    yield Shipped("gated_mix backward", text, mix.backward_launch(r, r, r, gate, (r, r, gate)), False, 0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
