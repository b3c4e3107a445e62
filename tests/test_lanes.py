"""Lanes, and graphs as a CPU can imitate them: what is done side by side is what is done one after the other."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.config import Config
from fedmoe.engine import device_engine, graphs, units
from fedmoe.engine.cohort import Cohort
from fedmoe.engine.fit import LARGE
from fedmoe.engine.lane import Lane
from fedmoe.engine.ranges import observed
from fedmoe.engine.rooms import Room
from fedmoe.engine.seam import Interrupted, Job, Result
from fedmoe.engine.seeds import Globals
from fedmoe.engine.step import How, Step
from tests.engines import Outcome, assert_close, assert_same, engine, rounds
from tests.graphs import imitate
from tests.support import begin, changed, theta, unequal
from tests.test_ranges import Heard

CPU = torch.device("cpu")


@pytest.fixture
def ragged(config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Clients of three architectures, one of which draws random numbers, unequal in size; turns of one step."""
    monkeypatch.setattr(device_engine, "TURN", 1)
    local = ("cnn-5", "tests.test_device_engine:dropping", "cnn-4")
    return unequal(config, model={"local": local}, training={"theta_momentum": "keep"})


def outcome(config: Config, run: Path, how: How | None = None, rooms: int = 1, **options: Any) -> Outcome:
    with engine(config, run, how or How(), **options) as made:
        for lane in made.lanes:
            lane.rooms = [Room(CPU) for _ in range(rooms)]
        return rounds(config, made, run, 2)


def jobs_of(config: Config, *clients: int) -> list[Job]:
    return [Job(client, 1, theta(config), {"epochs": 1}) for client in clients]


@pytest.mark.parametrize(
    "options",
    [
        {"lanes": 2},
        {"lanes": 3},
        {"lanes": 7},
        {"lanes": 2, "rooms": 2},
        {"lanes": 2, "rooms": 2, "memory": 0},
        {"lanes": 3, "memory": 2**20, "resident": False},
        {"rooms": 2, "memory": 0},
    ],
    ids=str,
)
def test_lanes_are_one_after_the_other_bit_for_bit(ragged: Config, tmp_path: Path, options: dict[str, Any]) -> None:
    run = begin(ragged, tmp_path / "run")
    state = torch.get_rng_state()
    assert_same(outcome(ragged, run, **options), outcome(ragged, run))
    assert torch.equal(torch.get_rng_state(), state)


def test_cohorts_in_lanes(ragged: Config, tmp_path: Path) -> None:
    config = changed(ragged, model={"local": ("cnn-5", "cnn-4")})
    run = begin(config, tmp_path / "run")
    expected = outcome(config, run, cohort=2)
    assert_same(outcome(config, run, cohort=2, lanes=2), expected)
    assert_same(outcome(config, run, cohort=2, lanes=2, rooms=2, memory=0), expected)


def test_steps_do_alternate_and_phases_tell_of_their_lane(ragged: Config, tmp_path: Path) -> None:
    run, heard = begin(ragged, tmp_path / "run"), Heard()
    with engine(ragged, run, How(), lanes=2) as made, observed(heard):
        list(made.run("train", jobs_of(ragged, 0, 1)))
    steps = [name for name in heard.all if name.startswith("+optimizer")]
    assert steps[:4] == ["+optimizer", "+optimizer in 1"] * 2
    for lane in ("", " in 1"):
        own = [name.removesuffix(" in 1") for name in heard.all if name.endswith(" in 1") == bool(lane)]
        open_ = []
        for name in own:
            if name[0] == "+":
                open_.append(name[1:])
            else:
                assert open_.pop() == name[1:]
        assert not open_


def test_lanes_that_draw_from_one_another_are_noticed(
    ragged: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(ragged, tmp_path / "run")
    expected = outcome(ragged, run)

    @contextmanager
    def shared(self: Globals) -> Iterator[None]:
        yield

    monkeypatch.setattr(Globals, "installed", shared)
    with pytest.raises(AssertionError):
        assert_same(outcome(ragged, run, lanes=2), expected)


def failing(client: int, step: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the client's training fail in a step."""
    train = Lane._train

    def made(self: Lane, unit: units.Unit, *others: Any) -> Any:
        for i, turn in enumerate(train(self, unit, *others)):
            if unit.clients == [client] and i == step:
                raise error("it broke")
            yield turn

    monkeypatch.setattr(Lane, "_train", made)


def until_it_breaks(made: Any, jobs: list[Job], error: type[Exception] = RuntimeError) -> list[Result]:
    results: list[Result] = []
    with pytest.raises(error, match="it broke"):
        results.extend(made.run("train", jobs))  # what it has taken before an error stays
    return results


def test_a_failure_in_one_lane_costs_no_other_its_result(
    ragged: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lanes hold clients 0 and 3, 1 and 4, and 2: the first has work left when the third fails."""
    run, jobs = begin(ragged, tmp_path / "run"), jobs_of(ragged, 2, 0, 1, 3, 4)
    with engine(ragged, run, How(), lanes=3) as made:
        expected = {result.client: result.payload["theta"] for result in made.run("train", jobs)}
        made.rollback()
        failing(2, 1, RuntimeError, monkeypatch)
        results = until_it_breaks(made, jobs)
        assert [result.client for result in results] == [0, 1]
        assert all(torch.equal(result.payload["theta"], expected[result.client]) for result in results)
        made.rollback()
        monkeypatch.undo()
        again = {result.client: result.payload["theta"] for result in made.run("train", jobs)}
        assert all(torch.equal(again[client], expected[client]) for client in range(5))


def test_stop_is_obeyed_at_once_in_all_lanes(ragged: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, stop, taken = begin(ragged, tmp_path / "run"), threading.Event(), []
    take = Step._take

    def counted(self: Step, indices: torch.Tensor) -> None:
        take(self, indices)
        taken.append(1)
        if len(taken) == 3:
            stop.set()

    monkeypatch.setattr(Step, "_take", counted)
    with engine(ragged, run, How(), lanes=3, stop=stop) as made, pytest.raises(Interrupted):
        list(made.run("train", jobs_of(ragged, *range(5))))
    assert len(taken) == 3


def test_a_client_that_comes_twice_goes_on_from_where_it_was(ragged: Config, tmp_path: Path) -> None:
    run, jobs = begin(ragged, tmp_path / "run"), jobs_of(ragged, 0, 1, 0, 2, 0)
    losses = []
    for lanes in (1, 3):
        with engine(ragged, run, How(), lanes=lanes) as made:
            losses.append([result.metrics["loss"] for result in made.run("train", jobs)])
    assert losses[0] == losses[1] and len(set(losses[0])) == 5


ANY: Any = None


class Imagined:
    """A roster of clients whose architecture is a letter; capitals are large."""

    def __init__(self, architectures: str) -> None:
        self._of = architectures

    def __getitem__(self, client: int) -> tuple[Any, None]:
        facts = {"architecture": self._of[client], "flops": 1, "samples": torch.arange(10 + client), "training": 5}
        return SimpleNamespace(**facts), None

    def trainable(self, client: int) -> int:
        return LARGE if self._of[client].isupper() else 1


def shared_out(architectures: str, lanes: int) -> list[list[int]]:
    made: Any = units.Units(ANY, ANY, ANY, ANY, 1, lanes)
    made._roster = Imagined(architectures)
    jobs = [Job(client, 1, {}, {"epochs": 1}) for client in range(len(architectures))]
    shared = made.shared("train", jobs)
    order = [unit.clients[0] for unit in made.in_time("train", shared)]
    assert sorted(order) == list(range(len(jobs)))
    return [[unit.clients[0] for unit in own] for own in shared]


def test_architectures_have_lanes_of_their_own() -> None:
    assert shared_out("ababab", 2) == [[0, 2, 4], [1, 3, 5]]
    assert shared_out("aaaa", 2) == [[0, 2], [1, 3]]
    assert shared_out("abcabc", 2) == [[0, 2, 3, 5], [1, 4]]
    assert shared_out("aabb", 4) == [[0], [2], [1], [3]]
    assert shared_out("aBBa", 3)[0][-2:] == [1, 2]


@given(st.text("abcD", min_size=1, max_size=20), st.integers(1, 6))
def test_each_job_is_done_once_and_large_clients_in_the_first_lane(architectures: str, lanes: int) -> None:
    shared = shared_out(architectures, lanes)
    assert sorted(client for own in shared for client in own) == list(range(len(architectures)))
    assert all(own == sorted(own) for own in shared)
    assert not any(architectures[client].isupper() for own in shared[1:] for client in own)
    small = {kind for kind in architectures if kind.islower()}
    assert sum(map(bool, shared)) >= min(lanes, len(small))


@pytest.mark.parametrize("options", [{}, {"lanes": 2}, {"cohort": 2}, {"lanes": 2, "cohort": 2, "rooms": 2}], ids=str)
@pytest.mark.parametrize("how", [How(), How(precision="bf16", optimizer="flat"), How(optimizer="flat")], ids=str)
def test_replayed_steps_are_those_taken_one_by_one(
    config: Config, tmp_path: Path, how: How, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of an evaluation are filled up for graphs, which rounds its sums otherwise."""
    config = changed(config, gate={"norm": "layer-batch-batch"}, partition={"kind": "dirichlet", "min_samples": 20})
    config = changed(config, federation={"epochs": 2}, model={"local": ("cnn-5", "cnn-4")})
    run = begin(config, tmp_path / "run")
    expected = outcome(config, run, how, **options)
    made = imitate(monkeypatch)
    found = outcome(config, run, replace(how, graphs=True), **options)
    assert made
    assert_same(found._replace(evaluated=[]), expected._replace(evaluated=[]))
    assert_close(found, expected, 1e-6)


def test_no_more_graphs_are_kept_than_agreed(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(config, tmp_path / "run")
    made = imitate(monkeypatch)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    expected = outcome(config, run)
    with engine(config, run, How(graphs=True)) as made_engine:
        found = rounds(config, made_engine, run, 2)
        assert len(made_engine.lanes[0]._track._kept) == 3 < len(made)
    assert_same(found._replace(evaluated=[]), expected._replace(evaluated=[]))


def test_a_step_that_cannot_be_captured_is_taken_by_itself(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(config, tmp_path / "run")
    expected = outcome(config, run)
    imitate(monkeypatch)

    def refused(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs.Track, "captured", refused)
    with pytest.warns(UserWarning, match="no CUDA graph of this step: operation not permitted [a-z ]*capturing$"):
        assert_close(outcome(config, run, How(graphs=True)), expected, 1e-6)


def refusing(number: int) -> Any:
    """A step that is refused when it is taken for the time of this number, from 0."""
    take, taken = Step._take, count()

    def made(self: Step, indices: torch.Tensor) -> None:
        take(self, indices)
        if next(taken) == number:
            raise RuntimeError("not permitted")

    return made


def test_a_capture_that_fails_leaves_all_as_it_was_and_is_told(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the warm-up, and in what only a capture refuses; also of modules whose numbers come from the host."""
    run = begin(config, tmp_path / "run")
    expected = outcome(config, run)
    for fails in (0, 2, 3):
        imitate(monkeypatch)
        monkeypatch.setattr(Step, "_take", refusing(fails))
        with pytest.warns(UserWarning, match="no CUDA graph of this step: not permitted"):
            found = outcome(config, run, How(graphs=True))
        assert_same(found._replace(evaluated=[]), expected._replace(evaluated=[]))
        monkeypatch.undo()
    config = changed(config, model={"local": ("tests.test_device_engine:dropping",)})
    run = begin(config, tmp_path / "dropping")
    expected = outcome(config, run)
    imitate(monkeypatch)
    with pytest.warns(UserWarning, match="draws? random numbers on the host"):
        found = outcome(config, run, How(graphs=True))
    assert_same(found._replace(evaluated=[]), expected._replace(evaluated=[]))


def test_batches_that_are_filled_up_disturb_no_statistics(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config, model={"local": ("tests.test_lanes:without_estimates",)})
    run = begin(config, tmp_path / "run")
    expected = outcome(config, run)
    imitate(monkeypatch)
    assert_same(outcome(config, run, How(graphs=True)), expected)


def without_estimates(shape: tuple[int, int, int], classes: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    nn = torch.nn
    width = shape[0] * shape[1] * shape[2]
    norm = nn.BatchNorm1d(50, track_running_stats=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 50), norm), nn.Linear(50, classes)


def test_one_run_at_a_time(config: Config, tmp_path: Path) -> None:
    run, jobs = begin(config, tmp_path / "run"), jobs_of(config, 0, 1, 2)
    with engine(config, run, How()) as made:
        results = made.run("train", jobs)
        next(results)
        with pytest.raises(
            ValueError, match="another run is under way on this engine: take all its results, or close it"
        ):
            list(made.run("evaluate", jobs))
        assert len(list(results)) == 2
        made.rollback()
        abandoned = made.run("train", jobs)
        next(abandoned)
        abandoned.close()  # type: ignore[attr-defined]
        made.rollback()
        expected = list(made.run("train", jobs))
        made.rollback()
        assert [r.metrics["loss"] for r in made.run("train", jobs)] == [r.metrics["loss"] for r in expected]


def test_rooms_are_as_wide_as_what_goes_together(config: Config, tmp_path: Path) -> None:
    config = changed(config, model={"local": ("cnn-1", "cnn-5", "cnn-5", "cnn-5")}, federation={"clients": 8})
    run = begin(config, tmp_path / "run")
    with engine(config, run, How(), cohort=6) as made:
        list(made.run("train", jobs_of(config, *range(8))))
        sizes = {made.site.roster[client][0].architecture: made.site.roster[client][1].size for client in range(8)}
        assert len(made.lanes[0].rooms[0].region) == max(2 * sizes["cnn-1"], 6 * sizes["cnn-5"])


def test_a_cohort_that_did_not_fit_is_gone_before_its_halves_come(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config, model={"local": ("cnn-5",)})
    run, made_ = begin(config, tmp_path / "run"), []
    take, init, halves = Cohort._take, Cohort.__init__, []

    def watched(self: Cohort, *given: Any) -> None:
        made_.append(weakref.ref(self))
        init(self, *given)

    def short(self: Cohort, indices: torch.Tensor) -> None:
        take(self, indices)
        if self.rows == 4:
            raise torch.OutOfMemoryError
        halves.append([cohort.rows == 4 for cohort in (reference() for reference in made_) if cohort is not None])

    monkeypatch.setattr(Cohort, "__init__", watched)
    monkeypatch.setattr(Cohort, "_take", short)
    with engine(config, run, How(), cohort=4) as made, pytest.warns(UserWarning, match="with 4 clients together"):
        list(made.run("train", jobs_of(config, 0, 1, 2, 3)))
    assert len(made_) == 3 and not any(any(alive) for alive in halves)  # one of a trial
