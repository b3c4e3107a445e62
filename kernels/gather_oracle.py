"""Gathering, augmenting and normalizing a batch of images in plain PyTorch, and the draw of augmentations."""

import torch
from torch import Tensor


def gather_augment(
    images: Tensor,  # [N, C, H, W] uint8
    labels: Tensor,  # [N] int64
    indices: Tensor,  # [B] integer
    mean: Tensor,  # [C], of pixels scaled to [0, 1]
    std: Tensor,  # [C]
    augmentation: Tensor | None = None,  # [B, 3] integer: dy, dx, flip
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> tuple[Tensor, Tensor]:  # x [B, C, H, W] in `dtype`, y [B] int64
    """The samples `indices` of a data set: cropped, then flipped, then normalized; and their labels.

    Row h and column w of the crop are row h + dy and column w + dx of the image, or pixels of value 0 outside it. With
    flip ≠ 0 the crop is then mirrored from left to right. So (dy, dx) is what torchvision's
    `RandomCrop(size, padding=p)` chooses, less p. A pixel becomes (pixel / 255 − mean) / std, computed in the dtype of
    `mean`, rounded once to `dtype`. For an index outside [0, N), x is NaN and y is −1.
    """
    known = (indices >= 0) & (indices < len(images))
    at = indices.where(known, 0).long()
    pixels = images[at]
    if augmentation is not None:
        pixels = augmented(pixels, augmentation)
    # By a tensor: CUDA multiplies by the reciprocal of a Python number, which rounds differently.
    x = pixels.to(mean.dtype) / torch.full_like(mean, 255)[:, None, None]
    x = (x - mean[:, None, None]) / std[:, None, None]
    x = x.where(known[:, None, None, None], float("nan")).to(dtype)
    form = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=form), labels[at].where(known, -1)


def augmented(pixels: Tensor, augmentation: Tensor) -> Tensor:
    """Images [B, C, H, W] of any dtype, each cropped and flipped as `augmentation`, integer [B, 3], says above."""
    dy, dx, flip = augmentation.long().unbind(1)
    _, channels, height, width = pixels.shape
    rows = torch.arange(height, device=dy.device) + dy[:, None]  # [B, H]
    columns = torch.arange(width, device=dx.device)
    columns = columns.flip(0).where(flip[:, None] != 0, columns) + dx[:, None]  # [B, W]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    place = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]  # [B, H, W]
    every = place.flatten(1)[:, None].expand(-1, channels, -1)
    return pixels.flatten(2).gather(2, every).view_as(pixels).where(inside[:, None], 0)


def draw_augmentation(samples: int, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Augmentations for `gather_augment`, int32 [samples, 3] on the CPU: shifts of −padding to padding, flips 0 or 1.

    All uniform and independent; without `flip` the third column is 0 and the shifts are those with it. Raises
    ValueError where `samples` or `padding` is negative.
    """
    if samples < 0 or padding < 0:
        raise ValueError(f"samples is {samples}, padding is {padding}, expected neither negative")
    drawn = torch.zeros(samples, 3, dtype=torch.int32)
    drawn[:, :2] = torch.randint(-padding, padding + 1, (samples, 2), generator=generator)
    if flip:
        drawn[:, 2] = torch.randint(2, (samples,), generator=generator)
    return drawn
