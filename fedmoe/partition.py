"""Deals the samples of a data set to the clients and splits every client's share into training and test samples."""

import contextlib
import hashlib
import inspect
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedmoe import config as settings
from fedmoe.engine.seeds import derive, generator
from fedmoe.errors import UserError
from fedmoe.files import write_atomic

FORMAT = "1"

NOT_BY_NAME = {"Partitioner", "IdToSizeFncPartitioner", "VerticalEvenPartitioner", "VerticalSizePartitioner"}
"""Of flwr-datasets: abstract, made with a function, or dealing columns."""

Positions: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Split:
    """Which samples every client trains on and which it is tested on. `len` is the number of clients, N."""

    indices: Tensor  # int64 [samples dealt]: client after client, the training samples of each before its test samples
    offsets: Tensor  # int64 [N + 1]: client i owns indices[offsets[i] : offsets[i + 1]]
    train_counts: Tensor  # int64 [N]

    def __len__(self) -> int:
        return len(self.train_counts)

    def train(self, client: int) -> Tensor:
        """Indices of the client's training samples, int64 [train_counts[client]], shuffled; a view."""
        start = int(self.offsets[client])
        return self.indices[start : start + int(self.train_counts[client])]

    def test(self, client: int) -> Tensor:
        """Indices of the client's test samples, int64, shuffled; a view."""
        start = int(self.offsets[client]) + int(self.train_counts[client])
        return self.indices[start : int(self.offsets[client + 1])]

    def counts(self, labels: Tensor, classes: int) -> Tensor:
        """Samples of every class that every client owns, int64 [N, classes], training and test together."""
        owner = torch.repeat_interleave(torch.arange(len(self)), self.offsets.diff())
        cells = torch.bincount(owner * classes + labels[self.indices], minlength=len(self) * classes)
        return cells.view(len(self), classes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content, in hexadecimal; equal on every machine."""
        digest = hashlib.sha256()
        for part in (self.offsets, self.train_counts, self.indices):
            digest.update(part.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the split to `path` (safetensors), whole or not at all. Raises OSError if it cannot."""
        tensors = {"indices": self.indices, "offsets": self.offsets, "train_counts": self.train_counts}
        metadata = {"format": FORMAT, "kind": "split", "fingerprint": self.fingerprint}
        write_atomic(path, save(tensors, metadata))

    @classmethod
    def load(cls, path: Path) -> "Split":
        """Read what `save` wrote. Raises UserError naming the file and the check that failed."""
        remedy = "restore it from a copy or start a new run"
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("kind") != "split":
                    raise UserError(f"{path}: kind is {metadata.get('kind')!r}, 'split' is needed; {remedy}")
                if metadata.get("format") != FORMAT:
                    found = metadata.get("format")
                    raise UserError(
                        f"{path}: format is {found}, this version reads {FORMAT}; use the version that wrote it"
                    )
                split = cls(*(file.get_tensor(name) for name in ("indices", "offsets", "train_counts")))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error
        except SafetensorError as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}); {remedy}") from error
        if split.fingerprint != metadata.get("fingerprint"):
            stated = str(metadata.get("fingerprint"))
            raise UserError(f"{path}: fingerprint is {split.fingerprint[:12]}, the file says {stated[:12]}; {remedy}")
        return split


def deal(
    labels: Tensor,  # int64 [n], each 0 to classes - 1
    classes: int,
    config: settings.Partition,
    clients: int,
    seed: int,
    names: Sequence[str] = (),
    column: Callable[[str], Sequence[str | int]] | None = None,
) -> Split:
    """Deal every sample to at most one client; hold out `test_fraction` of every client's samples, at least one.

    `names` are the classes', for messages; `column` gives the n values of a column of the data. Equal arguments give
    equal splits in every process. Raises UserError for settings that make no sense or that the data cannot satisfy;
    never retries without bound.
    """
    needed = max(config.min_samples, 2)  # one sample to train on and one to test on
    _check(len(labels), config, clients, needed)
    # Rows are shuffled first: files come sorted by split and often by class, and every partitioner slices in order.
    rows = torch.randperm(len(labels), generator=generator(seed, "partition/rows")).numpy()
    shuffled = labels.numpy()[rows]
    partition_seed = derive(seed, "partition")

    def values(name: str) -> list[str | int]:
        if column is None:
            raise UserError(f"partition.column is {name!r}, these data have no columns: leave it out")
        given = column(name)
        return [given[row] for row in rows.tolist()]

    if config.kind == "pathological":
        shares = _pathological(shuffled, classes, config.classes_per_client, clients, partition_seed, names)
    elif config.kind == "natural":
        shares = _natural(values(config.column), config.column, clients)
    else:
        shares = _flower(shuffled, config, clients, needed, partition_seed, values)
    indices, train_counts = [], []
    for client, share in enumerate(shares):
        if len(share) < needed:
            raise UserError(
                f"client {client} of {clients} gets {len(share)} samples, it needs {needed}: "
                "lower federation.clients or partition.min_samples, or take more data"
            )
        order = torch.randperm(len(share), generator=generator(seed, "split", client))
        indices.append(torch.from_numpy(rows[share])[order])
        train_counts.append(len(share) - min(max(1, round(config.test_fraction * len(share))), len(share) - 1))
    sizes = torch.tensor([len(share) for share in shares])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return Split(torch.cat(indices), offsets, torch.tensor(train_counts))


def _check(samples: int, config: settings.Partition, clients: int, needed: int) -> None:
    if clients < 1:
        raise UserError(f"federation.clients is {clients}, it must be at least 1")
    if not 0 < config.test_fraction < 1:
        raise UserError(f"partition.test_fraction is {config.test_fraction}, it must lie between 0 and 1")
    if clients * needed > samples:
        raise UserError(
            f"{clients} clients of at least {needed} samples need {clients * needed}, the data set has {samples}: "
            "lower federation.clients or partition.min_samples, or take more data"
        )


def _pathological(
    labels: npt.NDArray[np.int64],
    classes: int,
    per_client: int,
    clients: int,
    seed: int,
    names: Sequence[str],
) -> list[Positions]:
    """Positions for each client: `per_client` classes each, every class cut evenly among the clients that hold it.

    Not flwr-datasets' PathologicalPartitioner: it draws the classes independently, so that 10 clients of 10 classes
    (the paper's CIFAR-100 setting) leave 34% of the samples undealt, and 10 clients of 2 CIFAR-10 classes own 3000 to
    9000 samples. Here a client takes the classes used least so far, ties broken at random: uses never differ by more
    than one, so every class is dealt as soon as clients * per_client reaches their number.
    """
    present = np.unique(labels)
    if not 1 <= per_client <= len(present):
        raise UserError(
            f"partition.classes_per_client is {per_client}, the data have {len(present)} classes (of {classes} named): "
            f"choose 1 to {len(present)}"
        )
    rng = np.random.default_rng(seed)
    uses = np.zeros(len(present), dtype=np.int64)
    holders: list[list[int]] = [[] for _ in present]
    for client in range(clients):
        for chosen in np.lexsort((rng.random(len(present)), uses))[:per_client]:
            uses[chosen] += 1
            holders[chosen].append(client)
    if not uses.all():
        unused = int((uses == 0).sum())
        warnings.warn(f"{clients} clients of {per_client} classes leave {unused} classes undealt", stacklevel=3)
    parts: list[list[Positions]] = [[] for _ in range(clients)]
    for label, owners in zip(present, holders, strict=True):
        positions = np.flatnonzero(labels == label)
        if len(positions) < len(owners):
            raise UserError(
                f"class {names[label] if names else label} has {len(positions)} samples for the {len(owners)} clients "
                "that hold it: lower federation.clients or partition.classes_per_client, or take more data"
            )
        if owners:
            for owner, part in zip(owners, np.array_split(positions, len(owners)), strict=True):
                parts[owner].append(part)
    return [np.concatenate(part) for part in parts]


def _natural(values: Sequence[str | int], column: str, clients: int) -> list[Positions]:
    """Positions for each client: those of a value of the column each.

    Of more values than clients, those with most samples are taken, and of equals the first; the clients are then in
    the order of their values.
    """
    found: dict[str | int, list[int]] = {}
    for position, value in enumerate(values):
        found.setdefault(value, []).append(position)
    if len(found) < clients:
        raise UserError(
            f"partition.column {column!r} has {len(found)} values, federation.clients is {clients}: lower it to "
            f"{len(found)} or name another column"
        )
    ordered = sorted(found, key=lambda value: (isinstance(value, str), value))
    taken = set(sorted(ordered, key=lambda value: -len(found[value]))[:clients])
    return [np.asarray(found[value]) for value in ordered if value in taken]


def _flower(
    labels: npt.NDArray[np.int64],
    config: settings.Partition,
    clients: int,
    needed: int,
    seed: int,
    column: Callable[[str], Sequence[str | int]],
) -> list[Positions]:
    """Positions for each client from a partitioner of flwr-datasets."""
    if config.kind == "dirichlet" and not 0 < config.alpha < float("inf"):
        raise UserError(f"partition.alpha is {config.alpha}, it must be positive and finite")
    # Without self-balancing, which zeroes the shares of clients above the average and so bends the distribution
    # for the classes that come last. The library draws at most 11 times, then raises.
    dirichlet = {"alpha": float(config.alpha), "self_balancing": False, "shuffle": False}
    name, options = {
        "dirichlet": ("DirichletPartitioner", dirichlet),
        "iid": ("IidPartitioner", {}),  # contiguous slices: independent because the rows are shuffled
    }.get(config.kind, (config.kind, config.options))
    import datasets  # here, not above: the two take 3 s to import
    from flwr_datasets import partitioner as library

    known = [n for n in sorted(library.__all__) if n not in NOT_BY_NAME]
    if name not in known:
        raise UserError(f"partition.kind is {name!r}: flwr-datasets has {', '.join(known)}")
    make = getattr(library, name)
    takes = inspect.signature(make).parameters
    if unknown := sorted(options.keys() - takes):
        raise UserError(f"partition.options.{unknown[0]}: {name} has no such option, but {', '.join(takes)}")
    usual = {
        "num_partitions": clients,
        "partition_by": config.column or "label",
        "min_partition_size": needed,
        "seed": seed,
    }
    given = {key: value for key, value in usual.items() if key in takes} | options
    by = str(given.get("partition_by", "label"))
    place = f"{by}/position"  # named as no other column here is
    columns: dict[str, Any] = {"label": labels, place: np.arange(len(labels))}
    if by not in columns:
        columns[by] = column(by)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
        warnings.simplefilter("ignore")  # one warning of several lines for each draw
        try:
            # A list of lists can only be meant as an array.
            partitioner = make(**{k: np.asarray(v) if _nested(v) else v for k, v in given.items()})
            # In memory, so nothing is cached on disk. No format: NumPy's makes the partitioner's own reading 6 times
            # slower.
            partitioner.dataset = datasets.Dataset.from_dict(columns)
            shares = [partitioner.load_partition(client) for client in range(clients)]
            positions = [np.asarray(share[:][place], dtype=np.int64) for share in shares]
        except Exception as error:  # whatever the library raises
            if config.kind == "dirichlet" and isinstance(error, ValueError):
                raise UserError(
                    f"no Dirichlet split in 11 draws gives each of {clients} clients {needed} samples at alpha "
                    f"{config.alpha}: raise partition.alpha, or lower federation.clients or partition.min_samples"
                ) from error
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"{name} of flwr-datasets: {why}: change partition.options or federation.clients"
            ) from error
    dealt = np.concatenate(positions)
    if len(np.unique(dealt)) < len(dealt):
        raise UserError(f"{name} of flwr-datasets gives a sample to two clients: change partition.options")
    return positions


def _nested(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(inner, list) for inner in value)
