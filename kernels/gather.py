"""A batch of images from a data set on the device: gathered, augmented and normalized in one kernel.

`gather_augment` is functional; `gather_augment_step` writes into given buffers; `gather_augment_supported` says whether
both take given tensors; `gather_oracle` has the plain statement and draws augmentations. Pixels have no gradient.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fedmoe.kernels.batching import one_by_one
from fedmoe.kernels.launch import FLOATS, Launch, fits, load, refusal

_kernels = load("gather_kernels")


def gather_augment(
    images: Tensor,  # [N, C, H, W] uint8
    labels: Tensor,  # [N] int64
    indices: Tensor,  # [B] int64 or int32
    mean: Tensor,  # [C] fp32, of pixels scaled to [0, 1]
    std: Tensor,  # [C] fp32
    augmentation: Tensor | None = None,  # [B, 3] int32: dy, dx, flip
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> tuple[Tensor, Tensor]:  # x [B, C, H, W] in `dtype`, y [B] int64
    """What `gather_oracle.gather_augment` says, computed in fp32 with rounded divisions: the same bits.

    An index outside [0, N) reads nothing; it makes x NaN and y −1. Works under `torch.func.vmap`, one call after
    another, which leaves x's memory format open. Raises ValueError where shapes or `dtype` are wrong,
    or with the reason of `gather_augment_supported`.
    """
    _check(images, labels, indices, mean, std, augmentation)
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}, expected one of {FLOATS}")
    out: tuple[Tensor, Tensor] = _gather(images, labels, indices, mean, std, augmentation, dtype, channels_last)
    return out


def gather_augment_step(
    images: Tensor,  # [N, C, H, W] uint8
    labels: Tensor,  # [N] int64
    indices: Tensor,  # [B] int64 or int32
    mean: Tensor,  # [C] fp32, of pixels scaled to [0, 1]
    std: Tensor,  # [C] fp32
    augmentation: Tensor | None = None,  # [B, 3] int32: dy, dx, flip
    *,
    out: Tensor,  # [B, C, H, W] out, fp32, bf16 or fp16, contiguous or channels-last
    targets: Tensor,  # [B] int64 out
) -> None:
    """`gather_augment` into given buffers; `out` decides dtype and memory format. Nothing is read back to the host.

    Raises ValueError as `gather_augment` does, or where a buffer does not fit.
    """
    _check(images, labels, indices, mean, std, augmentation)
    shape = (len(indices), *images.shape[1:])
    fits("targets", targets, shape[:1], torch.int64, images.device)
    if out.shape != shape or not (out.is_contiguous() or _last(out)) or out.device != images.device:
        found = f"shape {tuple(out.shape)}, strides {out.stride()}, on {out.device}"
        raise ValueError(f"out has {found}, expected contiguous or channels-last {shape} on {images.device}")
    if out.dtype not in FLOATS:
        raise ValueError(f"out is {out.dtype}, expected one of {FLOATS}")
    gather_launch(images, labels, indices, mean, std, augmentation, out, targets).run()


def gather_augment_supported(
    images: Tensor,  # [N, C, H, W]
    labels: Tensor,  # [N]
    indices: Tensor,  # [B]
    mean: Tensor,  # [C]
    std: Tensor,  # [C]
    augmentation: Tensor | None = None,  # [B, 3]
) -> tuple[bool, str]:
    """Whether `gather_augment` and `gather_augment_step` take these tensors, and if not, why."""
    reason = refusal(
        (
            ("images", images, (torch.uint8,)),
            ("labels", labels, (torch.int64,)),
            ("indices", indices, (torch.int64, torch.int32)),
            ("mean", mean, (torch.float32,)),
            ("std", std, (torch.float32,)),
            ("augmentation", augmentation, (torch.int32,)),
        )
    )
    if not reason and 0 in (*images.shape, len(indices)):
        reason = f"there is nothing to do for {len(indices)} samples of shape {tuple(images.shape)}"
    return not reason, reason


def gather_launch(
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    mean: Tensor,
    std: Tensor,
    augmentation: Tensor | None,
    x: Tensor,  # contiguous or channels-last
    y: Tensor,  # contiguous
) -> Launch:
    """The whole batch."""
    assert _kernels is not None
    block, warps = _kernels.GATHER_TILE
    n, c, h, w = images.shape
    tensors = {
        "images": images,
        "labels": labels,
        "indices": indices,
        "mean": mean,
        "std": std,
        "augmentation": augmentation,
        "x": x,
        "y": y,
    }
    drawn = (0, 0) if augmentation is None else augmentation.stride()
    constants = {
        "C": c,
        "H": h,
        "W": w,
        **dict(zip(("IMAGES_N", "IMAGES_C", "IMAGES_H", "IMAGES_W"), images.stride(), strict=True)),
        "LABELS_N": labels.stride(0),
        "INDICES_B": indices.stride(0),
        "MEAN_C": mean.stride(0),
        "STD_C": std.stride(0),
        **dict(zip(("AUGMENTATION_B", "AUGMENTATION_K"), drawn, strict=True)),
        "CHANNELS_LAST": _last(x),
        "BLOCK": block,
    }
    grid = (len(indices) * -(-c * h * w // block),)
    return Launch(_kernels.gather_kernel, grid, tensors, constants, {"N": n}, warps, 1)


def shipped() -> Iterator[tuple[str, str, Launch]]:
    """Kernel, configuration and launch of what is shipped: images of CIFAR, of MNIST, and of an odd size."""
    for dtype, shape, plain, last in (
        *((dtype, (3, 32, 32), False, last) for dtype in FLOATS for last in (False, True)),
        (torch.bfloat16, (3, 32, 32), True, False),
        (torch.float32, (1, 28, 28), True, False),
        (torch.bfloat16, (3, 31, 33), False, False),
    ):
        images, labels = torch.empty(1000, *shape, dtype=torch.uint8), torch.empty(1000, dtype=torch.int64)
        indices, mean = labels[:64].int() if shape[1] % 2 else labels[:64], torch.empty(shape[0])
        drawn = None if plain else torch.empty(64, 3, dtype=torch.int32)
        x, y = _outputs(images, indices, dtype, last)
        size = "x".join(map(str, shape))
        text = f"{str(dtype).removeprefix('torch.')} {size}{'' if plain else ' augmented'}"
        launch = gather_launch(images, labels, indices, mean, mean, drawn, x, y)
        yield "gather_augment", text + " channels-last" * last, launch


def _check(
    images: Tensor, labels: Tensor, indices: Tensor, mean: Tensor, std: Tensor, augmentation: Tensor | None
) -> None:
    if images.ndim != 4 or indices.ndim != 1:
        raise ValueError(
            f"images has shape {tuple(images.shape)}, indices {tuple(indices.shape)}, expected [N, C, H, W] and [B]"
        )
    samples, channels = images.shape[:2]
    for name, tensor, shape in (
        ("labels", labels, (samples,)),
        ("mean", mean, (channels,)),
        ("std", std, (channels,)),
        ("augmentation", augmentation, (len(indices), 3)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    supported, reason = gather_augment_supported(images, labels, indices, mean, std, augmentation)
    if not supported:
        raise ValueError(f"gather_augment: {reason}")


def _last(x: Tensor) -> bool:
    """Whether x lies in the order [B, H, W, C]; where both orders are the same, it does not."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("fedmoe::gather_augment", mutates_args=())
def _gather(
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    mean: Tensor,
    std: Tensor,
    augmentation: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    x, y = _outputs(images, indices, dtype, channels_last)
    gather_launch(images, labels, indices, mean, std, augmentation, x, y).run()
    return x, y


def _outputs(images: Tensor, indices: Tensor, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor]:
    form = torch.channels_last if channels_last else torch.contiguous_format
    shape = (len(indices), *images.shape[1:])
    x = torch.empty(shape, dtype=dtype, device=images.device, memory_format=form)
    return x, torch.empty_like(indices, dtype=torch.int64, memory_format=torch.contiguous_format)


@_gather.register_fake
def _(
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    mean: Tensor,
    std: Tensor,
    augmentation: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(images, indices, dtype, channels_last)


_gather.register_vmap(one_by_one(_gather))
