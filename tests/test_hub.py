"""Models and tokenizers of the hub, fetched by the real library from one on loopback."""

import os
import subprocess
import sys
from pathlib import Path

from tests import hub
from tests.hfmodels import save
from tests.support import ROOT

FIND = """
from fedmoe.config import Model
from fedmoe.errors import UserError
from fedmoe.models import hf
from fedmoe.tokenizer import open_tokenizer

for name, weights in (("open", "random"), ("open", "pretrained"), ("gated", "pretrained"), ("absent", "pretrained")):
    try:
        source = hf.find(f"hf/them/{name}", Model(weights=weights))
        print(source.config.model_type, weights, source.folder and hf.load(hf.CAUSAL, source, Model())[1])
    except UserError as error:
        print(error)
try:
    open_tokenizer("them/open")
except UserError as error:
    print(error)
"""


def test_what_is_fetched_and_what_cannot_be(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    for name in ("pytorch_model.bin", "README.md", "modeling_llama.py"):  # neither pickles nor code are wanted
        (folder / name).write_bytes(b"import os")
    with hub.serving(folder, tmp_path / "home") as (environment, fetched):
        words = [sys.executable, "-c", FIND]
        done = subprocess.run(
            words, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "llama random None",
        "llama pretrained set()",
        "model 'hf/them/gated' is gated: ask for access on its page, and log in with `hf auth login`",
        "model 'hf/them/absent' is not there, or needs a login: hf/NAME must be a folder or a repository of the hub",
        "data.tokenizer: 'them/open' has no tokenizer.json: make one with transformers, "
        "AutoTokenizer.from_pretrained(...).save_pretrained(...), or give another",
    ]
    assert fetched == {"config.json", "generation_config.json", "model.safetensors"}
