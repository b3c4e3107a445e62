"""What a configuration means: values that cannot be meant, and fields that have no effect beside others."""

import dataclasses
import json
import math

from fedmoe import configfile
from fedmoe.config import PARTITIONS, Config, gate_norms, per_round, trimmed
from fedmoe.errors import UserError

LARGEST = {
    "seed": 2**63 - 1,
    "run.threads": 1024,
    "data.image_size": 4096,
    "model.lora_rank": 2**14,
    "data.sequence_length": 2**20,
    "gate.hidden": 2**20,
    "training.momentum": 0.9999,
    "engine.lanes": 7,  # with up to four streams each, and the engine's own, of the 32 that PyTorch has
}
"""Limits below the general ones, 2**31 - 1 for whole numbers and 1e6 for others: more cannot be meant."""

FROM_0 = {
    *("seed", "run.threads", "data.limit", "data.image_size", "training.momentum", "training.weight_decay"),
    *("training.clip_norm", "training.micro_batch"),
    *(f"engine.{name}" for name in ("lanes", "cohort", "device_memory_mb", "host_memory_mb")),
    *(f"server.{name}" for name in ("trim", "clip_norm", "byzantine", "chosen")),
}
"""Numbers that may be 0; all others but `data.mean` must be more."""


def check(config: Config) -> None:
    """Raise UserError for the first value that cannot be meant."""
    for name, value in configfile.flat(config).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            least, most = 0, LARGEST.get(name, 2**31 - 1 if isinstance(value, int) else 1e6)
            if not math.isfinite(value):
                raise UserError(f"{name} is {value}, must be a finite number")
            if abs(value) > most:
                raise UserError(f"{name} is {value}, must be at most {most}")
            if name in FROM_0 | {"static_weight"} and value < least:
                raise UserError(f"{name} is {value}, must be {least} or more")
            if name not in FROM_0 | {"static_weight", "data.mean"} and value <= least:
                raise UserError(f"{name} is {value}, must be more than {least}")
    if config.federation.fraction > 1:
        raise UserError(f"federation.fraction is {config.federation.fraction}, must be more than 0 and at most 1")
    if config.partition.test_fraction >= 1:
        raise UserError(f"partition.test_fraction is {config.partition.test_fraction}, must be between 0 and 1")
    if config.static_weight > 1:
        raise UserError(f"static_weight is {config.static_weight}, must be from 0 to 1")
    if not config.model.local:
        raise UserError("model.local is empty, must name at least one model, such as cnn-1")
    if "" in config.model.lora_targets:
        raise UserError("model.lora_targets has an empty name, must name linear layers, such as q_proj")
    if not config.data.name:
        raise UserError("data.name is empty, must be digits, a file or folder, or a data set's name")
    if config.data.sequence_length < 2:
        raise UserError(f"data.sequence_length is {config.data.sequence_length}, must be 2 or more")
    embedded = {"digits": "images", "stdlib": "text"}
    if (is_of := embedded.get(config.data.name, config.data.kind)) != config.data.kind:
        raise UserError(
            f'data.name is "{config.data.name}" with data.kind = "{config.data.kind}", must be one that has '
            f'{config.data.kind}, or set data.kind = "{is_of}"'
        )
    if not config.data.tokenizer:
        raise UserError("data.tokenizer is empty, must be bytes, a tokenizer.json or a folder with one, or a model")
    kind, column = config.partition.kind, config.partition.column
    if kind not in PARTITIONS and not kind.endswith("Partitioner"):
        raise UserError(
            f"partition.kind is {kind!r}, must be one of {', '.join(PARTITIONS)}, or the name of a partitioner of "
            "flwr-datasets, such as ShardPartitioner"
        )
    if kind == "natural" and not column:
        raise UserError('partition.column is empty, must name a column of the data with partition.kind = "natural"')
    norms = gate_norms(config.gate.norm)
    if config.data.kind == "text" and config.method == "fedmoe" and (odd := {"batch", "switch"} & set(norms)):
        raise UserError(
            f'gate.norm is "{config.gate.norm}", but {sorted(odd)[0]} norm would tell a token of those to come, as a '
            "batch's statistics are of all: take none or layer with text"
        )
    _check_training(config)
    _check_server(config)
    _check_attack(config)


def _check_training(config: Config) -> None:
    t = config.training
    if not all(0 <= beta < 1 for beta in t.betas):
        raise UserError(f"training.betas is {list(t.betas)}, must be two numbers from 0 on, less than 1")
    if t.optimizer == "adamw" and t.optimizer_states == "8bit" and config.engine.kind == "reference":
        raise UserError(
            'training.optimizer_states is "8bit", which the plain loop (engine.kind = "reference") does not have: '
            'choose "fp32", or engine.kind = "fast"'
        )


def _check_server(config: Config) -> None:
    s, k = config.server, per_round(config)
    if s.trim >= 0.5:
        raise UserError(f"server.trim is {s.trim}, must be less than 0.5: some must be left")
    if s.aggregation == "trimmed_mean" and trimmed(s.trim, k) == 0:
        # Rounded up, so that it is enough.
        advice = f"set at least {math.ceil(1e4 / k) / 1e4}" if k > 2 else "have 3 or more"
        raise UserError(f"server.trim is {s.trim}, which is none of the {k} clients of a round: {advice}")
    if s.aggregation in ("krum", "multi_krum") and k < (least := 2 * s.byzantine + 3):
        raise UserError(
            f'server.aggregation = "{s.aggregation}" with server.byzantine = {s.byzantine} needs {least} clients a '
            f"round, federation.clients and federation.fraction give {k}"
        )
    if s.aggregation == "multi_krum" and s.chosen > k:
        raise UserError(f"server.chosen is {s.chosen}, must be at most the {k} clients of a round")


def _check_attack(config: Config) -> None:
    attack, n = config.attack, config.federation.clients
    if attack.kind == "none":
        return
    if not attack.clients:
        raise UserError(f'attack.clients is empty, must name bad clients with attack.kind = "{attack.kind}"')
    for client in attack.clients:
        if not 0 <= client < n:
            raise UserError(f"attack.clients has {client}, must be from 0 to {n - 1}: federation.clients is {n}")
        if attack.clients.count(client) > 1:
            raise UserError(f"attack.clients has {client} twice, must name each client once")


def unused(config: Config) -> dict[str, str]:
    """Every field that has no effect in this configuration, whatever its value, with what takes it away."""
    values = configfile.flat(config)
    shared, shares = ["gate.norm", "gate.hidden"], ["partition.alpha", "partition.classes_per_client"]
    server, of_server = config.server, [f"server.{field.name}" for field in dataclasses.fields(config.server)]
    used = {
        "trimmed_mean": ["trim"],
        "clipped_mean": ["clip_norm", "clip_factor"],
        "krum": ["byzantine"],
        "multi_krum": ["byzantine", "chosen"],
    }.get(server.aggregation, [])
    lora, tune = ["lora_rank", "lora_alpha", "lora_targets"], config.model.tune
    alone = [
        *shared,
        "model.global_expert",
        "model.adapter",
        "training.theta_momentum",
        *of_server,
        *(f"attack.{field.name}" for field in dataclasses.fields(config.attack)),
        "evaluation.aggregated",
    ]
    of_images = ["data.image", "data.image_size", "data.mean", "data.std", "training.augment"]
    of_text = ["data.text", "data.tokenizer", "data.sequence_length"]
    of_tune = ["model.tune", "model.frozen_dtype", *(f"model.{name}" for name in lora)]
    of_library = ["model.weights", "model.attention", "model.activation_checkpointing", *of_tune]
    without = {
        "data.kind": {"images": of_text, "text": of_images}[config.data.kind],
        "method": {"fedmoe": ["static_weight"], "static": shared, "local": ["static_weight", *alone]}[config.method],
        "training.optimizer": {
            "sgd": ["training.betas", "training.eps", "training.optimizer_states"],
            "adamw": ["training.momentum"],
        }[config.training.optimizer],
        "training.batch_size": ["training.micro_batch"] * (config.training.micro_batch >= config.training.batch_size),
        "server.aggregation": [name for name in of_server[1:] if name.removeprefix("server.") not in used],
        "server.clip_norm": ["server.clip_factor"] if "clip_norm" in used and server.clip_norm else [],
        "model.local": _without_library(config, of_tune, of_library),
        "model.tune": [f"model.{name}" for name in {"full": [*lora, "frozen_dtype"], "frozen": lora}.get(tune, [])],
        "attack.kind": {"none": ["attack.clients", "attack.factor"], "nan": ["attack.factor"]}.get(
            config.attack.kind, []
        ),
        "partition.kind": {
            "pathological": ["partition.alpha", "partition.column", "partition.options"],
            "dirichlet": ["partition.classes_per_client", "partition.column", "partition.options"],
            "iid": [*shares, "partition.column", "partition.options"],
            "natural": [*shares, "partition.options"],
        }.get(config.partition.kind, shares),
        "engine.kind": {
            "fast": [],
            "reference": [
                name for name in configfile.flat(config) if name.startswith("engine.") and name != "engine.kind"
            ],
        }[config.engine.kind],
    }
    return {name: f"{cause} = {json.dumps(values[cause])}" for cause, names in without.items() for name in names}


def _without_library(config: Config, of_tune: list[str], of_library: list[str]) -> list[str]:
    """Which fields of transformers' models have no effect with these models."""
    shared = () if config.method == "local" else (config.model.global_expert,)
    named = [name.startswith("hf/") for name in (*config.model.local, *shared)]
    if config.data.kind == "text":
        return [] if any(named) else ["model.weights"]
    return [] if any(named[: len(config.model.local)]) else of_tune if any(named) else of_library


def ignored(config: Config) -> list[str]:
    """A line for every field that was set but has no effect in this configuration."""
    values, defaults = configfile.flat(config), configfile.flat(Config())
    return [
        f"{name} = {values[name]} has no effect with {cause}"
        for name, cause in unused(config).items()
        if values[name] != defaults[name]
    ]


def effective(config: Config) -> Config:
    """The same federation, with every field that has no effect at its default: equal where the numbers must be."""
    defaults = configfile.flat(Config())
    return configfile.with_values(config, {name: defaults[name] for name in unused(config)})
