"""Batches of a federation's samples, made on the device where they lie, or loaded to it."""

import torch
from torch import Tensor

from fedmoe.engine.member import Samples
from fedmoe.kernels import gather


class Loader:
    """Gathers batches, from the device if all samples are held there (`resident`), or else from the host."""

    def __init__(self, samples: Samples, device: torch.device, resident: bool) -> None:
        self.device, self.resident = device, resident
        self._samples = samples
        where = device if resident else torch.device("cpu")
        self._images, self._labels = samples.images.to(where), samples.labels.to(where)
        self.shape = samples.images.shape[1:]
        channels = self.shape[0]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" and not resident else None
        self._mean = torch.full((channels,), samples.mean, device=device)
        self._std = torch.full((channels,), samples.std, device=device)

    def batch(self, indices: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
        """Of samples `indices` [B], which lie where the samples do: inputs, fp32 [B, C, H, W]; targets int64 [B]."""
        operands = self._images, self._labels, indices, self._mean, self._std
        if self._images.is_cuda and gather.gather_augment_supported(*operands)[0]:
            return gather.gather_augment(*operands, channels_last=channels_last)
        if self._copies is None:
            images, labels = self._images[indices], self._labels[indices]
        else:
            images, labels = self._sent(self._images, indices), self._sent(self._labels, indices)
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
