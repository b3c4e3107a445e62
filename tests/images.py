"""Batches of random images, and what gathering, augmenting and normalizing them means, written out in NumPy."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """The operands of `gather_augment`, in its order."""

    images: Tensor  # [N, C, H, W] uint8
    labels: Tensor  # [N] int64
    indices: Tensor  # [B] int64
    mean: Tensor  # [C] fp32
    std: Tensor  # [C] fp32
    augmentation: Tensor | None  # [B, 3] int32


def batch(
    samples: int, rows: int, shape: tuple[int, int, int], shift: int | None = None, seed: int = 0, device: str = "cpu"
) -> Batch:
    """Random operands, another mean and deviation for each channel; shifts up to `shift`, no augmentation with None."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (samples, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (samples,), generator=generator)
    indices = torch.randint(0, samples, (rows,), generator=generator)
    mean, std = 0.2 + 0.6 * torch.rand(2, shape[0], generator=generator)
    drawn = None
    if shift is not None:
        drawn = torch.randint(-shift, shift + 1, (rows, 3), generator=generator, dtype=torch.int32)
        drawn[:, 2] = torch.arange(rows) % 2
    given = (images, labels, indices, mean, std, drawn)
    return Batch(*(None if t is None else t.to(device) for t in given))  # type: ignore[arg-type]


def written_out(given: Batch) -> tuple[Tensor, Tensor]:
    """x in fp32 and y, on the CPU, one sample after another."""
    arrays: list[Any] = [None if t is None else t.cpu().numpy() for t in given]
    images, labels, indices, mean, std, augmentation = arrays
    _, channels, height, width = images.shape
    x = np.full((len(indices), channels, height, width), np.nan, np.float32)
    y = np.full(len(indices), -1)
    for row, index in enumerate(indices):
        if not 0 <= index < len(images):
            continue
        pixels = images[index]
        if augmentation is not None:
            dy, dx, flip = (int(v) for v in augmentation[row])
            reach = max(abs(dy), abs(dx))
            padded = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach)))
            pixels = padded[:, reach + dy : reach + dy + height, reach + dx : reach + dx + width]
            pixels = pixels[:, :, ::-1] if flip else pixels
        scaled = pixels.astype(np.float32) / np.float32(255)
        x[row] = (scaled - mean[:, None, None]) / std[:, None, None]
        y[row] = labels[index]
    return torch.from_numpy(x), torch.from_numpy(y)


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Labels and pixels of the same bits, NaN where NaN is due."""
    x, truth = actual[0].cpu(), expected[0].cpu().to(actual[0].dtype)
    assert x.shape == truth.shape, f"shape {tuple(x.shape)}, expected {tuple(truth.shape)}"
    different = ~((x == truth) | (x.isnan() & truth.isnan()))
    assert not different.any(), f"{int(different.sum())} of {x.numel()} values are different"
    assert torch.equal(actual[1].cpu(), expected[1].cpu()), f"labels {actual[1].tolist()}, {expected[1].tolist()}"
