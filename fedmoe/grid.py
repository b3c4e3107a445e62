"""The runs of a sweep from its words: every combination of the alternatives, for every seed, each once."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fedmoe import configfile, meaning
from fedmoe.config import Config
from fedmoe.errors import UsageError, UserError

DOES = (
    "Train every combination of settings for several seeds, and compare them. Any field takes alternatives with commas "
    "between them (`--method fedmoe,local`), a list its entries with + (`--model.local cnn-1+cnn-5,cnn-2`), a switch "
    "`true,false`. `--seeds 3`: that many, from --seed on, or which (`--seeds 1,5,7`); `--dir runs/sweep`: a folder "
    "for the runs; `--json`: print JSON. The same words go on with what is not finished."
)
MOST = 10_000
"""Runs of a sweep: more cannot be meant."""
LONGEST = 120
"""Characters of a run's name: a file name has room for 255 bytes."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A run to be."""

    name: str
    """Of its folder, unique in the sweep."""
    config: Config
    """Without the folder."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What a sweep goes through."""

    base: Config
    axes: dict[str, list[Any]]
    """Alternatives by field."""
    seeds: list[int]

    def runs(self) -> list[Planned]:
        """All of them, a seed after another; within a seed those of the same data follow on one another.

        Fields that have no effect in a combination are at their defaults, so that it is run once.
        """
        combinations: dict[bytes, tuple[Config, dict[str, Any]]] = {}
        for values in itertools.product(*self.axes.values()):
            chosen = dict(zip(self.axes, values, strict=True))
            config = configfile.with_values(self.base, chosen)
            unused = meaning.unused(config)
            idle = tuple(f"{name}." for name in unused)
            told = {name: value for name, value in chosen.items() if not f"{name}.".startswith(idle)}
            effective = meaning.effective(config)
            combinations.setdefault(configfile.save(effective), (effective, told))
        of_data = [config.data for config, _ in combinations.values()]
        ordered = sorted(combinations.values(), key=lambda pair: of_data.index(pair[0].data))
        made: list[Planned] = []
        taken: set[str] = set()
        for seed, (config, told) in itertools.product(self.seeds, ordered):
            name = _name(told | {"seed": seed})
            if name.lower() in taken:  # told apart by what a file name cannot hold, or not at all on some disks
                name += "," + hashlib.sha256(repr(told).encode()).hexdigest()[:8]
            taken.add(name.lower())
            made.append(Planned(name, replace(config, seed=seed)))
        return made

    def idle(self) -> list[str]:
        """A line for every field that was set but has no effect in any of the runs."""
        said = [
            meaning.ignored(configfile.with_values(self.base, dict(zip(self.axes, values, strict=True))))
            for values in itertools.product(*self.axes.values())
        ]
        return [line for line in said[0] if all(line in lines for lines in said)]

    def to_json(self) -> dict[str, Any]:
        """All that decides the runs, as JSON gives it back."""
        made = {"config": configfile.flat(self.base), "axes": self.axes, "seeds": self.seeds}
        return dict(json.loads(json.dumps(made)))


def parse(base: Config, words: list[str], seeds: str) -> Grid:
    """The grid that options after a configuration name; every value fits its field, every configuration is sound.

    Raises UsageError for words that are not understood, UserError for a configuration that cannot be meant.
    """
    fixed: list[str] = []
    axes: dict[str, list[Any]] = {}
    seen: set[str] = set()
    for name, option in _options(words):
        if name == "run.dir":
            raise UsageError("run.dir has no place in a sweep, each run has its own folder: give --dir for them all")
        if name and name in seen:
            raise UsageError(f"--{name} is given twice: give its alternatives in one word, with commas between them")
        seen.add(name)
        if found := _alternatives(name, option):
            axes[name] = found
        else:
            fixed += option
    if "seed" in axes or ("seed" in seen and not seeds.isdecimal()):
        raise UsageError("several seeds are given by --seeds: how many from --seed on, as 3, or which, as 1,5,7")
    if "data.kind" in axes:
        raise UsageError("data.kind has one value in a sweep: accuracy of images and perplexity of text do not compare")
    base = configfile.override(base, fixed, "sweep", DOES)
    base = configfile.with_values(base, {name: found[0] for name, found in axes.items() if len(found) == 1})
    axes = {name: found for name, found in axes.items() if len(found) > 1}
    grid = Grid(base, axes, _seeds(seeds, base.seed))
    count = math.prod(map(len, axes.values())) * len(grid.seeds)
    if count > MOST:
        raise UserError(f"these are {count:,} runs, a sweep has at most {MOST:,}: give fewer alternatives or seeds")
    for run in grid.runs():
        try:
            meaning.check(run.config)
        except UserError as error:
            raise UserError(f"run {run.name}: {error}") from None
    return grid


def _options(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option with the words that follow it, and the field it sets; "" for none, as --help."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    for group in groups:
        yield configfile.option(group[0]) if group[0].startswith("--") and group[0] != "--help" else "", group


def _alternatives(name: str, option: list[str]) -> list[Any]:
    """The values that the words of an option list, each once; none where they are one value as `train` takes it."""
    word, equals, inline = option[0].partition("=")
    values = [*([inline] if equals else []), *option[1:]]
    default = configfile.flat(Config()).get(name)
    free = name.startswith(configfile.OPTIONS)
    listed = any("," in v or (isinstance(default, tuple) and "+" in v) for v in values)
    if free and len(values) == 1 and configfile.parse(name, values[0]) != values[0]:  # TOML, such as the list [2, 3]
        return []
    if (default is None and not free) or not (listed or (isinstance(default, bool) and values)):
        return []
    if len(values) > 1:
        raise UsageError(
            f"{word} {' '.join(values)}: give alternatives in one word, with commas between them and + within a list, "
            "as cnn-1+cnn-5,cnn-2"
        )
    pieces = values[0].split(",")
    if not all(pieces):
        raise UsageError(f"{word} {values[0]}: one of the alternatives is empty")
    try:
        found = [configfile.parse(name, piece) for piece in pieces]
        return [value for i, value in enumerate(found) if value not in found[:i]]
    except UserError as error:
        raise UsageError(str(error)) from None


def _seeds(word: str, first: int) -> list[int]:
    """The seeds that --seeds names."""
    pieces = word.split(",")
    if not all(piece.isdecimal() for piece in pieces):
        raise UsageError(f"--seeds is {word!r}, must be how many, as 3, or which, as 1,5,7")
    numbers = [int(piece) for piece in pieces]
    if len(numbers) == 1:
        if not 1 <= numbers[0] <= MOST:
            raise UsageError(f"--seeds is {word}, must be from 1 to {MOST:,}; a single one is --seed {word} --seeds 1")
        return list(range(first, first + numbers[0]))
    if twice := [n for n in numbers if numbers.count(n) > 1]:
        raise UsageError(f"--seeds is {word}, which has {twice[0]} twice")
    return numbers


def _name(values: dict[str, Any]) -> str:
    """Readable, and safe as the name of a folder: method=local,seed=0."""
    words = ",".join(f"{name}={configfile.shown(value)}" for name, value in values.items())
    safe = re.sub(r"[^A-Za-z0-9.,=+_-]", "_", words)
    if len(safe) <= LONGEST:
        return safe
    return f"{safe[:LONGEST]},{hashlib.sha256(words.encode()).hexdigest()[:8]}"
