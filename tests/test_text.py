"""Text as samples: every kind of corpus is read alike, every token is predicted once, and what is broken is named."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmoe.config import Data
from fedmoe.errors import UserError
from fedmoe.sources import documents, text
from fedmoe.sources.documents import Document
from fedmoe.tokenizer import ByteTokenizer
from tests import textfiles
from tests.textfiles import CORPORA, SENTENCES, tokenizer_file


@pytest.fixture(autouse=True)
def _nothing_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is taken for one of the hub by mistake fails at once."""

    def fail(name: str) -> None:
        raise AssertionError(f"{name} was looked for on the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)


def load(path: object, length: int = 4, **config: Any) -> text.Text:
    return text.load(Data(kind="text", name=str(path), sequence_length=length, **config))


def complaint(path: object, **config: Any) -> str:
    """The one line that is refused with."""
    with pytest.raises(UserError) as caught:
        load(path, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def streams(found: text.Text) -> dict[str, list[int]]:
    """The tokens of each source, as its windows follow each other; asserts that they join."""
    joined: dict[str, list[int]] = {}
    for window, label in zip(found.windows.tolist(), found.labels.tolist(), strict=True):
        before = joined.setdefault(found.classes[label], window[:1])
        assert before[-1] == window[0]
        before += window[1:]
    return joined


def expected(tokenizer: Any, length: int) -> dict[str, list[int]]:
    made = {}
    for who, texts in SENTENCES.items():
        tokens = [token for one in texts for token in (*tokenizer.encode(one).tolist(), tokenizer.end)]
        made[who] = tokens[: (len(tokens) - 1) // length * length + 1]
    return made


@pytest.mark.parametrize("kind", CORPORA)
@pytest.mark.parametrize("tokenizer", ["bytes", "file"])
def test_every_kind_gives_the_same_windows(tmp_path: Path, kind: str, tokenizer: str) -> None:
    (tmp_path / "corpus").mkdir()
    path = CORPORA[kind](tmp_path / "corpus")
    name = "bytes" if tokenizer == "bytes" else str(tokenizer_file(tmp_path))
    found = load(path, 4, tokenizer=name)
    assert found.classes == ("ann", "bob", "eve") and found.short == ()
    assert found.windows.dtype == torch.int32 and found.windows.shape[1] == 5
    assert found.labels.dtype == torch.int64 and found.labels.tolist() == sorted(found.labels.tolist())
    assert streams(found) == expected(found.tokenizer, 4)
    assert found.column("source") == [found.classes[label] for label in found.labels]
    assert found.fingerprint == load(path, 4, tokenizer=name).fingerprint != load(path, 5, tokenizer=name).fingerprint


@pytest.mark.parametrize("kind", ["JSONL", "parquet", "arrow"])
def test_a_file_may_be_named_itself(tmp_path: Path, kind: str) -> None:
    folder = CORPORA[kind](tmp_path)
    [file] = [path for path in folder.rglob("*") if path.suffix in (".jsonl", ".parquet", ".arrow")]
    assert load(file).fingerprint == load(folder).fingerprint
    assert set(load(file).column("file")) == {file.name}
    assert set(load(folder).column("file")) == {file.relative_to(folder).as_posix()}


DOCUMENTS = st.lists(st.tuples(st.sampled_from("abc"), st.text(max_size=12)), max_size=20)


@given(found=DOCUMENTS, length=st.integers(2, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_token_is_predicted_once_but_the_first_and_what_fills_no_window(
    monkeypatch: pytest.MonkeyPatch, found: list[tuple[str, str]], length: int
) -> None:
    made = [Document(written, who, f"{who}-{i}", "train") for i, (who, written) in enumerate(found)]
    monkeypatch.setattr(text, "documents", lambda config: iter(made))
    monkeypatch.setattr(text, "BATCH", 10)
    whole: dict[str, list[int]] = {}
    for who, written in found:
        whole.setdefault(who, []).extend([*written.encode(), 256] if written else [])
    full = {who: tokens for who, tokens in sorted(whole.items()) if len(tokens) > length}
    if not full:
        assert "some" in complaint("x", length=length) or "give more text" in complaint("x", length=length)
        return
    packed = load("x", length)
    assert packed.classes == tuple(full) and packed.short == tuple(sorted(whole.keys() - full.keys()))
    for label, tokens in enumerate(full.values()):
        targets = packed.windows[packed.labels == label][:, 1:].flatten().tolist()
        assert targets == tokens[1 : 1 + len(targets)]
        assert len(tokens) - 1 - len(targets) < length
    files = packed.column("file")
    for window, file in zip(packed.windows.tolist(), files, strict=True):
        written = made[int(str(file).split("-")[1])].text
        assert window[0] in [*written.encode(), 256]


def test_the_first_token_says_of_which_file_a_window_is(tmp_path: Path) -> None:
    for name, written in (("train-1", "abcdefg"), ("train-0", "123"), ("test", "x" * 8)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": written, "source": "one"}))
    found = load(tmp_path, 2)
    # xxxxxxxx.123.abcdefg. in windows of 2 that predict 2
    names = ["test.jsonl"] * 5 + ["train-0.jsonl"] * 2 + ["train-1.jsonl"] * 3
    assert found.column("file") == names
    assert found.column("split") == [name.split("-")[0].removesuffix(".jsonl") for name in names]
    assert bytes(load(tmp_path, 2, splits=("train",)).windows[:, 0].tolist()) == b"13ace"
    assert "has no split 'dev': set data.splits to any of test, train" in complaint(tmp_path, splits=("dev",))
    with pytest.raises(UserError, match="no column 'writer' among source, file, split: name one of these"):
        found.column("writer")


def test_files_are_sources_where_there_are_no_folders(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", ".hidden"):
        (tmp_path / name).write_text(f"This is {name}.")
    assert load(tmp_path).classes == ("a.md", "b.txt")
    assert load(tmp_path / "b.txt").classes == ("b.txt",)
    for path in tmp_path.iterdir():
        path.unlink()
    for name in "ba":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name * 9}) + "\n")
    assert load(tmp_path).classes == ("a.jsonl", "b.jsonl")


def test_a_source_too_short_for_a_window_is_left_out_and_told(tmp_path: Path) -> None:
    for name, written in (("a", "x" * 4), ("b", "x" * 3), ("c", "")):
        (tmp_path / name).write_text(written)
    found = load(tmp_path, 4)
    assert found.classes == ("a",) and found.short == ("b", "c")
    assert found.windows.tolist() == [[120, 120, 120, 120, 256]]


def test_columns_are_named_or_found(tmp_path: Path) -> None:
    names = ["x", "y"]
    made = pa.table({"title": ["T" * 9] * 4, "body": ["B" * 9] * 4, "who": [0, 1, 0, 1], "by": ["u", "v", "v", "v"]})
    features = {"who": {"_type": "ClassLabel", "names": names}}
    made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pa.parquet.write_table(made, tmp_path / "train.parquet")
    listing = "among title (string), body (string), who (int64), by (string): name one in data.text"
    assert f"3 text columns {listing}" in complaint(tmp_path)
    assert f"no text column 'who' {listing}" in complaint(tmp_path, text="who")
    assert "no label column 'when' among title" in complaint(tmp_path, text="body", label="when")
    assert load(tmp_path, text="body").classes == ("train.parquet",)
    assert load(tmp_path, text="body", label="who").classes == ("x", "y")
    assert load(tmp_path, text="title", label="by").labels.bincount().tolist() == [2, 7]
    pa.parquet.write_table(made.select(["body", "by"]), tmp_path / "train.parquet")
    assert load(tmp_path, label="by").classes == ("u", "v")
    (tmp_path / "train.parquet").unlink()
    (tmp_path / "a.jsonl").write_text(json.dumps({"title": "T" * 9, "body": "B" * 9, "who": 7}))
    assert "2 fields of text among 'title', 'body', 'who': name one in data.text" in complaint(tmp_path)
    assert load(tmp_path, text="body", label="who").classes == ("7",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 3: no JSON (Expecting ',' delimiter at column 13): repair or remove the line"),
        ("nothing", "line 3: no JSON (Expecting value at column 1): repair"),
        ("[" * 100_000, "line 3: no JSON ("),
        ('["text"]', "line 3: list, an object with a field for the text is needed: repair it"),
        ("null", "line 3: NoneType, an object"),
        ('{"source": "a"}', "line 3: no field 'text' among 'source': repair the line, or set data.text"),
        ("{}", "line 3: no field 'source' among none: repair the line, or set data.label"),
        ('{"text": "a"}', "line 3: no field 'source' among 'text': repair the line, or set data.label"),
        ('{"text": null, "source": "a"}', "line 3: text is null, not text: repair it"),
        ('{"text": ["a"], "source": "a"}', 'line 3: text is ["a"], not text: repair it'),
        ('{"text": "a", "source": true}', "line 3: source is true, not a name or a whole number: repair it"),
        ('{"text": "a", "source": 0.5}', "line 3: source is 0.5, not a name or a whole number: repair it"),
        ('{"text": "a\\ud800", "source": "a"}', "line 3: text holds '\\ud800', half of a character: repair it"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b c", "source": "ann"}\n \r\n' + line + "\n")
    assert complaint(path).startswith(f"{path}: {message}")


def test_text_that_is_no_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_bytes("é".encode() + b"ab\xe9c")
    assert complaint(tmp_path) == f"{tmp_path}/a/b.txt: not UTF-8 at byte 4: save it as UTF-8, or remove it"
    (tmp_path / "a" / "b.txt").rename(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert f"{tmp_path}/b.jsonl: not UTF-8 at byte 24: save" in complaint(tmp_path / "b.jsonl")


def remove_all(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_all, "no files in it: give JSONL, parquet or arrow files, or a folder of text files"),
        (lambda folder: (folder / "joe").mkdir(), "joe: no files in it: add some, or remove the folder"),
        (lambda folder: (folder / "x.txt").touch(), "x.txt: lies beside folders, each of which is a source"),
        (lambda folder: (folder / "bob" / "x.jsonl").touch(), ".txt: lies among JSONL files and is none by its name"),
        (lambda folder: (folder / "bob" / "up").symlink_to(folder), "up: a link to a folder that it is in: remove it"),
        (lambda folder: (folder / "bob" / "x").symlink_to("nowhere"), "x: a link to nowhere, which is not there"),
        (lambda folder: os.mkfifo(folder / "bob" / "pipe"), "pipe: is no regular file, a regular file is needed"),
        (lambda folder: (folder / os.fsdecode(b"\xff")).mkdir(), "its name is not UTF-8: rename it"),
        (lambda folder: [p.write_text("") for p in folder.rglob("*.txt")], "no text in it: give a data set that has"),
        (textfiles.arrow, ""),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_line(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    change(textfiles.texts(tmp_path))
    if message:
        assert message in complaint(tmp_path)
    else:
        (tmp_path / "x.jsonl").touch()
        assert "arrow files and JSONL files in it: give a folder that has one kind, or one file" in complaint(tmp_path)


def test_what_is_not_there_or_of_no_kind_is_one_line(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", "./nowhere", "nowhere.jsonl", "nowhere.txt"):
        assert "data.name: the file or folder " in complaint(name) and "does not exist: give JSONL" in complaint(name)
    (tmp_path / "a.json").write_text("[]")
    assert "a.json is of no known kind by its name: give a .txt file, JSONL" in complaint(tmp_path / "a.json")
    textfiles.parquet(tmp_path, body=pa.array([None] * 7, pa.string()))
    assert "train-00000-of-00001.parquet: row 0: no text: repair or remove the row" in complaint(tmp_path)
    broken = tmp_path / "data" / "train-00000-of-00001.parquet"
    broken.write_bytes(broken.read_bytes()[:-9])
    assert "not a whole parquet file" in complaint(tmp_path)


def test_too_little_text_for_a_window_says_how_much_there_is(tmp_path: Path) -> None:
    textfiles.jsonl(tmp_path)
    message = complaint(tmp_path, length=200)
    assert message.endswith(
        "the longest of its sources, 'bob', has 118 tokens, data.sequence_length = 200 needs 201: give more text or "
        "set less"
    )
    assert load(tmp_path, 117).classes == ("bob",)


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    textfiles.texts(tmp_path)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert complaint(tmp_path) == f"{tmp_path}/ann/0.txt: Permission denied"


def test_the_hub_takes_the_same_path_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = textfiles.table()
    found = {"train": datasets.Dataset(table[:4]), "test": datasets.Dataset(table[4:])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: found)
    whole = load("them/theirs")
    assert set(whole.column("file")) == {"them/theirs/train", "them/theirs/test"}
    assert set(whole.column("split")) == {"train", "test"}
    assert streams(load("them/theirs", splits=("train",)))["bob"] == expected(ByteTokenizer(), 4)["bob"]


def test_a_failing_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "'them/theirs' is no file or folder here and cannot be had from the Hugging" in complaint("them/theirs")


def test_the_standard_library_is_text_without_any_file_of_ours() -> None:
    found = load("stdlib", 128)
    assert {"argparse", "asyncio", "json", "unittest"} <= set(found.classes) and len(found.classes) > 100
    assert set(found.classes) <= sys.stdlib_module_names
    assert not [file for file in found.column("file") if {"test", "tests", "idle_test"} & set(str(file).split("/"))]
    source = found.classes.index("argparse")
    joined = found.tokenizer.decode(found.windows[found.labels == source][:, 1:].flatten())
    whole = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes().decode()
    assert whole[1:].startswith(joined) and len(whole) - len(joined) <= 128
    assert max(found.labels.bincount().tolist()) * 128 < documents.STDLIB_LIMIT * 1.1
    assert found.fingerprint == load("stdlib", 128).fingerprint


def test_libraries_that_take_long_to_import_are_imported_when_they_are_used() -> None:
    code = "import sys, fedmoe.sources.text; print({'datasets', 'tokenizers', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_python_without_source_code_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert f'data.name: "stdlib", but this Python has no source code in {tmp_path}: give' in complaint("stdlib")


def test_the_standard_library_is_cut_where_it_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[str, str | bytes] = {
        "json/__init__.py": "a = 1\n",
        "json/b.py": "b" * 2**18,
        "json/c.py": b"\xe9",
        "json/d.py": "d = 4\n",
        "json/tests/e.py": "e = 5\n",
        "mine.py": "f = 6\n",
        "abc.py": "g = 7\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    read = [(document.source, document.file) for document in documents.standard_library()]
    assert read == [("abc", "abc.py"), ("json", "json/__init__.py"), ("json", "json/d.py")]


@given(lines=st.lists(st.one_of(st.text(max_size=20), st.binary(max_size=20)), max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_a_file_is_read_or_one_line(tmp_path: Path, lines: list[str | bytes]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(one if isinstance(one, bytes) else json.dumps({"text": one}).encode() for one in lines))
    try:
        found = load(path, 2)
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert found.windows.min() >= 0 and found.windows.max() <= 256


def test_all_lines_say_whose_they_are_or_none_does(tmp_path: Path) -> None:
    lines = ['{"text": "abcdefgh"}', '{"text": "ijklmnop", "source": "x"}']
    for order, said in (
        (lines, "line 2: has a field 'source', .*line 1 has none: give all one, or none"),
        (lines[::-1], "line 2: no field 'source' among 'text'"),
    ):
        (tmp_path / "a.jsonl").write_text("\n".join(order))
        with pytest.raises(UserError, match=said):
            text.load(Data(kind="text", name=str(tmp_path / "a.jsonl"), sequence_length=4))
