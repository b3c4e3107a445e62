"""Reading, overriding, checking and saving a configuration; every complaint is one line."""

import contextlib
import dataclasses
import difflib
import io
import json
import math
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w
import tyro

from fedmoe.config import PARTITIONS, Config, gate_norms, per_round, trimmed
from fedmoe.errors import UsageError, UserError

C = TypeVar("C")

LARGEST = {
    "seed": 2**63 - 1,
    "run.threads": 1024,
    "data.image_size": 4096,
    "gate.hidden": 2**20,
    "training.momentum": 0.9999,
    "engine.lanes": 7,  # with up to four streams each, and the engine's own, of the 32 that PyTorch has
}
"""Limits below the general ones, 2**31 - 1 for whole numbers and 1e6 for others: more cannot be meant."""

OPTIONS = "partition.options."
"""What the name of a partitioner's option begins with, which is any."""

FROM_0 = {"seed", "run.threads", "data.limit", "data.image_size", "training.momentum", "training.weight_decay"} | {
    f"engine.{name}" for name in ("lanes", "cohort", "device_memory_mb", "host_memory_mb")
}
FROM_0 |= {f"server.{name}" for name in ("trim", "clip_norm", "byzantine", "chosen")}
"""Numbers that may be 0; all others but `data.mean` must be more."""


def read(path: Path) -> Config:
    """The configuration in a TOML file. Raises UserError naming the file and what is wrong in it."""
    try:
        content = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not TOML: {error}") from error
    try:
        return build(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def build(content: dict[str, Any]) -> Config:
    """The configuration that nested tables give, defaults for the rest. Raises UserError for what is wrong in them."""
    return _build(Config, content, "")


def option(word: str) -> str:
    """The field that the option `word` sets, as --section.field, with =value or not; UsageError if there is none."""
    key = word[2:].partition("=")[0].replace("-", "_")
    bare = key if key.startswith(OPTIONS) else re.sub(r"^((?:\w+\.)*)no_", r"\1", key)
    if bare not in _names(Config) and bare.removeprefix(OPTIONS) in (bare, ""):
        raise UsageError(_unknown(word.partition("=")[0], bare))
    return bare


def override(config: Config, words: list[str], command: str = "train", does: str = "Train a federation.") -> Config:
    """`config` with dotted command-line options applied, e.g. ["--federation.rounds", "50"].

    `--help` prints what `command` does, with all options, and exits.

    Raises UsageError for an unknown option, naming the nearest, and for a value that does not fit.
    """
    words, options = _options(words)
    for word in words:
        if word.startswith("--") and word != "--help":
            option(word)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            made = tyro.cli(
                Config,
                args=words,
                default=config,
                prog=f"fedmoe {command} [CONFIG.toml]",
                description=f"{does} Options win over the configuration file, which comes first.",
                use_underscores=True,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_one_line(complaint.getvalue())) from None
    return with_values(made, {OPTIONS + name: value for name, value in options.items()})


def save(config: Config) -> bytes:
    """The whole configuration as TOML."""
    return tomli_w.dumps(dataclasses.asdict(config)).encode()


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field's value by its dotted name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = dataclasses.is_dataclass(value)
        found |= flat(value, f"{prefix}{field.name}.") if inner else {prefix + field.name: value}
    return found


def check(config: Config) -> None:
    """Raise UserError for the first value that cannot be meant."""
    for name, value in flat(config).items():
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
    if not config.data.name:
        raise UserError("data.name is empty, must be digits, a file or folder, or a data set's name")
    kind, column = config.partition.kind, config.partition.column
    if kind not in PARTITIONS and not kind.endswith("Partitioner"):
        raise UserError(
            f"partition.kind is {kind!r}, must be one of {', '.join(PARTITIONS)}, or the name of a partitioner of "
            "flwr-datasets, such as ShardPartitioner"
        )
    if kind == "natural" and not column:
        raise UserError('partition.column is empty, must name a column of the data with partition.kind = "natural"')
    gate_norms(config.gate.norm)
    _check_server(config)


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


def unused(config: Config) -> dict[str, str]:
    """Every field that has no effect in this configuration, whatever its value, with what takes it away."""
    shared, shares = ["gate.norm", "gate.hidden"], ["partition.alpha", "partition.classes_per_client"]
    server, of_server = config.server, [f"server.{field.name}" for field in dataclasses.fields(config.server)]
    used = {
        "trimmed_mean": ["trim"],
        "clipped_mean": ["clip_norm", "clip_factor"],
        "krum": ["byzantine"],
        "multi_krum": ["byzantine", "chosen"],
    }.get(server.aggregation, [])
    alone = [
        *shared,
        "model.global_expert",
        "model.adapter",
        "training.theta_momentum",
        *of_server,
        "evaluation.aggregated",
    ]
    without = {
        "method": {"fedmoe": ["static_weight"], "static": shared, "local": ["static_weight", *alone]}[config.method],
        "server.aggregation": [name for name in of_server[1:] if name.removeprefix("server.") not in used],
        "server.clip_norm": ["server.clip_factor"] if "clip_norm" in used and server.clip_norm else [],
        "partition.kind": {
            "pathological": ["partition.alpha", "partition.column", "partition.options"],
            "dirichlet": ["partition.classes_per_client", "partition.column", "partition.options"],
            "iid": [*shares, "partition.column", "partition.options"],
            "natural": [*shares, "partition.options"],
        }.get(config.partition.kind, shares),
        "engine.kind": {
            "fast": [],
            "reference": [name for name in flat(config) if name.startswith("engine.") and name != "engine.kind"],
        }[config.engine.kind],
    }
    values = flat(config)
    return {name: f"{cause} = {json.dumps(values[cause])}" for cause, names in without.items() for name in names}


def ignored(config: Config) -> list[str]:
    """A line for every field that was set but has no effect in this configuration."""
    values, defaults = flat(config), flat(Config())
    return [
        f"{name} = {values[name]} has no effect with {cause}"
        for name, cause in unused(config).items()
        if values[name] != defaults[name]
    ]


def effective(config: Config) -> Config:
    """The same federation, with every field that has no effect at its default: equal where the numbers must be."""
    defaults = flat(Config())
    return with_values(config, {name: defaults[name] for name in unused(config)})


def with_values(config: C, values: Mapping[str, Any]) -> C:
    """`config` with fields replaced, by their dotted names."""
    if isinstance(config, dict):
        return {**config, **values}  # type: ignore[return-value]
    own = {name: value for name, value in values.items() if "." not in name}
    for section in {name.partition(".")[0] for name in values if "." in name}:
        inner = {name.removeprefix(f"{section}."): v for name, v in values.items() if name.startswith(f"{section}.")}
        own[section] = with_values(getattr(config, section), inner)
    return dataclasses.replace(config, **own)  # type: ignore[type-var]


def parse(name: str, word: str) -> Any:
    """The value of field `name` that a word gives; `+` joins the entries of a list. UserError if it does not fit."""
    if name.startswith(OPTIONS):
        return _option(name, word)
    kind: Any = Config
    for part in name.split("."):
        kind = typing.get_type_hints(kind)[part]
    value: Any = word
    if typing.get_origin(kind) is tuple:
        value = word.split("+")
    elif kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(word)
    elif kind is bool:
        value = {"true": True, "false": False}.get(word, word)
    return _value(name, kind, value)


def shown(value: Any) -> str:
    """A value as `parse` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(value) if isinstance(value, tuple) else str(value)


def _options(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """`words` without `--partition.options.NAME VALUE`, and those values by name: as TOML if they are, else as text."""
    rest, options, words = [], {}, list(words)
    while words:
        word, equals, value = words.pop(0).partition("=")
        if not word.startswith(f"--{OPTIONS}"):
            rest.append(word + equals + value)
            continue
        if not equals and not words:
            raise UsageError(f"{word} has no value")
        name = option(word)
        options[name.removeprefix(OPTIONS)] = _option(name, value if equals else words.pop(0))
    return rest, options


def _option(name: str, word: str) -> Any:
    """The value of a partitioner's option: as TOML if the word is some, else as text."""
    try:
        value = tomllib.loads(f"value = {word}")["value"]
    except ValueError:
        value = word
    return _storable(name, value)


def _storable(name: str, value: Any) -> Any:
    """`value`, if the files of a run can hold it."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must hold text, finite numbers, true or false, and lists: {error}") from error
    return value


def _build(cls: type[C], table: dict[str, Any], prefix: str) -> C:
    """A configuration class from a TOML table, every key known and every value of its field's type."""
    types, made = typing.get_type_hints(cls), {}
    for key, value in table.items():
        name, kind = prefix + key, types.get(key)
        if kind is None:
            raise UserError(_unknown(name, name))
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise UserError(f"{name} is {value!r}, must be a table: write [{name}] and its keys below")
            made[key] = _build(kind, value, f"{name}.")  # type: ignore[arg-type]
        else:
            made[key] = _value(name, kind, value)
    return cls(**made)


def _value(name: str, kind: Any, value: Any) -> Any:
    """`value` as a field of type `kind`."""
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
        raise UserError(f"{name} is {value!r}, must be one of {', '.join(typing.get_args(kind))}")
    if typing.get_origin(kind) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UserError(f"{name} is {value!r}, must be a list of strings")
    if typing.get_origin(kind) is dict:
        if isinstance(value, dict):
            return _storable(name, value)
        raise UserError(f"{name} is {value!r}, must be a table: write [{name}] and its keys below")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[kind]
    raise UserError(f"{name} is {value!r}, must be {wanted}")


def _unknown(word: str, key: str) -> str:
    """That `key`, given as `word`, is unknown, with the name most like it, in whole or in its last part."""
    names = _names(Config)
    last = key.rpartition(".")[2]
    near = [name for name in names if name.rpartition(".")[2] == last] or difflib.get_close_matches(key, names, 1, 0.6)
    hint = f"the nearest is {near[0]!r}; " if near else ""
    return f"unknown key {word!r}; {hint}all are in `fedmoe train --help`"


def _names(cls: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(cls):
        names.append(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            names += _names(field.type, f"{prefix}{field.name}.")
    return names


def _one_line(box: str) -> str:
    """The message inside the box that the parser draws around it, without the help it appends below a rule."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ").strip() for line in text.splitlines()[1:]]
    rule = next((i for i, line in enumerate(lines) if line.startswith(("──", "╰"))), len(lines))
    message = " ".join(line for line in lines[:rule] if line) or " ".join(text.split())
    unplaced = "not understood (the configuration file comes first, and there is only one):"
    return message.replace("Unrecognized options:", unplaced).removeprefix("Error parsing ")
