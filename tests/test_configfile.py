"""Configurations are read, overridden and saved without loss; every complaint is one line."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmoe.config import Config, Federation, Model
from fedmoe.configfile import override, read, save
from fedmoe.errors import UsageError, UserError
from fedmoe.meaning import check, ignored
from tests.support import ROOT, changed


def toml(folder: Path, text: str) -> Path:
    path = folder / "c.toml"
    path.write_text(text)
    return path


def test_file_then_options(tmp_path: Path) -> None:
    path = toml(tmp_path, 'seed = 3\n[federation]\nrounds = 7\nfraction = 0.5\n[data]\nsplits = ["train", "test"]\n')
    config = override(read(path), ["--federation.rounds", "50", "--run.dir", "a b", "--run.deterministic"])
    assert (config.seed, config.federation.rounds, config.federation.fraction) == (3, 50, 0.5)
    assert (config.data.splits, config.run.dir, config.run.deterministic) == (("train", "test"), "a b", True)
    for word in ("--run.no-deterministic", "--run.no_deterministic"):
        assert not override(config, [word]).run.deterministic


@given(
    st.builds(
        Config,
        seed=st.integers(0, 2**63),
        method=st.sampled_from(["fedmoe", "static", "local"]),
        static_weight=st.floats(0, 1),
        federation=st.builds(Federation, fraction=st.floats(1e-9, 1), clients=st.integers(1, 10**6)),
        model=st.builds(Model, local=st.lists(st.from_regex(r"[a-z.]+:[a-z]+", fullmatch=True), min_size=1).map(tuple)),
    )
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_saved_configuration_is_read_back_the_same(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(save(config))
    assert read(path) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda p: p.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    check(read(path))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[federation]\nround = 3", "unknown key 'federation.round'; the nearest is 'federation.rounds'"),
        ("[federtion]\nrounds = 3", "unknown key 'federtion'; the nearest is 'federation'"),
        ("[federation]\nrounds = 'many'", "federation.rounds is 'many', must be a whole number"),
        ("[federation]\nrounds = 1.5", "federation.rounds is 1.5, must be a whole number"),
        ("[federation]\nrounds = true", "federation.rounds is True, must be a whole number"),
        ("[training]\nlr = '0.1'", "training.lr is '0.1', must be a number"),
        ("[run]\ndeterministic = 1", "run.deterministic is 1, must be true or false"),
        ("[model]\nlocal = 'cnn-1'", "model.local is 'cnn-1', must be a list of strings"),
        ("[model]\nlocal = [1]", "model.local is .1., must be a list of strings"),
        ("method = 'fedavg'", "method is 'fedavg', must be one of fedmoe, static, local"),
        ("lr = 3", "unknown key 'lr'; the nearest is 'training.lr'"),
        ("help = true", "unknown key 'help'; "),
        ("federation = 3", "federation is 3, must be a table"),
        ("seed = [1, 2]", r"seed is \[1, 2\], must be a whole number"),
        ("seed 3", "not TOML: "),
    ],
)
def test_bad_file_is_named_with_its_fault_in_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        read(toml(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    assert "│" not in message
    assert message.startswith(str(tmp_path / "c.toml"))


def test_missing_file() -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml: cannot be read: No such file"):
        read(Path("nowhere.toml"))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--federation.round", "3"], "unknown key '--federation.round'; the nearest is 'federation.rounds'"),
        (["--lr", "3"], "unknown key '--lr'; the nearest is 'training.lr'"),
        (["--training.lr", "fast"], "--training.lr: .*'fast'"),
        (["--training.lr"], "--training.lr"),
        (["--seed", "1", "c.toml"], r"not understood \(the configuration file comes first.*: c.toml"),
    ],
)
def test_bad_option(words: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        override(Config(), words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("federation", "clients", 0),
        ("federation", "rounds", -1),
        ("federation", "fraction", 0.0),
        ("federation", "fraction", 1.5),
        ("training", "lr", 0.0),
        ("training", "lr", float("nan")),
        ("training", "lr", float("inf")),
        ("training", "momentum", 1.0),
        ("training", "betas", (0.9, 1.0)),
        ("training", "betas", (-0.1, 0.9)),
        ("training", "betas", (0.9, float("nan"))),
        ("training", "eps", 0.0),
        ("training", "clip_norm", -1.0),
        ("training", "micro_batch", -1),
        ("data", "mean", float("-inf")),
        ("run", "threads", 100_000),
        ("gate", "hidden", 2_000_000_000),
        ("evaluation", "batch_size", 10**20),
        ("data", "image_size", 100_000),
        ("data", "sequence_length", 1),
        ("data", "sequence_length", 2**21),
        ("data", "tokenizer", ""),
        ("data", "name", "stdlib"),
        ("training", "batch_size", 0),
        ("training", "momentum", -0.1),
        ("partition", "test_fraction", 1.0),
        ("checkpoint", "every", 0),
        ("evaluation", "every", 0),
        ("model", "local", ()),
        ("data", "name", ""),
        ("gate", "norm", "bach"),
        ("data", "std", 0.0),
        ("engine", "lanes", 8),
        ("engine", "cohort", -1),
        ("engine", "device_memory_mb", -1),
        ("engine", "host_memory_mb", -1),
    ],
)
def test_values_that_cannot_be_meant(section: str, field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"{section}\.{field} is "):
        check(changed(Config(), **{section: {field: value}}))


def test_static_weight_is_a_share() -> None:
    with pytest.raises(UserError, match=r"static_weight is 1\.5, must be from 0 to 1"):
        check(replace(Config(), static_weight=1.5))


def test_what_is_embedded_is_of_one_kind() -> None:
    check(changed(Config(), data={"kind": "text", "name": "stdlib"}))
    with pytest.raises(UserError, match=r'^data\.name is "digits" with data\.kind = "text", must be .* "images"$'):
        check(changed(Config(), data={"kind": "text"}))


def test_settings_without_effect_are_named() -> None:
    assert ignored(Config()) == []
    assert ignored(changed(Config(), data={"sequence_length": 64, "image_size": 32})) == [
        'data.sequence_length = 64 has no effect with data.kind = "images"'
    ]
    text = {"kind": "text", "name": "stdlib", "sequence_length": 64, "image_size": 32}
    assert ignored(changed(Config(), data=text, training={"augment": "flip"})) == [
        'data.image_size = 32 has no effect with data.kind = "text"',
        'training.augment = flip has no effect with data.kind = "text"',
    ]
    assert ignored(changed(Config(), method="static", static_weight=0.3, gate={"norm": "paper"})) == [
        'gate.norm = paper has no effect with method = "static"'
    ]
    assert ignored(changed(Config(), method="local", evaluation={"aggregated": True})) == [
        'evaluation.aggregated = True has no effect with method = "local"'
    ]
    assert ignored(changed(Config(), partition={"kind": "iid", "alpha": 2.0})) == [
        'partition.alpha = 2.0 has no effect with partition.kind = "iid"'
    ]
    assert ignored(changed(Config(), training={"eps": 1e-6, "optimizer_states": "8bit", "micro_batch": 64})) == [
        'training.eps = 1e-06 has no effect with training.optimizer = "sgd"',
        'training.optimizer_states = 8bit has no effect with training.optimizer = "sgd"',
        "training.micro_batch = 64 has no effect with training.batch_size = 64",
    ]
    assert ignored(changed(Config(), training={"optimizer": "adamw", "momentum": 0.5, "micro_batch": 63})) == [
        'training.momentum = 0.5 has no effect with training.optimizer = "adamw"'
    ]
    assert ignored(changed(Config(), engine={"lanes": 2, "graphs": "off"})) == []
    assert ignored(changed(Config(), engine={"kind": "reference", "lanes": 2, "graphs": "off"})) == [
        'engine.graphs = off has no effect with engine.kind = "reference"',
        'engine.lanes = 2 has no effect with engine.kind = "reference"',
    ]


def test_byte_order_mark_is_taken(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert read(tmp_path / "c.toml").seed == 3


def test_options_of_partitioners(tmp_path: Path) -> None:
    path = tmp_path / "shards.toml"
    path.write_text(
        '[partition]\nkind = "ShardPartitioner"\n[partition.options]\nnum_shards_per_partition = 2\nsizes = [1, 2]\n'
    )
    config = read(path)
    assert config.partition.options == {"num_shards_per_partition": 2, "sizes": [1, 2]}
    words = ["--partition.options.num-shards-per-partition=3", "--seed", "4", "--partition.options.mode", "strict"]
    changed_ = override(config, words)
    assert changed_.seed == 4
    assert changed_.partition.options == {"num_shards_per_partition": 3, "sizes": [1, 2], "mode": "strict"}
    path.write_bytes(save(changed_))
    assert read(path) == changed_
    check(changed_)
    path.write_text("[partition]\noptions = 3\n")
    with pytest.raises(UserError, match=r"partition.options is 3, must be a table: write \[partition.options\]"):
        read(path)
    with pytest.raises(UsageError, match=r"--partition\.options.mode has no value"):
        override(config, ["--partition.options.mode"])
    with pytest.raises(UsageError, match=r"unknown key '--partition\.options\.'"):
        override(config, ["--partition.options.", "3"])
    for word in ("nan", "1979-05-27"):
        path.write_text(f"[partition.options]\na = {word}\n")
        with pytest.raises(UserError, match=r"partition.options must hold text, finite numbers"):
            read(path)
        with pytest.raises(UserError, match=r"partition.options.a must hold text, finite numbers"):
            override(config, [f"--partition.options.a={word}"])
    for partition, expected in (
        (
            {"kind": "random"},
            "partition.kind is 'random', must be one of pathological, dirichlet, iid, natural, or the",
        ),
        ({"kind": "natural"}, "partition.column is empty, must name a column of the data"),
    ):
        with pytest.raises(UserError, match=expected):
            check(changed(Config(), partition=partition))
    assert ignored(changed(Config(), partition={"column": "writer"})) == [
        'partition.column = writer has no effect with partition.kind = "pathological"'
    ]


@pytest.mark.parametrize(
    ("server", "complaint"),
    [
        ({"trim": 0.5}, "server.trim is 0.5, must be less than 0.5"),
        ({"trim": -0.1}, "server.trim is -0.1, must be 0 or more"),
        (
            {"aggregation": "trimmed_mean", "trim": 0.09},
            "server.trim is 0.09, which is none of the 10 clients of a round: set at least 0.1",
        ),
        ({"clip_factor": 0.0}, "server.clip_factor is 0.0, must be more than 0"),
        ({"clip_norm": float("nan")}, "server.clip_norm is nan, must be a finite number"),
        (
            {"aggregation": "krum", "byzantine": 4},
            'server.aggregation = "krum" with server.byzantine = 4 needs 11 clients a round, federation.clients and '
            "federation.fraction give 10",
        ),
        ({"aggregation": "multi_krum", "chosen": 11}, "server.chosen is 11, must be at most the 10 clients of a round"),
    ],
)
def test_rules_that_cannot_work_are_refused(server: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        check(changed(Config(), server=server))


def test_advice_on_trim_can_be_followed() -> None:
    for clients in range(1, 40):
        federation, rule = {"clients": clients}, {"aggregation": "trimmed_mean", "trim": 0.0}
        with pytest.raises(UserError) as caught:
            check(changed(Config(), federation=federation, server=rule))
        advice = str(caught.value).rpartition(": ")[2]
        if clients < 3:
            assert advice == "have 3 or more"
        else:
            rule["trim"] = float(advice.removeprefix("set at least "))
            check(changed(Config(), federation=federation, server=rule))


def test_rules_that_just_work_are_not_refused() -> None:
    for server in ({"aggregation": "krum", "byzantine": 3}, {"aggregation": "trimmed_mean", "trim": 0.1}):
        check(changed(Config(), server=server))


def test_parameters_of_another_rule_are_named() -> None:
    assert ignored(changed(Config(), server={"trim": 0.2, "byzantine": 2})) == [
        'server.trim = 0.2 has no effect with server.aggregation = "mean"',
        'server.byzantine = 2 has no effect with server.aggregation = "mean"',
    ]
    both = {"aggregation": "clipped_mean", "clip_norm": 3.0, "clip_factor": 2.0}
    assert ignored(changed(Config(), server=both)) == [
        "server.clip_factor = 2.0 has no effect with server.clip_norm = 3.0"
    ]
    assert ignored(changed(Config(), server={"aggregation": "clipped_mean", "clip_factor": 2.0})) == []
    assert ignored(changed(Config(), server={"aggregation": "multi_krum", "chosen": 2, "byzantine": 2})) == []
    assert ignored(changed(Config(), method="local", server={"aggregation": "median"})) == [
        'server.aggregation = median has no effect with method = "local"'
    ]
