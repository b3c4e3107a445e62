"""Cohorts: clients that train as one batched model become what they would have become alone."""

import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmoe import engines, planning
from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.engine import units
from fedmoe.engine.cohort import Cohort
from fedmoe.engine.device_engine import DeviceEngine
from fedmoe.engine.facts import facts
from fedmoe.engine.lane import Lane
from fedmoe.engine.optimizers import Scale
from fedmoe.engine.seam import Interrupted, Job
from fedmoe.engine.step import How
from fedmoe.engine.units import grouped
from tests.engines import Outcome, apart, assert_close, assert_same, engine, rounds
from tests.support import begin, changed, theta, unequal
from tests.synchronization import NoSynchronization

TOLERANCE = 2e-4
"""Of two rounds. Mostly it is 1e-7, but now and then two pixels of a pool are so near that roundings choose."""


@pytest.fixture
def ragged(config: Config) -> Config:
    """Five clients of one architecture and of unequal size, four of them in a round, momentum kept."""
    keep = {"theta_momentum": "keep"}
    return unequal(config, model={"local": ("cnn-5",)}, federation={"fraction": 0.8}, training=keep)


def outcome(config: Config, run: Path, cohort: int = 4, how: How | None = None, number: int = 2) -> Outcome:
    with engine(config, run, how or How(), cohort=cohort) as made:
        result = rounds(config, made, run, number)
        assert sizes(made) == ([cohort] if cohort > 1 else [])
        return result


def sizes(made: DeviceEngine) -> list[int]:
    """Of the cohorts that there were."""
    return sorted(rows for lane in made.lanes for room in lane.rooms for _, rows in room.cohorts)


def trained(config: Config, run: Path, jobs: list[Job], how: How | None = None, **options: Any) -> Outcome:
    """These jobs, in an outcome's shape."""
    with engine(config, run, how or How(), **options) as made:
        results = list(made.run("train", jobs))
        made.commit()
        states = {client: state() for client, state in made.changed().items()}
    return Outcome([r.payload for r in results if r.payload], results, [], states)


def finite(outcome: Outcome) -> Outcome:
    """Without clients that were rolled back."""
    return outcome._replace(theta=[], train=[r for r in outcome.train if not r.metrics["rolled_back"]])


def jobs_of(config: Config, *clients: int, epochs: int = 1) -> list[Job]:
    payload = {} if config.method == "local" else theta(config)
    return [Job(client, 1, payload, {"epochs": epochs}) for client in clients]


@pytest.mark.parametrize(("norm", "policy"), [("none", "keep"), ("layer-batch-batch", "keep"), ("paper", "reset")])
def test_is_training_alone(ragged: Config, tmp_path: Path, norm: str, policy: str) -> None:
    config = changed(ragged, gate={"norm": norm}, training={"theta_momentum": policy})
    run = begin(config, tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that a row is computed after the other, for one
        ours, theirs = outcome(config, run), outcome(config, run, 1)
    assert len({r.metrics["samples"] for r in theirs.train[:4]}) > 1  # ragged
    assert_close(ours, theirs, TOLERANCE)
    if norm != "none":
        name = "model/gate.norm_hidden.running_mean"
        moved = [client for client, state in ours.states.items() if state[name].any()]
        assert sorted(moved) == sorted(ours.states)
        assert all(apart(ours.states[c][name], theirs.states[c][name]) < TOLERANCE for c in moved)


@pytest.mark.parametrize(
    ("training", "tolerance"),
    [
        ({"optimizer": "adamw", "theta_momentum": "reset"}, TOLERANCE),
        ({"optimizer": "adamw", "clip_norm": 0.1, "weight_decay": 0.1}, TOLERANCE),
        ({"clip_norm": 0.1, "lr": 0.05}, TOLERANCE),
        ({"optimizer": "adamw", "optimizer_states": "8bit"}, 1e-2),  # a rounding may lead to the code beside
    ],
)
def test_every_optimizer(ragged: Config, tmp_path: Path, training: dict[str, Any], tolerance: float) -> None:
    # Where gradients are near 0, eps keeps their roundings from becoming steps as long as any.
    config = changed(ragged, training={"lr": 1e-3, "eps": 1e-5, **training})
    run, how = begin(config, tmp_path / "run"), How(optimizer="flat")
    ours, theirs = outcome(config, run, how=how), outcome(config, run, 1, how)
    if "optimizer_states" not in training:
        assert_close(ours, theirs, tolerance)
    for client, state in theirs.states.items():
        mine = ours.states[client]
        assert mine.keys() == state.keys()
        weights = [torch.cat([s[n].flatten() for n in sorted(s) if n.startswith("model/")]) for s in (mine, state)]
        assert apart(*weights) <= tolerance
        assert torch.equal(mine["step"], state["step"]) if "step" in state else True


def test_clients_that_take_batches_in_parts_train_alone(ragged: Config, tmp_path: Path) -> None:
    config = changed(ragged, training={"micro_batch": 8})
    run, jobs = begin(config, tmp_path / "run"), jobs_of(config, 0, 1)
    assert_same(trained(config, run, jobs, cohort=2), trained(config, run, jobs))


@pytest.mark.parametrize("method", ["static", "local"])
def test_controls(ragged: Config, tmp_path: Path, method: str) -> None:
    config = changed(ragged, method=method)
    run, jobs = begin(config, tmp_path / "run"), jobs_of(config, 0, 1, 2, epochs=2)
    assert_close(trained(config, run, jobs, cohort=3), trained(config, run, jobs), TOLERANCE)


def test_bf16_is_near_too(ragged: Config, tmp_path: Path) -> None:
    config = changed(ragged, gate={"norm": "layer-batch-batch"})
    run, how = begin(config, tmp_path / "run"), How(precision="bf16")
    ours, theirs = outcome(config, run, how=how, number=1), outcome(config, run, 1, how, 1)
    assert_close(ours, theirs, 5e-2)
    plain = outcome(config, run, 1, number=1)
    by_ours, by_theirs = (apart(o.theta[0]["theta"], plain.theta[0]["theta"]) for o in (ours, theirs))
    assert 1e-5 < by_ours < 2 * by_theirs  # lower precision it is, but no lower than alone


@pytest.mark.parametrize("scale", [16, 40])
def test_fp16_scales_the_loss_of_each_client(
    ragged: Config, tmp_path: Path, scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the scale that all begin with, and from one that overflows; one client alone ends up in infinity."""
    run, jobs, how = begin(ragged, tmp_path / "run"), jobs_of(ragged, 0, 1, 2), How(precision="fp16", optimizer="flat")
    jobs[1] = replace(jobs[1], payload={"theta": theta(ragged)["theta"] * 1e4})
    monkeypatch.setattr(Scale, "reset", lambda self: (self.scale.fill_(2.0**scale), self.skipped.zero_()))
    ours, theirs = trained(ragged, run, jobs, how, cohort=3), trained(ragged, run, jobs, how)
    counts = [[r.metrics["skipped"] for r in outcome.train] for outcome in (ours, theirs)]
    assert counts[0] == counts[1] and (counts[0][0] > 0) == (scale == 40)  # type: ignore[operator]
    assert_close(finite(ours), finite(theirs), 1e-2)


def test_scales_of_rows_are_each_pytorchs() -> None:
    rows, each = Scale(torch.device("cpu"), (3,)), [Scale(torch.device("cpu")) for _ in range(3)]
    rows.scale.fill_(2.0**127)
    for scale in each:
        scale.scale.fill_(2.0**127)
    for step in range(5000):
        found = torch.tensor([0.0, float(step % 1000 == 7), float(step < 20)])
        rows.update(found)
        for scale, one in zip(each, found, strict=True):
            scale.update(one)
    for name in ("scale", "steps", "skipped"):
        assert getattr(rows, name).tolist() == [float(getattr(scale, name)) for scale in each]


def test_results_come_in_job_order_and_a_client_may_come_twice(config: Config, tmp_path: Path) -> None:
    """Two architectures, two batch sizes, cohorts that are not full, clients that nobody goes with."""
    config = changed(
        config,
        federation={"clients": 9},
        model={"local": ("cnn-5", "cnn-4")},
        partition={"kind": "dirichlet", "alpha": 0.3, "min_samples": 12},
        data={"limit": 200},
    )
    run = begin(config, tmp_path / "run")
    clients = (3, 1, 0, 8, 3, 2, 5, 8, 6, 3)
    jobs = [replace(job, round=i) for i, job in enumerate(jobs_of(config, *clients))]
    with engine(config, run, How(), cohort=3) as made:
        assert [r.client for r in made.run("train", jobs)] == list(clients)
        assert len(sizes(made)) > 1
        assert len({member.batch_size for member in made.site.roster._members.values()}) > 1
    assert_close(trained(config, run, jobs, cohort=3), trained(config, run, jobs), TOLERANCE)


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(2, 5), st.integers(1, 3))
def test_groups(clients: list[int], most: int, architectures: int) -> None:
    keys = [client % architectures for client in clients]
    groups = grouped(keys, clients, most)
    assert sorted(place for group in groups for place in group) == list(range(len(clients)))
    for group in groups:
        assert len(group) <= most and len({keys[place] for place in group}) == 1
        assert len({clients[place] for place in group}) == len(group)
    ordered = [group for group in groups if len(group) > 1] + [group for group in groups if len(group) == 1]
    for client in clients:
        own = [place for group in ordered for place in group if clients[place] == client]
        assert own == sorted(own)


def ended(config: Config, run: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The blocks of a cohort of clients 0 and 1 after each step; client 0 takes three, client 1 more."""
    seen: list[list[Tensor]] = []
    take, order = Cohort._take, Lane._order

    def watched(self: Cohort, indices: Tensor) -> None:
        take(self, indices)
        seen.append([*self.blocks.clone(), self.loss.clone(), self.correct.clone()])

    def short(self: Lane, member: Any, job: Job, epoch: int) -> Tensor:
        return order(self, member, job, epoch)[: 3 if member.id == 0 else None]

    monkeypatch.setattr(Cohort, "_take", watched)
    monkeypatch.setattr(Lane, "_order", short)
    with engine(config, run, How(), cohort=2) as made:
        results = list(made.run("train", jobs_of(config, 0, 1)))
    size = config.training.batch_size
    del seen[0]  # of a trial
    assert [r.metrics["samples"] for r in results] == [3 * size, len(seen) * size]
    return seen


def unmoved(seen: list[list[Tensor]]) -> bool:
    """Whether all of client 0's is as it was after its three steps, and client 1 went on."""
    assert len(seen) > 4
    before, after = seen[2], seen[-1]
    assert not torch.equal(before[1], after[1]) and not torch.equal(seen[1][0], before[0])
    return torch.equal(before[0], after[0]) and all(bool(before[i][0] == after[i][0]) for i in (2, 3))


@pytest.mark.parametrize("norm", ["paper", "layer-batch-batch"])
def test_a_client_that_is_done_stays_to_the_bit(
    config: Config, tmp_path: Path, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config, model={"local": ("cnn-5",)}, gate={"norm": norm}, training={"batch_size": 8})
    assert unmoved(ended(config, begin(config, tmp_path / "run"), monkeypatch))


def test_a_client_that_is_not_done_in_time_is_noticed(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config, model={"local": ("cnn-5",)}, training={"batch_size": 8})
    update = Cohort._update
    monkeypatch.setattr(Cohort, "_update", lambda self, live: update(self, torch.ones_like(live)))
    assert not unmoved(ended(config, begin(config, tmp_path / "run"), monkeypatch))


def test_gradients_that_reach_another_client_are_noticed(
    ragged: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, jobs = begin(ragged, tmp_path / "run"), jobs_of(ragged, 0, 1)
    theirs = trained(ragged, run, jobs)
    update = Cohort._update

    def leaking(self: Cohort, live: Tensor) -> None:
        for segment in self._segments:
            segment.gradients[1] += 0.01 * segment.gradients[0]
        update(self, live)

    assert_close(trained(ragged, run, jobs, cohort=2), theirs, TOLERANCE)
    monkeypatch.setattr(Cohort, "_update", leaking)
    ours = trained(ragged, run, jobs, cohort=2)
    with pytest.raises(AssertionError):
        assert_close(ours, theirs, TOLERANCE)
    assert apart(ours.theta[0]["theta"], theirs.theta[0]["theta"]) <= TOLERANCE  # client 0 is what it was


def test_a_client_that_is_not_finite_is_rolled_back_alone(ragged: Config, tmp_path: Path) -> None:
    run, jobs = begin(ragged, tmp_path / "run"), jobs_of(ragged, 0, 1, 2)
    bad = {"theta": torch.full_like(theta(ragged)["theta"], torch.inf)}
    jobs[1] = replace(jobs[1], payload=bad)
    ours, theirs = trained(ragged, run, jobs, cohort=3), trained(ragged, run, jobs)
    assert [r.metrics["rolled_back"] for r in ours.train] == [0, 1, 0]
    assert ours.train[1].weight == 0 and torch.equal(ours.train[1].payload["theta"], bad["theta"])
    assert sorted(ours.states) == [0, 2]
    assert_close(finite(ours), finite(theirs), TOLERANCE)


def test_stop_is_obeyed_after_the_step(ragged: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, stop = begin(ragged, tmp_path / "run"), threading.Event()
    taken = []
    take = Cohort._take

    def counted(self: Cohort, indices: Tensor) -> None:
        take(self, indices)
        taken.append(1)
        if len(taken) == 3:  # the first is a trial
            stop.set()

    monkeypatch.setattr(Cohort, "_take", counted)
    with engine(ragged, run, How(), stop=stop, cohort=2) as made:
        with pytest.raises(Interrupted):
            list(made.run("train", jobs_of(ragged, 0, 1)))
        assert len(taken) == 3
        made.rollback()
        assert not made.changed()


def test_rollback_and_commit(ragged: Config, tmp_path: Path) -> None:
    run, jobs = begin(ragged, tmp_path / "run"), jobs_of(ragged, 0, 1)
    with engine(ragged, run, How(), cohort=2) as made:
        first = [r.metrics["loss"] for r in made.run("train", jobs)]
        made.rollback()
        assert [r.metrics["loss"] for r in made.run("train", jobs)] == first
        made.commit()
        assert sorted(made.changed()) == [0, 1]
        assert [r.metrics["loss"] for r in made.run("train", jobs)] != first


def test_no_step_waits_for_the_device(ragged: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(ragged, gate={"norm": "paper"})
    run, jobs = begin(config, tmp_path / "run"), jobs_of(config, 0, 1)
    take, planted = Cohort._take, [False]

    def watched(self: Cohort, indices: Tensor) -> None:
        with NoSynchronization():
            take(self, indices)
            if planted[0]:
                self.loss.sum().item()

    monkeypatch.setattr(Cohort, "_take", watched)
    with engine(config, run, How(), cohort=2) as made:
        list(made.run("train", jobs))
        planted[0] = True
        with pytest.raises(AssertionError, match="makes the host wait"):
            list(made.run("train", jobs))


def test_paged_and_from_the_host_is_the_same(ragged: Config, tmp_path: Path) -> None:
    run, jobs = begin(ragged, tmp_path / "run"), jobs_of(ragged, 0, 1, 2, 3)
    whole = trained(ragged, run, jobs, cohort=2)
    assert_same(trained(ragged, run, jobs, cohort=2, memory=0, resident=False), whole)


def test_half_of_them_at_a_time_where_memory_does_not_suffice(
    ragged: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, jobs = begin(ragged, tmp_path / "run"), jobs_of(ragged, 0, 1, 2, 3, 4)
    take, most = Cohort._take, [2]

    def short(self: Cohort, indices: Tensor) -> None:
        take(self, indices)
        if self.rows > most[0] and self._done == 2:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(Cohort, "_take", short)
    theirs = trained(ragged, run, jobs)
    with pytest.warns(UserWarning, match="out of device memory with 5 clients together: from now on 2"):
        assert_close(trained(ragged, run, jobs, cohort=5), theirs, TOLERANCE)
    most[0] = 1
    with pytest.warns(UserWarning, match="with 2 clients together: from now on 1"):
        assert_same(trained(ragged, run, jobs, cohort=5), theirs)


def test_large_clients_train_alone(ragged: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, jobs = begin(ragged, tmp_path / "run"), jobs_of(ragged, 0, 1)
    monkeypatch.setattr(units, "LARGE", 1000)
    assert_same(trained(ragged, run, jobs, cohort=2), trained(ragged, run, jobs))


def test_modules_that_cannot_be_batched_train_alone_and_say_so(ragged: Config, tmp_path: Path) -> None:
    config = changed(ragged, model={"local": ("tests.test_cohort:deciding",)})
    run, jobs = begin(config, tmp_path / "run"), jobs_of(config, 0, 1)
    with pytest.warns(UserWarning, match="train alone: its modules do not run under torch.func.vmap: RuntimeError"):
        ours = trained(config, run, jobs, cohort=2)
    assert_same(ours, trained(config, run, jobs))


def test_dropout_differs_from_client_to_client_and_is_seeded(
    ragged: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(ragged, model={"local": ("tests.test_cohort:dropping",)}, training={"batch_size": 1, "lr": 1e-4})
    run, jobs = begin(config, tmp_path / "run"), jobs_of(config, 0, 1)
    assert_same(trained(config, run, jobs, cohort=2), trained(config, run, jobs, cohort=2))
    gradients: list[Tensor] = []
    update = Cohort._update

    def watched(self: Cohort, live: Tensor) -> None:
        gradients.append(self._gradients["local_expert.1.bias"].clone())
        update(self, live)

    monkeypatch.setattr(Cohort, "_update", watched)
    trained(config, run, jobs, cohort=2)
    dropped = [gradient == 0 for gradient in gradients[1:]]  # [2, 50] each; the first step is a trial
    assert len(dropped) > 10 and all(0.2 < both.float().mean() < 0.8 for both in dropped)
    assert not any(torch.equal(both[0], both[1]) for both in dropped)
    assert not torch.equal(dropped[0], dropped[1])


@pytest.mark.parametrize("asked", [0, 3])
def test_the_plan_says_how_many(ragged: Config, tmp_path: Path, asked: int) -> None:
    config = changed(ragged, engine={"cohort": asked}, run={"device": "cpu", "threads": 1})
    run, dataset = begin(config, tmp_path / "run"), load_data(config.data, config.seed)
    split = planning.deal(config, dataset)
    sizes_ = planning.sizes(config, dataset, split, planning.models(config, dataset, split), facts(torch.device("cpu")))
    plan, _ = planning.make(config, sizes_, facts(torch.device("cpu")))
    assert plan.cohort == max(1, asked)
    engines.write(run, plan)
    with engines.opened(config, run, torch.device("cpu")) as made:
        assert isinstance(made, DeviceEngine)
        assert [r.client for r in made.run("train", jobs_of(config, 2, 0, 1))] == [2, 0, 1]
        assert sizes(made) == ([3] if asked else [])


def test_callers_faults(ragged: Config, tmp_path: Path) -> None:
    run = begin(ragged, tmp_path / "run")
    with (
        pytest.raises(ValueError, match="cohort is 0 and lanes 1, both must be at least 1"),
        engine(ragged, run, How(), cohort=0),
    ):
        pass
    with engine(ragged, run, How(), cohort=2) as made:
        assert not list(made.run("train", []))
        with pytest.raises(ValueError, match="client 1 cannot take this in"):
            list(made.run("train", [*jobs_of(ragged, 0), Job(1, 1, {"theta": torch.zeros(3)}, {"epochs": 1})]))
        (cohort,) = made.lanes[0].rooms[0].cohorts.values()
        orders = [torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 15, dtype=torch.int64)]
        with pytest.raises(ValueError, match=r"of one B, got \[\[2, 16\], \[2, 15\]\]"):
            cohort.steps(orders)
        with pytest.raises(ValueError, match=r"a cohort of 2 takes as many orders .*, got \[\[2, 16\]\]"):
            cohort.steps(orders[:1])


class Deciding(nn.Module):
    """Looks at numbers to decide what to do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 50)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.flatten(1))
        return out if out.sum() > 0 else -out


def deciding(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return Deciding(shape[0] * shape[1] * shape[2]), nn.Linear(50, classes)


def dropping(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    width = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 50), nn.Dropout(0.5)), nn.Linear(50, classes)
