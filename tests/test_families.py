"""Every family trains in the engine as in the plain loop, alone and in cohorts, as local and as global expert."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fedmoe.config import Config
from fedmoe.engine.seam import Engine, Job
from fedmoe.engine.step import How
from fedmoe.models import resnet, vit
from fedmoe.reference import ReferenceEngine
from tests.engines import Outcome, assert_close, engine
from tests.support import begin, changed, theta

Parts = tuple[nn.Module, nn.Module]


def residual(shape: tuple[int, int, int], classes: int) -> Parts:
    """A ResNet of two stages, three bottlenecks."""
    extractor = resnet.Extractor(shape, resnet.Layers((2, 1, 0, 0), True))
    return extractor, nn.Linear(extractor.width, classes)


def transformer(shape: tuple[int, int, int], classes: int) -> Parts:
    """A ViT of two blocks."""
    return vit.Extractor(shape, 4, vit.Layers(192, 3, 2)), nn.Linear(192, classes)


def trained(made: Engine, config: Config) -> Outcome:
    jobs = [Job(client, 1, theta(config), {"epochs": 1}) for client in range(2)]
    results = list(made.run("train", jobs))
    evaluated = list(made.run("evaluate", [Job(client, 1, {}) for client in range(2)]))
    made.commit()
    states = {client: state() for client, state in made.changed().items()}
    return Outcome([r.payload for r in results], results, evaluated, states)


@pytest.mark.parametrize(("local", "shared"), [("residual", "transformer"), ("transformer", "residual")])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention in a cohort, on a CPU
def test_engine_and_cohort_are_the_plain_loop(config: Config, tmp_path: Path, local: str, shared: str) -> None:
    """One step: roundings decide which ReLUs are open, and in gradients that makes a thousandth."""
    config = changed(
        config,
        data={"limit": 50, "image_size": 16},
        federation={"clients": 2},
        partition={"kind": "iid"},
        model={"local": (f"{__name__}:{local}",), "global_expert": f"{__name__}:{shared}", "adapter": "linear"},
        training={"batch_size": 20},
    )
    run = begin(config, tmp_path / "run")
    theirs = trained(ReferenceEngine(config, run, torch.device("cpu")), config)
    statistics = [name for name in theirs.states[0] if name.endswith("running_var")]
    for cohort in (1, 2):
        with engine(config, run, How(), cohort=cohort) as made:
            ours = trained(made, config)
            assert [n for lane in made.lanes for room in lane.rooms for _, n in room.cohorts] == [2] * (cohort - 1)
        assert_close(ours, theirs, 1e-3)
        for client, state in ours.states.items():
            for name in statistics:
                assert not torch.equal(state[name], torch.ones_like(state[name]))
                torch.testing.assert_close(state[name], theirs.states[client][name], rtol=1e-4, atol=1e-5)
