"""Launchers of the gated head for a vocabulary: scratch, chunks, and the order of products and kernels."""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedmoe.kernels import gated_mix
from fedmoe.kernels.gated_head_launch import Inputs, Options
from fedmoe.kernels.launch import Launch, fits, load

_kernels = load("gated_lm_head_kernels")

SLAB_BYTES = 2**30
MAX_CHUNKS = 8
"""More row chunks than this cost more in passes over the header's gradient than computing the logits twice."""


class Gradients(NamedTuple):
    """The buffers that gradients go to, each contiguous and of its operand's shape; None is not computed.

    The header's are fp32, because their sum over chunks would drift in less.
    """

    d_global: Tensor  # [B, D]
    d_local: Tensor  # [B, D]
    d_gate: Tensor  # [B, 2]
    d_weight: Tensor | None  # [C, D] fp32
    d_bias: Tensor | None  # [C] fp32


class Scratch(NamedTuple):
    """Working memory; its contents mean nothing between calls. The slab's shape decides how the work is cut.

    R rows are worked on at a time. If S >= C they are all rows' classes and the logits are computed once; otherwise S
    classes at a time, and the logits twice.
    """

    mixed: Tensor  # [B, D]
    slab: Tensor  # [R, S] logits, then their gradients; S a multiple of 64
    d_mixed: Tensor | None  # [R, D] fp32; None: no gradients
    losses: Tensor  # [B] fp32
    hits: Tensor  # [B] int32
    carried: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None  # 4 of [R] fp32, [R] int32; None if S >= C

    @classmethod
    def empty(
        cls, global_: Tensor, classes: int, slab_bytes: int = SLAB_BYTES, backward: bool = True
    ) -> "Scratch":  # for global_ [B, D]
        """Scratch for C classes, with as large a slab as helps and `slab_bytes` permits."""
        rows, width = global_.shape
        height, breadth = slab_shape(rows, classes, global_.element_size(), slab_bytes)
        fp32 = global_.new_empty(0, dtype=torch.float32)
        hits = fp32.new_empty(rows, dtype=torch.int32)
        return cls(
            global_.new_empty(rows, width),
            global_.new_empty(height, breadth),
            fp32.new_empty(height, width) if backward else None,
            fp32.new_empty(rows),
            hits,
            (*fp32.new_empty(4, height).unbind(), hits.new_empty(height)) if breadth < classes else None,  # type: ignore[arg-type]
        )

    def check(self, global_: Tensor, classes: int) -> None:  # for global_ [B, D]
        """Raise ValueError unless it serves a step with C classes."""
        if self.slab.ndim != 2 or self.slab.shape[0] < 1 or self.slab.shape[1] < 64 or self.slab.shape[1] % 64:
            raise ValueError(f"scratch.slab has shape {tuple(self.slab.shape)}, expected [R, a multiple of 64]")
        (rows, width), (height, breadth), fp32 = global_.shape, self.slab.shape, torch.float32
        if self.d_mixed is None or (breadth < classes and self.carried is None):
            raise ValueError(
                f"scratch lacks d_mixed or carried, expected what Scratch.empty makes for {classes} classes"
            )
        kinds = fp32, fp32, fp32, fp32, torch.int32
        for name, tensor, shape, dtype in (
            ("mixed", self.mixed, (rows, width), global_.dtype),
            ("slab", self.slab, (height, breadth), global_.dtype),
            ("d_mixed", self.d_mixed, (height, width), fp32),
            ("losses", self.losses, (rows,), fp32),
            ("hits", self.hits, (rows,), torch.int32),
            *((f"carried[{k}]", t, (height,), kinds[k]) for k, t in enumerate(self.carried or ())),
        ):
            fits(f"scratch.{name}", tensor, shape, dtype, global_.device)


def slab_shape(rows: int, classes: int, element: int, slab_bytes: int) -> tuple[int, int]:  # R, S
    """The slab for B rows and C classes: as few equal row chunks as fit, beyond `MAX_CHUNKS` fewer classes at a time.

    S is a multiple of 64, so that every row is aligned for the products. Raises ValueError where `slab_bytes` is less
    than a slab of 64 classes.
    """
    whole = _aligned(classes)
    for chunks in range(1, MAX_CHUNKS + 1):
        height = min(rows, -(-rows // (16 * chunks)) * 16)
        if height * whole * element <= slab_bytes:
            break
    breadth = min(whole, slab_bytes // (height * element) // 64 * 64)
    if breadth < 64:
        raise ValueError(f"slab_bytes is {slab_bytes}, at least {height * element * 64} are needed for {rows} rows")
    return height, breadth


def _aligned(classes: int) -> int:
    return -(-classes // 64) * 64


def sweep(
    inputs: Inputs,  # the last of which is token_weights [B]
    options: Options,
    scratch: Scratch,
    scale: Tensor | None = None,  # [] or [B] fp32, the gradients' factor
    denominator: Tensor | None = None,  # [] fp32, the gradients' divisor
    gradients: Gradients | None = None,
    add: Collection[str] = (),  # gradients that are added to
) -> None:
    """All rows' losses and hits into `scratch`, and with `gradients` those too; nothing is read back to the host."""
    global_, local, gate, weight, bias, targets, token_weights = inputs
    rows, classes = len(global_), len(weight)
    height, breadth = scratch.slab.shape
    slabs = [(start, min(classes, start + breadth)) for start in range(0, classes, breadth)]
    gated_mix.forward_launch(global_, local, gate, scratch.mixed).run()
    for first in range(0, rows, height):
        at = slice(first, min(rows, first + height))
        mixed, count = scratch.mixed[at], at.stop - first
        own = (
            bias,
            targets[at],
            None if token_weights is None else token_weights[at],
            scale if scale is None or scale.ndim == 0 else scale[at],
            denominator,
            scratch.losses[at],
            scratch.hits[at],
        )
        whole, writes = len(slabs) == 1, add if first == 0 else ("d_weight", "d_bias")
        if not whole:
            for start, stop in slabs:
                logits = scratch.slab[:count, : stop - start]
                product(mixed, weight[start:stop].T, logits)
                losses_launch(own, options, scratch, logits, start, classes, True, False).run()
        if whole or gradients is not None:
            for start, stop in slabs:
                logits = scratch.slab[:count, : stop - start]
                product(mixed, weight[start:stop].T, logits)
                losses_launch(own, options, scratch, logits, start, classes, whole, gradients is not None).run()
                if gradients is not None:
                    _products(logits, mixed, weight, gradients, scratch, start, writes)
        if gradients is not None:
            assert scratch.d_mixed is not None
            out = gradients.d_global[at], gradients.d_local[at], gradients.d_gate[at]
            gated_mix.backward_launch(scratch.d_mixed[:count], global_[at], local[at], gate[at], out, add).run()


def _products(
    d_logits: Tensor,  # [R, V]
    mixed: Tensor,  # [R, D]
    weight: Tensor,  # [C, D]
    gradients: Gradients,
    scratch: Scratch,
    start: int,
    add: Collection[str],
) -> None:
    assert scratch.d_mixed is not None
    rows, classes = d_logits.shape
    part = slice(start, start + classes)
    product(d_logits, weight[part], scratch.d_mixed[:rows], add=start > 0)
    if gradients.d_weight is not None:
        product(d_logits.T, mixed, gradients.d_weight[part], add="d_weight" in add)
    if gradients.d_bias is not None:
        bias_launch(d_logits, gradients.d_bias[part], "d_bias" in add).run()


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, summed and kept in the dtype of `out`: that of `a`, or fp32."""
    if out.dtype != a.dtype and not a.is_cuda:  # with interpreted kernels; out_dtype is CUDA's alone
        a, b = a.to(out.dtype), b.to(out.dtype)
    wider: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, **wider, out=out)
    else:
        torch.mm(a, b, **wider, out=out)


Row = tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]
"""bias [C], then of the chunk: targets, token_weights, scale, denominator, losses, hits."""


def losses_launch(
    own: Row,
    options: Options,
    scratch: Scratch,
    logits: Tensor,  # [R, V]
    start: int,
    classes: int,
    statistics: bool,
    gradient: bool,
) -> Launch:
    """Losses and hits, the statistics for them, or the gradient of the logits, of one slab."""
    assert _kernels is not None
    bias, targets, token_weights, scale, denominator, losses, hits = own
    rows, breadth = logits.shape
    block, warps = _kernels.ROW_TILE
    block = min(block, max(128, 1 << (breadth - 1).bit_length()))
    carried = scratch.carried or (None,) * 5
    return Launch(
        _kernels.losses_kernel,
        (rows,),
        {
            "logits": logits,
            "bias": None if bias is None else bias[start : start + breadth],
            "targets": targets,
            "token_weights": token_weights,
            "scale": scale if gradient else None,
            "denominator": denominator if gradient else None,
            "losses": losses,
            "hits": hits,
            **dict(zip(("top", "others", "gaps", "target_logit", "best"), carried, strict=True)),
        },
        {
            "C": classes,
            "V": breadth,
            "HELD": _aligned(breadth),
            "LOGITS_R": logits.stride(0),
            "BIAS_C": 0 if bias is None else bias.stride(0),
            "TARGETS_R": targets.stride(0),
            "TOKEN_WEIGHTS_R": 0 if token_weights is None else token_weights.stride(0),
            "SCALE_R": 1 if scale is not None and scale.ndim else 0,
            "IGNORE": options.ignore_index,
            "SMOOTHING": options.label_smoothing,
            "Z_LOSS": options.z_loss,
            "SOFTCAP": options.softcap,
            "STATISTICS": statistics,
            "FIRST": statistics and start == 0,
            "LAST": statistics and start + breadth == classes,
            "GRADIENT": gradient,
            "BLOCK_V": block,
        },
        {"START": start},
        warps,
        1,
    )


def bias_launch(d_logits: Tensor, d_bias: Tensor, add: bool) -> Launch:
    """The bias's gradient of one slab."""
    assert _kernels is not None
    block_r, block_v, warps = _kernels.BIAS_TILE
    rows, breadth = d_logits.shape
    return Launch(
        _kernels.bias_kernel,
        (-(-breadth // block_v),),
        {"d_logits": d_logits, "d_bias": d_bias},
        {
            "V": breadth,
            "HELD": _aligned(breadth),
            "LOGITS_R": d_logits.stride(0),
            "ADD_BIAS": add,
            "BLOCK_R": block_r,
            "BLOCK_V": block_v,
        },
        {"R": rows},
        warps,
        2,
    )
