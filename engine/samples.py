"""Batches of a federation's samples, made on the device where they lie, or loaded to it; and their order."""

import torch
from torch import Tensor

from fedmoe.engine.member import Member, Samples
from fedmoe.engine.seeds import generator
from fedmoe.kernels import gather
from fedmoe.kernels.gather_oracle import augmented, draw_augmentation


def epoch_order(member: Member, samples: Samples, seed: int, round: int, epoch: int) -> Tensor:
    """The samples of an epoch's batches, int64 [steps, B]; the last partial batch is dropped.

    With augmentation [steps, B, 4]: each sample with its shifts and flip, so that all arrives together.
    """
    place, size = (member.id, round, epoch), member.batch_size
    steps = member.training // size
    drawn = torch.randperm(member.training, generator=generator(seed, "order", *place))
    indices = member.samples[drawn[: steps * size]]
    if samples.augmentation is None:
        return indices.view(steps, size)
    changes = draw_augmentation(len(indices), *samples.augmentation, generator(seed, "augmentation", *place))
    return torch.cat([indices[:, None], changes.long()], 1).view(steps, size, 4)


class Loader:
    """Gathers batches, from the device if all samples are held there (`resident`), or else from the host."""

    def __init__(self, samples: Samples, device: torch.device, resident: bool) -> None:
        self.device, self.resident = device, resident
        self._samples = samples
        where = device if resident else torch.device("cpu")
        self._inputs, self._labels = samples.inputs.to(where), samples.labels.to(where)
        self.shape = samples.shape
        channels = self.shape[0] if len(self.shape) > 1 else 0
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" and not resident else None
        self._mean = torch.full((channels,), samples.mean, device=device)
        self._std = torch.full((channels,), samples.std, device=device)

    def batch(self, indices: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
        """Inputs, fp32 [B, C, H, W], and targets, int64 [B], of samples as `epoch_order` names them, [B] or [B, 4].

        Of windows of tokens int64 [B, T] both. What names samples lies where they do.
        """
        if len(self.shape) == 1:
            windows = self._inputs[indices] if self._copies is None else self._sent(self._inputs, indices)
            windows = windows.long()
            return windows[:, :-1], windows[:, 1:]
        indices, changes = (indices, None) if indices.ndim == 1 else (indices[:, 0], indices[:, 1:].int())
        operands = self._inputs, self._labels, indices, self._mean, self._std, changes
        if self._inputs.is_cuda and gather.gather_augment_supported(*operands)[0]:
            return gather.gather_augment(*operands, channels_last=channels_last)
        if self._copies is None:
            images, labels = self._inputs[indices], self._labels[indices]
        else:
            images, labels = self._sent(self._inputs, indices), self._sent(self._labels, indices)
            changes = None if changes is None else self._sent(changes, torch.arange(len(changes)))
        if changes is not None:
            images = augmented(images, changes)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        s = self._samples
        return images.to(torch.float32, memory_format=layout).div_(255).sub_(s.mean).div_(s.std), labels

    def _sent(self, samples: Tensor, indices: Tensor) -> Tensor:
        """These of the host's, on the device: copied there while what came before is computed with.

        Pinned, or the copy would wait; PyTorch keeps pinned memory from being used again before it is done.
        """
        assert self._copies is not None
        pinned = torch.empty((len(indices), *samples.shape[1:]), dtype=samples.dtype, pin_memory=True)
        torch.index_select(samples, 0, indices, out=pinned)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            sent = pinned.to(self.device, non_blocking=True)
        current.wait_stream(self._copies)
        sent.record_stream(current)  # its memory must not be used again while it is still read
        return sent
