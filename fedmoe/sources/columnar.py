"""Samples in tables: images and their labels, or text and whose it is; parquet, arrow, and data sets from the hub."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedmoe.errors import UserError
from fedmoe.sources.part import Part, Picture, Rows, begins, choose, line, reading, regular, rows_of, shown

if TYPE_CHECKING:
    import pyarrow

BATCH = 1024  # rows held in encoded form at a time


@dataclass(frozen=True)
class Table:
    """Rows that are read together: a file, or a whole split from the hub."""

    name: str
    split: str
    schema: "pyarrow.Schema"
    read: Callable[[str], Iterator["pyarrow.Array"]]  # the batches of one column


def parts(tables: Sequence[Table], image: str, label: str) -> list[Part]:
    """A part for each table; `image` and `label` name its columns, the only ones possible if empty."""
    found = []
    for table in tables:
        image, label = _column(table, "image", image), _column(table, "label", label)
        found.append((table, label, _names(table, label)))
    return [
        Part(
            name=table.name,
            split=table.split,
            labels=_labels(table, label),
            classes=names,
            images=partial(_images, table, image),
            image_at=rows_of(table.name),
            label_at=rows_of(table.name),
            columns={name: partial(_values, table, name) for name in _plain(table.schema)},
        )
        for table, label, names in found
    ]


def documents(table: Table, text: str, label: str) -> Iterator[tuple[str, str | None]]:
    """The text of each row and whose it is: what column `label` says, or None if that is empty."""
    whose = _sources(table, label) if label else repeat(None)
    texts = (value for batch in table.read(text) for value in batch.to_pylist())
    for row, (value, source) in enumerate(zip(texts, whose, strict=False)):
        if value is None:
            raise UserError(f"{table.name}: row {row}: no text: repair or remove the row")
        yield value, source


def of_text(table: Table, text: str, label: str) -> tuple[str, str]:
    """The columns of the text and of whose it is.

    If empty, the first is `text`, `content` or the only one of text, and the second `source` or none at all.
    """
    from pyarrow.types import is_large_string, is_string

    kinds = dict(zip(table.schema.names, table.schema.types, strict=True))
    label = label or ("source" if "source" in kinds else "")
    fit = [name for name, kind in kinds.items() if is_string(kind) or is_large_string(kind)]
    candidates = [name for name in ("text", "content") if name in fit][:1] or [name for name in fit if name != label]
    chosen = _chosen(table, "text", [text] if text else candidates, fit)
    return chosen, label and _chosen(table, "label", [label], _plain(table.schema))


def parquet(path: Path, split: str) -> Table:
    """A parquet file."""
    import pyarrow.parquet

    what = "parquet file"

    def read(column: str) -> Iterator["pyarrow.Array"]:
        with reading(path, what), pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH, columns=[column]):
                batch.validate(full=True)
                yield batch.column(0)

    with reading(regular(path), what):
        begins(path, b"PAR1")
        return Table(shown(path), split, pyarrow.parquet.read_schema(path), read)


def arrow(path: Path, split: str) -> Table:
    """An arrow file in either of its formats, for files and for streams, as `datasets.save_to_disk` writes."""
    import pyarrow.ipc

    what = "arrow file"

    def opened(source: "pyarrow.NativeFile") -> Any:
        file = source.read(6) == b"ARROW1"
        source.seek(0)
        return pyarrow.ipc.open_file(source) if file else pyarrow.ipc.open_stream(source)

    def batches(reader: Any) -> Iterator["pyarrow.RecordBatch"]:
        if hasattr(reader, "num_record_batches"):
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from reader

    # Mapped: what a header declares is then looked for in the file, and not allocated.
    def read(column: str) -> Iterator["pyarrow.Array"]:
        with reading(path, what), pyarrow.memory_map(str(path)) as source:
            for batch in batches(opened(source)):
                batch.validate(full=True)
                for start in range(0, len(batch), BATCH):
                    yield batch.column(column).slice(start, BATCH)

    with reading(regular(path), what), pyarrow.memory_map(str(path)) as source:
        return Table(shown(path), split, opened(source).schema, read)


def hub(name: str, splits: Sequence[str]) -> list[Table]:
    """The splits of a Hugging Face data set."""
    import datasets  # here, not above: it takes a second to import

    print(f"fedmoe: fetching {name!r} from the Hugging Face hub, or from its cache on this machine", file=sys.stderr)
    retries = logging.getLogger("huggingface_hub")  # logs two lines for each of its six attempts, 23 s when offline
    level = retries.level
    retries.setLevel(logging.ERROR)
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # whatever the library, its network stack and its file formats raise
        raise UserError(
            f"data.name: {name!r} is no file or folder here and cannot be had from the Hugging Face hub "
            f"({line(error)}): check the name and the network, or give a folder of files"
        ) from error
    finally:
        retries.setLevel(level)

    def read(split: str, column: str) -> Iterator["pyarrow.Array"]:
        for table in found[split].select_columns([column]).with_format("arrow").iter(BATCH):
            yield table[column].combine_chunks()

    return [
        Table(f"{name}/{split}", split, found[split].features.arrow_schema, partial(read, split))
        for split in choose(splits, set(found), name)
    ]


def _features(schema: "pyarrow.Schema") -> dict[str, dict[str, Any]]:
    """The column types that the `datasets` library left in a schema; empty where it did not."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}  # lists: sequences
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return {}


def _names(table: Table, label: str) -> tuple[str, ...]:
    """The class names, if stated."""
    names = _features(table.schema).get(label, {}).get("names") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{table.name}: the class names of column {label!r} are no list of names: repair its metadata")
    return tuple(names)


def _column(table: Table, what: Literal["image", "label"], wanted: str) -> str:
    from pyarrow.types import is_integer, is_struct

    kinds = dict(zip(table.schema.names, table.schema.types, strict=True))
    if what == "image":
        fit = [name for name, kind in kinds.items() if is_struct(kind) and kind.get_field_index("bytes") >= 0]
        candidates = fit
    else:
        fit = [name for name, kind in kinds.items() if is_integer(kind)]
        typed = [name for name, feature in _features(table.schema).items() if feature.get("_type") == "ClassLabel"]
        candidates = [name for name in ("label", "labels", "fine_label") if name in kinds][:1] or typed
    return _chosen(table, what, [wanted] if wanted else candidates, fit)


def _chosen(table: Table, what: Literal["image", "label", "text"], chosen: list[str], fit: list[str]) -> str:
    """The only column there is to choose. UserError unless there is one, and it fits."""
    if len(chosen) == 1 and chosen[0] in fit and table.schema.names.count(chosen[0]) == 1:
        return chosen[0]
    found = f"no {what} column {chosen[0]!r}" if len(chosen) == 1 else f"{len(chosen)} {what} columns"
    kinds = zip(table.schema.names, table.schema.types, strict=True)
    listing = line(ValueError(", ".join(f"{name} ({kind})" for name, kind in kinds).replace("\n", " ")))
    raise UserError(f"{table.name}: {found} among {listing}: name one in data.{what}")


def _plain(schema: "pyarrow.Schema") -> list[str]:
    """The columns of names and whole numbers."""
    from pyarrow.types import is_dictionary, is_integer, is_large_string, is_string

    kinds = zip(schema.names, schema.types, strict=True)
    return [n for n, t in kinds if any(is_(t) for is_ in (is_integer, is_string, is_large_string, is_dictionary))]


def _values(table: Table, column: str) -> list[object]:
    return [value for batch in table.read(column) for value in batch.to_pylist()]


def _sources(table: Table, column: str) -> list[str]:
    """Whose each row is: a name, or a number, which the class names may name."""
    names, values = _names(table, column), _values(table, column)
    for row, value in enumerate(values):
        if not isinstance(value, str | int):
            raise UserError(f"{table.name}: row {row}: {column} is {value!r}, not a name or a whole number: repair it")
    return [names[v] if isinstance(v, int) and 0 <= v < len(names) else str(v) for v in values]


def _labels(table: Table, column: str) -> Rows:
    found = [np.empty(0, dtype=np.int64)]
    for batch in table.read(column):
        done = sum(map(len, found))
        if batch.null_count:
            row = done + int(np.flatnonzero(batch.is_null())[0])
            raise UserError(f"{table.name}: row {row}: no label: repair or remove the row")
        values = batch.to_numpy()
        if values.dtype == np.uint64 and values.max(initial=0) > np.iinfo(np.int64).max:
            row = done + int(values.argmax())
            raise UserError(f"{table.name}: row {row}: label {values.max()} out of range: repair or remove the row")
        found.append(values.astype(np.int64))
    return np.concatenate(found)


def _images(table: Table, column: str, rows: Rows) -> Iterator[Picture]:
    done = 0
    for batch in table.read(column):
        here = rows[np.searchsorted(rows, done) : np.searchsorted(rows, done + len(batch))]
        for value in batch.take(here - done).to_pylist():
            value = value or {}
            yield value["bytes"] if value.get("bytes") is not None else Path(value.get("path") or "")
        done += len(batch)
