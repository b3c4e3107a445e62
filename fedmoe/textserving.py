"""A trained client of text as a model to use, from a run or an export: a prompt in, the text that follows it out."""

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from torch import Tensor

from fedmoe import checkpoint, configfile, meaning, mixture, serving
from fedmoe.checkpoint import Entry
from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.engine.seeds import generator
from fedmoe.errors import UserError
from fedmoe.mixture import Mixture
from fedmoe.models import hf, language, tuning
from fedmoe.serving import Theta, Trained
from fedmoe.tokenizer import FILE, Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
CARD = serving.TEXT_CARD
MIXTURE = "mixture.safetensors"
"""Global expert, gate and adapter."""
ADAPTER, PEFT = "adapter_model.safetensors", "base_model.model."
"""Of peft: the file of adapters, and what it has before the names of tensors."""
BASE, GLOBAL = "base", "global"
"""Folders of an export: the model that adapters belong to, and the configuration of a global expert `hf/NAME`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a served model of text is; `fedmoe.json` of an export."""

    client: int
    round: int
    """After which it was taken."""
    theta: Theta
    vocabulary: int
    """Number of tokens."""
    config: Config
    """Method, models, gate and length of a window, as the run has them; of the local models the client's alone."""
    files: tuple[Entry, ...] = ()
    """All others of the export."""

    def to_json(self) -> str:
        """As `read` takes it."""
        return serving.described(self, FORMAT, {"kind": "text", "sequence_length": self.config.data.sequence_length})

    @classmethod
    def read(cls, folder: Path) -> "Card":
        """Of the export in `folder`. Raises UserError naming the file and what is wrong in it."""
        with serving.reading_card(folder / CARD, FORMAT) as content:
            config = configfile.build(content.pop("config"))
            config = replace(config, data=replace(config.data, name="stdlib"))  # not told: it is the client's own
            meaning.check(config)
            files = tuple(Entry(**entry) for entry in content.pop("files"))
            card = cls(config=config, files=files, **content)
            numbers = [card.client, card.round, card.vocabulary]
            if not all(type(n) is int and n >= 0 for n in numbers) or card.vocabulary < 1:
                raise ValueError(f"client {card.client}, round {card.round}, vocabulary {card.vocabulary}")
            if config.data.kind != "text" or len(config.model.local) != 1:
                raise ValueError(f"{len(config.model.local)} models of {config.data.kind}")
            if card.theta not in get_args(Theta):
                raise ValueError(f"theta {card.theta!r}")
            names = [entry.file for entry in files]
            if not all(type(e.bytes) is int and isinstance(e.sha256, str) for e in files):
                raise ValueError("files without size and SHA-256")
            for name in names:
                if names.count(name) > 1 or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise ValueError(f"file {name!r}")
            if missing := _needed(config) - {*names}:
                raise ValueError(f"no {min(missing)}")
            return card


@dataclass(frozen=True, eq=False)
class Served:
    """A model of text to use, and what it is."""

    card: Card
    model: Mixture
    tokenizer: Tokenizer


class Generated(NamedTuple):
    """What a model goes on with after a prompt."""

    text: str
    tokens: list[int]
    """With the end token, where that ended it."""
    weight: float
    """The global expert's, mean over the tokens."""
    log_probability: float
    """The natural logarithm of the probability that the model gives the tokens, at temperature 1."""


def from_run(run: Path, client: int, aggregated: bool = False) -> Served:
    """As `serving.from_run`, of text."""
    return from_trained(serving.trained(run, client, aggregated))


def from_trained(one: Trained) -> Served:
    """A client of text to use."""
    client, tokenizer = one.client, load_data(one.config.data, one.config.seed).tokenizer
    assert tokenizer is not None
    card = Card(
        client=client.id,
        round=one.round,
        theta=one.theta,
        vocabulary=tokenizer.size,
        config=one.config,
    )
    return _served(card, client.mixture, tokenizer)


def from_export(folder: Path) -> Served:
    """The model of the export in `folder`. Raises UserError naming the file and what is wrong with it."""
    card = Card.read(folder)
    files = {entry.file: entry for entry in card.files}
    for entry in files.values():
        checkpoint.verified(folder, entry, CARD)
    tokenizer = open_tokenizer(str((folder / FILE).absolute()))
    if tokenizer.size != card.vocabulary:
        has = f"{tokenizer.size} tokens, {CARD} says {card.vocabulary}"
        raise UserError(f"{folder / FILE}: is not the tokenizer of this export, it has {has}: export it again")
    config, shape = card.config, (card.config.data.sequence_length,)
    model = replace(config.model, weights="pretrained")
    name = f"{hf.PREFIX}{folder.absolute()}"
    if model.tune == "lora":
        name = f"{name}/{BASE}" if f"{BASE}/config.json" in files else model.local[0]
    with serving.quiet():
        local = language.make(name, model, card.vocabulary, *shape)
        shared = None
        if config.method != "local":
            known = model.global_expert  # all of it but its tensors
            if known.startswith(hf.PREFIX):
                known = f"{hf.PREFIX}{folder.absolute()}/{GLOBAL}"
            fresh = replace(config, model=replace(model, weights="random", global_expert=known))
            shared = mixture.build_global(fresh, shape, card.vocabulary)
        made = mixture.assemble(config, 0, local, shared, shape)
    if model.tune == "lora":
        serving.fill(
            adapter(local.extractor.whole), checkpoint.read_state(folder, files[ADAPTER], CARD), folder / ADAPTER
        )
    if shared is not None:
        serving.fill(beside(made), checkpoint.read_state(folder, files[MIXTURE], CARD), folder / MIXTURE)
    return _served(card, made, tokenizer)


def beside(model: Mixture) -> dict[str, Tensor]:
    """All that a mixture is besides its local expert and header, by name."""
    own = ("local_expert.", "header.")
    return {name: tensor for name, tensor in serving.tensors(model).items() if not name.startswith(own)}


def adapter(whole: "PreTrainedModel") -> dict[str, Tensor]:
    """The low-rank adapters in a model, not copied, by the names that peft's files give them."""
    found: dict[str, Tensor] = tuning.optional("peft", "hf/").get_peft_model_state_dict(whole)
    return {PEFT + name: tensor for name, tensor in found.items()}


def generate(served: Served, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0) -> Generated:
    """What follows `prompt`, up to so many tokens or the end token; an empty prompt begins behind an end token.

    The most probable token each time, or, with a temperature above 0, one drawn with `seed` from the softmax of
    logits / temperature. The model sees the last `data.sequence_length` tokens. Raises UserError where its logits are
    not finite.
    """
    start = served.tokenizer.encode(prompt).tolist() or [served.tokenizer.end]
    made: list[int] = []
    weights, total, random = [], 0.0, generator(seed, "generate")
    while len(made) < tokens and served.tokenizer.end not in made[-1:]:
        logits, weight = _next(served, [*start, *made])
        if not bool(torch.isfinite(logits).all()):
            raise UserError(f"client {served.card.client}: the model's logits are not finite: it has diverged")
        if temperature:
            chances = ((logits - logits.max()) / temperature).softmax(0)
            token = int(torch.multinomial(chances, 1, generator=random))
        else:
            token = int(logits.argmax())
        made.append(token)
        weights.append(weight)
        total += float(logits.log_softmax(0)[token])
    return Generated(_text(served.tokenizer, start, made), made, sum(weights) / max(len(weights), 1), total)


def _next(served: Served, tokens: list[int]) -> tuple[Tensor, float]:
    """Logits of the token after these, fp64 [V], and the global expert's weight where they come from."""
    x = torch.tensor(tokens[-served.card.config.data.sequence_length :])[None]
    with torch.no_grad():
        outputs = {name: out[:, -1:] for name, out in served.model.program().run(x).items()}
        logits = served.model.logits(outputs)[0, 0].double()
    gate = outputs.get("gate")
    return logits, 0.0 if gate is None else float(gate[0, 0].softmax(0)[0])


def _text(tokenizer: Tokenizer, start: list[int], made: list[int]) -> str:
    """What `made` adds to the text of `start`: some tokenizers leave out a space where a text begins."""
    before, whole = tokenizer.decode(start), tokenizer.decode([*start, *made])
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(made)


def _served(card: Card, model: Mixture, tokenizer: Tokenizer) -> Served:
    model.head = "plain"
    return Served(card, model.eval(), tokenizer)


def _needed(config: Config) -> set[str]:
    """The files without which there is no model."""
    needed = {FILE, ADAPTER if config.model.tune == "lora" else "config.json"}
    return needed if config.method == "local" else needed | {MIXTURE}
