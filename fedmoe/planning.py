"""`fedmoe plan`, and what it shares with the start of a run: device, split and models, all checked, and the sizes."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields, replace

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmoe import engines, meaning, mixture, partition, rehearsal, sizing
from fedmoe.client import load_data
from fedmoe.config import Config, per_round
from fedmoe.data import Dataset
from fedmoe.display import Output, warn, widen
from fedmoe.engine.choices import Choices, amount
from fedmoe.engine.device import prepare
from fedmoe.engine.facts import Architecture, Facts, Sizes, Wanted, as_if, facts
from fedmoe.engine.plan import CHOICES, Plan, plan
from fedmoe.engine.program import batch_statistics
from fedmoe.engine.step import How
from fedmoe.errors import UserError
from fedmoe.mixture import Mixture
from fedmoe.models import hf
from fedmoe.partition import Split


def run(config: Config, as_json: bool, gpu: str = "") -> None:
    """Print the plan for `config` on this machine, as a table or as JSON; as if it had this GPU, where one is named.

    Raises UserError as a start of it would.
    """
    meaning.check(config)
    for line in meaning.ignored(config):
        warn(line)
    if config.engine.kind == "reference":
        warn('engine.kind = "reference" needs no plan; this is the one of "fast"')
    on = as_if(gpu) if gpu else facts(device(config, config.run.threads))
    dataset = load_data(config.data, config.seed)
    split = deal(config, dataset)
    made, lines = make(config, sizes(config, dataset, split, models(config, dataset, split), on), on)
    for line in lines:
        warn(line)
    if as_json:
        print(made.to_json())
    else:
        _print(Output(), made)


def make(config: Config, given: Sizes, on: Facts) -> tuple[Plan, list[str]]:
    """The plan for `config` on such a device, and its warnings. UserError where there is none."""
    try:
        return plan(_wanted(config), given, on)
    except ValueError as error:
        raise UserError(str(error)) from error


def _wanted(config: Config) -> Wanted:
    return Wanted(**{f.name: getattr(config.engine, f.name) for f in fields(Wanted)})


def device(config: Config, threads: int) -> torch.device:
    """The device of the configuration, prepared. UserError where it is not there."""
    try:
        return prepare(config.run.device, threads, config.run.deterministic)
    except ValueError as error:
        raise UserError(str(error)) from error


def deal(config: Config, dataset: Dataset) -> Split:
    """The samples dealt to the clients; what is odd about that is told in warnings."""
    classes, clients = len(dataset.classes), config.federation.clients
    with warnings.catch_warnings(record=True) as caught:
        split = partition.deal(
            dataset.labels, classes, config.partition, clients, config.seed, dataset.classes, dataset.column
        )
    for warning in caught:
        warn(str(warning.message))
    return split


def models(config: Config, dataset: Dataset, split: Split) -> dict[str, Mixture]:
    """An untrained mixture for each local model in use, by name, every one rehearsed with its smallest client's batch.

    Raises UserError for the first that cannot train.
    """
    n, t, made = config.federation.clients, config.training, {}
    for first, name in enumerate(config.model.local[:n]):
        # Language models, which may be large, are known without their weights.
        with torch.device("meta") if config.data.kind == "text" else nullcontext():
            model = made[name] = mixture.build(config, first, dataset.shape, dataset.outputs)
        owners = range(first, n, len(config.model.local))
        smallest, largest = (of(owners, key=lambda client: len(split.train(client))) for of in (min, max))
        batch, most = (min(t.batch_size, len(split.train(client))) for client in (smallest, largest))
        if 0 < t.micro_batch < most and (norm := batch_statistics(model)):
            raise UserError(
                f"training.micro_batch is {t.micro_batch}, but with model {name!r} {norm} takes statistics of whole "
                f"batches, of {most}: set it to 0, or choose other norms"
            )
        if config.data.kind != "text" or config.engine.kind == "reference":  # else its memory is found by one
            rehearsal.rehearse(
                config, model, dataset.shape, dataset.outputs, batch, f"model {name!r}, client {smallest}"
            )
    unused = not any(hasattr(model, "adapter") for model in made.values())
    if config.model.adapter != "none" and config.method != "local" and unused:
        warn(f"model.adapter = {config.model.adapter} has no effect where all experts are of one width")
    return made


def sizes(config: Config, dataset: Dataset, split: Split, models: Mapping[str, Mixture], on: Facts) -> Sizes:
    """What the engine's plan has to know of the federation, from the data set, the split and what `models` gives.

    Raises UserError as `make` does.
    """
    n, names, t = config.federation.clients, config.model.local, config.training
    checkpointing = config.model.activation_checkpointing
    owned = [names[client % len(names)] for client in range(n)]
    largest = max(len(split.train(client)) for client in range(n))
    held_out = max(len(split.test(client)) for client in range(n))
    found = Sizes(
        architectures=tuple(_architecture(config, name, owned.count(name), model) for name, model in models.items()),
        clients=n,
        sampled=per_round(config),
        batch=min(t.batch_size, largest),
        micro_batch=t.micro_batch,
        # What a model of images needs is known whole alone.
        checkpointing="off" if config.data.kind == "images" and checkpointing == "auto" else checkpointing,
        optimizer={"sgd": "sgd", "adamw": "adamw" if t.optimizer_states == "fp32" else "8-bit adamw"}[t.optimizer],
        evaluation_batch=min(config.evaluation.batch_size, held_out),
        samples=dataset.inputs.nbytes + dataset.labels.nbytes,
        branches=max(len(model.branches()) for model in models.values()),
    )
    how = _how(config, found, on)
    if config.data.kind == "text":
        return replace(found, ways=(sizing.text(config, models, found, dataset, *how, on),))
    kinds = (replace(a, activations=sizing.images(models[a.name], found, dataset)) for a in found.architectures)
    return replace(found, architectures=tuple(kinds))


def _architecture(config: Config, name: str, clients: int, model: Mixture) -> Architecture:
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    layout = engines.layout(config, name, model)
    return Architecture(
        name=name,
        clients=clients,
        trainable=sum(p.numel() for p in trainable),
        frozen=sum(p.numel() for p in frozen),
        buffers=sum(b.nbytes for b in model.buffers()),
        state=layout.size,
        constants=layout.size - layout.moving,
        same=name.startswith(hf.PREFIX) and config.model.weights == "pretrained",
        batch_statistics=bool(batch_statistics(model)),
    )


def _how(config: Config, given: Sizes, on: Facts) -> tuple[How, bool]:
    """How a step will be taken, and whether its head is fused, as far as that does not depend on memory."""
    try:
        choices = Choices(_wanted(config), given, on)
        precision = choices.precision()
        return How(precision=precision, optimizer=choices.optimizer(precision)), choices.head() == "fused"
    except ValueError as error:
        raise UserError(str(error)) from error


def _print(console: Console, made: Plan) -> None:
    """The plan as two tables: what is decided and why, and what it takes."""
    widen(console)
    table = Table("field", "decided", "why")
    for name in CHOICES:
        value = getattr(made, name)
        shown = ("on" if value else "off") if isinstance(value, bool) else str(value)
        table.add_row(name, amount(value) if name.endswith("_bytes") else shown, Text(made.reasons[name]))
    console.print(table)
    p, where = made.predicted, "device" if made.device == "cuda" else "host"
    rows = {
        "states of clients, on the device": (p.states_device, where),
        "states of clients, on the host": (p.states_host, "host"),
        "states of clients, in files": (p.states_files, "files"),
        "regions: states while clients train": (p.regions, where),
        "gradients": (p.gradients, where),
        "low-precision copies": (p.low_precision, where),
        "activations and workspaces": (p.activations, where),
        "samples": (p.samples, made.data),
    }
    table = Table("predicted", "", "where")
    table.columns[1].justify = "right"
    for name, (count, place) in rows.items():
        if count:
            table.add_row(name, amount(count), place)
    console.print(table)
