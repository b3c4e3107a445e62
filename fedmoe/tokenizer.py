"""Tokenizers: text to numbers and back, by bytes, or as a `tokenizer.json` of the tokenizers library says."""

import hashlib
import json
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmoe.errors import UserError
from fedmoe.files import write_atomic
from fedmoe.sources.part import line, reading, regular, shown

if TYPE_CHECKING:
    import tokenizers

Ids: TypeAlias = npt.NDArray[np.int32]  # [n]

FILE, CONFIG, MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
"""What a folder of transformers' has, of which the first is needed."""
END = "<|endoftext|>"
"""The end token of bytes."""
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""Special tokens that are taken for the end token where no file says which is."""


class Tokenizer(ABC):
    """Text to the numbers of its tokens, and back."""

    size: int
    """V, the size of the vocabulary: every number is less."""
    end: int
    """Number of the token that stands behind every document."""
    fingerprint: str
    """SHA-256 of all that decides what numbers a text has."""

    def encode(self, text: str) -> Ids:
        """The tokens of a text, without any that only mark its start or end. Raises UserError."""
        return self.encode_all([text])[0]

    @abstractmethod
    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of many texts, each as `encode` gives them, at once."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens, of which those that stand for no text are left out.

        What is no UTF-8, as part of a character, becomes U+FFFD. Raises UserError for numbers that no token has.
        """
        numbers = np.fromiter(ids, dtype=np.int64)
        for number in numbers[(numbers < 0) | (numbers >= self.size)][:1]:
            raise UserError(f"token {number} is out of the vocabulary, 0 to {self.size - 1}: use one tokenizer for all")
        return self._decode(numbers)

    @abstractmethod
    def _decode(self, numbers: npt.NDArray[np.int64]) -> str: ...

    @abstractmethod
    def _saved(self) -> tuple["tokenizers.Tokenizer", dict[str, Any]]:
        """What is to be saved, and what transformers is to be told besides."""

    def save(self, folder: Path) -> None:
        """Write files into a folder that is there, of which the tokenizers library and transformers make the same.

        Raises OSError, and UserError where that library is not installed.
        """
        made, told = self._saved()
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **told}
        write_atomic(folder / FILE, made.to_str(pretty=True).encode())
        write_atomic(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


class ByteTokenizer(Tokenizer):
    """A token for each byte of a text's UTF-8, and one more for its end, which no text holds."""

    size, end = 257, 256
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """The bytes of many texts."""
        return [np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int32) for text in texts]

    def _decode(self, numbers: npt.NDArray[np.int64]) -> str:
        return numbers[numbers < self.end].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def _saved(self) -> tuple["tokenizers.Tokenizer", dict[str, Any]]:
        library = _library("bytes")
        vocabulary = {letter: byte for byte, letter in enumerate(_letters())} | {END: self.end}
        made = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=[]))
        made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = library.decoders.ByteLevel()
        # The end token is not declared as special: the library would then find it in texts that quote its name.
        return made, {"eos_token": END, "split_special_tokens": True}


class FileTokenizer(Tokenizer):
    """A `tokenizer.json`, with the end token that the files beside it name."""

    def __init__(self, path: Path) -> None:
        """Read it. Raises UserError naming the file and what is wrong with it."""
        library = _library(shown(path))
        with reading(regular(path), "tokenizer file"):
            content = path.read_bytes()
            made: tokenizers.Tokenizer = library.Tokenizer.from_buffer(content)
            made.no_truncation()
            made.no_padding()
        self._name, self._made = shown(path), made
        vocabulary = made.get_vocab()
        self.size = max(vocabulary.values(), default=-1) + 1  # not their count: numbers may be left out
        if self.size > 2**31:
            raise UserError(f"{self._name}: a token has number {self.size - 1}, at most {2**31 - 1} can be: repair it")
        special = {token.content for token in made.get_added_tokens_decoder().values() if token.special}
        self._end = _end(path, vocabulary, special)
        self.end = vocabulary[self._end]
        self.fingerprint = hashlib.sha256(content + self.end.to_bytes(4, "little")).hexdigest()

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of many texts, on all processors."""
        for text in texts:
            _utf8(text)
        try:
            found = self._made.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises no more special one
            raise UserError(
                f"{self._name}: a text cannot be encoded ({line(error)}): give a tokenizer that knows every character"
            ) from error
        return [np.array(encoding.ids, dtype=np.int32) for encoding in found]

    def _decode(self, numbers: npt.NDArray[np.int64]) -> str:
        return self._made.decode(numbers[numbers != self.end].tolist(), skip_special_tokens=True)

    def _saved(self) -> tuple["tokenizers.Tokenizer", dict[str, Any]]:
        return self._made, {"eos_token": self._end}


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: `bytes`, a file, a folder with one, or one of the Hugging Face hub.

    Raises UserError, in one line, where there is none, or it is broken.
    """
    if name == "bytes":
        return ByteTokenizer()
    if not name:
        raise UserError('data.tokenizer is empty: give "bytes", a tokenizer.json, a folder with one, or a hub name')
    path = Path(name).expanduser()
    if not (name.startswith((".", "/", "~")) or path.suffix == ".json" or path.exists()):
        return FileTokenizer(_in(_fetched(name), repr(name)))
    if not path.exists():
        raise UserError(
            f'data.tokenizer: the file or folder {shown(path)} does not exist: give "bytes", a tokenizer.json or a '
            "folder with one"
        )
    return FileTokenizer(_in(path, shown(path)) if path.is_dir() else path)


def _in(folder: Path, name: str) -> Path:
    if not (path := folder / FILE).exists():
        raise UserError(
            f"data.tokenizer: {name} has no {FILE}: make one with transformers, "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...), or give another"
        )
    return path


def _fetched(name: str) -> Path:
    """The folder of a model of the hub, as far as it is about tokens."""
    import huggingface_hub

    print(f"fedmoe: fetching the tokenizer of {name!r} from the Hugging Face hub, or from its cache", file=sys.stderr)
    retries = logging.getLogger("huggingface_hub")  # logs two lines for each of its six attempts, 23 s when offline
    level = retries.level
    retries.setLevel(logging.ERROR)
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[FILE, CONFIG, MAP]))
    except Exception as error:  # whatever the library and its network stack raise
        raise UserError(
            f"data.tokenizer: {name!r} is no file or folder here and cannot be had from the Hugging Face hub "
            f"({line(error)}): check the name and the network, or give a tokenizer.json"
        ) from error
    finally:
        retries.setLevel(level)


def _end(path: Path, vocabulary: dict[str, int], special: set[str]) -> str:
    """The end token: what the files beside `path` call `eos_token`, else a special token of a usual name."""
    for beside in (path.with_name(CONFIG), path.with_name(MAP)):
        if not beside.exists():
            continue
        with reading(regular(beside), "tokenizer configuration"):
            named = json.loads(beside.read_bytes())["eos_token"] if b'"eos_token"' in beside.read_bytes() else None
            end = named["content"] if isinstance(named, dict) else named
        if end is not None and (not isinstance(end, str) or end not in vocabulary):
            raise UserError(
                f"{shown(beside)}: the end token {end!r} is not in the vocabulary of {path.name}: repair eos_token"
            )
        if end is not None:
            return end
    for known in ENDS:
        if known in special:
            return known
    raise UserError(
        f"{shown(path)}: none of its special tokens ({', '.join(sorted(special)[:5]) or 'it has none'}) is known to "
        f'end a document: name one as "eos_token" in a {CONFIG} beside it'
    )


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"a text holds {text[error.start]!r} at character {error.start}, half of a character: repair or remove it"
        ) from error


def _letters() -> str:
    """The letter that stands for each byte in a byte-level vocabulary: itself where it is printable.

    The rest takes letters from U+0100 on. Convention of GPT-2 (Radford et al., 2019).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(rest)) for byte in range(256))


def _library(name: str) -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise UserError(
            f"tokenizer {name!r} needs the tokenizers library, which is not installed: pip install tokenizers"
        ) from error
    return tokenizers
