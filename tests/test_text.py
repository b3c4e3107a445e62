"""Text as windows of tokens, from everything that it may lie in."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe import data
from fedmoe.config import Data
from fedmoe.errors import UserError
from fedmoe.sources import text
from fedmoe.tokenizer import open_tokenizer

T = 4


def load(name: str | Path, **fields: object) -> text.Text:
    return text.load(Data(kind="text", name=str(name), **({"sequence_length": T} | fields)))  # type: ignore[arg-type]


def told(found: text.Text) -> dict[str, str]:
    """What the windows of each source say, one after the other; end tokens as U+0003."""
    said: dict[str, str] = {}
    for window, source in zip(found.windows.tolist(), found.column("source"), strict=True):
        shown = bytes(3 if token == 256 else token for token in window).decode()
        before = said.setdefault(str(source), shown[:1])
        assert before[-1] == shown[0]
        said[str(source)] = before + shown[1:]
    return said


@given(st.lists(st.text(st.characters(codec="ascii"), max_size=40), min_size=1, max_size=5), st.integers(2, 9))
@settings(max_examples=50, deadline=None)
def test_each_token_is_a_target_once_but_the_first_and_what_is_left_over(texts: list[str], length: int) -> None:
    tokens = text._tokens(texts, open_tokenizer("bytes"))
    expected = [t for one in texts for t in [*one.encode(), 256]]
    assert tokens.tolist() == expected
    count = (len(expected) - 1) // length
    windows = text._windows(tokens, length)
    assert windows.shape == (count, length + 1)
    assert windows[:, 1:].flatten().tolist() == expected[1 : count * length + 1]
    assert np.array_equal(windows[1:, 0], windows[:-1, -1])


def test_standard_library_is_there_and_the_same_each_time() -> None:
    found = load("stdlib", sequence_length=128)
    assert found.windows.shape[1] == 129 and found.windows.dtype == torch.int32 and len(found.windows) > 50_000
    assert {"asyncio", "json", "argparse", "email"} <= set(found.classes) and "test" not in found.classes
    assert list(found.classes) == sorted(found.classes)
    first = found.windows[found.labels == found.classes.index("argparse")][0]
    assert open_tokenizer("bytes").decode(first.tolist()).startswith("# Author: Steven J. Bethard")
    again = load("stdlib", sequence_length=128)
    assert found.fingerprint == again.fingerprint
    assert found.fingerprint != load("stdlib", sequence_length=64).fingerprint


def test_a_folder_is_a_source_a_file_or_where_it_has_folders_one_for_each(tmp_path: Path) -> None:
    flat, deep = tmp_path / "flat", tmp_path / "deep"
    for folder in (flat, deep / "a" / "x", deep / "b"):
        folder.mkdir(parents=True)
    (flat / "one.txt").write_text("abcdefgh")
    (flat / "two.md").write_text("ijklmnop")
    (flat / ".hidden").write_text("not this")
    (deep / "a" / "1.txt").write_text("abcd")
    (deep / "a" / "x" / "2.txt").write_text("efgh")
    (deep / "b" / "3.txt").write_text("ijklmnop")
    assert told(load(flat)) == {"one.txt": "abcdefgh\x03", "two.md": "ijklmnop\x03"}
    assert told(load(deep)) == {"a": "abcd\x03efgh", "b": "ijklmnop\x03"}
    assert told(load(flat / "one.txt")) == {"one.txt": "abcdefgh\x03"}
    (deep / "stray.txt").write_text("x")
    with pytest.raises(UserError, match=r"stray.txt: lies beside folders, each of which is a source: put it into one"):
        load(deep)


def test_jsonl_and_tables_say_whose_a_text_is(tmp_path: Path) -> None:
    rows = [{"who": "b", "text": "ijkl"}, {"who": "a", "text": "abcdefgh"}, {"who": "b", "text": "mnopqrs"}]
    lines = tmp_path / "some.jsonl"
    lines.write_text("\n\n".join(map(json.dumps, rows)))
    table = tmp_path / "some.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    for path in (lines, table):
        assert told(load(path, label="who")) == {"a": "abcdefgh\x03", "b": "ijkl\x03mnopqrs\x03"}
        assert told(load(path, text="text")) == {"some": "ijkl\x03abcdefgh\x03mnopqrs"}
    many = tmp_path / "many"
    many.mkdir()
    (many / "c.jsonl").write_text(json.dumps({"content": "abcdefgh"}))
    (many / "d.jsonl").write_text(json.dumps({"content": "ijklmnop"}))
    assert sorted(told(load(many))) == ["c", "d"]


def test_a_data_set_of_text_keeps_the_same_windows_for_a_seed() -> None:
    config = Data(kind="text", name="stdlib", sequence_length=32, limit=100)
    found = data.load(config, 3)
    assert found.inputs.shape == (100, 33) and found.shape == (32,) and found.outputs == 257
    assert torch.equal(found.inputs, data.load(config, 3).inputs)
    assert not torch.equal(found.inputs, data.load(config, 4).inputs)
    assert found.column("source") == [found.classes[label] for label in found.labels]


@pytest.mark.parametrize(
    ("name", "content", "fields", "said"),
    [
        ("a.txt", b"abc", {}, "no source has the 5 tokens of a window, the longest, a.txt, has 4: lower data.sequence"),
        ("a.txt", b"", {}, "the longest, .*, has 1"),
        ("a.txt", b"abcd\xff", {}, "a.txt: byte 4 is not UTF-8: convert or remove it"),
        ("a.jsonl", b'{"text": "abcdefgh"}\n{"text"', {}, "a.jsonl: line 2: no JSON .*: repair or remove it"),
        ("a.jsonl", b"[1]", {}, "line 1: is a list, must be an object"),
        ("a.jsonl", b'{"a": "x", "b": "y"}', {}, "line 1: no one field of text among a, b: name it in data.text"),
        ("a.jsonl", b'{"text": 7}', {"text": "text"}, "line 1: text is 7, must be text: repair the row"),
        ("a.jsonl", b'{"body": "x"}', {"text": "text"}, "line 1: text is None, must be text"),
        ("a.jsonl", b'{"text": "x", "who": 1.5}', {"label": "who"}, "line 1: who is 1.5, must be a name or a whole"),
        ("a.parquet", b"PAR1", {}, "a.parquet: not a whole parquet file"),
    ],
)
def test_broken_text_is_one_line(
    tmp_path: Path, name: str, content: bytes, fields: dict[str, object], said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        load(tmp_path / name, **fields)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the file or folder .*nowhere does not exist: give one that holds text"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no files in it"):
        load(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "abcdefgh"}))
    (tmp_path / "b.txt").write_text("abcdefgh")
    with pytest.raises(UserError, match="JSONL files and others in it: give a folder of one kind"):
        load(tmp_path)
    table = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), table)
    with pytest.raises(UserError, match=r"no text column '' among n: name one in data.text"):
        load(table)
    with pytest.raises(UserError, match=r"no label column 'who' among n, text: name one in data.label"):
        pyarrow.parquet.write_table(pyarrow.table({"n": [1], "text": ["a"]}), table)
        load(table, label="who")
    with pytest.raises(UserError, match="text has no column 'split'"):
        (tmp_path / "only").mkdir()
        (tmp_path / "only" / "b.txt").write_text("abcdefgh")
        load(tmp_path / "only").column("split")
