"""The gated head with a vocabulary: mix, header, loss and the gradients of both representations, gate and weight.

Ours counts correct predictions as well, which the fused baselines do not. The operands are random: CCE, which unless
told otherwise skips gradients that hardly count, then skips nearly all but the targets', and its row says how far off
that is.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmoe.kernels.gated_lm_head_launch import SLAB_BYTES, Gradients, Scratch
from fedmoe.profiling.bench import Absent, Bench, Call, Floor, Unavailable, attempt, sizes
from tests.bench.variants import agreement, compiled, compiler, differentiated, plain_mix, tolerance

NAMES = ("loss", "d_global", "d_local", "d_gate", "d_weight")
CHUNKS = 2
"""Of the rows, wherever that can be chosen: as many as ours takes at this size."""
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}
LIGER_OPTIONS = {"label_smoothing": 0.1, "lse_square_scale": 1e-4, "softcap": 30.0}


@sizes("tokens, width, vocabulary, dtype", full=[(8192, 4096, 128256, "bfloat16")], tiny=[(24, 16, 100, "float32")])
def test_gated_lm_head(gpu_benchmark: Bench, tokens: int, width: int, vocabulary: int, dtype: str) -> None:
    bench, kind, fp32 = gpu_benchmark, getattr(torch, dtype), torch.float32
    leaves, targets = operands(bench, tokens, width, vocabulary, kind)

    def baseline(make: Callable[[], Callable[..., Tensor]]) -> Call | Absent:
        """A loss of mixed representations [T, D], weight and targets, with the mix in front."""

        def set_up() -> Call:
            loss = make()
            return differentiated(lambda g, l, gate, weight: (loss(plain_mix(g, l, gate), weight, targets),), leaves)  # noqa: E741

        return attempt(set_up)

    def whole(global_: Tensor, local: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (eager(plain_mix(global_, local, gate), weight, targets),)

    # Liger takes as many chunks as the vocabulary is wider than this many times the representation.
    liger_chunks = -(-vocabulary // (CHUNKS * width))
    bench(
        {
            f"three products, {CHUNKS} chunks": products(leaves, CHUNKS, fp32),
            "three products, whole": products(leaves, 1, kind),
            "eager": differentiated(whole, leaves),
            compiler(bench): differentiated(compiled(whole, bench), leaves),
            "F.linear_cross_entropy": baseline(lambda: in_torch()),
            "F.linear_cross_entropy, tuned": baseline(
                lambda: in_torch(batch_chunk_size=-(-tokens // CHUNKS), chunking_method=None, acc_policy="compact")
            ),
            "Liger": baseline(lambda: liger(bench)),
            "Liger, tuned": baseline(lambda: liger(bench, chunk_mem_const=liger_chunks)),
            "Liger, tuned, fp32 dW": baseline(lambda: liger(bench, chunk_mem_const=liger_chunks, accum_dtype=fp32)),
            "CCE": baseline(lambda: cce(bench)),
            "CCE, exact": baseline(lambda: cce(bench, filter_eps=None)),
            "ours": attempt(lambda: differentiated(ours(leaves, targets), leaves)),
            "ours, step": attempt(lambda: step(leaves, targets)),
            "ours, recomputing": attempt(
                lambda: differentiated(ours(leaves, targets, slab_bytes=small(bench)), leaves),
            ),
            "ours, step, recomputing": attempt(lambda: step(leaves, targets, small(bench))),
        },
        floor=floor(tokens, width, vocabulary, kind),
        check=agreement(NAMES, tolerance(kind)),
    )


@sizes("tokens, width, vocabulary, dtype", full=[(8192, 4096, 128256, "bfloat16")], tiny=[(24, 16, 100, "float32")])
def test_gated_lm_head_options(gpu_benchmark: Bench, tokens: int, width: int, vocabulary: int, dtype: str) -> None:
    """With a bias, smoothing, z-loss and softcap, for whose sake a kernel does more between the products."""
    bench, kind = gpu_benchmark, getattr(torch, dtype)
    leaves, targets = operands(bench, tokens, width, vocabulary, kind)
    leaves.append(torch.randn(vocabulary, device=bench.device, dtype=kind).requires_grad_())

    def whole(global_: Tensor, local: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        logits = F.linear(plain_mix(global_, local, gate), weight, bias).float()  # or bf16 would round the cap
        logits = OPTIONS["softcap"] * torch.tanh(logits / OPTIONS["softcap"])
        loss = F.cross_entropy(logits, targets, label_smoothing=OPTIONS["label_smoothing"])
        return (loss + OPTIONS["z_loss"] * logits.logsumexp(1).square().mean(),)

    def by_liger() -> Call:
        loss = liger(bench, chunk_mem_const=-(-vocabulary // (CHUNKS * width)), **LIGER_OPTIONS)
        return differentiated(
            lambda g, l, gate, weight, bias: (loss(plain_mix(g, l, gate), weight, targets, bias),),  # noqa: E741
            leaves,
        )

    bench(
        {
            "eager": differentiated(whole, leaves),
            compiler(bench): differentiated(compiled(whole, bench), leaves),
            "Liger, tuned": attempt(by_liger),
            "ours": attempt(lambda: differentiated(ours(leaves, targets, **OPTIONS), leaves)),
            "ours, step": attempt(lambda: step(leaves, targets, **OPTIONS)),
            "ours, step, recomputing": attempt(lambda: step(leaves, targets, small(bench), **OPTIONS)),
        },
        floor=floor(tokens, width, vocabulary, kind),
        check=agreement((*NAMES, "d_bias"), tolerance(kind)),
    )


def operands(bench: Bench, tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Representations, gate logits and header, and targets."""
    torch.manual_seed(0)
    shapes = (tokens, width), (tokens, width), (tokens, 2), (vocabulary, width)
    made = [torch.randn(*shape, device=bench.device, dtype=dtype) for shape in shapes]
    made[3] /= width**0.5
    return [t.requires_grad_() for t in made], torch.randint(0, vocabulary, (tokens,), device=bench.device)


def small(bench: Bench) -> int:
    """A slab so small that the logits are computed twice, a part of the vocabulary at a time."""
    return 2**26 if bench.full else 16 * 64 * 4


def eager(mixed: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss by all logits at once."""
    return F.cross_entropy(F.linear(mixed, weight), targets)


def in_torch(**options: Any) -> Callable[..., Tensor]:
    """PyTorch's own chunked loss, from 2.13 on."""
    return partial(F.linear_cross_entropy, options=nn.LinearCrossEntropyOptions(**options))


def liger(bench: Bench, **options: Any) -> Callable[..., Tensor]:
    """Liger's: its default is a chunk for every D of the vocabulary, dW in the weight's dtype."""
    _need_full(bench)
    module = importlib.import_module("liger_kernel.transformers.functional")
    return partial(module.liger_fused_linear_cross_entropy, **options)


def cce(bench: Bench, **options: Any) -> Callable[..., Tensor]:
    """Apple's, which computes logits twice and keeps none; exact without its filter of small gradients."""
    _need_full(bench)
    return partial(importlib.import_module("cut_cross_entropy").linear_cross_entropy, **options)


def _need_full(bench: Bench) -> None:
    """Not every library takes fp32, or as little as the tiny sizes are."""
    if not bench.full:
        raise Unavailable("compared on a GPU only, at full size")


def products(leaves: list[Tensor], chunks: int, accumulator: torch.dtype) -> Call:
    """The least that any of these does: logits, dR and dW by the library, into buffers made once, nothing in between.

    In chunks, as memory demands, dW is accumulated in `accumulator`. Returns nothing: there is no loss to compare.
    """
    mixed, weight = (t.detach() for t in (leaves[0], leaves[3]))
    rows = -(-len(mixed) // chunks)
    slab, d_mixed = mixed.new_empty(rows, len(weight)), torch.empty_like(mixed)
    d_weight = torch.empty_like(weight, dtype=accumulator)
    mixed_precision: Any = {} if accumulator == weight.dtype else {"out_dtype": accumulator}

    def call() -> None:
        for start in range(0, len(mixed), rows):
            chunk = mixed[start : start + rows]
            logits = slab[: len(chunk)]
            torch.mm(chunk, weight.t(), out=logits)
            torch.mm(logits, weight, out=d_mixed[start : start + rows])
            if start == 0:
                torch.mm(logits.t(), chunk, out=d_weight, **mixed_precision)
            else:
                torch.addmm(d_weight, logits.t(), chunk, out=d_weight, **mixed_precision)

    return call


def _module(leaves: list[Tensor], targets: Tensor) -> Any:
    """Ours, if it takes these."""
    module: Any = importlib.import_module("fedmoe.kernels.gated_lm_head")
    supported, why = module.gated_lm_head_supported(*_with_bias(leaves), targets)
    if not supported:
        raise Unavailable(why)
    return module


def _with_bias(leaves: Sequence[Tensor]) -> list[Any]:
    return [*leaves, None][:5]


def ours(leaves: list[Tensor], targets: Tensor, **options: Any) -> Callable[..., tuple[Tensor]]:
    """The differentiable entry."""
    head = _module(leaves, targets).gated_lm_head
    return lambda *given: (head(*_with_bias(given), targets, **options)[0],)


def step(leaves: list[Tensor], targets: Tensor, slab_bytes: int = SLAB_BYTES, **options: Any) -> Call:
    """The engine's entry, dW in fp32; what else it needs it allocates, so that its memory can be seen."""
    gated_lm_head_step = _module(leaves, targets).gated_lm_head_step
    given = _with_bias([t.detach() for t in leaves])
    d_rows = [torch.empty_like(t) for t in given[:3]]
    d_header = [None if t is None else torch.empty_like(t, dtype=torch.float32) for t in given[3:]]
    gradients = Gradients(d_rows[0], d_rows[1], d_rows[2], d_header[0], d_header[1])
    loss = torch.empty((), device=targets.device)
    correct = torch.empty((), dtype=torch.int64, device=targets.device)
    one, rows = torch.ones_like(loss), torch.full_like(loss, len(targets))

    def call() -> tuple[Tensor | None, ...]:
        keys = {"scale": one, "denominator": rows, "loss": loss, "correct": correct, "gradients": gradients}
        scratch = Scratch.empty(given[0], len(given[3]), slab_bytes)
        gated_lm_head_step(*given, targets, **keys, scratch=scratch, **options)
        return loss, *gradients[: len(leaves)]

    return call


def floor(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> Floor:
    """Every operand read once, its gradient written once: 2 (2 T D + 2 T + C D) numbers, T targets, the loss.

    Three products (logits, dR, dW) of 2 T D C FLOPs each.
    """
    numbers = 2 * tokens * width + 2 * tokens + vocabulary * width
    moved = 2 * numbers * dtype.itemsize + 8 * tokens + 4
    return Floor(bytes=moved, flops=3 * 2 * tokens * width * vocabulary, dtype=dtype)
