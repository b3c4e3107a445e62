"""Tokenizers: bytes, built in, and any of the library `tokenizers`, from a tokenizer.json or the hub."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedmoe.errors import UserError
from fedmoe.files import write
from fedmoe.sources.part import line, shown

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
BYTES, END = "bytes", "<|endoftext|>"
ENDS = (END, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
"""What the token that ends a text is called where a tokenizer does not say; the first that it has."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to tokens and back.

    `end` is the token behind every text, `size` the number of tokens; `json` is the tokenizer.json that says all of it.
    """

    name: str
    size: int
    end: int
    json: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what it is."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """The tokens of each text, without an end token."""
        if self.name == BYTES:
            return [np.frombuffer(t.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int32) for t in texts]
        made = self._made.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in made]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is no text, or no token, is left out."""
        if self.name == BYTES:
            return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")
        text: str = self._made.decode([token for token in tokens if token < self.size and token != self.end])
        return text

    def save(self, folder: Path) -> None:
        """Write what transformers opens as the tokenizer of a model, and `open_tokenizer` as this one."""
        write(folder / FILE, self.json.encode())
        end = self._made.id_to_token(self.end)
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}
        write(folder / "tokenizer_config.json", json.dumps(said, indent=1).encode())

    @cached_property
    def _made(self) -> "tokenizers.Tokenizer":
        return _library().Tokenizer.from_str(self.json)


def open_tokenizer(name: str) -> Tokenizer:
    """`bytes`, a tokenizer.json, a folder that has one, or a name on the hub.

    Raises UserError where there is none, or none that knows a token to end texts with.
    """
    if name == BYTES:
        return Tokenizer(BYTES, 257, 256, _bytes())
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        file = path / FILE if path.is_dir() else path
        try:
            return _opened(shown(file), file.read_text("utf-8"), _end(file.parent))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"data.tokenizer: {shown(file)} cannot be read ({line(error)}): give `bytes`, a {FILE}, a folder with "
                "one, or a name on the hub"
            ) from error
    import huggingface_hub

    try:
        found = Path(huggingface_hub.hf_hub_download(name, FILE))
        with suppress(Exception):  # many have none
            huggingface_hub.hf_hub_download(name, "tokenizer_config.json")
    except Exception as error:  # whatever the library and its network stack raise
        raise UserError(
            f"data.tokenizer: {name!r} is no file or folder here and cannot be had from the Hugging Face hub "
            f"({line(error)}): check the name and the network, or give `bytes` or a {FILE}"
        ) from error
    return _opened(name, found.read_text("utf-8"), _end(found.parent))


def _opened(name: str, text: str, end: str | None) -> Tokenizer:
    try:
        made = _library().Tokenizer.from_str(text)
    except UserError:
        raise
    except Exception as error:  # of whatever type the library chooses
        raise UserError(f"data.tokenizer: {name} is no whole {FILE} ({line(error)}): fetch it again") from error
    if text == _bytes():
        return Tokenizer(BYTES, 257, 256, text)
    for token in (end, *ENDS) if end else ENDS:
        if (number := made.token_to_id(token)) is not None:
            return Tokenizer(name, made.get_vocab_size(), number, text)
    raise UserError(
        f"data.tokenizer: {name} has no token to end texts with, none of {', '.join(ENDS)}: add one, or name it as "
        "eos_token in a tokenizer_config.json beside it"
    )


def _end(folder: Path) -> str | None:
    """The end token that a tokenizer_config.json names."""
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    found = found.get("content") if isinstance(found, dict) else found
    return found if isinstance(found, str) else None


def _bytes() -> str:
    """The tokenizer.json of bytes: each a token, and the end token after them."""
    tokenizers = _library()
    # The library writes a byte as a printable character: itself where it is one, the others from U+0100 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE({names[byte]: byte for byte in range(256)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([END])
    text: str = made.to_str()
    return text


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"text needs tokenizers ({error}): pip install 'fedmoe[lm]'") from error
    return tokenizers
