"""Gathering and augmenting on the device: the written-out statement's bits; eager, in a graph, never synchronizing."""

import pytest
import torch

from fedmoe.data import normalize
from fedmoe.kernels.gather import gather_augment, gather_augment_step, gather_augment_supported
from fedmoe.kernels.gather_oracle import gather_augment as plain
from tests.images import Batch, assert_same, written_out
from tests.images import batch as on_cpu
from tests.synchronization import without_synchronization

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch(samples: int, rows: int, shape: tuple[int, int, int], shift: int | None = None) -> Batch:
    made = on_cpu(samples, rows, shape, shift, device="cuda")
    supported, reason = gather_augment_supported(*made)
    if not supported:
        pytest.skip(reason)
    return made


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [None, 4, 40])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 31, 33)])
def test_is_what_is_written_out(
    shape: tuple[int, int, int], shift: int | None, dtype: torch.dtype, channels_last: bool
) -> None:
    given = batch(500, 65, shape, shift)
    given.indices[:3] = torch.tensor([500, -1, 2**40], device="cuda")
    actual = gather_augment(*given, dtype=dtype, channels_last=channels_last)
    form = torch.channels_last if channels_last else torch.contiguous_format
    assert actual[0].dtype == dtype and actual[0].is_contiguous(memory_format=form)
    assert_same(actual, written_out(given))
    assert_same(actual, plain(*given, dtype=dtype))
    assert_same(actual, gather_augment(*given, dtype=dtype, channels_last=channels_last))


def test_is_what_the_plain_loop_trains_on() -> None:
    """Within rounding: CUDA multiplies by reciprocals where PyTorch's CPU code and the kernel divide."""
    images, labels, indices, *_ = batch(500, 64, (3, 32, 32))
    mean, std = torch.full((2, 3), 0.25, device="cuda")
    x, y = gather_augment(images, labels, indices, mean, std)
    torch.testing.assert_close(x, normalize(images[indices], 0.25, 0.25), rtol=1e-6, atol=1e-6)
    assert torch.equal(y, labels[indices])


def test_slices_of_an_epoch_at_any_offset() -> None:
    given = batch(100, 100, (1, 9, 9), 2)
    assert given.augmentation is not None
    for start in (0, 1, 7):
        at = slice(start, start + 33)
        part = given._replace(indices=given.indices[at], augmentation=given.augmentation[at])
        assert_same(gather_augment(*part), written_out(part))


@pytest.mark.parametrize("channels_last", [False, True])
def test_in_a_graph_without_synchronization(channels_last: bool) -> None:
    first = batch(500, 64, (3, 32, 32), 4)
    assert first.augmentation is not None
    second = first._replace(indices=first.indices.flip(0), augmentation=first.augmentation.flip(0))
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(64, 3, 32, 32, dtype=torch.bfloat16, device="cuda", memory_format=form)
    y = torch.empty(64, dtype=torch.int64, device="cuda")
    static = first._replace(indices=first.indices.clone(), augmentation=first.augmentation.clone())
    assert static.augmentation is not None and second.augmentation is not None
    with without_synchronization():
        gather_augment_step(*static, out=x, targets=y)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather_augment_step(*static, out=x, targets=y)
    with without_synchronization():
        static.indices.copy_(second.indices)  # read at replay
        static.augmentation.copy_(second.augmentation)
        graph.replay()
    assert_same((x, y), written_out(second))


def test_images_beyond_two_to_the_31_bytes() -> None:
    samples, shape = 2**31 // 3072 + 10, (3, 32, 32)
    if torch.cuda.mem_get_info()[0] < 2**32:
        pytest.skip("needs 4 GB of free GPU memory")
    images = torch.zeros(samples, *shape, dtype=torch.uint8, device="cuda")
    images[-1] = 255
    labels = torch.arange(samples, device="cuda")
    indices = torch.tensor([samples - 1, 0], device="cuda")
    mean, std = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    x, y = gather_augment(images, labels, indices, mean, std)
    assert bool((x[0] == 1).all()) and bool((x[1] == 0).all()) and y.tolist() == [samples - 1, 0]
