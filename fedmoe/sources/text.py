"""Text as packed windows of tokens: whoever's it is told apart, all of it read, checked and tokenized in one place."""

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmoe import config as settings
from fedmoe.errors import UserError
from fedmoe.sources import columnar
from fedmoe.sources.local import ARROW
from fedmoe.sources.part import line, listed, printable, shown
from fedmoe.tokenizer import Tokenizer, open_tokenizer

STDLIB = "stdlib"
JSONL = (".jsonl", ".ndjson")
TEXTS = ("text", "content", "sentence", "body")
"""What the field with the text is called where `data.text` does not say."""
BATCH = 256
"""Texts that are tokenized at a time."""


class Piece(NamedTuple):
    """One text."""

    source: str
    """Whose it is."""
    file: str
    text: str


@dataclass(frozen=True, eq=False)
class Text:
    """Windows of tokens, each of one source."""

    windows: Tensor  # int32 [n, T + 1]; the last token of one is the first of the source's next
    labels: Tensor  # int64 [n], whose: 0 to len(classes) - 1
    classes: tuple[str, ...]
    """The sources."""
    tokenizer: Tokenizer
    fingerprint: str

    def column(self, name: str) -> list[str | int]:
        """What `source` says of each window; UserError for any other name."""
        if name != "source":
            raise UserError(f"text has no column {name!r}: set partition.column to source")
        return [self.classes[label] for label in self.labels.tolist()]


def load(config: settings.Data) -> Text:
    """The text that `config` names.

    The texts of a source follow each other in order, an end token behind each, and are cut into windows; what is left
    over at the end of a source is dropped. Raises UserError, naming the file and the line or byte where there is one.
    """
    length = config.sequence_length
    tokenizer = open_tokenizer(config.tokenizer)
    found: list[tuple[str, np.ndarray]] = []
    short = ("", 0)
    for source, pieces in groupby(sorted(_pieces(config), key=lambda piece: piece[:2]), lambda piece: piece.source):
        tokens = _tokens([piece.text for piece in pieces], tokenizer)
        if len(tokens) > length:
            found.append((source, _windows(tokens, length)))
        elif len(tokens) > short[1]:
            short = source, len(tokens)
    if not found:
        raise UserError(
            f"{config.name}: no source has the {length + 1} tokens of a window, the longest, {short[0] or 'none'}, has "
            f"{short[1]}: lower data.sequence_length, or give more text"
        )
    names = tuple(source for source, _ in found)
    whole = torch.from_numpy(np.concatenate([windows for _, windows in found]))
    labels = torch.from_numpy(np.repeat(np.arange(len(found)), [len(windows) for _, windows in found]))
    digest = hashlib.sha256(json.dumps([list(whole.shape), names, tokenizer.fingerprint]).encode())
    digest.update(whole.numpy().data)
    digest.update(labels.numpy().astype("<i8").data)
    return Text(whole, labels, names, tokenizer, digest.hexdigest())


def _tokens(texts: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """int32 [n], an end token behind each text."""
    made: list[np.ndarray] = []
    for start in range(0, len(texts), BATCH):
        for tokens in tokenizer.encode(texts[start : start + BATCH]):
            made += [tokens, np.array([tokenizer.end], np.int32)]
    return np.concatenate(made)


def _windows(tokens: np.ndarray, length: int) -> np.ndarray:  # [n] -> [(n - 1) // length, length + 1]
    """Each begins with the last token of the one before, so that every token but the first is predicted once."""
    if len(tokens) <= length:
        return np.empty((0, length + 1), np.int32)
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]


def _pieces(config: settings.Data) -> Iterator[Piece]:
    if config.name == STDLIB:
        return _stdlib()
    path = Path(config.name).expanduser()
    if not path.exists():
        if config.name.startswith((".", "/", "~")) or path.suffix in (*JSONL, ".parquet", *ARROW, ".txt"):
            raise UserError(f"data.name: the file or folder {shown(path)} does not exist: give one that holds text")
        return _rows(columnar.hub(config.name, config.splits), config)
    printable(path)
    if path.is_dir():
        files = _files(path)
        for kind, suffixes in (("parquet", (".parquet",)), ("arrow", ARROW), ("JSONL", JSONL)):
            if some := [file for file in files if file.suffix in suffixes]:
                if len(some) < len(files):
                    raise UserError(f"{shown(path)}: {kind} files and others in it: give a folder of one kind")
                return (piece for file in some for piece in _file(file, config))
        return _folder(path, files)
    return _file(path, config)


def _file(path: Path, config: settings.Data) -> Iterator[Piece]:
    if path.suffix in JSONL:
        return _jsonl(path, config)
    if path.suffix == ".parquet" or path.suffix in ARROW:
        table = columnar.parquet if path.suffix == ".parquet" else columnar.arrow
        return _rows([table(path, path.stem)], config)
    return iter([Piece(path.name, path.name, _read(path))])


def _stdlib() -> Iterator[Piece]:
    """The source of the standard library of the Python that runs, a source for each top-level package or module."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not skipped & set(inside.parts[:-1]) and inside.parts[0].isascii():
            try:
                text = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError):  # a few are in another encoding, on purpose
                continue
            yield Piece(inside.parts[0].removesuffix(".py"), inside.as_posix(), text)


def _files(folder: Path) -> list[Path]:
    """All files of a folder, recursively, sorted; hidden ones left out."""
    return [file for path in listed(folder) for file in (_files(path) if path.is_dir() else [path])]


def _folder(folder: Path, files: Sequence[Path]) -> Iterator[Piece]:
    """A source for each folder in it, or where there is none, for each file."""
    if not files:
        raise UserError(f"{shown(folder)}: no files in it: give a folder with text")
    apart = any(file.parent != folder for file in files)
    for file in files:
        inside = file.relative_to(folder)
        if apart and len(inside.parts) == 1:
            raise UserError(f"{shown(file)}: lies beside folders, each of which is a source: put it into one")
        yield Piece(inside.parts[0], inside.as_posix(), _read(file))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)}: byte {error.start} is not UTF-8: convert or remove it") from error
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read ({error.strerror}): make it readable") from error


def _jsonl(path: Path, config: settings.Data) -> Iterator[Piece]:
    name = config.text
    for number, raw in enumerate(_read(path).splitlines(), start=1):
        if not raw.strip():
            continue
        place = f"{shown(path)}: line {number}"
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: no JSON ({line(error)}): repair or remove it") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: is a {type(row).__name__}, must be an object: repair or remove it")
        if not name:
            strings = [key for key, value in row.items() if isinstance(value, str) and key != config.label]
            name = next((key for key in TEXTS if key in strings), strings[0] if len(strings) == 1 else "")
            if not name:
                raise UserError(f"{place}: no one field of text among {', '.join(row) or 'none'}: name it in data.text")
        yield _piece(
            row.get(name), row.get(config.label) if config.label else path.stem, name, config, place, path.name
        )


def _rows(tables: Sequence[columnar.Table], config: settings.Data) -> Iterator[Piece]:
    from pyarrow.types import is_large_string, is_string

    for table in tables:
        kinds = dict(zip(table.schema.names, table.schema.types, strict=True))
        strings = [name for name, kind in kinds.items() if is_string(kind) or is_large_string(kind)]
        others = [name for name in strings if name != config.label]
        name = config.text or next((n for n in TEXTS if n in others), others[0] if len(others) == 1 else "")
        for field, wanted in (("text", name), ("label", config.label)):
            if (wanted or field == "text") and wanted not in (strings if field == "text" else kinds):
                raise UserError(
                    f"{table.name}: no {field} column {wanted!r} among {', '.join(kinds)}: name one in data.{field}"
                )
        texts = (value for batch in table.read(name) for value in batch.to_pylist())
        label = config.label
        whose = (value for batch in table.read(label) for value in batch.to_pylist()) if label else None
        for row, text in enumerate(texts):
            source = table.split if whose is None else next(whose)
            yield _piece(text, source, name, config, f"{table.name}: row {row}", table.name)


def _piece(text: object, source: object, name: str, config: settings.Data, place: str, file: str) -> Piece:
    if not isinstance(text, str):
        raise UserError(f"{place}: {name} is {text!r:.40}, must be text: repair the row, or name another in data.text")
    if isinstance(source, bool) or not isinstance(source, str | int):
        what = f"{config.label} is {source!r:.40}"
        raise UserError(f"{place}: {what}, must be a name or a whole number: repair the row, or set data.label")
    return Piece(str(source), file, text)
