"""A large client: its step in the federation against its model trained alone by plain transformers, and paged rounds.

At full size the local expert is a Llama of 1.24 B parameters with fresh weights, in texts of 2048 tokens, 8 a step. The
plain loop is what a good user writes: fp32 masters and autocast, or all in bf16, PyTorch's fused AdamW, the library's
own loss. FLOPs are of the mixture's forward and backward, of products and attention; of the model alone, fewer.
"""

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmoe.client import measured, open_client
from fedmoe.config import Config, Data, Federation, Model, Partition, Training
from fedmoe.engine.device import prepare
from fedmoe.engine.step import How, autocast
from fedmoe.models.language import Body
from fedmoe.profiling.bench import Absent, Bench, Call, Floor, Unavailable, attempt
from tests.bench.federations import FASTEST, a_round, rounds_of, steps_of
from tests.engines import engine
from tests.support import begin, changed

BILLION: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
"""The shape of Llama 3.2's smallest."""


def test_lm_step(gpu_benchmark: Bench, tmp_path: Path) -> None:
    """One client: two steps a call."""
    bench = gpu_benchmark
    prepare(bench.device.type, 0, False)
    config, precision = large(bench, tmp_path, clients=1, samples=2), "bf16" if bench.full else "fp32"
    low = torch.bfloat16 if bench.full else None
    run = begin(config, tmp_path / "run")
    fastest = FASTEST if bench.device.type == "cuda" else How()
    with ExitStack() as stack:

        def ours(**sections: Any) -> Call:
            made = changed(config, **sections)
            folder = begin(made, tmp_path / f"run-{len(sections)}") if sections else run
            how = How(precision=precision, optimizer=fastest.optimizer, streams=fastest.streams, graphs=fastest.graphs)
            opened = stack.enter_context(engine(made, folder, how, bench.device.type))
            a_round(made, opened)()
            return steps_of(opened, 0)

        bench(
            {
                "transformers alone, autocast": attempt(lambda: alone(config, run, bench, low, masters=True)),
                "transformers alone, all bf16": attempt(lambda: alone(config, run, bench, low, masters=False)),
                "engine, local expert alone": attempt(partial(ours, method="local")),
                "engine": attempt(ours),
            },
            floor=floor(config, run, precision),
        )


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_lm_paging(gpu_benchmark: Bench, tmp_path: Path, tune: str) -> None:
    """Rounds of clients on the device, on the host, in files: all that is above 1 is transfer that does not hide.

    With one region nothing can hide behind training; of what comes in, only what goes out at the same time.
    """
    bench = gpu_benchmark
    config = large(bench, tmp_path, clients=3 if bench.full else 2, samples=4)
    config = changed(config, model={"tune": tune, "frozen_dtype": "bf16" if bench.full else "fp32"})
    run = begin(config, tmp_path / "run")
    gpu = bench.device.type == "cuda"
    ways: dict[str, dict[str, Any] | Absent] = {
        "in device memory": {} if gpu else Absent("a CPU has the host's memory only"),
        "in host memory": {"device_memory": 0},
        "in host memory, one region": {"device_memory": 0, "regions": 1} if gpu else Absent("a CPU has one always"),
        "in files": {"memory": 0},
    }
    rounds_of(bench, config, run, ways)


def large(bench: Bench, folder: Path, clients: int, samples: int) -> Config:
    """Clients of the model with `samples` batches each, one of them in five for their tests."""
    length, batch = (2048, 8) if bench.full else (16, 2)
    shape = BILLION if bench.full else BILLION | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    if not bench.full:
        shape = shape | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300}
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(shape))
    (folder / "texts").mkdir()
    windows = -(-samples * batch * 5 // 4)
    for client in range(clients):
        letters = torch.randint(97, 123, (windows * length + 1,), generator=torch.Generator().manual_seed(client))
        (folder / "texts" / f"{client}.txt").write_bytes(bytes(letters.tolist()))
    return Config(
        federation=Federation(clients=clients),
        data=Data(kind="text", name=str(folder / "texts"), sequence_length=length),
        partition=Partition(kind="natural", column="source", min_samples=2),
        model=Model(local=(f"hf/{folder / 'model'}",), global_expert="llama-nano", adapter="linear", weights="random"),
        training=Training(optimizer="adamw", lr=1e-4, batch_size=batch),
    )


def alone(config: Config, run: Path, bench: Bench, low: torch.dtype | None, masters: bool) -> Call:
    """The local expert by itself: two steps on the client's samples."""
    if low is None and not masters:
        raise Unavailable("it is in fp32 here, as the one before")
    client = open_client(config, 0, run, bench.device)
    body = client.mixture.local_expert
    assert isinstance(body, Body)
    whole = body.whole.train()
    if not masters:
        whole = whole.to(low)
    t = config.training
    optimizer = torch.optim.AdamW(whole.parameters(), lr=t.lr, weight_decay=t.weight_decay, fused=True)
    batches: list[Tensor] = [client.batch(torch.arange(client.batch_size, device=bench.device))[0] for _ in range(2)]

    def call() -> None:
        for tokens in batches:
            with autocast(bench.device, low if masters else None):
                loss = whole(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return call


def floor(config: Config, run: Path, precision: str) -> Floor:
    """Two steps' products and attention; every weight of the optimizer's read and written once a step."""
    client = open_client(config, 0, run, torch.device("cpu"), trained=False)
    flops, _ = measured(client)
    moved = 2 * sum(p.numel() for p in client.mixture.parameters()) * 2 * 12
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    return Floor(bytes=moved, flops=2 * flops * client.batch_size, dtype=dtype)
