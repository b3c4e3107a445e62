"""Looks into trained clients: how their gates weigh the experts, and where the experts put the samples (t-SNE)."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmoe import checkpoint
from fedmoe.client import Client, open_client
from fedmoe.config import Config
from fedmoe.kernels import oracle

CLIENTS, SAMPLES = 64, 64
"""Most clients that are opened, evenly apart, and most held-out samples of each."""
STATES = 500_000_000
"""Most bytes of clients' states that are read: fewer clients of larger ones."""
PICTURED, DOTS = 3, 40
"""Clients with a t-SNE, and most samples in each."""

Places: TypeAlias = npt.NDArray[np.float32]  # [n, 2]


@dataclass(frozen=True, slots=True)
class Gated:
    """A client's gate on its held-out samples."""

    client: int
    weights: list[float]
    """Of the global expert, one for each sample, where it is finite."""
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Pictured:
    """A client's representations of its held-out samples, all in one t-SNE, so that they can be compared."""

    client: int
    places: Mapping[str, Places]
    """By what represents: `global`, `local`, `mixed`."""
    labels: list[int]


def look(config: Config, run: Path, device: torch.device) -> tuple[list[Gated], list[Pictured]]:
    """Of clients that have trained, as the last checkpoint has them; the run's lock must be held.

    Gates are looked at with method `fedmoe` alone: the controls have none, or one that is the same for all samples.
    Raises UserError where a client cannot be opened.
    """
    gated, pictured = [], []
    for number, id in enumerate(_chosen(run)):
        client = open_client(config, id, run, device)
        outputs, labels = _outputs(client)
        if config.method == "fedmoe":
            weights = outputs["gate"][:, 0]
            finite = weights.isfinite()
            if finite.any():
                gated.append(Gated(id, weights[finite].tolist(), labels[finite].tolist()))
        if number < PICTURED and (places := _places(outputs)):
            pictured.append(Pictured(id, places, labels[:DOTS].tolist()))
    return gated, pictured


def _chosen(run: Path) -> list[int]:
    entries = checkpoint.read_manifest(run).clients
    trained = sorted(entries)
    if not trained:
        return []
    mean = sum(entry.bytes for entry in entries.values()) / len(entries)
    count = max(1, min(CLIENTS, len(trained), int(STATES / mean)))
    return [trained[i * len(trained) // count] for i in range(count)]


@torch.no_grad()
def _outputs(client: Client) -> tuple[dict[str, Tensor], Tensor]:
    """What the client's branches give, and their mix, each [n, ...], and the labels [n], all on the CPU.

    A text has the mean over its tokens, and where it comes from for a label.
    """
    samples = client.held_out[:SAMPLES]
    x, y = client.batch(samples)
    client.mixture.eval()
    outputs = {name: branch(x).float().cpu() for name, branch in client.mixture.branches().items()}
    if "gate" in outputs:
        rows = {name: output.flatten(0, y.ndim - 1) for name, output in outputs.items()}
        mixed = oracle.gated_mix(rows["global"], rows["local"], rows["gate"])
        outputs = {**outputs, "mixed": mixed.unflatten(0, y.shape), "gate": outputs["gate"].softmax(dim=-1)}
    if y.ndim > 1:
        outputs = {name: output.mean(1) for name, output in outputs.items()}
    return outputs, client.labels[samples].cpu()


def _places(outputs: Mapping[str, Tensor]) -> dict[str, Places]:
    """Nothing where there is nothing to see: too few samples, all represented alike, or not by finite numbers."""
    kinds = {name: outputs[name][:DOTS].flatten(1) for name in ("global", "local", "mixed") if name in outputs}
    stacked = torch.cat(list(kinds.values())).numpy()
    if len(stacked) < 8 or not np.isfinite(stacked).all() or not stacked.std(axis=0).any() or stacked.shape[1] < 2:
        return {}
    from sklearn.manifold import TSNE  # a second that others need not wait for

    made: Any = TSNE(perplexity=min(30.0, (len(stacked) - 1) / 3), init="pca", random_state=0, n_jobs=1)
    with warnings.catch_warnings():  # of ties between samples that are represented alike
        warnings.simplefilter("ignore")
        places = made.fit_transform(stacked)
    return dict(zip(kinds, np.split(places, len(kinds)), strict=True))
