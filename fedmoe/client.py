"""A client: its model, its optimizer, its samples, the state of it that persists, and the one door out of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fedmoe import checkpoint, data, mixture, optimizer, partition, rehearsal
from fedmoe import config as settings
from fedmoe.config import Config
from fedmoe.engine.layout import digest
from fedmoe.engine.member import input_shape
from fedmoe.engine.seam import Metrics, Payload, Result, Schema, State, violations
from fedmoe.engine.seeds import globals_kept
from fedmoe.errors import UserError, reason
from fedmoe.kernels.gather_oracle import augmented
from fedmoe.profiling import flops


class Client:
    """What one member of the federation owns. Nothing of it leaves but through `outgoing`.

    `inputs`, uint8 [n, channels, height, width] or int32 [n, T + 1], and `labels`, int64 [n], are its own; the first
    `training` of them are for training, the rest for its test. `outputs` is the number of classes or tokens.
    """

    def __init__(
        self, config: Config, id: int, inputs: Tensor, labels: Tensor, training: int, outputs: int, device: torch.device
    ) -> None:
        self.config, self.id, self.training, self.outputs = config, id, training, outputs
        self.inputs, self.labels = inputs.to(device), labels.to(device)
        self.shape = input_shape(inputs)
        self.targets = 1 if len(self.shape) > 1 else self.shape[0]
        """How many a sample has: 1, or T."""
        self.held_out = torch.arange(training, len(labels), device=device)
        self.model = config.model.local[id % len(config.model.local)]
        self.mixture = mixture.build(config, id, self.shape, outputs).to(device)
        self.program = self.mixture.program()
        shared = self.program.segments["theta"]
        self.global_expert: nn.Module | None = getattr(self.mixture, shared[0]) if shared else None
        self.schema = mixture.schema(self.global_expert)
        self.optimizer = optimizer.make(config.training, self.mixture.parameters())
        self._coded: State = {}  # the optimizer's state, where it is such that the engine alone goes on from it
        self.batch_size = min(config.training.batch_size, training)
        # A buffer may hold infinities from the start, as a mask does.
        self.finite_names = [
            n for n, t in self.tensors().items() if t.is_floating_point() and bool(torch.isfinite(t).all())
        ]
        self._digest: Tensor | None = None

    def batch(self, indices: Tensor, augmentation: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of the client's samples `indices` [B]: inputs, normalized, fp32 [B, channels, height, width]; targets [B].

        `augmentation` [B, 3] is how each is cropped and flipped, see `gather_oracle.augmented`. Of text: tokens, int64
        [B, T], and after each the one to predict, likewise.
        """
        if len(self.shape) == 1:
            windows = self.inputs[indices].long()
            return windows[:, :-1], windows[:, 1:]
        d, images = self.config.data, self.inputs[indices]
        if augmentation is not None:
            images = augmented(images, augmentation)
        return data.normalize(images, d.mean, d.std), self.labels[indices]

    def receive(self, payload: Payload) -> None:
        """Take in a new global expert; `training.theta_momentum` says whether its optimizer state goes on."""
        if broken := violations(payload, self.schema):
            raise ValueError(f"client {self.id} cannot take this in: {'; '.join(broken)}")
        if self.global_expert is None:
            return
        mixture.unpack(payload, mixture.theta_tensors(self.global_expert))
        if self.config.training.theta_momentum == "reset":
            optimizer.forget(self.optimizer, self.global_expert.parameters())

    @contextmanager
    def lent(self, payload: Payload) -> Iterator[None]:
        """Within the block the global expert is the payload's; an empty payload changes nothing."""
        if not payload or self.global_expert is None:
            yield
            return
        own = [t.detach().clone() for t in mixture.theta_tensors(self.global_expert)]
        try:
            mixture.unpack(payload, mixture.theta_tensors(self.global_expert))
            yield
        finally:
            with torch.no_grad():
                for tensor, kept in zip(mixture.theta_tensors(self.global_expert), own, strict=True):
                    tensor.copy_(kept)

    def payload(self) -> Payload:
        """A copy of what the client shares: {"theta": fp32 [P]}; nothing if it has no global expert."""
        if self.global_expert is None:
            return {}
        packed = mixture.pack(mixture.theta_tensors(self.global_expert))
        return {name: tensor.cpu() for name, tensor in packed.items()}

    def state(self) -> State:
        """Copies, on the CPU, of all that persists: parameters and buffers (`model/...`), and what `optimizer` says.

        Of parameters that never change there is a digest alone (`constants`): a client is made with them.
        """
        kept = {f"model/{name}": tensor for name, tensor in self.tensors().items()}
        kept |= optimizer.state(self.optimizer, *self._trained()) | self._coded | self._constants()
        return {
            name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in kept.items()
        }

    def load_state(self, state: State) -> None:
        """Become what `state` says. Raises ValueError naming a tensor that does not fit this client."""
        tensors, (parameters, theta) = self.tensors(), self._trained()
        always = {f"model/{n}": t for n, t in tensors.items()} | self._constants()
        known = dict(always)
        known |= optimizer.expected(self.config.training, parameters, bool(theta))
        if coded := optimizer.coded(self.config.training):
            known |= {name: state[name] for name in ("first_absmax", "second_absmax") if name in state}
        for name in sorted(state.keys() | always.keys()):
            if name not in state or name not in known:
                raise ValueError(f"tensor {name!r} {'is missing' if name in known else 'is unknown'}")
            theirs, ours = ((t.dtype, list(t.shape)) for t in (state[name], known[name]))
            if theirs != ours:
                raise ValueError(f"tensor {name!r} is {theirs[0]} {theirs[1]}, the client's is {ours[0]} {ours[1]}")
        for name, made in self._constants().items():
            if not torch.equal(state[name], made):
                raise ValueError(
                    f"the weights of {self.model!r} that do not train have changed since (SHA-256 "
                    f"{_hex(made)}, were {_hex(state[name])}): use the files that it was trained with, or, where they "
                    "are random, the versions and the kind of machine"
                )
        kept = {n: tensor for n, tensor in state.items() if not n.startswith("model/") and n != "constants"}
        self._coded = kept if coded else {}
        with torch.no_grad():
            optimizer.load(self.optimizer, parameters, theta, {} if coded else kept)
            for name, tensor in tensors.items():
                tensor.copy_(state[f"model/{name}"])

    def finite(self) -> bool:
        """Whether everything that was finite at the start is so still."""
        tensors = self.tensors()
        return all(bool(torch.isfinite(tensors[name]).all()) for name in self.finite_names)

    def _trained(self) -> tuple[dict[str, nn.Parameter], set[str]]:
        """The parameters by name, and the names of those that are shared."""
        shared = tuple(f"{child}." for child in self.program.segments["theta"])
        parameters = dict(self.mixture.named_parameters())
        return parameters, {name for name in parameters if shared and name.startswith(shared)}

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the mixture that may change, by name, not copied."""
        named = dict(self.mixture.named_parameters()) | dict(self.mixture.named_buffers())
        return {name: tensor for name, tensor in named.items() if name not in self.program.constants}

    def _constants(self) -> State:
        """What a state has of those that may not."""
        if self.program.constants and self._digest is None:
            names = [n for n, _ in self.mixture.named_parameters() if n in self.program.constants]
            self._digest = digest(self.mixture, names)
        return {} if self._digest is None else {"constants": self._digest}


def _hex(digest: Tensor) -> str:
    return bytes(digest.tolist()).hex()[:12]


def open_client(config: Config, id: int, run: Path, device: torch.device, trained: bool = True) -> Client:
    """Client `id` of the run in folder `run`, as its last checkpoint has it; untrained if that has none, or so wanted.

    Raises UserError where data, partition, models or checkpoint do not fit, naming what.
    """
    path = run / "partition.safetensors"
    dataset, split = load_data(config.data, config.seed), _split(path, path.stat().st_mtime_ns)
    train, test = split.train(id), split.test(id)
    own = torch.cat([train, test])
    client = Client(config, id, dataset.inputs[own], dataset.labels[own], len(train), dataset.outputs, device)
    if trained and (entry := checkpoint.read_manifest(run).clients.get(id)):
        state = checkpoint.load(run, entry)
        try:
            client.load_state(state)
        except ValueError as error:
            raise UserError(f"{run / 'checkpoints' / entry.file}: {error}") from error
    return client


def measured(client: Client) -> tuple[int, tuple[str, ...]]:
    """FLOPs of forward and backward for one sample, and the names of parameters that get no gradient.

    By a step on a copy, so that nothing of the client changes.
    """
    count, outputs = min(2, client.batch_size), client.outputs
    with rehearsal.trial(client.mixture, client.shape) as model, globals_kept():
        model.train().head = "plain"  # what kernels compute is not counted
        program = model.program()
        x, y = (tensor.to(client.labels.device) for tensor in rehearsal.blank(count, client.shape, outputs))
        try:
            total = flops.count(lambda: program.join(program.run(x), y)[0].backward())
        except Exception as error:  # whatever a library's model raises
            raise UserError(f"model {client.model!r}: a step cannot be taken: {reason(error)}") from error
        unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    return total // count, tuple(unused)


def load_data(config: settings.Data, seed: int) -> data.Dataset:
    """The data set, read once for all clients of a process, and for all seeds where these do not choose its samples."""
    return _load(config, seed if config.limit else 0)


_load = lru_cache(maxsize=2)(data.load)
"""Two, so that two runs can be compared."""


@lru_cache(maxsize=2)
def _split(path: Path, written: int) -> partition.Split:
    """The split, read once for all clients of a run; `written` tells a new file of the same name from the old."""
    return partition.Split.load(path)


def outgoing(client: int, schema: Schema, payload: Payload, weight: float, metrics: Metrics) -> Result:
    """Let a client's contribution out: the only place through which anything leaves one.

    The payload goes out as a copy. Raises ValueError unless it holds exactly what `schema` declares, and every metric
    is a number or a list of numbers.
    """
    if broken := violations(payload, schema):
        raise ValueError(f"client {client} may not send this: {'; '.join(broken)}")
    for name, value in metrics.items():
        if not all(isinstance(v, int | float) for v in (value if isinstance(value, list) else [value])):
            raise ValueError(f"client {client} may not send metric {name!r}: {type(value).__name__}, must be numbers")
    return Result(client, {name: tensor.detach().clone() for name, tensor in payload.items()}, weight, metrics)
