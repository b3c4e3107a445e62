"""Runs read from their folders, and grouped: what makes a variant, what repeats it, and what is damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmoe.errors import UserError
from fedmoe.variants import Variant, group, read
from tests.trained import line, made

ONE = [[0.5, 0.7]]


def names(folder: Path, *runs: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """Names and seeds of the variants that runs with these fields come to."""
    read_ = [read(made(folder / f"{i}", ONE, **fields)) for i, fields in enumerate(runs)]
    return [(variant.name, list(variant.runs)) for variant in group(read_)]


def test_a_run_is_read(tmp_path: Path) -> None:
    run = read(made(tmp_path / "a", {2: [0.5, float("nan"), 1.0], 4: [0.6, 0.7, 0.8]}, rounds=9, seed=3))
    assert run.config.seed == 3 and len(run.rounds) == 4
    assert run.scores == {2: {0: 0.5, 2: 1.0}, 4: {0: 0.6, 1: 0.7, 2: 0.8}}
    assert run.dealt == ("d", "p3", 3)


def test_seeds_repeat_a_variant_and_fields_that_differ_name_it(tmp_path: Path) -> None:
    assert names(
        tmp_path,
        {"seed": 0, "model__local": ("cnn-1", "cnn-2")},
        {"seed": 1, "model__local": ("cnn-1", "cnn-2")},
        {"seed": 0, "training__lr": 0.1},
    ) == [
        ("model.local=cnn-1+cnn-2 training.lr=0.01", [0, 1]),
        ("model.local=cnn-1+cnn-2+cnn-3+cnn-4+cnn-5 training.lr=0.1", [0]),
    ]


def test_options_of_a_partitioner_tell_variants_apart_whatever_their_order(tmp_path: Path) -> None:
    assert names(
        tmp_path,
        {"seed": 0, "partition__kind": "ShardPartitioner", "partition__options": {"a": 2, "b": [1]}},
        {"seed": 1, "partition__kind": "ShardPartitioner", "partition__options": {"b": [1], "a": 2}},
        {"seed": 0, "partition__kind": "ShardPartitioner", "partition__options": {"b": [1]}},
        {"seed": 0, "partition__kind": "iid", "partition__options": {"a": 3}},
    ) == [
        ("partition.kind=ShardPartitioner partition.options.a=2", [0, 1]),
        ("partition.kind=ShardPartitioner partition.options.a=default", [0]),
        ("partition.kind=iid", [0]),
    ]


def test_what_has_no_effect_makes_no_variant(tmp_path: Path) -> None:
    found = names(
        tmp_path,
        {"method": "fedmoe", "gate__norm": "none"},
        {"method": "fedmoe", "gate__norm": "paper"},
        {"method": "local", "gate__norm": "none", "seed": 0},
        {"method": "local", "gate__norm": "paper", "seed": 1},
    )
    assert found == [
        ("method=fedmoe gate.norm=none", [0]),
        ("method=fedmoe gate.norm=paper", [0]),
        ("method=local", [0, 1]),
    ]


def test_what_changes_no_number_counts_only_where_nothing_else_differs(tmp_path: Path) -> None:
    threads = [{"run__threads": n} for n in (1, 2)]
    assert names(tmp_path / "seeds", *({"seed": n} | fields for n, fields in enumerate(threads))) == [
        ("method=fedmoe", [0, 1])
    ]
    assert names(tmp_path / "same", *threads) == [("run.threads=1", [0]), ("run.threads=2", [0])]


def test_repeats_of_one_run_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [read(made(tmp_path / name, ONE, seed=seed)) for name in ("old/0", "new/0") for seed in (0,)]
    assert [v.name for v in group(runs)] == [f"in={tmp_path}/old", f"in={tmp_path}/new"]
    runs += [read(made(tmp_path / "old" / "again", ONE))]
    assert [v.name for v in group(runs)] == [f"folder={tmp_path}/{name}" for name in ("old/0", "new/0", "old/again")]


def test_the_same_data_elsewhere_is_no_difference(tmp_path: Path) -> None:
    there = {"data__name": "/there", "method": "local"}
    assert [name for name, _ in names(tmp_path, {"data__name": "/here"}, there)] == ["method=fedmoe", "method=local"]
    other = {"data__name": "/there", "environment": {"data": "e"}}
    assert names(tmp_path / "2", {"data__name": "/here"}, other)[1][0] == "data.name=/there"


def test_values_are_empty_where_they_have_no_effect(tmp_path: Path) -> None:
    runs: list[dict[str, Any]] = [{"method": "local"}, {"gate__norm": "paper"}, {}]
    variants: list[Variant] = group([read(made(tmp_path / str(i), ONE, **f)) for i, f in enumerate(runs)])
    assert variants[0].values == {"method": "local", "gate.norm": ""}


def cut(run: Path) -> str:
    (run / "metrics.jsonl").write_text('{"round": 1}\n')
    return "metrics.jsonl: the line of round 1 is damaged (KeyError: 'seconds'): restore it"


def garbled(run: Path) -> str:
    (run / "metrics.jsonl").write_text("{not json}\n")
    return "metrics.jsonl: line 1 is no round's metrics (JSONDecodeError"


def skipped(run: Path) -> str:
    (run / "metrics.jsonl").write_text(json.dumps(line(2, [0.5], 1)) + "\n")
    return "metrics.jsonl: has no line of round 1 of 1: restore it"


def uneven(run: Path) -> str:
    entry = line(1, [0.5, 0.5], 1) | {"evaluated": [0]}
    (run / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    return "metrics.jsonl: the line of round 1 is damaged (ValueError: accuracy is of 2 clients, 1 were evaluated)"


def impossible(run: Path) -> str:
    (run / "metrics.jsonl").write_text(json.dumps(line(1, [1.5], 1)) + "\n")
    return "(ValueError: accuracy is not from 0 to 1)"


def text(run: Path) -> str:
    entry = line(1, [0.5], 1) | {"bytes_up": "many"}
    (run / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    return "metrics.jsonl: the line of round 1 is damaged (ValueError: 'many' is not a number)"


def no_environment(run: Path) -> str:
    (run / "environment.json").unlink()
    return "environment.json: is missing or damaged (FileNotFoundError"


def no_fingerprint(run: Path) -> str:
    (run / "environment.json").write_text('{"data": 3}')
    return "environment.json: is missing or damaged (TypeError: a fingerprint is no text)"


def bad_config(run: Path) -> str:
    (run / "config.toml").write_text("seed = -1")
    return "seed is -1"


def no_run(run: Path) -> str:
    (run / "config.toml").unlink()
    return "a is not a run, it has no config.toml: give folders that `fedmoe train` made"


@pytest.mark.parametrize(
    "damage",
    [cut, garbled, skipped, uneven, impossible, text, no_environment, no_fingerprint, bad_config, no_run],
    ids=lambda damage: damage.__name__,
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    run = made(tmp_path / "a", ONE)
    said = damage(run)
    with pytest.raises(UserError) as failed:
        read(run)
    assert said in str(failed.value)


def test_a_line_that_a_kill_cut_short_is_not_read(tmp_path: Path) -> None:
    run = made(tmp_path / "a", [[0.5], [0.6]])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "by')
    assert list(read(run).scores) == [1, 2]
