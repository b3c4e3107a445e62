"""Partitions: who gets which samples, that equal seeds give equal splits, and what cannot be dealt."""

import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmoe.config import Partition
from fedmoe.errors import UserError
from fedmoe.partition import Split, deal

KINDS = ("pathological", "dirichlet", "iid")


def sorted_labels(samples: int, classes: int) -> Tensor:
    """The hard case: labels sorted by class, as evenly many of each as can be."""
    return torch.arange(samples) * classes // samples


def complaint(labels: Tensor, classes: int, clients: int, **config: Any) -> str:
    """The one line that `deal` refuses with."""
    with pytest.raises(UserError) as caught:
        deal(labels, classes, Partition(**config), clients, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    samples=st.integers(200, 600),
    classes=st.integers(2, 12),
    clients=st.integers(1, 12),
    test_fraction=st.floats(0.01, 0.99),
    alpha=st.floats(0.01, 100),
    per_client=st.integers(1, 12),
    seed=st.integers(0, 2**63),
)
def test_every_split_is_disjoint_whole_and_repeatable(
    kind: str,
    samples: int,
    classes: int,
    clients: int,
    test_fraction: float,
    alpha: float,
    per_client: int,
    seed: int,
) -> None:
    labels = sorted_labels(samples, classes)
    per_client = min(per_client, classes)
    config = Partition(
        kind=kind, test_fraction=test_fraction, alpha=alpha, classes_per_client=per_client, min_samples=2
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            split = deal(labels, classes, config, clients, seed)
            again = deal(labels, classes, config, clients, seed)
    except UserError:
        assert kind == "dirichlet"  # the others can always be met here
        return
    assert split.fingerprint == again.fingerprint
    assert len(split) == clients
    assert len(split.indices.unique()) == len(split.indices)
    assert 0 <= split.indices.min() <= split.indices.max() < samples
    everything = kind != "pathological" or clients * per_client >= classes
    assert (len(split.indices) == samples) == everything
    for client in range(clients):
        train, test = split.train(client), split.test(client)
        size = len(train) + len(test)
        assert size == split.offsets[client + 1] - split.offsets[client]
        assert len(test) == min(max(1, round(test_fraction * size)), size - 1)
        assert len(train) >= 1
    if kind == "pathological":
        assert ((split.counts(labels, classes) > 0).sum(1) == per_client).all()
    if kind == "iid":
        assert split.offsets.diff().max() - split.offsets.diff().min() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_and_the_global_seeds_do_not(kind: str) -> None:
    labels = sorted_labels(600, 6)
    splits = []
    for seed, global_seed in ((5, 0), (5, 1), (6, 0)):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        splits.append(deal(labels, 6, Partition(kind=kind), 8, seed))
    assert splits[0].fingerprint == splits[1].fingerprint != splits[2].fingerprint
    assert not torch.equal(splits[0].indices.sort().values, splits[0].indices)


@pytest.mark.timeout(60)
def test_another_process_deals_the_same() -> None:
    program = (
        "import torch; from fedmoe.config import Partition; from fedmoe.partition import deal\n"
        f"for kind in {KINDS}: print(deal(torch.arange(600) * 6 // 600, 6, Partition(kind=kind), 8, 5).fingerprint)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        deal(sorted_labels(600, 6), 6, Partition(kind=kind), 8, 5).fingerprint for kind in KINDS
    ]
    assert "\r" not in done.stderr  # nor does a library draw progress bars


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_clients_are_dealt_in_seconds(kind: str) -> None:
    labels = sorted_labels(60_000, 10)
    start = time.perf_counter()
    split = deal(labels, 10, Partition(kind=kind), 1000, seed=0)
    assert time.perf_counter() - start < 30
    assert len(split.indices) == 60_000
    assert split.offsets.diff().min() >= 10


@pytest.mark.timeout(60)
def test_a_dirichlet_split_that_cannot_be_is_refused_not_retried_for_ever() -> None:
    message = complaint(sorted_labels(60_000, 10), 10, 1000, kind="dirichlet", alpha=0.05)
    assert message.startswith(
        "no Dirichlet split in 11 draws gives each of 1000 clients 10 samples at alpha 0.05: raise"
    )


def test_pathological_deals_every_class_and_evenly() -> None:
    """Ten clients of ten of 100 classes: the paper's CIFAR-100 setting, where independent draws lose a third."""
    labels = sorted_labels(6000, 100)
    counts = deal(labels, 100, Partition(classes_per_client=10), 10, seed=0).counts(labels, 100)
    assert (counts.sum(0) == 60).all()
    assert ((counts > 0).sum(1) == 10).all()
    labels = sorted_labels(6000, 10)
    counts = deal(labels, 10, Partition(classes_per_client=2), 10, seed=0).counts(labels, 10)
    assert (counts.sum(1) == 600).all()
    with pytest.warns(UserWarning, match="3 clients of 2 classes leave 4 classes undealt"):
        deal(labels, 10, Partition(classes_per_client=2), 3, seed=0)


def test_iid_mixes_sorted_classes_and_dirichlet_follows_alpha() -> None:
    labels = sorted_labels(6000, 10)
    iid = deal(labels, 10, Partition(kind="iid"), 10, seed=0).counts(labels, 10)
    assert 30 < iid.min() <= iid.max() < 100  # 60 expected, standard deviation 7
    spread = [
        deal(labels, 10, Partition(kind="dirichlet", alpha=alpha), 10, seed=0).counts(labels, 10).float().std().item()
        for alpha in (0.1, 1.0, 100.0)
    ]
    assert spread[0] > 2 * spread[1] > 10 * spread[2]


def test_the_seed_decides_who_gets_which_classes() -> None:
    labels = sorted_labels(6000, 10)
    for kind in KINDS[:2]:
        first, second = (deal(labels, 10, Partition(kind=kind), 10, seed).counts(labels, 10) for seed in (0, 1))
        assert ((first > 100) != (second > 100)).any()


def test_a_large_test_share_leaves_one_sample_to_train_on_and_a_small_one_one_to_test() -> None:
    labels = sorted_labels(100, 10)
    large = deal(labels, 10, Partition(kind="iid", test_fraction=0.99), 10, seed=0)
    small = deal(labels, 10, Partition(kind="iid", test_fraction=0.01), 10, seed=0)
    assert (large.train_counts.tolist(), small.train_counts.tolist()) == ([1] * 10, [9] * 10)


def test_counts_are_those_of_each_client() -> None:
    labels = torch.tensor([2, 0, 0, 1, 2, 2])
    split = Split(torch.tensor([5, 0, 3, 1, 2]), torch.tensor([0, 3, 5]), torch.tensor([2, 1]))
    assert split.counts(labels, 4).tolist() == [[0, 1, 2, 0], [2, 0, 0, 0]]
    assert (split.train(0).tolist(), split.test(0).tolist()) == ([5, 0], [3])
    assert (split.train(1).tolist(), split.test(1).tolist()) == ([1], [2])


def test_train_and_test_do_not_follow_the_order_of_the_files() -> None:
    split = deal(torch.zeros(1000, dtype=torch.int64), 1, Partition(kind="iid"), 2, seed=0)
    for client in range(2):
        assert 400 < split.test(client).float().mean() < 600


def test_what_cannot_be_dealt_is_refused() -> None:
    labels = sorted_labels(100, 5)
    assert complaint(labels, 5, 0).startswith("federation.clients is 0")
    assert complaint(labels, 5, 11).startswith("11 clients of at least 10 samples need 110, the data set has 100:")
    assert complaint(labels, 5, 51, min_samples=1).startswith("51 clients of at least 2 samples need 102")
    for fraction in (0.0, 1.0, -0.5, float("nan")):
        assert complaint(labels, 5, 2, test_fraction=fraction).startswith(f"partition.test_fraction is {fraction}")
    for alpha in (0.0, -1.0, float("inf"), float("nan")):
        assert complaint(labels, 5, 2, kind="dirichlet", alpha=alpha).startswith(f"partition.alpha is {alpha}")
    expected = "is 6, the data have 5 classes (of 7 named): choose 1 to 5"
    assert expected in complaint(labels, 7, 2, classes_per_client=6)
    assert "classes_per_client is 0" in complaint(labels, 5, 2, classes_per_client=0)


def test_a_client_that_gets_too_little_is_named() -> None:
    labels = torch.tensor([0] * 96 + [1] * 4)  # whoever has the rare class has 4 samples
    message = complaint(labels, 2, 2, classes_per_client=1)
    assert message.startswith(("client 0 of 2 gets 4 samples, it needs 10:", "client 1 of 2 gets 4 samples"))
    assert "class 1 has 4 samples for the 5 clients that hold it" in complaint(labels, 2, 10, classes_per_client=1)


def test_a_natural_partition_has_a_client_for_each_of_the_largest_values() -> None:
    labels, owners = sorted_labels(200, 4), ["b", "d", "a", "c"] * 30 + ["a", "b", "e", "a"] * 20
    columns: dict[str, Any] = {"writer": owners, "age": [10 if owner == "a" else 9 for owner in owners]}
    split = deal(labels, 4, Partition(kind="natural", column="writer"), 3, 0, column=columns.__getitem__)
    for client, owner in enumerate(("a", "b", "c")):  # of 70, 50, 30 and 30 samples
        own = torch.cat([split.train(client), split.test(client)])
        assert sorted(own.tolist()) == [row for row, value in enumerate(owners) if value == owner]
    ages = deal(labels, 4, Partition(kind="natural", column="age"), 2, 0, column=columns.__getitem__)
    assert ages.offsets.tolist() == [0, 130, 200]
    with pytest.raises(
        UserError, match=r"'writer' has 5 values, federation.clients is 6: lower it to 5 or name another"
    ):
        deal(labels, 4, Partition(kind="natural", column="writer"), 6, 0, column=columns.__getitem__)
    with pytest.raises(UserError, match=r"client 0 of 2 gets 70 samples, it needs 80"):
        deal(labels, 4, Partition(kind="natural", column="writer", min_samples=80), 2, 0, column=columns.__getitem__)
    assert "partition.column is 'x', these data have no columns" in complaint(labels, 4, 2, kind="natural", column="x")


NAMED: dict[str, dict[str, Any]] = {
    "ShardPartitioner": {"num_shards_per_partition": 2},
    "PathologicalPartitioner": {"num_classes_per_partition": 2},
    "DirichletPartitioner": {"alpha": [0.5] * 6},
    "LinearPartitioner": {},
    "SquarePartitioner": {},
    "ExponentialPartitioner": {},
    "SizePartitioner": {"partition_sizes": [200] * 6},
    "InnerDirichletPartitioner": {"partition_sizes": [200] * 6, "alpha": 0.5},
    "DistributionPartitioner": {
        "distribution_array": [[1.0] * 3] * 6,
        "num_unique_labels_per_partition": 3,
        "preassigned_num_samples_per_label": 5,
    },
    "NaturalIdPartitioner": {"partition_by": "writer"},
    "GroupedNaturalIdPartitioner": {"partition_by": "writer", "group_size": 2},
    "ContinuousPartitioner": {"partition_by": "age", "strictness": 0.5},
}


@pytest.mark.parametrize("kind", NAMED)
def test_partitioners_of_flwr_datasets_by_name(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    labels = sorted_labels(2400, 6)
    rows = range(2400)
    columns: dict[str, Any] = {"writer": [f"w{row % 16}" for row in rows], "age": [row % 70 for row in rows]}
    config = Partition(kind=kind, options=NAMED[kind], min_samples=2)
    splits = [deal(labels, 6, config, 6, seed, column=columns.__getitem__) for seed in (1, 1, 2)]
    assert capsys.readouterr() == ("", "")  # nor progress bars
    assert splits[0].fingerprint == splits[1].fingerprint != splits[2].fingerprint
    assert len(splits[0]) == 6
    assert len(splits[0].indices.unique()) == len(splits[0].indices)


def test_a_partitioner_takes_a_column_by_any_name() -> None:
    labels = sorted_labels(240, 6)
    config = Partition(kind="NaturalIdPartitioner", column="position", min_samples=2)
    writers = [f"w{row % 6}" for row in range(240)]
    split = deal(labels, 6, config, 6, 0, column={"position": writers}.__getitem__)
    for client in range(6):
        assert len({writers[row] for row in torch.cat([split.train(client), split.test(client)]).tolist()}) == 1


def test_partitioners_cannot_be_made_of_anything() -> None:
    labels = sorted_labels(200, 4)
    assert "'MagicPartitioner': flwr-datasets has ContinuousPartitioner, Di" in complaint(
        labels, 4, 2, kind="MagicPartitioner"
    )
    assert "'VerticalEvenPartitioner': flwr-datasets has" in complaint(labels, 4, 2, kind="VerticalEvenPartitioner")
    for options, expected in (
        (
            {"shards": 2},
            "partition.options.shards: ShardPartitioner has no such option, but num_partitions, partition_by",
        ),
        ({}, "ShardPartitioner of flwr-datasets: "),
        ({"num_shards_per_partition": "two"}, "ShardPartitioner of flwr-datasets: "),
        ({"num_shards_per_partition": 2, "partition_by": "hue"}, "partition.column is 'hue', these data have no"),
    ):
        assert expected in complaint(labels, 4, 2, kind="ShardPartitioner", options=options)
    assert "NaturalIdPartitioner of flwr-datasets: " in complaint(labels, 4, 9, kind="NaturalIdPartitioner")


def test_classes_are_named_in_complaints() -> None:
    labels = torch.tensor([0] * 96 + [1] * 4)
    with pytest.raises(UserError, match="class owl has 4 samples for the 5 clients that hold it"):
        deal(labels, 2, Partition(classes_per_client=1), 10, 0, names=("cat", "owl"))


def test_a_saved_split_is_the_same_and_damage_is_named(tmp_path: Path) -> None:
    split = deal(sorted_labels(200, 4), 4, Partition(), 5, seed=0)
    path = tmp_path / "split.safetensors"
    split.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded = Split.load(path)
    assert loaded.fingerprint == split.fingerprint
    assert all(torch.equal(loaded.test(client), split.test(client)) for client in range(5))

    tensors, whole = load_file(path), path.read_bytes()
    metadata = {"format": "1", "kind": "split", "fingerprint": split.fingerprint}
    for change, expected in (
        ({"kind": "server"}, "kind is 'server', 'split' is needed"),
        ({"format": "9"}, "format is 9, this version reads 1"),
        ({"fingerprint": "0" * 64}, f"fingerprint is {split.fingerprint[:12]}, the file says 000000000000"),
    ):
        save_file(tensors, path, metadata | change)
        assert_refused(path, expected)
    save_file({"indices": tensors["indices"]}, path, metadata)
    assert_refused(path, "not a whole safetensors file (")
    path.write_bytes(whole[:-8])
    assert_refused(path, "not a whole safetensors file (")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_refused(path, "fingerprint is ")
    path.unlink()
    assert_refused(path, "cannot be read (")


def assert_refused(path: Path, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        Split.load(path)
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(caught.value)
