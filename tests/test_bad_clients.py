"""Two clients of ten that send what they should not: what the plain mean comes to, and what robust rules do."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedmoe import checkpoint
from fedmoe.config import Config, Data, Evaluation, Federation, Model, Training
from fedmoe.config import Server as Rule
from fedmoe.engine.seam import Engine, Job, Result
from fedmoe.metrics import Line
from fedmoe.reference import ReferenceEngine
from fedmoe.rounds import take_round
from fedmoe.server import Server
from tests.support import begin

BAD = (1, 4)
ROUNDS = 8
ATTACKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # Of theta as the client got it, and as it trained it.
    "none": lambda got, trained: trained,
    "scaled": lambda got, trained: got + 30 * (trained - got),
    "sign-flipped": lambda got, trained: got - 10 * (trained - got),
    "not finite": lambda got, trained: trained * torch.nan,
}


def mlp(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    channels, height, width = shape
    inputs = channels * height * width // 7
    return nn.Sequential(nn.Flatten(), nn.AvgPool1d(7, 7), nn.Linear(inputs, 20), nn.ReLU()), nn.Linear(20, classes)


class Lying:
    """An engine at whose seam two clients' results are replaced."""

    def __init__(self, engine: ReferenceEngine, attack: str) -> None:
        self.engine, self.attack = engine, ATTACKS[attack]

    def run(self, kind: Any, jobs: Sequence[Job]) -> Iterator[Result]:
        for job, result in zip(jobs, self.engine.run(kind, jobs), strict=True):
            if kind == "train" and result.client in BAD:
                lie = self.attack(job.payload["theta"], result.payload["theta"])
                result = replace(result, payload={"theta": lie})
            yield result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class Silent:
    def trained(self, result: Result) -> None: ...

    def evaluating(self, done: int, of: int) -> None: ...


@cache
def last(attack: str, aggregation: Any) -> Line:
    """The last round's metrics."""
    name = f"{__name__}:mlp"
    config = Config(
        federation=Federation(clients=10, rounds=ROUNDS),
        data=Data(limit=1797),
        model=Model(local=(name,), global_expert=name),
        training=Training(batch_size=16, lr=0.1),
        evaluation=Evaluation(every=ROUNDS, aggregated=True),
        server=Rule(aggregation=aggregation, trim=0.2, byzantine=2),
    )
    with TemporaryDirectory() as folder:
        run = begin(config, Path(folder) / "run")
        engine: Engine = Lying(ReferenceEngine(config, run, torch.device("cpu")), attack)
        server = Server(config, checkpoint.load(run, checkpoint.read_manifest(run).server))
        for number in range(1, ROUNDS + 1):
            line, server.theta = take_round(config, server, engine, number, Silent())
            engine.commit()
    return line


def accuracy(attack: str, aggregation: str) -> float:
    """On held-out samples with the aggregated theta, which clients' own training has not put right again."""
    return float(last(attack, aggregation)["accuracy_aggregated"]["mean"])


def test_plain_mean_is_spoilt() -> None:
    assert accuracy("scaled", "mean") < accuracy("none", "mean") - 0.05


@pytest.mark.parametrize(
    ("attack", "aggregation"),
    [
        ("scaled", "trimmed_mean"),
        ("sign-flipped", "trimmed_mean"),
        ("not finite", "mean"),
    ],
)
def test_robust_rule_ends_within_two_points_of_the_clean_run(attack: str, aggregation: str) -> None:
    assert accuracy(attack, aggregation) >= accuracy("none", "mean") - 0.02


def test_what_is_not_finite_is_rejected_by_name() -> None:
    line = last("not finite", "mean")
    assert list(line["rejected"]) == [str(client) for client in BAD]
    assert all("numbers of 'theta' are not finite" in reason for reason in line["rejected"].values())
    assert line["rolled_back"] == [] and line["bytes_up"] == line["bytes_down"]
