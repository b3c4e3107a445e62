"""Reading, overriding, checking and saving a configuration; every complaint is one line."""

import contextlib
import dataclasses
import difflib
import io
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
import tyro

from fedmoe.config import Config
from fedmoe.errors import UserError


def read(path: Path) -> Config:
    """The configuration in a TOML file. Raises UserError naming the file and what is wrong in it."""
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not TOML: {error}") from error
    try:
        return override(Config(), [word for key, value in _flat(content) for word in _words(key, value)])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def override(config: Config, words: list[str]) -> Config:
    """`config` with dotted command-line options applied, e.g. ["--federation.rounds", "50"]. `--help` prints and exits.

    Raises UserError for an unknown option, naming the nearest, and for a value that does not fit.
    """
    for word in words:
        if word.startswith("--"):
            _known(re.sub(r"^(--(?:\w+\.)*)no[-_]", r"\1", word).partition("=")[0])
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                Config,
                args=words,
                default=config,
                prog="fedmoe train [CONFIG.toml]",
                description="Train a federation.",
                use_underscores=True,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(complaint.getvalue())) from None


def save(config: Config) -> bytes:
    """The whole configuration as TOML."""
    return tomli_w.dumps(dataclasses.asdict(config)).encode()


def check(config: Config) -> None:
    """Raise UserError for the first value that cannot be meant."""
    c = config
    positive = {
        "federation.clients": c.federation.clients,
        "federation.rounds": c.federation.rounds,
        "federation.epochs": c.federation.epochs,
        "partition.classes_per_client": c.partition.classes_per_client,
        "partition.alpha": c.partition.alpha,
        "partition.min_samples": c.partition.min_samples,
        "gate.hidden": c.gate.hidden,
        "training.batch_size": c.training.batch_size,
        "training.lr": c.training.lr,
        "evaluation.every": c.evaluation.every,
        "evaluation.batch_size": c.evaluation.batch_size,
        "checkpoint.every": c.checkpoint.every,
        "data.std": c.data.std,
        "model.local (entries)": len(c.model.local),
    }
    for name, value in positive.items():
        if not value > 0:
            raise UserError(f"{name} is {value}, must be more than 0")
    natural = {
        "run.threads": c.run.threads,
        "seed": c.seed,
        "data.limit": c.data.limit,
        "data.image_size": c.data.image_size,
        "training.momentum": c.training.momentum,
        "training.weight_decay": c.training.weight_decay,
    }
    for name, value in natural.items():
        if not value >= 0:
            raise UserError(f"{name} is {value}, must be 0 or more")
    if not 0 < c.federation.fraction <= 1:
        raise UserError(f"federation.fraction is {c.federation.fraction}, must be more than 0 and at most 1")
    if not 0 < c.partition.test_fraction < 1:
        raise UserError(f"partition.test_fraction is {c.partition.test_fraction}, must be between 0 and 1")
    if not 0 <= c.static_weight <= 1:
        raise UserError(f"static_weight is {c.static_weight}, must be from 0 to 1")


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            _known(prefix + key)
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _words(key: str, value: Any) -> list[str]:
    _known(key)
    if key in {field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)}:
        raise UserError(f"{key} is {value!r}, must be a table: write [{key}] and its keys below")
    if isinstance(value, bool):
        head, _, last = key.rpartition(".")
        return [f"--{key}"] if value else [f"--{head}.no-{last}" if head else f"--no-{last}"]
    return [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]


def _known(key: str) -> None:
    plain = key.removeprefix("--").replace("-", "_")
    names = ["help", *_names(Config)]
    if plain not in names:
        near = difflib.get_close_matches(plain, names, n=1, cutoff=0)
        raise UserError(
            f"unknown key {key!r}; the nearest is {near[0]!r}" + (", see fedmoe train --help" if key[0] == "-" else "")
        )


def _names(cls: type, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(cls):
        yield prefix + field.name
        if dataclasses.is_dataclass(field.type):
            yield from _names(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]


def _one_line(box: str) -> str:
    """The message inside the box that the parser draws around it, without the help it appends below a rule."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ").strip() for line in text.splitlines()[1:]]
    rule = next((i for i, line in enumerate(lines) if line.startswith(("──", "╰"))), len(lines))
    return " ".join(line for line in lines[:rule] if line) or text.strip()
