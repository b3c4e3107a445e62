"""Run folders with made-up metrics, so that comparing them needs no training."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmoe import configfile
from fedmoe.config import Config
from fedmoe.metrics import spread

CLIENTS = 4


def made(
    folder: Path,
    accuracies: Mapping[int, Sequence[float]] | Sequence[Sequence[float]],
    *,
    seed: int = 0,
    rounds: int = 0,
    environment: Mapping[str, Any] | None = None,
    **values: Any,
) -> Path:
    """A run whose clients have these accuracies, by round; of other rounds it has lines without evaluation.

    With data__kind="text" they are test losses, and who has the lower one has the lower accuracy, too.
    `values` are fields of its configuration, with __ for the dot.
    """
    by_round = accuracies if isinstance(accuracies, Mapping) else dict(enumerate(accuracies, start=1))
    last = max(by_round, default=0)
    count = len(next(iter(by_round.values()), [0.0] * CLIENTS))
    fields = {"seed": seed, "federation.rounds": rounds or last or 1, "federation.clients": count}
    config = configfile.with_values(Config(), fields | {k.replace("__", "."): v for k, v in values.items()})
    config = replace(config, run=replace(config.run, dir=str(folder)))
    folder.mkdir(parents=True)
    (folder / "config.toml").write_bytes(configfile.save(config))
    facts = {"data": "d", "partition": f"p{seed}", "cpu": "some", "gpu": "none", "threads": 1}
    (folder / "environment.json").write_text(json.dumps(facts | dict(environment or {})))
    text = config.data.kind == "text"
    lines = [line(n, by_round.get(n), count, text) for n in range(1, last + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return folder


def line(number: int, values: Sequence[float] | None, clients: int = CLIENTS, text: bool = False) -> dict[str, Any]:
    """A round's metrics, as far as they are read."""
    entry: dict[str, Any] = {"round": number, "bytes_up": 1000, "bytes_down": 1000, "flops": 10**9, "loss": 1.0}
    entry |= {"sampled": list(range(clients)), "rolled_back": [], "clients": {"samples": [10] * clients}}
    entry["seconds"] = {"round": 0.5, "train": 0.4, "aggregate": 0.0, "evaluate": 0.1}
    if values is not None:
        accuracies, losses = ([v / 1000 for v in values], values) if text else (values, [1 - v for v in values])
        entry |= {"evaluated": list(range(len(values))), "accuracy": spread(list(accuracies))}
        entry["test_loss"] = spread(list(losses))
    return entry
