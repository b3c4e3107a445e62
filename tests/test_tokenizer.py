"""Tokenizers: bytes, and those of files."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.errors import UserError
from fedmoe.tokenizer import open_tokenizer

BYTES = open_tokenizer("bytes")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of a few words in a file."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    made.save(str(path))
    return path


@given(st.text(max_size=200))
@settings(deadline=None)
def test_bytes_are_the_text_and_back(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()  # lone surrogates are no text
    (tokens,) = BYTES.encode([text])
    assert tokens.dtype == np.int32 and tokens.tolist() == list(text.encode())
    assert BYTES.decode([*tokens.tolist(), BYTES.end]) == text


@given(st.text(max_size=100))
@settings(max_examples=50, deadline=None)
def test_the_library_reads_saved_bytes_alike(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    made = tokenizers.Tokenizer.from_str(BYTES.json)
    assert made.get_vocab_size() == BYTES.size == 257
    assert made.encode(text, add_special_tokens=False).ids == BYTES.encode([text])[0].tolist()


def test_transformers_opens_what_is_saved(tmp_path: Path, words: Path) -> None:
    for name in ("bytes", str(words)):
        ours, folder = open_tokenizer(name), tmp_path / Path(name).stem
        folder.mkdir()
        ours.save(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert theirs.eos_token_id == ours.end and len(theirs) == ours.size
        for text in ("a b a", "def f(x):\n    return x", "ä€😀"):
            tokens = ours.encode([text])[0].tolist()
            assert theirs(text, add_special_tokens=False)["input_ids"] == tokens
            assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
        again = open_tokenizer(str(folder))
        assert (again.size, again.end, again.fingerprint) == (ours.size, ours.end, ours.fingerprint)


def test_a_file_or_its_folder_is_opened(words: Path) -> None:
    for place in (words, words.parent):
        made = open_tokenizer(str(place))
        assert (made.size, made.end) == (4, 3)
        assert [tokens.tolist() for tokens in made.encode(["a b", "b c"])] == [[1, 2], [2, 0]]
        assert made.decode([1, 2, 3, 99]) == "a b"


def test_the_end_token_is_the_one_that_is_named(tmp_path: Path, words: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(words.read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "b"}}))
    assert open_tokenizer(str(tmp_path)).end == 2
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert open_tokenizer(str(tmp_path)).end == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "tokenizer.json cannot be read .*: give `bytes`, a tokenizer.json"),
        (b"{}", "is no whole tokenizer.json"),
        (b"\xff", "cannot be read"),
        (b"", "is no whole tokenizer.json"),
    ],
)
def test_broken_tokenizers_are_one_line(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        open_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"t.json has no token to end texts with, none of .*: add one"):
        open_tokenizer(str(tmp_path / "t.json"))


def test_a_name_that_no_hub_gives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> str:
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"'no-such/thing' is no file or folder here and cannot be had .*no network"):
        open_tokenizer("no-such/thing")
