"""Documents of text and whose each is: of the standard library, JSONL files, text files, tables, or the hub."""

import json
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from fedmoe.config import Data
from fedmoe.errors import UserError
from fedmoe.sources import columnar, local
from fedmoe.sources.part import choose, line, listed, printable, regular, shown

JSONL = (".jsonl", ".ndjson")
TABLES = (".parquet", *local.ARROW)
KINDS = "JSONL, parquet or arrow files, or a folder of text files"

STDLIB_LIMIT = 2**18
"""Characters that a source of the standard library gives at most; files that would exceed it are left out."""
STDLIB_SKIPPED = {"__pycache__", "idle_test", "site-packages", "test", "tests"}
"""Folders of the standard library that are left out: what is generated or installed, and tests."""


class Document(NamedTuple):
    """A text, whole."""

    text: str
    source: str
    """Whose it is."""
    file: str
    """What holds it: relative to the folder that the data set is, or the name of a split of the hub."""
    split: str


def documents(config: Data) -> Iterator[Document]:
    """All documents of what `config` names, always in the same order; some may be empty.

    Raises UserError, naming the file and the line (from 1), row or byte (both from 0) where there is one, and OSError.
    """
    if config.name == "stdlib":
        choose(config.splits, {"train"}, "stdlib")
        return standard_library()
    path = Path(config.name).expanduser()
    suffixes = (*JSONL, *TABLES, ".txt")
    if not (config.name.startswith((".", "/", "~")) or path.suffix in suffixes or path.exists()):
        tables = columnar.hub(config.name, config.splits)
        return _of_tables(tables, [table.name for table in tables], config)
    printable(path)
    if not path.exists() and not path.is_symlink():
        raise UserError(f"data.name: the file or folder {shown(path)} does not exist: give {KINDS}")
    if path.is_dir():
        return _of_folder(path, config)
    regular(path)
    if path.suffix in TABLES:
        return _of_table_files(path, [path], config)
    if path.suffix in JSONL:
        return _of_lines(path, {path: path.name}, config)
    if path.suffix == ".txt":
        return _of_texts(path, {path: path.name}, config)
    raise UserError(f"data.name: {shown(path)} is of no known kind by its name: give a .txt file, {KINDS}")


def standard_library() -> Iterator[Document]:
    """The source code of the Python that runs, without tests; what is not UTF-8 is left out."""
    root, found = Path(sysconfig.get_path("stdlib")), False
    for source in sorted(sys.stdlib_module_names):
        left = STDLIB_LIMIT
        for path in [root / f"{source}.py", *sorted((root / source).rglob("*.py"))]:
            if STDLIB_SKIPPED & set(path.relative_to(root).parts) or not path.is_file():
                continue
            found = True
            try:
                text = path.read_bytes().decode()
            except UnicodeDecodeError:
                continue
            if len(text) <= left:
                left -= len(text)
                yield Document(text, source, path.relative_to(root).as_posix(), "train")
    if not found:
        raise UserError(f'data.name: "stdlib", but this Python has no source code in {shown(root)}: give {KINDS}')


def _of_folder(folder: Path, config: Data) -> Iterator[Document]:
    tables = local.table_files(folder)
    kinds = [*tables, *["JSONL files"] * any(path.suffix in JSONL for path in listed(folder))]
    if len(kinds) > 1:
        raise UserError(f"{shown(folder)}: {' and '.join(kinds)} in it: give a folder that has one kind, or one file")
    for files in tables.values():
        return _of_table_files(folder, files, config)
    sources = _sources(folder)
    other = [path for path in sources if path.suffix not in JSONL]
    if len(other) == len(sources):
        return _of_texts(folder, sources, config)
    if other:
        raise UserError(f"{shown(other[0])}: lies among JSONL files and is none by its name: move it elsewhere")
    return _of_lines(folder, sources, config)


def _sources(folder: Path) -> dict[Path, str]:
    """Every file in a folder, at any depth, with its source: the folder at the top, or the file where there is none."""
    top = listed(folder)
    above = [path for path in top if path.is_dir()]
    if not above:
        if not top:
            raise UserError(f"{shown(folder)}: no files in it: give {KINDS}")
        return {path: path.name for path in top}
    found = {path: source.name for source in above for path in _below(source, (folder.resolve(),))}
    if empty := [source for source in above if source.name not in found.values()]:
        raise UserError(f"{shown(empty[0])}: no files in it: add some, or remove the folder")
    if alone := [path for path in top if path not in above]:
        raise UserError(
            f"{shown(alone[0])}: lies beside folders, each of which is a source: put it into one, or move it elsewhere"
        )
    return found


def _below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        raise UserError(f"{shown(folder)}: a link to a folder that it is in: remove it")
    for path in listed(folder):
        if path.is_dir():
            yield from _below(path, (*above, real))
        else:
            yield path


def _of_texts(root: Path, sources: dict[Path, str], config: Data) -> Iterator[Document]:
    """A document for each file."""
    choose(config.splits, {"train"}, shown(root))
    for path, source in sources.items():
        text = _decoded(regular(path).read_bytes(), shown(path), 0)
        yield Document(text.removeprefix("\ufeff"), source, _relative(path, root), "train")


def _of_lines(root: Path, sources: dict[Path, str], config: Data) -> Iterator[Document]:
    """A document for each line, which is an object of JSON; the split is what a file's name begins with."""
    splits = {path: path.stem.split("-")[0] for path in sources}
    chosen = choose(config.splits, set(splits.values()), shown(root))
    text, label, first = config.text, config.label, ""
    for path, source in sources.items():
        if splits[path] not in chosen:
            continue
        done = 0
        with regular(path).open("rb") as file:
            for number, content in enumerate(file, 1):
                place = f"{shown(path)}: line {number}"
                read = _decoded(content, shown(path), done).removeprefix("\ufeff" if number == 1 else "")
                done += len(content)
                if not read.strip():
                    continue
                record = _record(read, place)
                if not first:
                    first, label = place, label or ("source" if "source" in record else "")
                if not label and "source" in record:
                    raise UserError(f"{place}: has a field 'source', {first} has none: give all one, or none")
                text = text or _text_field(record, label, place)
                whose = _field(record, label, place, "label") if label else source
                written = _field(record, text, place, "text")
                yield Document(written, whose, _relative(path, root), splits[path])


def _record(text: str, place: str) -> dict[str, object]:
    try:
        record = json.loads(text.rstrip())  # an end of the line would be counted as one more
    except (ValueError, RecursionError) as error:
        cause = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else line(error)
        raise UserError(f"{place}: no JSON ({cause}): repair or remove the line") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: {type(record).__name__}, an object with a field for the text is needed: repair it")
    return record


def _text_field(record: dict[str, object], label: str, place: str) -> str:
    texts = [name for name, value in record.items() if isinstance(value, str) and name != label]
    found = [name for name in ("text", "content") if name in texts][:1] or texts
    if len(found) != 1:
        raise UserError(f"{place}: {len(found)} fields of text among {_names(record)}: name one in data.text")
    return found[0]


def _field(record: dict[str, object], name: str, place: str, what: str) -> str:
    """The value of a field: text, or, of a label, a whole number too."""
    if name not in record:
        raise UserError(f"{place}: no field {name!r} among {_names(record)}: repair the line, or set data.{what}")
    value = record[name]
    if what == "label" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        expected = "text" if what == "text" else "a name or a whole number"
        raise UserError(f"{place}: {name} is {json.dumps(value)[:50]}, not {expected}: repair it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: {name} holds {value[error.start]!r}, half of a character: repair it") from error
    return value


def _names(record: dict[str, object]) -> str:
    return ", ".join(map(repr, record))[:200] or "none"


def _of_table_files(root: Path, files: list[Path], config: Data) -> Iterator[Document]:
    tables = local.tables(root, files, config.splits)
    names = {shown(file): _relative(file, root) for file in files}
    return _of_tables(tables, [names[table.name] for table in tables], config)


def _of_tables(tables: Sequence[columnar.Table], files: list[str], config: Data) -> Iterator[Document]:
    """A document for each row; without a column that says whose it is, the file does."""
    text, label = config.text, config.label
    for table, file in zip(tables, files, strict=True):
        text, label = columnar.of_text(table, text, label)
        for written, whose in columnar.documents(table, text, label):
            yield Document(written, PurePath(file).name if whose is None else whose, file, table.split)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.name


def _decoded(content: bytes, name: str, start: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {start + error.start}: save it as UTF-8, or remove it") from error
