"""The gather-augment-normalize kernel in Triton's interpreter: the oracle's bits, every layout, and planted bugs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe.data import normalize
from fedmoe.kernels import gather, gather_kernels
from fedmoe.kernels.gather import gather_augment, gather_augment_step, gather_augment_supported
from fedmoe.kernels.gather_oracle import gather_augment as plain
from tests.heads import assert_within_rule
from tests.images import Batch, assert_same, batch
from tests.planted import planted

FP32, FP16 = torch.float32, torch.float16
SHAPES = [(1, 28, 28), (3, 32, 32), (3, 5, 9), (1, 1, 1), (2, 33, 17), (4, 1, 7)]


def check(operands: Batch, dtype: torch.dtype = FP32, channels_last: bool = False) -> None:
    """Both entries, the step into buffers that hold something else."""
    expected = plain(*operands, dtype=dtype, channels_last=channels_last)
    x, y = gather_augment(*operands, dtype=dtype, channels_last=channels_last)
    form = torch.channels_last if channels_last else torch.contiguous_format
    assert x.dtype == dtype and x.is_contiguous(memory_format=form)
    assert_same((x, y), expected)
    x, y = torch.full_like(expected[0], 77), torch.full_like(expected[1], 77)
    gather_augment_step(*operands, out=x, targets=y)
    assert_same((x, y), expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_oracle(shape: tuple[int, int, int], dtype: torch.dtype, channels_last: bool) -> None:
    check(batch(9, 5, shape), dtype, channels_last)
    check(batch(9, 5, shape, 4), dtype, channels_last)


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_is_within_the_rule(dtype: torch.dtype) -> None:
    operands = batch(9, 8, (3, 12, 12), 2)
    double = operands._replace(mean=operands.mean.double(), std=operands.std.double())
    exact, _ = plain(*double, dtype=torch.float64)
    assert_within_rule("x", gather_augment(*operands, dtype=dtype)[0], plain(*operands, dtype=dtype)[0], exact)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    samples=st.integers(1, 20),
    rows=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 33),
    width=st.integers(1, 33),
    shift=st.sampled_from([None, 0, 1, 4, 33, 100]),
    dtype=st.sampled_from([FP32, FP16]),
    channels_last=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_shape(
    samples: int,
    rows: int,
    channels: int,
    height: int,
    width: int,
    shift: int | None,
    dtype: torch.dtype,
    channels_last: bool,
    seed: int,
) -> None:
    check(batch(samples, rows, (channels, height, width), shift, seed), dtype, channels_last)


def test_every_pixel_value() -> None:
    """All 256 values under many means and deviations: every division is rounded as PyTorch's."""
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 32, 16, 16)
    mean, std = torch.rand(2, 32, generator=torch.Generator().manual_seed(0)) + 0.01
    check(Batch(images, torch.tensor([1]), torch.tensor([0]), mean, std, None))


def test_shifts_at_the_border_and_beyond() -> None:
    operands = batch(4, 14, (3, 5, 7), 1)
    extreme = 2**31 - 1
    rows = [(d, 0) for d in (4, 5, -4, -5, extreme, -extreme - 1)] + [(0, d) for d in (6, 7, -6, -7, extreme)]
    shifts = [*rows, (4, -6), (-5, 7), (extreme, -extreme)]
    for flip in (0, 1, 5, -1):
        drawn = torch.tensor([(*shift, flip) for shift in shifts], dtype=torch.int32)
        check(operands._replace(augmentation=drawn))


def test_operands_that_are_not_contiguous() -> None:
    operands = batch(9, 6, (3, 6, 10), 2)
    images, labels, indices, mean, std, drawn = operands
    assert drawn is not None
    strided = Batch(
        images.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
        torch.stack([labels, labels], 1)[:, 1],
        torch.stack([indices, indices], 1)[:, 0],
        mean[:1].expand(3),
        torch.stack([std, std], 1)[:, 0],
        drawn.T.contiguous().T,
    )
    assert not any(t.is_contiguous() for t in strided if t is not None)
    for last in (False, True):
        check(strided, FP32, last)
    check(operands._replace(images=images.contiguous(memory_format=torch.channels_last), indices=indices.int()))
    check(operands._replace(images=images[2:, :, 1:4, ::3], labels=labels[2:], indices=indices % 7))
    check(operands._replace(indices=indices[1:4], augmentation=drawn[1:4]))


def test_an_index_out_of_range_is_noticeable_and_reads_nothing() -> None:
    images, labels, indices, mean, std, drawn = batch(9, 6, (3, 4, 6), 1)
    indices[:] = torch.tensor([0, 6, -1, 5, 2**40, -(2**40)])
    # Six samples of nine: a read beyond them would find another sample rather than fail.
    for augmentation in (None, drawn):
        operands = Batch(images[:6], labels[:6], indices, mean, std, augmentation)
        x, y = gather_augment(*operands)
        assert x[[1, 2, 4, 5]].isnan().all() and not x[[0, 3]].isnan().any()
        assert y.tolist() == [labels[0], -1, -1, labels[5], -1, -1]
        check(operands, FP16, True)


def test_two_runs_give_the_same_bits() -> None:
    operands = batch(9, 6, (3, 32, 32), 4)
    assert_same(gather_augment(*operands), gather_augment(*operands))


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.1307, 0.3081)])
def test_is_what_the_plain_loop_trains_on(mean: float, std: float) -> None:
    images, labels, indices, *_ = batch(9, 6, (1, 28, 28))
    x, y = gather_augment(images, labels, indices, torch.tensor([mean]), torch.tensor([std]))
    assert_same((x, y), (normalize(images[indices], mean, std), labels[indices]))


def test_step_writes_only_its_buffers() -> None:
    operands = batch(9, 4, (3, 10, 10), 2)
    around = torch.full((6, 3, 10, 10), 77.0)
    targets = torch.full((6,), 77)
    gather_augment_step(*operands, out=around[1:5], targets=targets[1:5])
    assert_same((around[1:5], targets[1:5]), plain(*operands))
    assert (around[[0, 5]] == 77).all() and targets[[0, 5]].tolist() == [77, 77]


def test_opcheck() -> None:
    for shift, channels_last in ((None, False), (2, True)):
        arguments = (*batch(5, 4, (3, 6, 6), shift), FP16, channels_last)
        torch.library.opcheck(torch.ops.fedmoe.gather_augment.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    operands = batch(5, 4, (3, 6, 6), 2)

    def doubled(*tensors: Any) -> tuple[Tensor, Tensor]:
        x, y = gather_augment(*tensors, channels_last=True)
        return x * 2, y

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    x, y = compiled(*operands)
    assert_same((x, y), doubled(*operands))
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_vmap() -> None:
    clients = [batch(5, 4, (3, 6, 6), 2, seed=k) for k in range(3)]
    images, labels, indices, drawn = (torch.stack([c[k] for c in clients]) for k in (0, 1, 2, 5))  # type: ignore[misc]
    _, _, _, mean, std, _ = clients[0]

    def gathered(images: Tensor, labels: Tensor, indices: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        return gather_augment(images, labels, indices, mean, std, drawn, channels_last=True)

    x, y = torch.func.vmap(gathered)(images, labels, indices, drawn)
    for k, client in enumerate(clients):
        assert_same((x[k], y[k]), plain(*client._replace(mean=mean, std=std)))
    x, y = torch.func.vmap(gathered, in_dims=(None, None, 0, None))(images[0], labels[0], indices, drawn[0])
    assert_same((x[1], y[1]), plain(*clients[0]._replace(indices=indices[1])))


def test_wrong_arguments() -> None:
    operands = batch(5, 4, (3, 6, 8))
    x, y = torch.empty(4, 3, 6, 8), torch.empty(4, dtype=torch.int64)
    assert gather_augment_supported(*operands) == (True, "")
    with pytest.raises(ValueError, match=r"images is torch\.float32, not one of \(torch\.uint8"):
        gather_augment(*operands._replace(images=operands.images.float()))
    with pytest.raises(ValueError, match="there is nothing to do for 0 samples"):
        gather_augment(*operands._replace(indices=operands.indices[:0]))
    with pytest.raises(ValueError, match=r"dtype is torch\.float64"):
        gather_augment(*operands, dtype=torch.float64)
    for out, message in (
        (x[:3], r"out has shape \(3, 3, 6, 8\).* expected contiguous or channels-last \(4, 3, 6, 8\)"),
        (x.transpose(2, 3).contiguous().transpose(2, 3), "out has shape"),
        (x.contiguous(memory_format=torch.channels_last)[:3], r"out has shape \(3, 3, 6, 8\)"),
        (x[0], r"out has shape \(3, 6, 8\)"),
        (x.double(), r"out is torch\.float64"),
        (x.int(), r"out is torch\.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            gather_augment_step(*operands, out=out, targets=y)
    with pytest.raises(ValueError, match=r"targets is torch\.int32, expected torch\.int64"):
        gather_augment_step(*operands, out=x, targets=y.int())
    with pytest.raises(ValueError, match=r"targets has shape \(3,\)"):
        gather_augment_step(*operands, out=x, targets=y[:3])


BUGS = {
    "flipped before it is cropped": (
        "tl.where(flip != 0, W - 1 - w, w) + tl.load(drawn + AUGMENTATION_K)",
        "tl.where(flip != 0, W - 1 - w - tl.load(drawn + AUGMENTATION_K), w + tl.load(drawn + AUGMENTATION_K))",
    ),
    "padded with a normalized zero": ("tl.where(known, value,", "tl.where(inside, value, 0.0) + tl.where(known, 0.0,"),
    "the next channel's mean": ("mean + c * MEAN_C", "mean + (c + 1) % C * MEAN_C"),
    "shifted the other way": ("h += tl.load(drawn)", "h -= tl.load(drawn)"),
    "divided by 256": ("255, tl.float32", "256, tl.float32"),
    "an index of N taken": ("(index < N)", "(index <= N)"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, indices, *others = batch(9, 6, (3, 6, 7), 2)
    indices[2] = 8
    operands = Batch(images[:8], labels[:8], indices % 9, *others)  # type: ignore[arg-type]
    check(operands)
    right, wrong = BUGS[bug]
    monkeypatch.setattr(gather, "_kernels", planted(gather_kernels, right, wrong, tmp_path))
    with pytest.raises(AssertionError, match="values are different"):
        check(operands)
