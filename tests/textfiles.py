"""Small corpora of every kind that can be read, all of the same documents of three people; and tokenizers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import tokenizers

SENTENCES = {
    "ann": ["The owl sleeps by day.\n", "It hunts mice, voles and moths — in the dark.\r\n", "Ünïcödé 猫 😀\x00"],
    "bob": ["A dog barks. " * 9],
    "eve": ["Cats purr.", "Cats scratch the sofa, the chair and the door.", "Nobody knows why.\u2028They do."],
}
PAIRS = [(text, who) for who, texts in SENTENCES.items() for text in texts]


def jsonl(folder: Path) -> Path:
    lines = [json.dumps({"id": i, "text": text, "source": who}) for i, (text, who) in enumerate(PAIRS)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


def jsonl_of_each(folder: Path) -> Path:
    """A folder for each, with a file for each text; not all that is there is ASCII."""
    for who, texts in SENTENCES.items():
        (folder / who).mkdir()
        for i, text in enumerate(texts):
            line = json.dumps({"content": text, "n": 3}, ensure_ascii=False)
            (folder / who / f"{i}.jsonl").write_text("\ufeff" * (i == 1) + line, encoding="utf-8", newline="")
    return folder


def texts(folder: Path) -> Path:
    for who, written in SENTENCES.items():
        for i, text in enumerate(written):
            path = folder / who / (f"{i}" * (i % 2)) / f"{i}.txt"  # the second lies deeper
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\xef\xbb\xbf" * (i == 2) + text.encode())
    return folder


def table(**columns: Any) -> pa.Table:
    return pa.table({"body": [text for text, _ in PAIRS], "source": [who for _, who in PAIRS]} | columns)


def parquet(folder: Path, **columns: Any) -> Path:
    (folder / "data").mkdir()
    (folder / "README.md").write_text("Of what is beside.\n")
    pa.parquet.write_table(table(**columns), folder / "data" / "train-00000-of-00001.parquet")
    return folder


def arrow(folder: Path) -> Path:
    made = table()
    with pa.ipc.new_stream(folder / "train.arrow", made.schema) as writer:
        writer.write_table(made, max_chunksize=3)
    return folder


CORPORA: dict[str, Callable[[Path], Path]] = {
    "JSONL": jsonl,
    "JSONL of each": jsonl_of_each,
    "texts": texts,
    "parquet": parquet,
    "arrow": arrow,
}


def tokenizer_file(folder: Path, special: Sequence[str] = ("<s>", "</s>"), size: int = 300) -> Path:
    """A byte-level tokenizer that knows frequent pieces, as language models have it; it puts `<s>` before a text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text for text, _ in PAIRS], trainer)
    if "<s>" in special:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", special.index("<s>"))]
        )
    made.enable_truncation(8)
    made.enable_padding(length=8)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
