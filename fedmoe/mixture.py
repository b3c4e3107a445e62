"""One client's model, as the program an engine runs: two experts, a gate and a header; and theta, its shared part."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmoe import config as settings
from fedmoe import experts
from fedmoe.config import Config, Model
from fedmoe.engine.program import Branch, Outputs, Program
from fedmoe.engine.seam import Payload, Schema, TensorSpec
from fedmoe.engine.seeds import derive, globals_kept, seed_globals
from fedmoe.errors import UserError
from fedmoe.gate import Gate, TokenGate
from fedmoe.kernels import gated_head, gated_lm_head, gated_mix, oracle
from fedmoe.models import language
from fedmoe.models.attention import capped
from fedmoe.models.language import Body, Language

Made = TypeVar("Made")

SHARED = "global_expert"
"""The one child of a mixture that is shared; every other is private and never leaves its client."""


class StaticGate(nn.Module):
    """Gives every sample the same weights: the control `method = "static"`."""

    logits: Tensor

    def __init__(self, weight: float) -> None:
        super().__init__()
        # log 0 is kept finite; its softmax is exactly 0 all the same.
        self.register_buffer("logits", torch.tensor([math.log(max(w, 1e-300)) for w in (weight, 1 - weight)]))

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> logits [B, 2]; embeddings of tokens [B, T, E] -> logits [B, T, 2]."""
        return self.logits.expand(*x.shape[: 2 if x.ndim == 3 else 1], 2)


class Mixture(nn.Module):
    """One client's model (arXiv 2402.01350, section 3): R = a_g global(x) + a_l local(x), logits = header(R).

    With `global_expert` and `gate` both None it is the local model alone, the control `method = "local"`. An `adapter`,
    as private as the gate, makes a representation of the local expert's width of the global expert's. `head` is as in
    the configuration (`engine.head`).

    Of a language model all this is for each token: inputs are tokens [B, T], and the gate reads the embeddings that the
    local expert begins with (`local.extractor.embed`), which it does not train. `softcap`, where there is one, caps the
    logits: softcap * tanh(logits / softcap).
    """

    def __init__(
        self,
        global_expert: nn.Module | None,
        local: experts.Split | Language,
        gate: nn.Module | None,
        head: str = "plain",
        adapter: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.head, self.softcap = head, local.softcap if isinstance(local, Language) else None
        assert (global_expert is None) == (gate is None)
        if global_expert is not None and gate is not None:
            self.global_expert = global_expert
            if adapter is not None:
                self.adapter = adapter
            self.gate = gate
        self.local_expert = local.extractor
        self.header = local.header

    def branches(self) -> Mapping[str, Branch]:
        """The parts that depend on the input alone."""
        if not hasattr(self, SHARED):
            return {"local": self.local_expert}
        shared = self._adapted if hasattr(self, "adapter") else self.global_expert
        gate = self._token_gate if isinstance(self.local_expert, Body) else self.gate
        return {"global": shared, "local": self.local_expert, "gate": gate}

    def _token_gate(self, tokens: Tensor) -> Tensor:
        assert isinstance(self.local_expert, Body)
        # A frozen local expert may be in low precision, which the gate is not.
        out: Tensor = self.gate(self.local_expert.embed(tokens).detach().float())
        return out

    def _adapted(self, x: Tensor) -> Tensor:
        out: Tensor = self.adapter(self.global_expert(x))
        return out

    def logits(self, outputs: Outputs) -> Tensor:
        """Branch outputs -> logits [B, C], or [B, T, C]."""
        mixed = outputs["local"]
        if "gate" in outputs:
            rows = mixed.shape[:-1]
            operands = tuple(outputs[name].flatten(0, -2) for name in ("global", "local", "gate"))
            fused = _takes(self.head, gated_mix.gated_mix_supported, *operands)
            mixed = (gated_mix.gated_mix(*operands) if fused else oracle.gated_mix(*operands)).unflatten(0, rows)
        if isinstance(self.local_expert, Body) and isinstance(self.header, nn.Linear):
            mixed = mixed.to(self.header.weight.dtype)
        out: Tensor = self.header(mixed)
        return capped(out, self.softcap)

    def join(self, outputs: Outputs, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Branch outputs and targets [B] or [B, T] -> (mean cross-entropy [], correct predictions [])."""
        if targets.ndim == 2:
            return self._join_tokens(outputs, targets.flatten())
        header = self.header
        if "gate" in outputs and isinstance(header, nn.Linear) and _only_linear(header):
            operands = outputs["global"], outputs["local"], outputs["gate"], header.weight, header.bias, targets
            if _takes(self.head, gated_head.gated_head_supported, *operands):
                return gated_head.gated_head(*operands)
        logits = self.logits(outputs)
        return F.cross_entropy(logits, targets), (logits.argmax(1) == targets).sum()

    def _join_tokens(self, outputs: Outputs, targets: Tensor) -> tuple[Tensor, Tensor]:
        header, rows = self.header, {name: output.flatten(0, -2) for name, output in outputs.items()}
        if "gate" in rows and isinstance(header, nn.Linear) and _only_linear(header):
            # Norms that stay in fp32 beside low precision give representations of another type than the header has.
            both = [rows[name].to(header.weight.dtype) for name in ("global", "local")]
            operands = *both, rows["gate"], header.weight, header.bias, targets
            if _takes(self.head, gated_lm_head.gated_lm_head_supported, *operands):
                return gated_lm_head.gated_lm_head(*operands, softcap=self.softcap)
        logits = self.logits(rows)
        return F.cross_entropy(logits.float(), targets), (logits.argmax(1) == targets).sum()

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, height, width] -> logits [B, C], or tokens [B, T] -> [B, T, V], by the mixture."""
        return self.logits(self.program().run(x))

    def weights(self, x: Tensor) -> Tensor:
        """The experts' weights for each sample [B, 2] or token [B, T, 2], order [global, local].

        Not defined for the local model alone.
        """
        return self.branches()["gate"](x).softmax(dim=-1)

    def constants(self) -> frozenset[str]:
        """Names of the private parameters that do not train."""
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        return frozenset(name for name in frozen if not name.startswith(f"{SHARED}."))

    def program(self) -> Program:
        """This mixture as an engine runs it."""
        children = [name for name, _ in self.named_children()]
        return Program(
            modules=self,
            branches=self.branches(),
            logits=self.logits,
            join=self.join,
            segments={
                "theta": tuple(name for name in children if name == SHARED),
                "private": tuple(name for name in children if name != SHARED),
            },
            constants=self.constants(),
        )


@contextmanager
def _in_memory() -> Iterator[None]:
    """A lack of memory within the block, for which PyTorch has no type on the CPU, is a user's."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("allocate memory|overflowed", str(error)):
            raise
        wanted = re.search(r"allocate (\d+) bytes", str(error))
        size = f" of {int(wanted[1]) / 1e9:.1f} GB" if wanted else ""
        raise UserError(
            f"a model needs a tensor{size}, for which there is no memory: lower data.image_size or gate.hidden, or "
            "choose smaller models"
        ) from error


@_in_memory()
def build(config: Config, client: int, shape: tuple[int, ...], outputs: int) -> Mixture:
    """Client `client`'s untrained mixture for images of `shape` (channels, height, width), or texts of (T,) tokens.

    Every part has a seed of its own, so the controls start from the same local model; the global expert's is the same
    for all clients. Raises UserError where the experts' representations differ in width and no adapter is wanted.
    """
    name = config.model.local[client % len(config.model.local)]
    local = _seeded(config.seed, "init/local", client, lambda: _expert(config.model, name, shape, outputs))
    shared = None if config.method == "local" else build_global(config, shape, outputs)
    return assemble(config, client, local, shared, shape)


def assemble(
    config: Config, client: int, local: experts.Split | Language, shared: nn.Module | None, shape: tuple[int, ...]
) -> Mixture:
    """The mixture of these experts with an untrained gate and, where one is needed, adapter; otherwise as `build`."""
    if shared is None:
        return Mixture(None, local, None, _head(config))
    name = config.model.local[client % len(config.model.local)]
    ours, theirs = _width(local.extractor, shape), _width(shared, shape)
    adapter = None
    if ours != theirs:
        if config.model.adapter == "none":
            raise UserError(
                f"local model {name!r} represents {'an image' if len(shape) > 1 else 'a token'} in {ours} numbers, "
                f"global expert {config.model.global_expert!r} in {theirs}: both must be equal; change model.local or "
                'model.global_expert, or set model.adapter to "linear"'
            )
        adapter = _seeded(config.seed, "init/adapter", client, lambda: nn.Linear(theirs, ours))
    gate: nn.Module = StaticGate(config.static_weight)
    if config.method == "fedmoe":
        gate = _seeded(config.seed, "init/gate", client, lambda: _gate(config.gate, local, shape))
    return Mixture(shared, local, gate, _head(config), adapter)


def build_global(config: Config, shape: tuple[int, ...], outputs: int) -> nn.Module:
    """The untrained global expert: every client and the server start from the same."""
    name = config.model.global_expert
    # All of it trains, whatever trains of the local experts.
    model = replace(config.model, tune="full")
    made = _seeded(config.seed, "init/global", 0, lambda: _expert(model, name, shape, outputs)).extractor
    if isinstance(made, Body):
        made.forget_head()
    if not list(made.parameters()) or any(t.dtype != torch.float32 for t in theta_tensors(made)):
        raise UserError(f"global expert {name!r} must have parameters, and all its floating-point tensors in float32")
    return made


def theta_tensors(global_expert: nn.Module) -> list[Tensor]:
    """What theta consists of: parameters, then float buffers, in registration order; integer buffers never leave."""
    return [*global_expert.parameters(), *(b for b in global_expert.buffers() if b.is_floating_point())]


def pack(theta: Sequence[Tensor]) -> Payload:
    """A copy of theta's tensors, in the order of `theta_tensors`, as the payload {"theta": fp32 [P]}, there."""
    return {"theta": torch.cat([t.detach().reshape(-1).float() for t in theta])}


def unpack(payload: Payload, theta: Sequence[Tensor]) -> None:
    """Write the payload's theta into theta's tensors, in place."""
    with torch.no_grad():
        for tensor, flat in zip(theta, payload["theta"].split([t.numel() for t in theta]), strict=True):
            tensor.copy_(flat.view_as(tensor))


def schema(global_expert: nn.Module | None) -> Schema:
    """What may leave a client: theta alone; with no global expert, nothing."""
    if global_expert is None:
        return {}
    return {"theta": TensorSpec(torch.float32, (sum(t.numel() for t in theta_tensors(global_expert)),))}


def check_head(config: Config, device: torch.device) -> None:
    """Raise UserError where `engine.head` asks for kernels that this device cannot run."""
    one = torch.ones(1, 2, device=device)
    _takes(_head(config), gated_mix.gated_mix_supported, one, one, one)


def _head(config: Config) -> str:
    """`engine.head`, which the plain loop has no part in."""
    return "plain" if config.engine.kind == "reference" else config.engine.head


def _takes(head: str, supported: Callable[..., tuple[bool, str]], *operands: Tensor | None) -> bool:
    """Whether kernels do it; UserError where they must and cannot."""
    if head == "plain":
        return False
    able, why = supported(*operands)
    if head == "fused" and not able:
        raise UserError(f'engine.head is "fused", but the kernels cannot run: {why}; choose "auto" or "plain"')
    return able


def _expert(model: Model, name: str, shape: tuple[int, ...], outputs: int) -> experts.Split | Language:
    if len(shape) == 1:
        return language.make(name, model, outputs, shape[0])
    channels, height, width = shape
    return experts.build(name, (channels, height, width), outputs, model)


def _gate(config: settings.Gate, local: experts.Split | Language, shape: tuple[int, ...]) -> nn.Module:
    if len(shape) > 1:
        return Gate(math.prod(shape), config.hidden, config.norm)
    assert isinstance(local, Language)
    return TokenGate(local.extractor.embedding_width, config.hidden, config.norm)


def _width(extractor: nn.Module, shape: tuple[int, ...]) -> int:
    """D."""
    return extractor.width if isinstance(extractor, Body) else experts.width(extractor, shape)


def _only_linear(header: nn.Linear) -> bool:
    """Whether a linear layer is no more than that: kernels would skip hooks, its own or all modules', and a forward."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = any(getattr(header, kind) or getattr(nn.modules.module, f"_global{kind}") for kind in kinds)
    return type(header) is nn.Linear and "forward" not in vars(header) and not hooked


def _seeded(seed: int, stream: str, client: int, make: Callable[[], Made]) -> Made:
    """What `make` makes with the global generators seeded for this use, and put back afterwards."""
    with globals_kept():
        seed_globals(derive(seed, stream, client))
        return make()
