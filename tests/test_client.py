"""A client keeps what is its own, takes in theta, and lets nothing else out."""

import ast
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmoe.client import load_data, open_client, outgoing
from fedmoe.config import Config
from fedmoe.engine.seam import Job, Metrics, TensorSpec
from fedmoe.partition import Split
from fedmoe.reference import ReferenceEngine
from tests.support import ROOT, begin, changed

Opened = Callable[[Config], ReferenceEngine]
SCHEMA = {"theta": TensorSpec(torch.float32, (3,))}


def train(engine: ReferenceEngine, client: int, number: int = 1) -> None:
    theta = engine.client(client).payload()
    list(engine.run("train", [Job(client, number, theta, {"epochs": 1})]))


def test_outgoing_lets_out_exactly_the_schema() -> None:
    theta = torch.ones(3)
    result = outgoing(2, SCHEMA, {"theta": theta}, 5, {"loss": 0.5, "steps": [1, 2]})
    assert (result.client, result.weight, dict(result.metrics)) == (2, 5, {"loss": 0.5, "steps": [1, 2]})
    assert torch.equal(result.payload["theta"], theta)
    assert result.payload["theta"].data_ptr() != theta.data_ptr()


@pytest.mark.parametrize(
    "payload",
    [
        {"theta": torch.ones(3), "gate": torch.ones(1)},
        {"header": torch.ones(3)},
        {"theta": torch.ones(4)},
        {"theta": torch.ones(3).half()},
        {},
    ],
)
def test_outgoing_refuses_anything_else(payload: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="client 2 may not send this: "):
        outgoing(2, SCHEMA, payload, 1, {})


@pytest.mark.parametrize("value", [torch.ones(1), "text", {"a": 1}, [torch.ones(1)], [[1]], None])
def test_outgoing_refuses_metrics_that_are_not_numbers(value: object) -> None:
    metrics: Metrics = {"loss": value}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="client 2 may not send metric 'loss'"):
        outgoing(2, SCHEMA, {"theta": torch.ones(3)}, 1, metrics)


def test_results_are_made_in_outgoing_alone() -> None:
    """A Result built anywhere else would be a second door."""
    makers = []
    for folder in ("fedmoe", "engine", "kernels", "profiling"):
        for path in (ROOT / folder).glob("*.py"):
            for function in ast.walk(ast.parse(path.read_text())):
                if isinstance(function, ast.FunctionDef):
                    calls = [c.func for c in ast.walk(function) if isinstance(c, ast.Call)]
                    names = [c.id if isinstance(c, ast.Name) else getattr(c, "attr", "") for c in calls]
                    makers += [(path.name, function.name)] * names.count("Result")
    assert makers == [("client.py", "outgoing")]


def test_nothing_private_reaches_the_server(config: Config, opened: Opened) -> None:
    """What a real round hands over is theta to the bit, in memory of its own, and numbers."""
    engine = opened(config)
    for client in range(5):
        theta = engine.client(client).payload()
        [result] = engine.run("train", [Job(client, 1, theta, {"epochs": 1})])
        owner = engine.client(client)
        assert owner.global_expert is not None
        expected = torch.cat([p.detach().reshape(-1) for p in owner.global_expert.parameters()])
        assert result.payload.keys() == {"theta"}
        assert torch.equal(result.payload["theta"], expected)
        sent = result.payload["theta"].untyped_storage().data_ptr()
        assert sent not in {t.untyped_storage().data_ptr() for t in owner.tensors().values()}
        assert all(isinstance(value, int | float) for value in result.metrics.values())
        [result] = engine.run("evaluate", [Job(client, 1, {})])
        assert result.payload == {}


def test_state_is_everything_and_goes_back_in(config: Config, opened: Opened) -> None:
    config = changed(config, gate={"norm": "paper"})
    a, b = opened(config), opened(config)
    train(a, 0)
    state = a.client(0).state()
    b.client(0).load_state(state)
    again = b.client(0).state()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    momenta = [name for name in state if name.startswith("momentum/")]
    assert len(momenta) == len(list(a.client(0).mixture.parameters()))
    # Only what is in the state matters: both go on alike.
    train(a, 0, 2)
    train(b, 0, 2)
    one, other = a.client(0).state(), b.client(0).state()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], state[name]) for name in one)


def test_state_is_a_copy(config: Config, opened: Opened) -> None:
    engine = opened(config)
    state = engine.client(0).state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    train(engine, 0)
    assert all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda s: s.pop("model/header.bias"), "'model/header.bias' is missing"),
        (lambda s: s.update({"model/extra": torch.ones(1)}), "'model/extra' is unknown"),
        (
            lambda s: s.update({"model/header.bias": torch.ones(3)}),
            r"'model/header.bias' is torch.float32 \[3\], the client's is torch.float32 \[10\]",
        ),
    ],
)
def test_state_of_another_shape_is_refused(
    config: Config, opened: Opened, spoil: Callable[[dict[str, torch.Tensor]], object], complaint: str
) -> None:
    client = opened(config).client(0)
    state = client.state()
    spoil(state)
    with pytest.raises(ValueError, match=complaint):
        client.load_state(state)


@pytest.mark.parametrize("policy", ["keep", "reset"])
def test_momentum_of_theta_is_kept_or_reset_when_theta_arrives(config: Config, opened: Opened, policy: str) -> None:
    engine = opened(changed(config, training={"theta_momentum": policy}))
    train(engine, 0)
    client = engine.client(0)
    before = client.state()
    client.receive({"theta": torch.zeros_like(client.payload()["theta"])})
    after = client.state()
    shared = {n for n in before if n.startswith("momentum/global_expert.")}
    private = {n for n in before if n.startswith("momentum/")} - shared
    assert shared
    assert all(torch.equal(before[n], after[n]) for n in private)
    if policy == "keep":
        assert all(torch.equal(before[n], after[n]) for n in shared)
    else:
        assert not any(after[n].any() for n in shared)


def test_lent_theta_is_given_back(config: Config, opened: Opened) -> None:
    client = opened(config).client(0)
    own = client.payload()["theta"]
    with pytest.raises(RuntimeError), client.lent({"theta": torch.zeros_like(own)}):
        assert client.payload()["theta"].abs().max() == 0
        raise RuntimeError
    assert torch.equal(client.payload()["theta"], own)


def test_theta_that_does_not_fit_is_refused(config: Config, opened: Opened) -> None:
    client = opened(config).client(0)
    with pytest.raises(ValueError, match=r"client 0 cannot take this in: 'theta' is torch.float32 \[3\], must be"):
        client.receive({"theta": torch.zeros(3)})


def make_masked(shape: tuple[int, int, int], classes: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    extractor = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 50))
    extractor.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    return extractor, torch.nn.Linear(50, classes)


def test_buffer_that_is_infinite_from_the_start_is_in_order(config: Config, opened: Opened) -> None:
    engine = opened(changed(config, model={"local": (f"{__name__}:make_masked",)}))
    assert engine.client(0).finite()
    train(engine, 0)
    assert engine.changed() == {}
    engine.commit()
    assert list(engine.changed()) == [0]
    engine.client(0).mixture.get_parameter("header.bias").data[0] = torch.nan
    assert not engine.client(0).finite()


def test_running_statistics_that_are_not_finite_count(config: Config, opened: Opened) -> None:
    client = opened(changed(config, gate={"norm": "batch-none-none"})).client(0)
    client.mixture.get_buffer("gate.norm_in.running_mean")[0] = torch.nan
    assert not client.finite()


def test_a_new_run_in_the_same_folder_has_its_own_partition(config: Config, tmp_path: Path) -> None:
    first = open_client(config, 0, begin(config, tmp_path / "run"), torch.device("cpu"))
    shutil.rmtree(tmp_path / "run")
    other = open_client(
        replace(config, seed=1), 0, begin(replace(config, seed=1), tmp_path / "run"), torch.device("cpu")
    )
    assert first.labels.tolist() != other.labels.tolist()
    assert torch.equal(other.labels[other.held_out], held_out_labels(replace(config, seed=1), tmp_path / "run"))


def held_out_labels(config: Config, run: Path) -> torch.Tensor:
    return load_data(config.data, config.seed).labels[Split.load(run / "partition.safetensors").test(0)]
