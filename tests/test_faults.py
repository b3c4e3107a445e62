"""The faults of the public attempts at FedMoE: each check passes here, and fails once the fault is planted.

One attempt's optimizer holds the parameters of an object that is replaced every round, so that its global expert never
trains; the other scores the local expert and header alone and gives every client the same model; a relative loses each
client's own parts between rounds.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedmoe import mixture
from fedmoe.client import Client, load_data
from fedmoe.config import Config
from fedmoe.engine.program import Program
from fedmoe.engine.seam import Job, Payload, State
from fedmoe.engine.seeds import derive
from fedmoe.gate import Gate
from fedmoe.partition import Split
from fedmoe.reference import ReferenceEngine
from fedmoe.server import Server
from tests.support import changed
from tests.support import theta as initial

Opened = Callable[[Config], ReferenceEngine]
PARTS = ("global_expert", "local_expert", "gate", "header")


def moved(before: State, after: State) -> set[str]:
    """The parts of which every tensor changed, or that changed at all, which must be the same."""
    names = [name for name in before if name.startswith("model/")]
    differ = {name for name in names if not torch.equal(before[name], after[name])}
    some = {part for part in PARTS if any(name.startswith(f"model/{part}.") for name in differ)}
    every = {part for part in PARTS if all(name in differ for name in names if name.startswith(f"model/{part}."))}
    assert some == every
    return some


def check_all_parts_train_when_sampled_and_only_then(engine: ReferenceEngine, config: Config) -> None:
    server = Server(config, initial(config))
    everyone = range(config.federation.clients)
    sat_out: set[int] = set()
    for number in range(1, 5):
        before = {c: engine.client(c).state() for c in everyone}
        jobs = server.jobs(number)
        results = list(engine.run("train", jobs))
        theta = server.aggregate(results)
        for client in everyone:
            after = engine.client(client).state()
            took_part = client in [job.client for job in jobs]
            assert moved(before[client], after) == (set(PARTS) if took_part else set()), (number, client)
            sat_out |= set() if took_part else {client}
        for result in results:
            assert not torch.equal(result.payload["theta"], server.theta["theta"])
        # Only theta reaches the server, and by the weights stated: training samples.
        n = {job.client: engine.client(job.client).training for job in jobs}
        expected = sum(r.payload["theta"].double() * n[r.client] / sum(n.values()) for r in results)
        torch.testing.assert_close(theta["theta"].double(), expected, rtol=2**-23, atol=1e-12)
        server.theta = theta
    assert sat_out  # or the second half of the claim was not tested


def check_private_parts_persist_between_rounds(engine: ReferenceEngine, config: Config) -> None:
    client = engine.client(1)
    list(engine.run("train", [Job(1, 1, client.payload(), {"epochs": 1})]))
    before = client.state()
    client.receive({"theta": torch.zeros_like(client.payload()["theta"])})  # as the next round begins
    after = client.state()
    assert {name for name in before if not torch.equal(before[name], after.get(name, torch.zeros(())))} == {
        name for name in before if "/global_expert." in name
    }


def check_evaluation_uses_the_whole_mixture(engine: ReferenceEngine, config: Config) -> None:
    client = engine.client(2)
    list(engine.run("train", [Job(2, 1, client.payload(), {"epochs": 3})]))
    x = (client.inputs[client.held_out].float() / 255 - 0.5) / 0.5
    m = client.mixture.eval()
    with torch.no_grad():
        a = m.gate(x).softmax(1)
        logits = m.header(a[:, :1] * m.global_expert(x) + a[:, 1:] * m.local_expert(x))
    expected = torch.nn.functional.cross_entropy(logits, client.labels[client.held_out])
    [result] = engine.run("evaluate", [Job(2, 1, {})])
    assert result.metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)


def check_evaluation_is_on_samples_never_trained_on(engine: ReferenceEngine, config: Config) -> None:
    data, split = load_data(config.data, config.seed), Split.load(engine.folder / "partition.safetensors")
    for client in map(engine.client, range(config.federation.clients)):
        trained, held_out = split.train(client.id), split.test(client.id)
        assert torch.equal(client.inputs[: client.training], data.inputs[trained])
        assert torch.equal(client.inputs[client.held_out], data.inputs[held_out])
        assert torch.equal(client.labels[client.held_out], data.labels[held_out])
        assert not set(trained.tolist()) & set(held_out.tolist())


def check_clients_have_models_and_initializations_of_their_own(engine: ReferenceEngine, config: Config) -> None:
    n = config.federation.clients
    sizes = {engine.client(c).id: [t.shape for t in engine.client(c).tensors().values()] for c in range(n)}
    assert len({str(sizes[c]) for c in range(5)}) == 5  # five architectures
    for part in PARTS[1:]:
        # The first tensor has the same shape in all five.
        first = [
            next(t for k, t in engine.client(c).tensors().items() if k.startswith(part)).flatten()[:50]
            for c in range(n)
        ]
        assert all(not torch.equal(first[i], first[j]) for i in range(n) for j in range(i)), part


def plant_optimizer_of_a_replaced_object(patch: pytest.MonkeyPatch) -> None:
    receive = Client.receive

    def replaced(self: Client, payload: Payload) -> None:
        self.mixture.global_expert = self.global_expert = copy.deepcopy(self.global_expert)  # type: ignore[assignment]
        receive(self, payload)

    patch.setattr(Client, "receive", replaced)


def plant_scoring_by_local_expert_and_header(patch: pytest.MonkeyPatch) -> None:
    program = mixture.Mixture.program

    def local_only(self: mixture.Mixture) -> Program:
        return replace(program(self), logits=lambda outputs: self.header(outputs["local"]))

    patch.setattr(mixture.Mixture, "program", local_only)


def plant_same_model_for_everyone(patch: pytest.MonkeyPatch) -> None:
    build = mixture.build
    patch.setattr(mixture, "build", lambda config, client, *rest: build(config, 0, *rest))


def plant_same_initialization_for_everyone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mixture, "derive", lambda seed, stream, client: derive(seed, stream, 0))


def plant_gate_lost_between_rounds(patch: pytest.MonkeyPatch) -> None:
    receive = Client.receive

    def lost(self: Client, payload: Payload) -> None:
        assert isinstance(self.mixture.gate, Gate)
        self.mixture.gate.fc2.reset_parameters()
        receive(self, payload)

    patch.setattr(Client, "receive", lost)


def plant_average_of_equal_weights(patch: pytest.MonkeyPatch) -> None:
    aggregate = Server.aggregate
    patch.setattr(Server, "aggregate", lambda self, results: aggregate(self, [replace(r, weight=1.0) for r in results]))


def plant_training_of_clients_not_sampled(patch: pytest.MonkeyPatch) -> None:
    run = ReferenceEngine.run

    def and_another(self: ReferenceEngine, kind: str, jobs: list[Job]) -> object:
        spare = next((c for c in range(7) if c not in [job.client for job in jobs]), None)
        if kind == "train" and spare is not None:
            list(run(self, "train", [replace(jobs[0], client=spare)]))
        return run(self, kind, jobs)  # type: ignore[arg-type]

    patch.setattr(ReferenceEngine, "run", and_another)


def plant_evaluation_of_training_samples(patch: pytest.MonkeyPatch) -> None:
    init = Client.__init__

    def first_samples(self: Client, *args: Any) -> None:
        init(self, *args)
        self.held_out = torch.arange(len(self.held_out))

    patch.setattr(Client, "__init__", first_samples)


CHECKS = {
    check_all_parts_train_when_sampled_and_only_then: [
        plant_optimizer_of_a_replaced_object,
        plant_average_of_equal_weights,
        plant_training_of_clients_not_sampled,
    ],
    check_private_parts_persist_between_rounds: [plant_gate_lost_between_rounds],
    check_evaluation_uses_the_whole_mixture: [plant_scoring_by_local_expert_and_header],
    check_evaluation_is_on_samples_never_trained_on: [plant_evaluation_of_training_samples],
    check_clients_have_models_and_initializations_of_their_own: [
        plant_same_model_for_everyone,
        plant_same_initialization_for_everyone,
    ],
}


@pytest.fixture
def seven(config: Config) -> Config:
    """Seven clients, of whom four are sampled, with unequal numbers of samples."""
    return changed(
        config, federation={"clients": 7, "fraction": 0.6}, partition={"kind": "dirichlet"}, data={"limit": 500}
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_holds(check: Callable[[ReferenceEngine, Config], None], seven: Config, opened: Opened) -> None:
    check(opened(seven), seven)


@pytest.mark.parametrize(
    ("check", "plant"), [(c, p) for c, plants in CHECKS.items() for p in plants], ids=lambda f: f.__name__
)
def test_planted_fault_is_found(
    check: Callable[[ReferenceEngine, Config], None],
    plant: Callable[[pytest.MonkeyPatch], None],
    seven: Config,
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    engine = opened(seven)
    with pytest.raises(AssertionError):
        check(engine, seven)
