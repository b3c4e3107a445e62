"""Loads text into memory as windows of tokens: documents cut into tokens, joined by source, and packed."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedmoe import config as settings
from fedmoe.errors import UserError
from fedmoe.sources.documents import Document, documents
from fedmoe.sources.part import line, shown
from fedmoe.tokenizer import Ids, Tokenizer, open_tokenizer

BATCH = 2**20  # characters cut into tokens at a time


@dataclass(frozen=True, eq=False)
class Text:
    """Windows of T + 1 tokens: the first T are a sample's input, the last T what it predicts; all splits pooled.

    The documents of a source follow each other, an end token behind each. A window begins with the last token of the
    one before: every token of a source is predicted once, but its first, and those at its end that fill no window.
    """

    windows: Tensor  # int32 [n, T + 1], sorted by source, then as they follow each other
    labels: Tensor  # int64 [n], whose each is, 0 to len(classes) - 1
    classes: tuple[str, ...]
    """The sources' names, sorted, of those that fill a window."""
    short: tuple[str, ...]
    """The other ones."""
    tokenizer: Tokenizer
    fingerprint: str  # SHA-256 of windows, labels, class names and tokenizer
    column: Callable[[str], list[str | int]]
    """Of each window its `source`, or the `file` or `split` its first token is of; UserError for another name."""


@dataclass
class _Stream:
    """The tokens of a source, and where they are from."""

    tokens: list[Ids] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    origins: list[tuple[str, str]] = field(default_factory=list)
    length: int = 0

    def add(self, document: Document, ids: Ids, end: Ids) -> None:
        """Append a document and its end."""
        self.starts.append(self.length)
        self.origins.append((document.file, document.split))
        self.tokens += [ids, end]
        self.length += len(ids) + 1


def load(config: settings.Data) -> Text:
    """The text that `config` names, whole (`limit` is not looked at).

    Raises UserError, naming the file and the line, row or byte where there is one, for anything that cannot be found or
    read, and where no source fills a window.
    """
    try:
        tokenizer = open_tokenizer(config.tokenizer)
        return _packed(_streams(documents(config), tokenizer), tokenizer, config)
    except OSError as error:
        place = shown(Path(os.fsdecode(error.filename or config.name)))
        raise UserError(f"{place}: {error.strerror or line(error)}") from error


def _streams(found: Iterable[Document], tokenizer: Tokenizer) -> dict[str, _Stream]:
    """The tokens of each source. Documents that are empty, or are for the tokenizer, leave none."""
    streams: dict[str, _Stream] = {}
    end = np.array([tokenizer.end], dtype=np.int32)
    for batch in _batches(found):
        for document, ids in zip(batch, tokenizer.encode_all([document.text for document in batch]), strict=True):
            stream = streams.setdefault(document.source, _Stream())
            if len(ids):
                stream.add(document, ids, end)
    return streams


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in found:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    yield batch


def _packed(streams: dict[str, _Stream], tokenizer: Tokenizer, config: settings.Data) -> Text:
    length = config.sequence_length
    counts = {source: max(0, streams[source].length - 1) // length for source in sorted(streams)}
    classes = tuple(source for source, count in counts.items() if count)
    if not classes:
        raise UserError(_refusal(streams, config))
    try:
        windows = np.empty((sum(counts.values()), length + 1), dtype=np.int32)
    except MemoryError as error:
        raise UserError(
            f"{config.name}: {sum(counts.values())} windows of {length + 1} tokens exceed memory: give less text"
        ) from error
    origins: list[tuple[str, str]] = []
    for source in classes:
        stream, at, count = streams.pop(source), len(origins), counts[source]
        tokens = np.concatenate(stream.tokens)
        windows[at : at + count] = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]
        documents_at = np.searchsorted(stream.starts, np.arange(count) * length, side="right") - 1
        origins += [stream.origins[index] for index in documents_at]
    labels = np.repeat(np.arange(len(classes)), [counts[source] for source in classes])

    def column(name: str) -> list[str | int]:
        if name == "source":
            return [classes[label] for label in labels]
        if name in ("file", "split"):
            return [origin[name == "split"] for origin in origins]
        raise UserError(f"{config.name}: no column {name!r} among source, file, split: name one of these")

    digest = hashlib.sha256(json.dumps([windows.shape, classes, tokenizer.fingerprint]).encode())
    digest.update(windows.astype("<i4", copy=False).data)
    digest.update(labels.astype("<i8").data)
    return Text(
        windows=torch.from_numpy(windows),
        labels=torch.from_numpy(labels),
        classes=classes,
        short=tuple(source for source, count in counts.items() if not count),
        tokenizer=tokenizer,
        fingerprint=digest.hexdigest(),
        column=column,
    )


def _refusal(streams: dict[str, _Stream], config: settings.Data) -> str:
    """Why there is no window at all."""
    longest = max(sorted(streams), key=lambda source: streams[source].length, default="")
    if not streams or not streams[longest].length:
        return f"{config.name}: no text in it: give a data set that has some"
    return (
        f"{config.name}: the longest of its sources, {longest!r}, has {streams[longest].length} tokens, data."
        f"sequence_length = {config.sequence_length} needs {config.sequence_length + 1}: give more text or set less"
    )
