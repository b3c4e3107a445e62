"""The engine against the plain loop: every switch alone and all together, faults, and what must never happen."""

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe.config import Config
from fedmoe.engine import step as steps
from fedmoe.engine.program import Program
from fedmoe.engine.rooms import Room
from fedmoe.engine.seam import Interrupted, Job, Refused
from fedmoe.engine.step import How, Step
from fedmoe.reference import ReferenceEngine
from tests.engines import Outcome, assert_close, assert_same, engine, in_pieces, rounds
from tests.support import begin, changed, theta, unequal
from tests.synchronization import NoSynchronization

CPU = torch.device("cpu")
PLAIN = How(optimizer="torch", channels_last=False)
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2, "fp16": 1e-2}
"""Of three rounds from the same start: roundings of the dtype, grown by training."""


@pytest.fixture
def ragged(config: Config) -> Config:
    """Clients of unequal size, three of five in a round, two epochs, momentum kept."""
    return unequal(config, federation={"fraction": 0.6}, training={"theta_momentum": "keep"})


def reference(config: Config, run: Path) -> Outcome:
    return rounds(config, ReferenceEngine(config, run, CPU), run)


def outcome(config: Config, run: Path, how: How, **options: Any) -> Outcome:
    with engine(config, run, how, **options) as made:
        return rounds(config, made, run)


SWITCHES = {
    "nothing": PLAIN,
    "flat optimizer": replace(PLAIN, optimizer="flat"),
    "channels last": replace(PLAIN, channels_last=True),
    "streams and graphs, which are nothing here": replace(PLAIN, streams=True, graphs=True),
    "all": How(optimizer="flat", streams=True, graphs=True, channels_last=True),
    "tf32, which is fp32 here": replace(PLAIN, precision="tf32"),
    "bf16": replace(PLAIN, precision="bf16"),
    "bf16, flat": replace(PLAIN, precision="bf16", optimizer="flat"),
    "fp16, flat": replace(PLAIN, precision="fp16", optimizer="flat"),
}


@pytest.mark.parametrize("norm", ["none", "layer-batch-batch"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_is_the_plain_loop(ragged: Config, tmp_path: Path, switch: str, norm: str) -> None:
    config = changed(ragged, gate={"norm": norm})
    run = begin(config, tmp_path / "run")
    how = SWITCHES[switch]
    assert_close(outcome(config, run, how), reference(config, run), TOLERANCE.get(how.precision, TOLERANCE["fp32"]))


@pytest.mark.parametrize("method", ["static", "local"])
@pytest.mark.parametrize("policy", ["keep", "reset"])
def test_controls_and_policies(config: Config, tmp_path: Path, method: str, policy: str) -> None:
    config = changed(config, method=method, training={"theta_momentum": policy})
    run = begin(config, tmp_path / "run")
    if method == "local":
        made = ReferenceEngine(config, run, CPU)
        jobs = [Job(c, 1, {}, {"epochs": 1}) for c in range(5)]
        with engine(config, run, How()) as ours:
            for a, b in zip(ours.run("train", jobs), made.run("train", jobs), strict=True):
                assert a.payload == b.payload == {} and a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=1e-5)
        return
    assert_close(outcome(config, run, How()), reference(config, run), TOLERANCE["fp32"])


def test_paged_is_unpaged_bit_for_bit(ragged: Config, tmp_path: Path) -> None:
    run = begin(ragged, tmp_path / "run")
    whole = outcome(ragged, run, How())
    for memory in (0, 2**20):  # nothing but files; a few clients
        with engine(ragged, run, How(), memory=memory) as made:
            assert_same(rounds(ragged, made, run), whole)
            assert made.store.held["file"] > 0 and made.store.held["host"] <= memory
            assert list((run / "store").iterdir())
        assert not (run / "store").exists()


def test_the_same_client_twice_in_a_row_goes_on_from_where_it_was(config: Config, tmp_path: Path) -> None:
    """With two rooms, too, as on a GPU: the next may be brought in early, but not this one."""
    run = begin(config, tmp_path / "run")
    jobs = [Job(c, 1, theta(config), {"epochs": 1}) for c in (0, 0, 1, 0, 0)]
    losses = []
    for count in (1, 2):
        with engine(config, run, How()) as made:
            made.lanes[0].rooms = [Room(CPU) for _ in range(count)]
            losses.append([result.metrics["loss"] for result in made.run("train", jobs)])
    assert losses[0] == losses[1] and len(set(losses[0])) == 5


def test_a_resumed_fp16_run_is_the_uninterrupted_one(config: Config, tmp_path: Path) -> None:
    """Its loss scale is found anew by each client in each round, so nothing of it has to be kept."""
    run = begin(config, tmp_path / "run")
    how = How(precision="fp16", optimizer="flat")
    job = [Job(0, number, theta(config), {"epochs": 1}) for number in (1, 2)]
    with engine(config, run, how) as made:
        list(made.run("train", job[:1]))
        (step,) = made.lanes[0].rooms[0].steps.values()
        assert step.scale is not None
        step.scale.scale.fill_(8.0)
        made.rollback()
        again = list(made.run("train", job[:1]))
    with engine(config, run, how) as made:
        (fresh,) = made.run("train", job[:1])
    assert fresh.metrics["loss"] == again[0].metrics["loss"]
    assert torch.equal(fresh.payload["theta"], again[0].payload["theta"])


def test_deterministic_runs_are_bit_identical_and_so_is_a_resumed_one(ragged: Config, tmp_path: Path) -> None:
    """Three rounds at once, and again with an engine of its own for each round, from what the one before saved."""
    config = changed(ragged, run={"deterministic": True})
    run = begin(config, tmp_path / "run")
    whole = outcome(config, run, How())
    assert_same(outcome(config, run, How()), whole)
    assert_same(in_pieces(config, run, How(), 3), whole)


def test_dropout_is_seeded_as_in_the_plain_loop(config: Config, tmp_path: Path) -> None:
    config = changed(config, model={"local": ("tests.test_device_engine:dropping",)})
    run = begin(config, tmp_path / "run")
    assert_close(outcome(config, run, PLAIN), reference(config, run), TOLERANCE["fp32"])


def test_modules_that_view_their_input_are_given_it_as_they_can_take_it(config: Config, tmp_path: Path) -> None:
    config = changed(config, model={"local": ("tests.test_device_engine:viewing",)})
    run = begin(config, tmp_path / "run")
    assert_close(outcome(config, run, How()), reference(config, run), TOLERANCE["fp32"])


def test_rollback_and_commit(config: Config, tmp_path: Path) -> None:
    run = begin(config, tmp_path / "run")
    jobs = [Job(c, 1, theta(config), {"epochs": 1}) for c in (0, 1)]
    with engine(config, run, How()) as made:
        first = [r.metrics["loss"] for r in made.run("train", jobs)]
        made.rollback()
        assert not made.changed()
        assert [r.metrics["loss"] for r in made.run("train", jobs)] == first
        made.commit()
        assert sorted(made.changed()) == [0, 1] and not made.changed()
        assert [r.metrics["loss"] for r in made.run("train", jobs)] != first


def test_a_client_that_is_not_finite_is_rolled_back_and_the_others_go_on(config: Config, tmp_path: Path) -> None:
    config = changed(config, model={"local": ("cnn-1", "tests.test_device_engine:exploding")})
    run = begin(config, tmp_path / "run")
    jobs = [Job(c, 1, theta(config), {"epochs": 1}) for c in range(3)]
    with engine(config, run, How()) as made:
        results = list(made.run("train", jobs))
        made.commit()
        assert [r.metrics["rolled_back"] for r in results] == [0, 1, 0]
        assert results[1].weight == 0 and torch.equal(results[1].payload["theta"], theta(config)["theta"])
        assert sorted(made.changed()) == [0, 2]


def test_stop_is_obeyed_after_the_step(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, stop = begin(config, tmp_path / "run"), threading.Event()
    taken = []
    take = Step._take

    def counted(self: Step, indices: torch.Tensor) -> None:
        take(self, indices)
        taken.append(1)
        stop.set()

    monkeypatch.setattr(Step, "_take", counted)
    with engine(config, run, How(), stop=stop) as made:
        with pytest.raises(Interrupted):
            list(made.run("train", [Job(0, 1, theta(config), {"epochs": 1})]))
        assert len(taken) == 1
        made.rollback()
        assert not made.changed()


def test_a_payload_that_does_not_fit_is_refused(config: Config, tmp_path: Path) -> None:
    run = begin(config, tmp_path / "run")
    bad = {"theta": torch.zeros(3)}
    with engine(config, run, How()) as made, pytest.raises(ValueError, match="client 0 cannot take this in"):
        list(made.run("train", [Job(0, 1, bad, {"epochs": 1})]))


@pytest.mark.parametrize("training", [{}, {"optimizer": "adamw", "clip_norm": 1.0}])
@pytest.mark.parametrize("how", [How(), How(optimizer="flat"), How(precision="fp16", optimizer="flat")])
def test_no_step_waits_for_the_device(
    config: Config, tmp_path: Path, how: How, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config, training=training)
    run = begin(config, tmp_path / "run")
    take, planted = Step._take, [False]

    def watched(self: Step, indices: torch.Tensor) -> None:
        with NoSynchronization():
            take(self, indices)
            if planted[0]:
                self.loss.item()

    monkeypatch.setattr(Step, "_take", watched)
    jobs = [Job(0, 1, theta(config), {"epochs": 1})]
    with engine(config, run, how) as made:
        list(made.run("train", jobs))
        planted[0] = True
        with pytest.raises(AssertionError, match="makes the host wait"):
            list(made.run("train", jobs))


def test_nothing_private_is_handed_out(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What leaves shares no memory with an arena, and holds what is shared alone; planted faults are noticed."""
    run = begin(config, tmp_path / "run")
    jobs = [Job(0, 1, theta(config), {"epochs": 1})]
    with engine(config, run, How()) as made:
        (result,) = made.run("train", jobs)
        (step,) = made.lanes[0].rooms[0].steps.values()
        block = step.arena.block
        spans = range(block.data_ptr(), block.data_ptr() + len(block))
        assert result.payload.keys() == {"theta"} and result.payload["theta"].data_ptr() not in spans
        own = torch.cat([t.detach().flatten() for t in step.arena.theta()])
        assert torch.equal(result.payload["theta"], own)
        monkeypatch.setattr(made.site.federation, "pack", lambda theta: {"theta": own, "private": step.arena.weights})
        with pytest.raises(ValueError, match="client 0 may not send this: 'private' must not be there"):
            list(made.run("train", jobs))


def test_arenas_stay_bound(config: Config, tmp_path: Path) -> None:
    run = begin(config, tmp_path / "run")
    with engine(config, run, How(precision="bf16")) as made:
        rounds(config, made, run, 1)
        for step in made.lanes[0].rooms[0].steps.values():
            step.arena.check()


def test_fp16_overflow_skips_the_step_and_is_counted(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(config, tmp_path / "run")
    with engine(config, run, How(precision="fp16", optimizer="flat")) as made:
        list(made.run("train", [Job(0, 1, theta(config), {"epochs": 1})]))
        (step,) = made.lanes[0].rooms[0].steps.values()
        assert step.scale is not None
        # From where every client begins, it overflows in fp16.
        monkeypatch.setattr(type(step.scale), "reset", lambda self: (self.scale.fill_(2.0**40), self.skipped.zero_()))
        (result,) = made.run("train", [Job(0, 2, theta(config), {"epochs": 1})])
        taken = result.metrics["samples"]
        assert isinstance(taken, int) and result.metrics["skipped"] == taken // made.site.roster[0][0].batch_size
        assert result.metrics["rolled_back"] == 0 and step.scale.scale < 2.0**40


@pytest.mark.parametrize("how", [PLAIN, replace(PLAIN, optimizer="flat")])
def test_parameters_without_a_gradient_stay_as_they_are(config: Config, tmp_path: Path, how: How) -> None:
    """And frozen ones: weight decay, too, passes over them, as in the plain loop."""
    config = changed(config, model={"local": ("tests.test_device_engine:lazy",)}, training={"weight_decay": 0.1})
    run = begin(config, tmp_path / "run")
    found, expected = outcome(config, run, how), reference(config, run)
    assert_close(found, expected, TOLERANCE["fp32"])
    idle = "model/local_expert.idle.weight"
    assert torch.equal(found.states[0][idle], expected.states[0][idle])


PARTS = {"torch": PLAIN, "flat": replace(PLAIN, optimizer="flat")} | {
    f"{optimizer}, {low}": replace(PLAIN, optimizer=optimizer, precision=low)
    for optimizer, low in (("torch", "bf16"), ("flat", "bf16"), ("flat", "fp16"))
}


@pytest.mark.parametrize(("how", "micro_batch"), [*((how, 0) for how in PARTS), ("torch", 8), ("flat, bf16", 8)])
def test_out_of_memory_halves_the_batches_parts(
    config: Config, tmp_path: Path, how: str, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that has memory for 6 samples at a time: batches of 16 are taken in four parts, with the same result."""
    config = changed(config, training={"micro_batch": micro_batch})
    run = begin(config, tmp_path / "run")
    expected = outcome(config, run, PARTS[how])
    limited = steps.branches

    def branches(program: Program, x: torch.Tensor, streams: list[torch.cuda.Stream]) -> dict[str, torch.Tensor]:
        if program.modules.training and len(x) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return limited(program, x, streams)

    monkeypatch.setattr(steps, "branches", branches)
    found = outcome(config, run, PARTS[how])
    assert {result.metrics.pop("parts") for result in found.train} == {4}
    assert_close(found, expected, TOLERANCE[PARTS[how].precision])


def test_a_client_that_runs_out_of_memory_in_a_later_step_begins_anew(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, limited, wide = begin(config, tmp_path / "run"), steps.branches, Counter[int]()
    expected = outcome(config, run, PLAIN)

    def branches(program: Program, x: torch.Tensor, streams: list[torch.cuda.Stream]) -> dict[str, torch.Tensor]:
        wide[id(program)] += program.modules.training and len(x) == 16
        if wide[id(program)] == 2:
            wide[id(program)] += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return limited(program, x, streams)

    monkeypatch.setattr(steps, "branches", branches)
    found = outcome(config, run, PLAIN)
    assert {result.metrics.pop("parts") for result in found.train} == {2}
    assert_close(found, expected, TOLERANCE["fp32"])


def test_out_of_memory_without_a_way_out_is_one_line(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    for norm, why in (
        ("none", "it takes them in 16 parts already"),
        ("paper", "its normalization needs whole batches"),
    ):
        run = begin(changed(config, gate={"norm": norm}), tmp_path / norm)
        with engine(changed(config, gate={"norm": norm}), run, PLAIN) as made:
            job = Job(0, 1, theta(config), {"epochs": 1})
            made.site.roster[0]
            monkeypatch.setattr(Step, "_take", full)
            with pytest.raises(Refused, match=rf"client 0, cnn-1: out of device memory with batches of 16, and {why}"):
                list(made.run("train", [job]))
            made.rollback()
        monkeypatch.undo()


def dropping(shape: tuple[int, int, int], classes: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    nn = torch.nn
    width = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 50), nn.Dropout(0.5)), nn.Linear(50, classes)


class Lazy(torch.nn.Module):
    """Has layers that it does not use, or that are not to be trained."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.idle = torch.nn.Linear(5, 5)
        self.frozen = torch.nn.Linear(features, features).requires_grad_(False)
        self.linear = torch.nn.Linear(features, 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(self.frozen(x.flatten(1)))
        return out


def lazy(shape: tuple[int, int, int], classes: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    return Lazy(shape[0] * shape[1] * shape[2]), torch.nn.Linear(50, classes)


class Viewing(torch.nn.Module):
    """Cannot take channels-last images: `view` refuses them."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(shape[0], 2, 3)
        self.linear = torch.nn.Linear(2 * (shape[1] - 2) * (shape[2] - 2), 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convolution(x)
        out: torch.Tensor = self.linear(x.view(len(x), -1))
        return out


def viewing(shape: tuple[int, int, int], classes: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    return Viewing(shape), torch.nn.Linear(50, classes)


class Exploding(torch.nn.Module):
    """Not finite in training."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(shape[0] * shape[1] * shape[2], 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x.flatten(1))
        return out * float("inf") if self.training else out


def exploding(shape: tuple[int, int, int], classes: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    return Exploding(shape), torch.nn.Linear(50, classes)
