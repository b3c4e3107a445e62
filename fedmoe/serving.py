"""A trained client as a model to use, from a run or an export: images in, class probabilities and gate weights out."""

import contextlib
import dataclasses
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fedmoe import __version__, checkpoint, configfile, experts, meaning, mixture
from fedmoe.checkpoint import Entry
from fedmoe.client import Client, load_data, open_client
from fedmoe.config import Config
from fedmoe.data import normalize
from fedmoe.errors import UsageError, UserError
from fedmoe.mixture import Mixture
from fedmoe.run import reading

FORMAT = 1
CARD = "config.json"
WEIGHTS = "model.safetensors"
TEXT_CARD = "fedmoe.json"
"""Of an export of text, whose `config.json` is that of transformers."""

Theta = Literal["own", "aggregated", "none"]
"""A global expert: the client's, as trained by it, or the server's."""


class Serving(nn.Module):
    """A mixture in evaluation, normalization included."""

    alone: Tensor

    def __init__(self, model: Mixture, mean: float, std: float) -> None:
        super().__init__()
        model.head = "plain"
        self.model, self.mean, self.std = model.eval(), mean, std
        self.register_buffer("alone", torch.tensor([0.0, 1.0]), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, channels, height, width] -> (class probabilities [N, C], weights [N, 2], order [global, local]).

        Of a local model alone the weights are 0 and 1.
        """
        program = self.model.program()
        outputs = program.run(normalize(images, self.mean, self.std))
        gate = outputs.get("gate")
        weights = self.alone.expand(images.shape[0], 2) if gate is None else gate.softmax(dim=1)
        return program.logits(outputs).softmax(dim=1), weights


def described(card: Any, format: int, data: dict[str, Any]) -> str:
    """A card as JSON: all its fields, and of its configuration what a model is made of, with this of `data`."""
    c: Config = card.config
    kept = {
        "method": c.method,
        "static_weight": c.static_weight,
        "model": dataclasses.asdict(c.model),
        "gate": dataclasses.asdict(c.gate),
        "data": data,
    }
    fields = {f.name: getattr(card, f.name) for f in dataclasses.fields(card)}
    content = {"format": format, "fedmoe": __version__} | fields | {"config": kept}
    return json.dumps(content, indent=1, ensure_ascii=False, default=dataclasses.asdict)


@contextmanager
def reading_card(path: Path, format: int) -> Iterator[dict[str, Any]]:
    """What a card of this format says; within the block, whatever is wrong with it is a UserError that names it."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if (found := content.pop("format")) != format:
            raise UserError(f"format {found}, this version reads {format}: use the version that wrote it")
        del content["fedmoe"]
        yield content
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: does not describe an export ({what}): export it again") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a served model is; `config.json` of an export."""

    client: int
    round: int
    """After which it was taken."""
    theta: Theta
    shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    classes: tuple[str, ...]
    width: int
    """D."""
    config: Config
    """Method, models, gate and normalization, as the run has them; of the local models the client's alone."""
    weights: Entry | None = None
    """The file with the tensors, if there is one."""

    def to_json(self) -> str:
        """As `read` takes it."""
        return described(self, FORMAT, {"mean": self.config.data.mean, "std": self.config.data.std})

    @classmethod
    def read(cls, folder: Path) -> "Card":
        """Of the export in `folder`. Raises UserError naming the file and what is wrong in it."""
        with reading_card(folder / CARD, FORMAT) as content:
            config = configfile.build(content.pop("config"))
            meaning.check(config)
            weights = content.pop("weights")
            listed: object = content["classes"]
            card = cls(config=config, weights=None if weights is None else Entry(**weights), **content)
            channels, height, width = card.shape
            numbers = [channels, height, width, card.client, card.round]
            if not all(type(n) is int and n >= 0 for n in numbers) or min(numbers[:3]) < 1:
                raise ValueError(f"shape {card.shape}, client {card.client}, round {card.round}")
            if not listed or not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
                raise ValueError("classes are not names")
            if card.weights and card.weights.file != WEIGHTS:
                raise ValueError(f"weights in {card.weights.file!r}")
            return dataclasses.replace(card, shape=(channels, height, width), classes=tuple(card.classes))


@dataclass(frozen=True, eq=False)
class Served:
    """A model to use, and what it is."""

    card: Card
    model: Serving


class Trained(NamedTuple):
    """A client as a run's last checkpoint has it."""

    config: Config
    """The run's, of the local models the client's alone."""
    client: Client
    round: int
    """Of the checkpoint."""
    theta: Theta


def kind(model: Path, client: int | None) -> Literal["images", "text"]:
    """The kind of data of a run or an export. Raises UserError where it is neither.

    Of a run `client` must be given, of an export not.
    """
    if (model / "config.toml").is_file():
        if client is None:
            raise UsageError(f"{model} is a run, whose clients each have a model: say which with --client")
        return configfile.read(model / "config.toml").data.kind
    text = (model / TEXT_CARD).is_file()
    if text or (model / CARD).is_file():
        if client is not None:
            raise UsageError(f"{model} is an export of one client: leave --client out")
        return "text" if text else "images"
    raise UserError(f"{model} is neither a run, with a config.toml, nor an export, with a {CARD}")


def trained(run: Path, client: int, aggregated: bool = False) -> Trained:
    """Client `client` as the run's last checkpoint has it, `aggregated`: with the server's theta in place of its own.

    Raises UserError where there is no such client, it has not trained yet, or the run is not as it was left.
    """
    with reading(run) as config:
        n = config.federation.clients
        if not 0 <= client < n:
            raise UserError(f"there is no client {client}: the run has clients 0 to {n - 1}")
        manifest = checkpoint.read_manifest(run)
        if client not in manifest.clients:
            one = next(iter(manifest.clients), None)
            others = "nobody has" if one is None else f"others have, such as client {one}"
            raise UserError(f"client {client} has not trained in {manifest.round} rounds, {others}: train on")
        if config.model.attention == "flash_attention_2":  # which no CPU has; what it computes is the same
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="sdpa"))
        opened = open_client(config, client, run, torch.device("cpu"))
        if aggregated:
            if opened.global_expert is None:
                raise UserError('there is nothing aggregated with method = "local": leave --aggregated out')
            mixture.unpack(checkpoint.load(run, manifest.server), mixture.theta_tensors(opened.global_expert))
    own = dataclasses.replace(config.model, local=(opened.model,))
    theta: Theta = "none" if opened.global_expert is None else "aggregated" if aggregated else "own"
    return Trained(dataclasses.replace(config, model=own), opened, manifest.round, theta)


def from_run(run: Path, client: int, aggregated: bool = False) -> Served:
    """The same, of images, to use."""
    return from_trained(trained(run, client, aggregated))


def from_trained(one: Trained) -> Served:
    """A client of images to use."""
    config, client = one.config, one.client
    _, channels, height, width = client.inputs.shape
    card = Card(
        client=client.id,
        round=one.round,
        theta=one.theta,
        shape=(channels, height, width),
        classes=load_data(config.data, config.seed).classes,
        width=experts.width(client.mixture.local_expert, (channels, height, width)),
        config=config,
    )
    return Served(card, Serving(client.mixture, config.data.mean, config.data.std))


def from_export(folder: Path) -> Served:
    """The model of the export in `folder`. Raises UserError naming the file and what is wrong with it."""
    card = Card.read(folder)
    if card.weights is None:
        raise UserError(f"{folder} has no {WEIGHTS}: export it again with --format safetensors among others")
    state = checkpoint.read_state(folder, card.weights, CARD)
    model = mixture.build(card.config, 0, card.shape, len(card.classes))
    fill(tensors(model), state, folder / WEIGHTS)
    return Served(card, Serving(model, card.config.data.mean, card.config.data.std))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that a model is, by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def fill(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors by name. Raises UserError naming the first that does not fit, and `path`, the file they are from."""
    mine, given = ({name: (t.dtype, list(t.shape)) for name, t in some.items()} for some in (ours, theirs))
    if odd := sorted(name for name in mine.keys() | given.keys() if mine.get(name) != given.get(name)):
        has, wants = (_described(kind.get(odd[0])) for kind in (given, mine))
        raise UserError(f"{path}: tensor {odd[0]!r} is {has}, its models have {wants}: export it again")
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])


def copied(some: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies to write to a file."""
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in some.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries warn of their own deprecations, of what nobody has asked for, and print what they tried."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        nowhere = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _described(kind: Any) -> str:
    return "missing" if kind is None else f"{kind[0]} {kind[1]}"
