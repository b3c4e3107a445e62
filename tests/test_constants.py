"""Weights that never change: in no checkpoint, kept once for all who share them, brought in only where they differ."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedmoe import checkpoint
from fedmoe.client import open_client
from fedmoe.config import Config, Data, Federation, Model, Partition
from fedmoe.engine.device_engine import DeviceEngine
from fedmoe.engine.graphs import Track
from fedmoe.engine.residency import Residency
from fedmoe.engine.rooms import Room
from fedmoe.engine.seam import Engine, Job
from fedmoe.engine.step import How
from fedmoe.errors import UserError
from fedmoe.reference import ReferenceEngine
from tests.engines import Outcome, assert_close, assert_same, engine, rounds
from tests.support import begin, changed, theta

CPU = torch.device("cpu")
VALUE = 0.25
"""Of what clients share; a test changes it, as a download may change."""


class Backbone(nn.Module):
    """One layer that never trains, of weights that all clients share or each has its own; and one that does."""

    def __init__(self, inputs: int, shared: bool) -> None:
        super().__init__()
        self.frozen = nn.Linear(inputs, 24).requires_grad_(False)
        if shared:
            nn.init.constant_(self.frozen.weight, VALUE)
            nn.init.zeros_(self.frozen.bias)
        self.trained: nn.Module = nn.Linear(24, 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.trained(self.frozen(x.flatten(1)).relu())
        return out


def shared(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return Backbone(shape[0] * shape[1] * shape[2], True), nn.Linear(50, classes)


def own(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return Backbone(shape[0] * shape[1] * shape[2], False), nn.Linear(50, classes)


def deeper(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    """Of the very weights that `shared` has, beside more that trains."""
    body = Backbone(shape[0] * shape[1] * shape[2], True)
    body.trained = nn.Sequential(nn.Linear(24, 60), nn.Linear(60, 50))
    return body, nn.Linear(50, classes)


def open_(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    """All of it trains."""
    return Backbone(shape[0] * shape[1] * shape[2], False).requires_grad_(True), nn.Linear(50, classes)


SHARED, OWN, DEEPER, OPEN = (f"tests.test_constants:{name}" for name in ("shared", "own", "deeper", "open_"))
NAMES = ("model/local_expert.frozen.weight", "model/local_expert.frozen.bias")


@pytest.fixture
def mixed(config: Config) -> Config:
    """Five clients: 0, 2 and 4 share their frozen weights, 1 and 3 have their own."""
    return changed(config, model={"local": (SHARED, OWN)})


def outcome(config: Config, folder: Path, **options: Any) -> Outcome:
    run = begin(config, folder)
    with engine(config, run, How(), **options) as made:
        return rounds(config, made, run)


def test_training_is_the_plain_loop_s_under_every_budget(mixed: Config, tmp_path: Path) -> None:
    run = begin(mixed, tmp_path / "plain")
    expected = rounds(mixed, ReferenceEngine(mixed, run, CPU), run)
    found = outcome(mixed, tmp_path / "memory")
    assert_close(found, expected, 2e-5)
    assert_same(outcome(mixed, tmp_path / "files", memory=0), found)
    assert_close(outcome(mixed, tmp_path / "cohorts", cohort=3), expected, 2e-5)
    for states in (expected.states, found.states):
        assert not {name for state in states.values() for name in state} & set(NAMES)
        assert torch.equal(states[0]["constants"], states[4]["constants"])
        assert not torch.equal(states[1]["constants"], states[3]["constants"])


@pytest.mark.parametrize("rooms", [1, 2])
def test_any_order_of_any_clients_gives_the_plain_loop_s(rooms: int, config: Config, tmp_path: Path) -> None:
    """Of several sizes, alone and two together, from pieces in memory and in files."""
    draw, clients = random.Random(rooms), 6
    config = changed(
        config,
        model={"local": (SHARED, DEEPER, OPEN), "global_expert": OPEN},
        federation={"clients": clients},
        partition={"kind": "iid"},
        data={"limit": 100},
        training={"batch_size": 8},
    )
    plain = ReferenceEngine(config, begin(config, tmp_path / "plain"), CPU)
    run = begin(config, tmp_path / "run")
    given, outcomes = theta(config), (Outcome([], [], [], {}), Outcome([], [], [], {}))
    with engine(config, run, How(), memory=400_000, piece=16384, cohort=2) as made:
        made.lanes[0].rooms = [Room(CPU) for _ in range(rooms)]
        engines: tuple[Engine, Engine] = (made, plain)
        for number in range(1, 9):
            some = draw.sample(range(clients), draw.randint(1, 4))
            for one, out in zip(engines, outcomes, strict=True):
                out.train.extend(one.run("train", [Job(client, number, given, {"epochs": 1}) for client in some]))
                out.evaluated.extend(one.run("evaluate", [Job(client, number, {}) for client in reversed(some)]))
                (one.rollback if number % 3 == 1 else one.commit)()
                out.states.update({client: state() for client, state in one.changed().items()})
            given = outcomes[1].train[-1].payload
    assert_close(*outcomes, 2e-5)


def test_equal_constants_are_kept_once(mixed: Config, tmp_path: Path) -> None:
    run = begin(mixed, tmp_path / "run")
    with engine(mixed, run, How()) as made:
        layouts = [made.site.roster[client][1] for client in range(5)]
        tails = [layout.size - layout.moving for layout in layouts]
        pixels = 28 * 28
        assert set(tails) == {-(-24 * pixels * 4 // 256) * 256 + 256}
        assert made.store.held["host"] == sum(layout.moving for layout in layouts) + 3 * tails[0]


def brought_in(made: DeviceEngine, monkeypatch: pytest.MonkeyPatch, config: Config, *clients: int) -> list[int]:
    """Whose states and constants (below 0) come into the region when these clients train one after the other."""
    seen: list[int] = []
    real = type(made.store.residency).load

    def load(self: Any, block: Any, *rest: Any) -> Any:
        seen.append(block.client)
        return real(self, block, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(type(made.store.residency), "load", load)
        list(made.run("train", [Job(client, 1, theta(config), {"epochs": 1}) for client in clients]))
    return seen


def test_constants_come_in_only_where_they_differ(
    mixed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(mixed, tmp_path / "run")
    with engine(mixed, run, How()) as made:
        for client in range(5):
            made.site.roster[client]
        ids = [made.store.constants(client) for client in range(5)]
        assert ids[0] == ids[2] == ids[4] and len(set(ids)) == 3
        a, b, c = ids[0], ids[1], ids[3]
        assert brought_in(made, monkeypatch, mixed, 0, 2, 4) == [a, 0, 2, 4]
        assert brought_in(made, monkeypatch, mixed, 2, 1, 1, 3, 0) == [2, b, 1, 1, c, 3, a, 0]


def test_a_room_knows_whose_constants_are_in_each_of_its_rows(
    mixed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    track, room = Track(CPU), Room(CPU)
    room.fit(400, track)
    room.taken(0, 100, -1)
    room.taken(1, 100, -2)
    assert room.has(0, 100, -1) and room.has(1, 100, -2)
    assert not any((room.has(0, 100, -2), room.has(2, 100, -1), room.has(0, 200, -1)))
    room.taken(0, 200, -1)  # over both rows
    room.taken(0, 100, -1)
    assert room.has(0, 100, -1) and not room.has(1, 100, -2)
    room.fit(300, track)
    assert room.has(0, 100, -1)
    room.fit(500, track)  # another region
    assert not room.has(0, 100, -1)
    with engine(mixed, begin(mixed, tmp_path / "run"), How(), cohort=2) as made:
        for client in (1, 3):
            made.site.roster[client]
        a, b = made.store.constants(1), made.store.constants(3)
        assert brought_in(made, monkeypatch, mixed, 1, 3) == [a, 1, b, 3]
        assert brought_in(made, monkeypatch, mixed, 1, 3) == [1, 3]
        assert brought_in(made, monkeypatch, mixed, 3) == [b, 3]


def test_constants_that_came_in_half_are_not_taken_for_whole(
    mixed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = begin(mixed, tmp_path / "run"), Residency.load

    def load(self: Any, block: Any, *rest: Any) -> Any:
        if block.client == 1:
            raise OSError("a file that cannot be read")
        return real(self, block, *rest)

    with engine(mixed, run, How()) as made:
        [before] = made.run("evaluate", [Job(0, 1, {})])
        with monkeypatch.context() as patch:
            patch.setattr(Residency, "load", load)
            with pytest.raises(OSError, match="cannot be read"):
                list(made.run("evaluate", [Job(1, 1, {})]))
        [after] = made.run("evaluate", [Job(0, 1, {})])
    assert before.metrics["loss"] == after.metrics["loss"]


def test_a_client_whose_constants_could_not_be_kept_is_opened_again(
    mixed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("a disk that is full")

    with engine(mixed, begin(mixed, tmp_path / "run"), How()) as made:
        with monkeypatch.context() as patch:
            patch.setattr(type(made.store), "add_constants", fail)
            with pytest.raises(OSError, match="is full"):
                made.site.roster[0]
        made.site.roster[0]
        assert made.store.constants(0) is not None


def test_weights_that_have_changed_since_are_refused(
    mixed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = outcome(mixed, run := tmp_path / "run")
    writer = checkpoint.Writer(run)
    writer.submit(3, found.theta[-1], {client: (lambda s=state: s) for client, state in found.states.items()})  # type: ignore[misc]
    writer.wait()
    writer.close()
    opened = open_client(mixed, 0, run, CPU)
    assert (dict(opened.mixture.named_parameters())["local_expert.frozen.weight"] == VALUE).all()
    monkeypatch.setattr(f"{__name__}.VALUE", 0.5)
    open_client(mixed, 1, run, CPU)  # has its own
    with pytest.raises(UserError, match=r"client-0.*that do not train have changed since \(SHA-256 \w{12}, were"):
        open_client(mixed, 0, run, CPU)


def test_a_shared_expert_has_none(config: Config, tmp_path: Path) -> None:
    """What goes to the server is in every state, whether it trains or not."""
    config = changed(config, model={"local": (SHARED,), "global_expert": SHARED})
    found = outcome(config, tmp_path / "run")
    assert "model/global_expert.frozen.weight" in found.states[0]
    assert "model/local_expert.frozen.weight" not in found.states[0]


def test_states_of_adapters_are_small(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("one two three four five six seven " * 50)
    sizes = {}
    for tune in ("lora", "full"):
        model = Model(local=("qwen-tiny",), global_expert="llama-nano", adapter="linear", tune=tune, lora_rank=2)
        data = Data(kind="text", name=str(tmp_path / "words.txt"), sequence_length=16)
        made = Config(data=data, model=model, federation=Federation(clients=2), partition=Partition(kind="iid"))
        client = open_client(made, 0, begin(made, tmp_path / tune), CPU)
        state = client.state()
        sizes[tune] = sum(tensor.nbytes for tensor in state.values())
        state = {name: torch.zeros_like(t) if t.is_floating_point() else t for name, t in state.items()}
        client.load_state(state)
        weights = dict(client.mixture.named_parameters())
        kept = {name for name, weight in weights.items() if weight.any()}
        # All that is in the state took its zeros, and all else kept its values.
        assert kept == {name for name in weights if f"model/{name}" not in state}
        assert bool(kept) == (tune == "lora")
    assert sizes["lora"] < sizes["full"] / 3
