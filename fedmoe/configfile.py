"""Reading, overriding and saving a configuration; every complaint is one line."""

import contextlib
import dataclasses
import difflib
import io
import json
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w
import tyro

from fedmoe.config import Config
from fedmoe.errors import UsageError, UserError

C = TypeVar("C")

OPTIONS = "partition.options."
"""What the name of a partitioner's option begins with, which is any."""


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
        value = [_number(typing.get_args(kind)[0], item) for item in word.split("+")]
    elif kind in (int, float):
        value = _number(kind, word)
    elif kind is bool:
        value = {"true": True, "false": False}.get(word, word)
    return _value(name, kind, value)


def shown(value: Any) -> str:
    """A value as `parse` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(shown, value)) if isinstance(value, tuple) else str(value)


def _number(kind: Any, word: str) -> Any:
    """The word as a number of this kind; as it is if it is none, or no number is wanted."""
    try:
        return kind(word)
    except ValueError:
        return word


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
    if kind == tuple[float, float]:
        if isinstance(value, list) and [type(item) in (int, float) for item in value] == [True, True]:
            return tuple(map(float, value))
        raise UserError(f"{name} is {value!r}, must be a list of two numbers")
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, list) and all(type(entry) is item for entry in value):
            return tuple(value)
        raise UserError(f"{name} is {value!r}, must be a list of {'strings' if item is str else 'whole numbers'}")
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
