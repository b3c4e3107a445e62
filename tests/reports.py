"""Runs of any size that were never trained, for reports of them: lines as `metrics.jsonl` has them, gates, pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmoe import outcome
from fedmoe.config import Config, Federation, Model
from fedmoe.insight import Gated, Pictured
from fedmoe.metrics import Line, spread
from fedmoe.reportsections import Subject

MODELS = ("cnn-1", "cnn-2", "cnn-3", "cnn-4", "cnn-5")


def lines(clients: int, rounds: int, seed: int = 0, aggregated: bool = True) -> list[Line]:
    """Learning curves with noise; a tenth of 100 clients or more take part in a round; some trouble now and then."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(0.55, 0.98, clients)
    k = clients if clients < 100 else clients // 10
    made = []
    for number in range(1, rounds + 1):
        sampled = sorted(rng.choice(clients, k, replace=False).tolist())
        learned = 1 - 0.9 * np.exp(-5 * number / rounds)
        accuracy = np.clip(level * learned + rng.normal(0, 0.02, clients), 0, 1)
        each = [int(n) for n in rng.integers(100, 500, k)]
        line: Line = {
            "round": number,
            "sampled": sampled,
            "rolled_back": sampled[:1] if number % 40 == 7 else [],
            "loss": float(2.3 * (1 - learned) + 0.01),
            "bytes_down": 466_240 * k,
            "bytes_up": 466_240 * (k - (number % 40 == 7)),
            "flops": 1_600_000_000 * k,
            "evaluated": list(range(clients)),
            "accuracy": spread(accuracy.tolist()),
            "test_loss": spread((2.4 * (1 - accuracy)).tolist()),
            "not_finite": [],
            "seconds": {"round": 2.0, "train": 1.8, "aggregate": 0.01, "evaluate": 0.19, "checkpoint": 0.01},
            "clients": {"samples": each},
        }
        if aggregated:
            line["accuracy_aggregated"] = spread((0.93 * accuracy).tolist())
        if number % 100 == 50:
            why = "1 of the 10 numbers of 'theta' are not finite"
            line |= {"rejected": {str(sampled[1]): why}, "kept": "krum needs 5 results, 4 were fit to count"}
            line |= {"parts": {str(sampled[-1]): 2}, "skipped": 3}
        made.append(line)
    return made


def subject(clients: int, rounds: int, classes: int = 10, **changes: Any) -> Subject:
    """A run that such lines could be of."""
    rng = np.random.default_rng(1)
    config = Config(
        federation=Federation(clients=clients, rounds=rounds, fraction=1.0 if clients < 100 else 0.1),
        model=Model(local=MODELS),
    )
    names = [f"class {i}" for i in range(classes)]
    counts = torch.from_numpy(rng.integers(0, 60, (clients, classes)) * (rng.random((clients, classes)) < 0.3))
    gates = [
        Gated(int(c), rng.beta(2, 5, 64).round(6).tolist(), rng.integers(0, classes, 64).tolist())
        for c in np.linspace(0, clients - 1, min(64, clients))
    ]
    pictures = [
        Pictured(
            client,
            {kind: rng.normal(0, 10, (40, 2)).astype(np.float32) for kind in ("global", "local", "mixed")},
            rng.integers(0, classes, 40).tolist(),
        )
        for client in range(min(3, clients))
    ]
    given: dict[str, Any] = {
        "name": "synthetic",
        "config": config,
        "rounds": outcome.rounds(Path("metrics.jsonl"), lines(clients, rounds), clients, rounds),
        "train": (counts.sum(1) * 4 // 5).tolist(),
        "test": (counts.sum(1) // 5).tolist(),
        "counts": counts,
        "classes": names,
        "environment": {"gpu": "none", "cpu": "EPYC", "threads": 1},
        "plan": {"precision": "fp32", "reasons": {"precision": "the device is a CPU"}},
        "gates": gates,
        "pictures": pictures,
    }
    return Subject(**given | changes)
