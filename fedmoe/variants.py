"""Runs as they lie in their folders, grouped by what differs in their configurations; seeds repeat a variant."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe import configfile, meaning, metrics, outcome
from fedmoe.config import Config
from fedmoe.errors import UserError
from fedmoe.measure import Measure, measure
from fedmoe.outcome import Round

ASIDE = ("run.", "checkpoint.", "evaluation.", "federation.rounds")
"""What changes no number of a round; it tells variants apart only where nothing else does."""


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What a run folder tells."""

    folder: Path
    config: Config
    environment: Mapping[str, Any]
    rounds: Sequence[Round]
    """1, 2, ..."""
    scores: Mapping[int, Mapping[int, float]]
    """Of every evaluated round, the measure's value by client, personalized; without those that have none."""

    @property
    def by(self) -> Measure:
        """What the run is judged by."""
        return measure(self.config)

    @property
    def dealt(self) -> tuple[Any, Any, int]:
        """Equal where client i of two runs has the same samples."""
        return self.environment["data"], self.environment["partition"], self.config.federation.clients


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """Runs that differ in their seeds alone."""

    name: str
    values: Mapping[str, str]
    """Of the fields that differ among variants; empty where a field has no effect in this one."""
    runs: Mapping[int, Trained]
    """By seed."""


def read(folder: Path) -> Trained:
    """The run in a folder. Raises UserError naming the file and what is wrong with it."""
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder} is not a run, it has no config.toml: give folders that `fedmoe train` made")
    config = configfile.read(folder / "config.toml")
    meaning.check(config)
    path = folder / "environment.json"
    try:
        environment = json.loads(path.read_text())
        if not all(isinstance(environment[name], str) for name in ("data", "partition")):
            raise TypeError("a fingerprint is no text")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is missing or damaged ({type(error).__name__}: {error}): restore it") from error
    lines = metrics.read(folder)
    rounds = outcome.rounds(folder / "metrics.jsonl", lines, config.federation.clients, len(lines))
    by = measure(config)
    scores = {r.number: outcome.held(r, by) for r in rounds if r.accuracy is not None}
    return Trained(folder, config, environment, rounds, scores)


def group(runs: Sequence[Trained]) -> list[Variant]:
    """Variants in the order of their first runs, named by the fields that differ among them.

    Fields that change no number count only where runs of one seed are otherwise alike, then the folders do.
    """
    found: dict[tuple[str, ...], list[Trained]] = {}
    told = [_told(run, runs) for run in runs]
    for level in range(4):
        fields = [name for name in told[0] if _counts(name, level) and len({t[name] for t in told} - {""}) > 1]
        found = {}
        for run, values in zip(runs, told, strict=True):
            found.setdefault(tuple(values[name] for name in fields), []).append(run)
        if all(len({run.config.seed for run in same}) == len(same) for same in found.values()):
            break
    variants = []
    for key, same in found.items():
        values = dict(zip(fields, key, strict=True))
        name = " ".join(f"{field}={value}" for field, value in values.items() if value)
        name = name or f"method={same[0].config.method}"
        variants.append(Variant(name, values, {run.config.seed: run for run in same}))
    return variants


def pairs(first: Variant, second: Variant, number: int) -> Iterator[tuple[int, int, float, float]]:
    """Seed, client and both values of each client that has the same samples in both, after the round."""
    for seed, run in first.runs.items():
        other = second.runs.get(seed)
        if other is not None and run.dealt == other.dealt:
            a, b = run.scores[number], other.scores[number]
            yield from ((seed, client, a[client], b[client]) for client in sorted(a.keys() & b.keys()))


def _told(run: Trained, runs: Sequence[Trained]) -> dict[str, str]:
    """All that may tell a run from others: its fields, and its place."""
    flat, unused = configfile.flat(run.config), meaning.unused(run.config)
    values = {name: "" if name in unused else configfile.shown(value) or "''" for name, value in flat.items()}
    idle, options = "partition.options" in unused, run.config.partition.options
    del values["partition.options"]
    for name in sorted({name for other in runs for name in other.config.partition.options}):
        known = configfile.shown(options[name]) or "''" if name in options else "default"
        values[f"{configfile.OPTIONS}{name}"] = "" if idle else known
    if len({other.environment["data"] for other in runs}) == 1:  # wherever it lies
        del values["data.name"]
    del values["seed"], values["run.dir"]
    return values | {"in": str(run.folder.parent), "folder": str(run.folder)}


def _counts(name: str, level: int) -> bool:
    """Whether a field is asked for to tell variants apart, at the first level or a later one."""
    first = {"in": 2, "folder": 3}.get(name, int(name.startswith(ASIDE)))
    return first <= level and (name, level) != ("in", 3)
