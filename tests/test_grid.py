"""A sweep's words: combinations, seeds, names of folders, and what is not understood."""

import re
from dataclasses import replace
from typing import Any

import pytest

from fedmoe import configfile, meaning
from fedmoe.config import Config
from fedmoe.errors import UsageError, UserError
from fedmoe.grid import Grid, parse
from tests.support import changed


def grid(*words: str, seeds: str = "1", base: Config | None = None) -> Grid:
    return parse(base or Config(), list(words), seeds)


def names(*words: str, seeds: str = "1") -> list[str]:
    return [run.name for run in grid(*words, seeds=seeds).runs()]


def test_every_combination_for_every_seed_and_each_once() -> None:
    words = ("--method", "fedmoe,local,static", "--gate.norm=none,paper", "--training.lr", "0.5")
    assert names(*words, seeds="2") == [
        f"method={run},seed={seed}"
        for seed in (0, 1)
        for run in ("fedmoe,gate.norm=none", "fedmoe,gate.norm=paper", "local", "static")
    ]
    runs = grid(*words).runs()
    assert [run.config.method for run in runs] == ["fedmoe", "fedmoe", "local", "static"]
    assert {run.config.training.lr for run in runs} == {0.5}
    assert {run.config.gate.norm for run in runs if run.config.method != "fedmoe"} == {"none"}
    assert all(meaning.ignored(run.config) == [] for run in runs)


def test_values_of_every_type() -> None:
    found = grid(
        "--training.lr", "1e-2,0.1,0.01", "--federation.clients=5,7", "--evaluation.aggregated", "true,false",
        "--model.local", "cnn-1+cnn-2,cnn-5", "--data.mean", "0.0,-0.5", "--run.deterministic",
    )  # fmt: skip
    assert found.axes == {
        "training.lr": [0.01, 0.1],
        "federation.clients": [5, 7],
        "evaluation.aggregated": [True, False],
        "model.local": [("cnn-1", "cnn-2"), ("cnn-5",)],
        "data.mean": [0.0, -0.5],
    }
    assert found.base.run.deterministic
    assert len(found.runs()) == 32 == len({run.name for run in found.runs()})
    assert found.runs()[0].name == (
        "training.lr=0.01,federation.clients=5,evaluation.aggregated=true,model.local=cnn-1+cnn-2,data.mean=0.0,seed=0"
    )


def test_options_of_partitioners_take_alternatives() -> None:
    words = ["--partition.kind", "ShardPartitioner,iid", "--partition.options.mode=strict"]
    size, sizes = "--partition.options.shard-size", "--partition.options.sizes"
    found = grid(*words, size, "2,3", sizes, "[1, 2]").runs()
    assert [run.name for run in found] == [
        "partition.kind=ShardPartitioner,partition.options.shard_size=2,seed=0",
        "partition.kind=ShardPartitioner,partition.options.shard_size=3,seed=0",
        "partition.kind=iid,seed=0",
    ]
    fixed = {"mode": "strict", "sizes": [1, 2]}
    assert [run.config.partition.options for run in found] == [
        fixed | {"shard_size": 2}, fixed | {"shard_size": 3}, {},
    ]  # fmt: skip
    assert grid(sizes, "[1],[2]").axes == {"partition.options.sizes": [[1], [2]]}


def test_words_as_train_takes_them() -> None:
    found = grid("--model.local", "cnn-1", "cnn-2", "--run.no_deterministic", "--training.batch-size", "8", "--seed=4")
    assert found.axes == {} and found.base.model.local == ("cnn-1", "cnn-2")
    assert found.base.training.batch_size == 8
    assert [run.name for run in found.runs()] == ["seed=4"]
    single = grid("--model.local", "cnn-1+cnn-2", "--evaluation.aggregated=true")
    assert single.axes == {} and single.base.model.local == ("cnn-1", "cnn-2") and single.base.evaluation.aggregated


def test_seeds() -> None:
    assert grid(seeds="3", base=replace(Config(), seed=5)).seeds == [5, 6, 7]
    assert grid("--seed", "2", seeds="2").seeds == [2, 3]
    assert grid(seeds="1,5,7").seeds == [1, 5, 7]


def test_names_are_safe_short_and_unique() -> None:
    long = ",".join(f"some.where:{'model' * 40}{i}" for i in range(3))
    found = names("--model.global_expert", long, seeds="2")
    assert len(set(found)) == 6 and max(map(len, found)) < 200
    odd = names("--data.name", "/a/b,/a_b,~/C,~/c,../x y,é", "--data.limit", "100")
    assert len({name.lower() for name in odd}) == 6
    assert all(re.fullmatch(r"[A-Za-z0-9.,=+_-]+", name) and name.startswith("data.name=") for name in odd)


def test_runs_of_the_same_data_follow_on_one_another() -> None:
    runs = grid("--training.lr", "0.1,0.2", "--data.limit", "100,200", seeds="2").runs()
    assert [(run.config.seed, run.config.data.limit) for run in runs] == [
        (seed, limit) for seed in (0, 1) for limit in (100, 100, 200, 200)
    ]


def test_a_field_that_no_run_uses_is_named() -> None:
    assert grid("--method", "local,static", "--gate.norm", "paper", "--static_weight", "0.3").idle() == []
    assert grid("--method", "local", "--gate.norm", "paper").idle() == [
        'gate.norm = paper has no effect with method = "local"'
    ]
    assert grid("--method", "local", "--training.lr", "0.1,0.2", "--gate.hidden", "9").idle() == [
        'gate.hidden = 9 has no effect with method = "local"'
    ]


@pytest.mark.parametrize(
    ("words", "seeds", "line"),
    [
        (["--lr", "1,2"], "1", "unknown key '--lr'; the nearest is 'training.lr'"),
        (["--method", "fedmoe,lokal"], "1", "method is 'lokal', must be one of fedmoe, static, local"),
        (["--method", "fedmoe,,local"], "1", "--method fedmoe,,local: one of the alternatives is empty"),
        (["--training.lr", "0.1,fast"], "1", "training.lr is 'fast', must be a number"),
        (["--federation.clients", "2,2.5"], "1", "federation.clients is '2.5', must be a whole number"),
        (["--evaluation.aggregated", "yes,no"], "1", "evaluation.aggregated is 'yes', must be true or false"),
        (["--model.local", "cnn-1,cnn-2", "cnn-3"], "1", "commas between them and + within a list"),
        (["--method", "local", "--method", "fedmoe,static"], "1", "--method is given twice"),
        (["--run.dir", "x"], "1", "run.dir has no place in a sweep"),
        (["--seed", "1,2"], "1", "several seeds are given by --seeds"),
        (["--seed", "1"], "1,2", "several seeds are given by --seeds"),
        (["--federation", "1,2"], "1", "--federation"),
        (["--data.kind", "images,text"], "1", "data.kind has one value in a sweep: accuracy of images and"),
        (["other.toml"], "1", "there is only one): other.toml"),
        ([], "0", "--seeds is 0, must be from 1 to 10,000"),
        ([], "many", "--seeds is 'many', must be how many, as 3, or which, as 1,5,7"),
        ([], "1,", "--seeds is '1,'"),
        ([], "-1", "--seeds is '-1'"),
        ([], "1,2,1", "--seeds is 1,2,1, which has 1 twice"),
    ],
)
def test_words_that_are_not_understood(words: list[str], seeds: str, line: str) -> None:
    with pytest.raises(UsageError, match=re.escape(line)):
        grid(*words, seeds=seeds)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gate.norm", "none,bach"], 'run gate.norm=bach,seed=0: gate.norm is "bach", must be none, paper'),
        (["--training.lr", "0.1,0"], "run training.lr=0.0,seed=0: training.lr is 0.0, must be more than 0"),
        (["--federation.clients", ",".join(map(str, range(1, 201))), "--federation.rounds",
          ",".join(map(str, range(1, 101)))], "these are 20,000 runs, a sweep has at most 10,000"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be_meant(words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        grid(*words)


def test_a_configuration_is_known_again_by_what_decides_it() -> None:
    made = grid("--model.local", "cnn-1+cnn-2,cnn-5", seeds="2").to_json()
    assert made["axes"] == {"model.local": [["cnn-1", "cnn-2"], ["cnn-5"]]} and made["seeds"] == [0, 1]
    assert made["config"]["training.lr"] == 0.01


@pytest.mark.parametrize("value", [3, 0.25, True, False, "a b", ("cnn-1", "x:y"), "none"])
def test_shown_values_are_parsed_again(value: Any) -> None:
    name = {int: "seed", float: "training.lr", bool: "run.deterministic", tuple: "model.local", str: "data.image"}
    assert configfile.parse(name[type(value)], configfile.shown(value)) == value


def test_shown_numbers_are_parsed_again() -> None:
    assert configfile.parse("training.betas", configfile.shown((0.8, 0.95))) == (0.8, 0.95)
    with pytest.raises(UserError, match=r"training.betas is \[0.8, 'x'\], must be a list of two numbers"):
        configfile.parse("training.betas", "0.8+x")


def test_effective_configurations_are_equal_where_the_numbers_must_be() -> None:
    local = changed(Config(), method="local", gate={"norm": "paper"}, training={"theta_momentum": "keep"})
    assert meaning.effective(local) == replace(Config(), method="local")
    fedmoe = changed(Config(), gate={"norm": "paper"})
    assert meaning.effective(fedmoe) == fedmoe
