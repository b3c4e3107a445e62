"""Tokenizers: bytes and files give the same text back, and the same tokens after they were saved; what is broken."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.errors import UserError
from fedmoe.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, open_tokenizer
from tests.textfiles import PAIRS, tokenizer_file

TEXTS = [text for text, _ in PAIRS] + ["", " ", "<|endoftext|> is quoted, and </s>", "\r\n\n\t", "x" * 3000, "\ufeffé"]


def complaint(name: object) -> str:
    with pytest.raises(UserError) as caught:
        open_tokenizer(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=["bytes", "file"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return open_tokenizer("bytes" if request.param == "bytes" else str(tokenizer_file(tmp_path)))


@given(st.text())
def test_bytes_give_any_text_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == tokenizer.decode([*ids, tokenizer.end]) == text


@given(st.lists(st.text(), max_size=5))
def test_many_texts_are_cut_as_each_alone(texts: list[str]) -> None:
    tokenizer = ByteTokenizer()
    assert [ids.tolist() for ids in tokenizer.encode_all(texts)] == [tokenizer.encode(t).tolist() for t in texts]


def test_bytes_that_are_no_utf8_are_shown_as_such() -> None:
    assert ByteTokenizer().decode("é".encode()[:1] + b"a") == "\ufffda"
    assert (ByteTokenizer().size, ByteTokenizer().end) == (257, 256)


def test_a_text_comes_back_whole_from_a_file_that_would_cut_it(tmp_path: Path) -> None:
    """The file pads, truncates and marks the start: of documents none of that is wanted."""
    tokenizer = open_tokenizer(str(tokenizer_file(tmp_path)))
    assert tokenizer.size == 300 and tokenizer.end == 1
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_all(TEXTS[:-4])] == TEXTS[:-4]
    assert tokenizer.encode("x" * 3000).size > 8 and tokenizer.encode("").size == 0
    assert len(tokenizer.encode(PAIRS[3][0])) < len(PAIRS[3][0]) / 2
    assert tokenizer.decode([1, *tokenizer.encode("a"), 1]) == "a"


def test_what_is_saved_gives_the_same_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    again = open_tokenizer(str(tmp_path / "saved"))
    assert (again.size, again.end) == (tokenizer.size, tokenizer.end)
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert library.encode(text, add_special_tokens=False).ids == ids
        assert again.encode(text).tolist() == ids
        assert again.decode(ids) == tokenizer.decode(ids)


def test_what_is_saved_is_the_same_to_transformers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers", reason="language models from files need it")
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.eos_token_id == tokenizer.end and len(theirs) == tokenizer.size
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text).tolist()


def test_the_same_has_the_same_fingerprint(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
        tokenizer_file(tmp_path / name, size=301 if name == "c" else 300)
    a, b, c = (open_tokenizer(str(tmp_path / name)).fingerprint for name in "abc")
    assert a == b != c != ByteTokenizer().fingerprint
    (tmp_path / "b" / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    assert open_tokenizer(str(tmp_path / "b")).fingerprint != a


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<end>", "model_max_length": 9}),
        ("tokenizer_config.json", {"eos_token": {"content": "<end>", "lstrip": False}}),
        ("special_tokens_map.json", {"eos_token": "<end>"}),
    ],
)
def test_the_end_token_is_what_the_files_beside_say(tmp_path: Path, file: str, content: dict[str, Any]) -> None:
    path = tokenizer_file(tmp_path, ["<a>", "<end>"])
    assert "none of its special tokens (<a>, <end>) is known to end a document: name one as" in complaint(path)
    (tmp_path / file).write_text(json.dumps(content))
    assert open_tokenizer(str(tmp_path)).end == open_tokenizer(str(path)).end == 1


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_an_end_token_that_is_none_is_named(tmp_path: Path, name: str) -> None:
    tokenizer_file(tmp_path)
    for content, expected in (
        ('{"eos_token": "<end>"}', "the end token '<end>' is not in the vocabulary of tokenizer.json"),
        ('{"eos_token": 3}', "the end token 3 is not in the vocabulary of tokenizer.json"),
        ('{"eos_token": "</s>"', "not a whole tokenizer configuration (Expecting ',' delimiter"),
        ('["eos_token"]', "not a whole tokenizer configuration"),
        ('{"eos_token": {}}', "not a whole tokenizer configuration"),
    ):
        (tmp_path / name).write_text(content)
        assert f"{tmp_path / name}: {expected}" in complaint(tmp_path)
    (tmp_path / name).write_text('{"eos_token": null}')
    assert open_tokenizer(str(tmp_path)).end == 1


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def act(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return act


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text[:-9], "not a whole tokenizer file (Cannot instantiate Tokenizer from buffer: EOF"),
        (lambda text: "", "not a whole tokenizer file (Cannot instantiate Tokenizer from buffer: EOF"),
        (lambda text: "{}", "not a whole tokenizer file (Cannot instantiate Tokenizer from buffer: Model missing"),
        (changed(lambda c: c["model"]["merges"].append(["?!", "x"])), "Token `?!` out of vocabulary"),
        (changed(lambda c: c["model"].update(type="Magic")), "did not match any variant"),
        (changed(lambda c: c["model"]["vocab"].update(x=2**31)), "has number 2147483648, at most 2147483647"),
        (changed(lambda c: c.update(added_tokens=[])), "special tokens (it has none) is known to end a document"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, change: Callable[[str], str], expected: str) -> None:
    path = tokenizer_file(tmp_path)
    path.write_text(change(path.read_text()))
    message = complaint(path)
    assert message.startswith(str(path)) and expected in message


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'^data\.tokenizer is empty: give "bytes", a tokenizer.json, a folder'):
        open_tokenizer("")
    for name in (tmp_path / "nowhere", "./nowhere", "nowhere.json", "~/nowhere/tokenizer.json"):
        assert "nowhere" in complaint(name) and 'does not exist: give "bytes", a tokenizer.json' in complaint(name)
    assert f"{tmp_path} has no tokenizer.json: make one with transformers" in complaint(tmp_path)
    (tmp_path / "tokenizer.json").mkdir()
    assert "tokenizer.json: is a folder, a regular file is needed" in complaint(tmp_path)


def test_a_tokenizer_of_the_hub_is_one_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "tokenizer.json" in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "'them/theirs' has no tokenizer.json" in complaint("them/theirs")
    tokenizer_file(tmp_path)
    assert open_tokenizer("them/theirs").size == 300
    assert asked == ["them/theirs"] * 2


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    expected = "data.tokenizer: 'them/theirs' is no file or folder here and cannot be had from the Hugging Face hub (no"
    assert complaint("them/theirs").startswith(expected)
    assert complaint("them/theirs").endswith("check the name and the network, or give a tokenizer.json")


def test_a_missing_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tokenizer_file(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "needs the tokenizers library, which is not installed: pip install tokenizers" in complaint(path)
    assert open_tokenizer("bytes").decode([97]) == "a"


@pytest.mark.parametrize("number", [-1, 300, 2**40])
def test_numbers_out_of_the_vocabulary_are_named(tmp_path: Path, number: int) -> None:
    for tokenizer in (ByteTokenizer(), FileTokenizer(tokenizer_file(tmp_path))):
        with pytest.raises(
            UserError, match=rf"token {number} is out of the vocabulary, 0 to {tokenizer.size - 1}: use"
        ):
            tokenizer.decode([65, number, 10**6])


def test_texts_that_cannot_be_encoded_are_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"holds '\\ud800' at character 1, half of a character"):
        tokenizer.encode("a\ud800")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="?"))
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match=r"words.json: a text cannot be encoded \(WordLevel error: Missing"):
        open_tokenizer(str(tmp_path / "words.json")).encode("b")
