"""A batch from images that lie on the device: gathered, cropped, flipped and normalized."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmoe.kernels import gather_oracle
from fedmoe.kernels.gather import gather_augment, gather_augment_supported
from fedmoe.profiling.bench import Absent, Bench, Floor, attempt, sizes
from tests.bench.variants import Graphed, agreement, compiled, compiler


@sizes("batch, image, augmented", full=[(64, 32, False), (64, 32, True), (512, 32, True)], tiny=[(4, 8, True)])
def test_gather(gpu_benchmark: Bench, batch: int, image: int, augmented: bool) -> None:
    bench = gpu_benchmark
    torch.manual_seed(0)
    drawn = gather_oracle.draw_augmentation(batch, 4, True, torch.Generator().manual_seed(0)) if augmented else None
    operands: list[Any] = [
        torch.randint(0, 256, (5000, 3, image, image), dtype=torch.uint8),
        torch.randint(0, 10, (5000,)),
        torch.randint(0, 5000, (batch,)),
        torch.full((3,), 0.5),
        torch.full((3,), 0.25),
        drawn,
    ]
    operands = [t if t is None else t.to(bench.device) for t in operands]

    def eager(*given: Any) -> tuple[Tensor, Tensor]:
        return by_index(*given) if augmented else plain(*given)

    def called(function: Any) -> Any:
        return lambda: function(*operands)

    supported, why = gather_augment_supported(*operands)
    ours: dict[str, Any] = dict.fromkeys(("ours", "ours, graph"), Absent(why))
    if supported:
        ours = {"ours": called(gather_augment), "ours, graph": attempt(lambda: Graphed(called(gather_augment)))}
    bench(
        {
            "eager": called(eager),
            "eager, graph": attempt(lambda: Graphed(called(eager))),
            compiler(bench): called(compiled(eager, bench)),
            "compile, graph": attempt(lambda: Graphed(called(compiled(eager, bench, "max-autotune-no-cudagraphs")))),
            **ours,
        },
        # A byte read and four written for each value; indices and labels read, targets written.
        floor=Floor(bytes=5 * batch * 3 * image * image + 3 * 8 * batch, flops=0, dtype=torch.float32),
        check=agreement(("x", "y"), 1e-6),
    )


def plain(images: Tensor, labels: Tensor, indices: Tensor, mean: Tensor, std: Tensor, _: None) -> tuple[Tensor, Tensor]:
    """As a loop over resident data does it."""
    x = images[indices].float().div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])
    return x, labels[indices]


def by_index(
    images: Tensor, labels: Tensor, indices: Tensor, mean: Tensor, std: Tensor, drawn: Tensor
) -> tuple[Tensor, Tensor]:
    """The augmentation without a loop: pad, then one gather of pixels by computed rows and columns."""
    size, pad = images.shape[-1], 4
    padded = F.pad(images[indices], (pad, pad, pad, pad))
    at = torch.arange(size, device=images.device)
    column = at.where(drawn[:, 2:] == 0, size - 1 - at) + drawn[:, 1:2] + pad
    row = at + drawn[:, :1] + pad
    samples = torch.arange(len(indices), device=images.device)[:, None, None]
    x = padded.permute(0, 2, 3, 1)[samples, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)
    return x.float().div_(255).sub_(mean[:, None, None]).div_(std[:, None, None]), labels[indices]
