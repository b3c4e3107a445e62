"""Batches gathered and augmented: the oracle, draws, refusals; the kernel is tested by `tests/interpreter`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedmoe.config import Config
from fedmoe.kernels import gather, launch
from fedmoe.kernels.gather import gather_augment, gather_augment_supported
from fedmoe.kernels.gather_oracle import draw_augmentation
from fedmoe.kernels.gather_oracle import gather_augment as plain
from fedmoe.reference import ReferenceEngine
from tests.images import Batch, assert_same, batch, written_out
from tests.support import changed


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 5, 9), (2, 7, 1)])
@pytest.mark.parametrize("shift", [None, 0, 4, 40])
def test_oracle_is_what_is_written_out(shape: tuple[int, int, int], shift: int | None) -> None:
    given = batch(20, 16, shape, shift)
    assert_same(plain(*given), written_out(given))
    x, _ = plain(*given, dtype=torch.bfloat16, channels_last=True)
    assert x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, written_out(given)[0].bfloat16())


def test_oracle_of_two_by_three_pixels() -> None:
    """One row down, one column to the right, then mirrored: outside are pixels of 0, not zeros."""
    image = torch.tensor([[[[51, 102, 153], [204, 255, 0]]]], dtype=torch.uint8)
    half, one = torch.tensor([0.5]), torch.ones(1)
    drawn = torch.tensor([[1, -1, 0], [1, -1, 1]], dtype=torch.int32)
    x, y = plain(image, torch.tensor([7]), torch.tensor([0, 0]), half, one, drawn)
    crop = torch.tensor([[0, 0.8, 1], [0, 0, 0]]) - 0.5
    torch.testing.assert_close(x[:, 0], torch.stack([crop, crop.flip(1)]))
    assert y.tolist() == [7, 7]


def test_oracle_in_double_precision() -> None:
    given = batch(5, 4, (3, 6, 6), 2)
    x, _ = plain(*given[:3], given.mean.double(), given.std.double(), given.augmentation, dtype=torch.float64)
    torch.testing.assert_close(x, written_out(given)[0].double(), rtol=1e-5, atol=1e-6)


def test_oracle_makes_an_unknown_index_noticeable() -> None:
    given = batch(5, 6, (3, 4, 4), 1)
    given.indices[1], given.indices[4] = 5, -1
    x, y = plain(*given)
    assert x[[1, 4]].isnan().all() and not x[[0, 2, 3, 5]].isnan().any()
    assert y[[1, 4]].tolist() == [-1, -1]
    assert_same((x, y), written_out(given))


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.1307, 0.3081)])
def test_oracle_is_a_clients_batch(
    config: Config, opened: Callable[[Config], ReferenceEngine], mean: float, std: float
) -> None:
    client = opened(changed(config, data={"mean": mean, "std": std})).client(1)
    indices = torch.tensor([3, 0, 3, 11])
    given = Batch(client.inputs, client.labels, indices, torch.tensor([mean]), torch.tensor([std]), None)
    assert_same(plain(*given), client.batch(indices))


def draw(samples: int, padding: int, flip: bool, seed: int = 0) -> torch.Tensor:
    return draw_augmentation(samples, padding, flip, torch.Generator().manual_seed(seed))


def test_draws_reach_both_ends_and_no_further() -> None:
    drawn = draw(2000, 4, True)
    assert drawn.shape == (2000, 3) and drawn.dtype == torch.int32 and drawn.device.type == "cpu"
    for column, values in enumerate((range(-4, 5), range(-4, 5), range(2))):
        found, counts = drawn[:, column].unique(return_counts=True)
        assert found.tolist() == list(values)
        # Six standard deviations of a uniform draw.
        share = 1 / len(values)
        assert (counts - 2000 * share).abs().max() < 6 * (2000 * share * (1 - share)) ** 0.5
    assert (torch.corrcoef(drawn.T.double()) - torch.eye(3)).abs().max() < 0.1


def test_draws_follow_from_the_generator_alone() -> None:
    torch.manual_seed(1)
    first = draw(50, 2, True)
    torch.manual_seed(2)
    assert torch.equal(draw(50, 2, True), first)
    assert not torch.equal(draw(50, 2, True, seed=1), first)
    without = draw(50, 2, False)
    assert torch.equal(without[:, :2], first[:, :2]) and not without[:, 2].any()
    assert not draw(50, 0, False).any()
    assert draw(0, 2, True).shape == (0, 3)


def test_draws_refuse_negative_sizes() -> None:
    with pytest.raises(ValueError, match="samples is 5, padding is -1"):
        draw(5, -1, True)
    with pytest.raises(ValueError, match="samples is -5, padding is 1"):
        draw(-5, 1, True)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"images": torch.zeros(5, 4, 4)}, r"images has shape \(5, 4, 4\), indices \(6,\), expected \[N, C, H, W\]"),
    ({"indices": torch.zeros(2, 2)}, r"indices \(2, 2\), expected"),
    ({"labels": torch.zeros(4)}, r"labels has shape \(4,\), expected \(5,\)"),
    ({"mean": torch.tensor(0.5)}, r"mean has shape \(\), expected \(3,\)"),
    ({"std": torch.ones(1)}, r"std has shape \(1,\), expected \(3,\)"),
    ({"augmentation": torch.zeros(5, 3)}, r"augmentation has shape \(5, 3\), expected \(6, 3\)"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda value: next(iter(value)) if value else "")
def test_wrong_shapes(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gather_augment(*batch(5, 6, (3, 4, 4), 1)._replace(**wrong))


def test_another_dtype_is_refused() -> None:
    expected = "dtype is torch.float64, expected one of" if launch.INTERPRETED else "gather_augment: "
    with pytest.raises(ValueError, match=expected):
        gather_augment(*batch(5, 6, (3, 4, 4)), dtype=torch.float64)


@pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET=1 is set")
def test_is_refused_on_the_cpu() -> None:
    given = batch(5, 6, (3, 4, 4), 1)
    supported, reason = gather_augment_supported(*given)
    assert not supported and ("not on a CUDA device" in reason or "Triton is missing" in reason)
    with pytest.raises(ValueError, match="gather_augment: "):
        gather_augment(*given)


def test_is_refused_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_missing", "No module named 'triton'")
    given = batch(5, 6, (3, 4, 4))
    assert gather_augment_supported(*given) == (False, "Triton is missing (No module named 'triton')")


@pytest.mark.skipif(launch.INTERPRETED, reason="interpreted kernels cannot be compiled")
def test_compiled_code_divides_exactly_and_stores_vectors() -> None:
    aot = pytest.importorskip("fedmoe.kernels.aot", reason="needs Triton")
    for _, configuration, call in gather.shipped():
        ptx = aot.compiled(call, 90).ptx
        assert "div.rn.f32" in ptx and "div.full" not in ptx and "div.approx" not in ptx
        assert ("st.global.v4.b32" in ptx) == ("3x31x33" not in configuration), configuration
