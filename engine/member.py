"""What a method gives an engine: the federation's samples, how it trains, and its members, one at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from fedmoe.engine.program import Program
from fedmoe.engine.seam import Metrics, Payload, Result, Schema, State


def input_shape(inputs: Tensor) -> tuple[int, ...]:
    """Of what a model is given of a federation's inputs: (channels, height, width), or (T,) of windows of T + 1."""
    return tuple(inputs.shape[1:]) if inputs.ndim > 2 else (inputs.shape[1] - 1,)


@dataclass(frozen=True, slots=True)
class Samples:
    """All clients' samples, and how a batch of them becomes input."""

    inputs: Tensor  # images, uint8 [N, channels, height, width], or windows of tokens, int32 [N, T + 1]
    labels: Tensor  # int64 [N], of images; the targets of a window are its own tokens, each the one before's
    mean: float
    """Of pixels scaled to [0, 1], subtracted."""
    std: float
    """Divides after that."""
    augmentation: tuple[int, bool] | None = None
    """Of training batches: by how many pixels at most they are shifted, and whether half of them are mirrored."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input: (channels, height, width), or (T,)."""
        return input_shape(self.inputs)

    @property
    def targets(self) -> int:
        """How many of them a sample has: 1, or T."""
        return 1 if len(self.shape) > 1 else self.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How gradients change the weights, as far as all optimizers have it in common."""

    lr: float
    weight_decay: float
    reset_theta: bool
    """Whether theta's part of the optimizer's state begins anew when a new theta arrives."""
    clip_norm: float = 0.0
    """What a step's gradient is scaled down to, if its norm is larger; 0: nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SGD(Rule):
    """As torch.optim.SGD does."""

    momentum: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW(Rule):
    """As torch.optim.AdamW does."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    bits: Literal[8, 32] = 32
    """Of an element of each moment; with 8, blocks of elements share a maximum (`flat_optimizer_oracle.decoded`)."""


@dataclass(frozen=True, slots=True)
class Member:
    """What an engine must know of a client besides its state."""

    id: int
    architecture: str
    """Members of one architecture have equal programs."""
    samples: Tensor  # int64 [n], which of the federation's; the first `training` are for training
    training: int
    batch_size: int
    flops: int
    """Of a training step, per sample."""
    schema: Schema
    finite: tuple[str, ...]
    """Names of the tensors of its state that must stay finite."""


class Federation(Protocol):
    """Opens members and lets results out."""

    samples: Samples
    optimizer: SGD | AdamW
    micro_batch: int
    """Samples in a backward pass at most, those of a step adding up; 0: the whole batch."""
    seed: int
    evaluation_batch: int

    def open(self, client: int) -> tuple[Member, Program, State]:
        """The member, a program of its architecture on the CPU, and its state as the last checkpoint has it."""
        ...

    def program(self, client: int) -> Program:
        """Another program of the client's architecture on the CPU, with anyone's state."""
        ...

    def batchable(self, client: int) -> Program:
        """A program of the client's architecture, with anyone's state, of operators that torch.func.vmap batches."""
        ...

    def pack(self, theta: Sequence[Tensor]) -> Payload:
        """The payload of what a member shares, given as views of its arena: a copy, on their device."""
        ...

    def unpack(self, payload: Payload, theta: Sequence[Tensor]) -> None:
        """Write a payload there."""
        ...

    def outgoing(
        self, kind: Literal["train", "evaluate"], member: Member, payload: Payload, weight: float, metrics: Metrics
    ) -> Result:
        """The only way out of a member."""
        ...
