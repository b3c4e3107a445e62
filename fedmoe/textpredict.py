"""`fedmoe predict` of text: how a trained client goes on after prompts, as it is or as a line of JSON for each."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmoe import textserving
from fedmoe.errors import UsageError, UserError
from fedmoe.sources.part import shown
from fedmoe.textserving import Generated

TOKENS = 100
"""That are generated unless more or fewer are asked for."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to generate; None where it is not said."""

    prompts: tuple[str, ...] = ()
    tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None

    def given(self) -> str | None:
        """The first option that is."""
        options = {
            "--prompt": self.prompts or None,
            "--tokens": self.tokens,
            "--temperature": self.temperature,
            "--seed": self.seed,
        }
        return next((name for name, value in options.items() if value is not None), None)


def run(model: Path, client: int | None, inputs: Sequence[Path], wanted: Wanted, as_json: bool) -> int:
    """Print what the model, an export or a client of a run, goes on with after prompts and the contents of `inputs`.

    A prompt that cannot be read is told on the error stream, and the exit code, which this returns, is then 1.
    """
    tokens, temperature, seed = _checked(wanted)
    if not wanted.prompts and not inputs:
        raise UsageError('no prompt: give one with --prompt, "" to begin anew, or name text files')
    served = textserving.from_export(model) if client is None else textserving.from_run(model, client)
    failed, first = False, True
    for prompt in _prompts(wanted.prompts, inputs):
        try:
            if isinstance(prompt, UserError):
                raise prompt
            made = textserving.generate(served, prompt, tokens, temperature, seed)
        except UserError as error:
            failed = True
            print(f"fedmoe: error: {error}", file=sys.stderr)
            continue
        if as_json:
            print(json.dumps(_line(prompt, made)), flush=True)
        else:
            print("" if first else "\n", _visible(prompt + made.text), sep="", flush=True)
        first = False
    return int(failed)


def _checked(wanted: Wanted) -> tuple[int, float, int]:
    tokens = TOKENS if wanted.tokens is None else wanted.tokens
    temperature = wanted.temperature or 0.0
    if tokens < 1:
        raise UsageError(f"--tokens is {tokens}, must be at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"--temperature is {temperature}, must be a finite number from 0 on")
    if wanted.seed is not None and temperature == 0:
        raise UsageError("--seed has no effect with temperature 0, where nothing is drawn: set --temperature")
    if wanted.seed is not None and wanted.seed < 0:
        raise UsageError(f"--seed is {wanted.seed}, must be at least 0")
    return tokens, temperature, wanted.seed or 0


def _prompts(prompts: Sequence[str], inputs: Sequence[Path]) -> Iterator[str | UserError]:
    yield from prompts
    for path in inputs:
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            yield UserError(f"{shown(path)}: byte {error.start} is not UTF-8: convert or remove it")
        except OSError as error:
            fix = "name a text file, or give a text with --prompt"
            yield UserError(f"{shown(path)}: cannot be read ({error.strerror}): {fix}")


def _line(prompt: str, made: Generated) -> dict[str, object]:
    return {
        "prompt": prompt,
        "text": made.text,
        "tokens": made.tokens,
        "weights": {"global": made.weight, "local": 1 - made.weight},
        "log_probability": made.log_probability,
    }


def _visible(text: str) -> str:
    """Text for a terminal: what would move its cursor or change its colors is written out."""
    return "".join(c if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160) else f"\\x{ord(c):02x}" for c in text)
