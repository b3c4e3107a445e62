"""Simulated bad clients: what is sent for theta_k, by whom, what cannot be meant, and that a resumed run is one."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedmoe import configfile, meaning
from fedmoe.attack import attacked, described
from fedmoe.config import Attack, Config
from fedmoe.engine.seam import Job, Result
from fedmoe.errors import UserError
from tests.support import SMALL, Fedmoe, changed
from tests.test_kill import end

GOT = torch.tensor([1.0, -2.0])
TRAINED = torch.tensor([1.5, -2.25])
NAN = torch.full((2,), torch.nan)


def sent(attack: Attack, weight: float = 5) -> list[Result]:
    """What reaches the server of clients 2, 3 and 5, which have trained."""
    jobs = [Job(client, 1, {"theta": GOT}) for client in (2, 3, 5)]
    results: Iterator[Result] = (Result(job.client, {"theta": TRAINED}, weight, {"loss": 0.5}) for job in jobs)
    return list(attacked(attack, jobs, results))


@pytest.mark.parametrize(
    ("attack", "lie"),
    [
        (Attack(kind="none", clients=(3, 5)), TRAINED),
        (Attack(kind="scale", clients=(3, 5), factor=8), torch.tensor([5.0, -4.0])),
        (Attack(kind="flip", clients=(3, 5), factor=8), torch.tensor([-3.0, 0.0])),
        (Attack(kind="nan", clients=(3, 5)), NAN),
    ],
    ids=lambda value: value.kind if isinstance(value, Attack) else "",
)
def test_bad_clients_send_what_is_documented_and_others_what_they_trained(attack: Attack, lie: torch.Tensor) -> None:
    good, *bad = sent(attack)
    assert torch.equal(good.payload["theta"], TRAINED)
    for result in bad:
        torch.testing.assert_close(result.payload["theta"], lie, rtol=0, atol=0, equal_nan=True)
    assert [(r.client, r.weight, r.metrics) for r in (good, *bad)] == [(c, 5, {"loss": 0.5}) for c in (2, 3, 5)]


def test_a_client_that_was_rolled_back_sends_nothing_bad_either() -> None:
    results = sent(Attack(kind="nan", clients=(2, 3, 5)), weight=0)
    assert all(torch.equal(result.payload["theta"], TRAINED) for result in results)


@pytest.mark.parametrize(
    ("attack", "line"),
    [
        ({"kind": "nan"}, 'attack.clients is empty, must name bad clients with attack.kind = "nan"'),
        ({"clients": (10,)}, "attack.clients has 10, must be from 0 to 9: federation.clients is 10"),
        ({"clients": (-1,)}, "attack.clients has -1, must be from 0 to 9: federation.clients is 10"),
        ({"clients": (4, 1, 4)}, "attack.clients has 4 twice, must name each client once"),
        ({"clients": (1,), "factor": 0.0}, "attack.factor is 0.0, must be more than 0"),
    ],
)
def test_what_cannot_be_meant(attack: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        meaning.check(changed(Config(), attack={"kind": "scale", **attack}))


def test_what_has_no_effect() -> None:
    assert meaning.ignored(changed(Config(), attack={"clients": (99,)})) == [
        'attack.clients = (99,) has no effect with attack.kind = "none"'
    ]
    nan = changed(Config(), attack={"kind": "nan", "clients": (1,), "factor": 2.0})
    assert meaning.ignored(nan) == ['attack.factor = 2.0 has no effect with attack.kind = "nan"']
    assert described(nan) == "1 of 10 clients (1) send NaN instead of θ_k"
    local = changed(nan, method="local")
    assert not described(local) and meaning.effective(local) == meaning.effective(changed(Config(), method="local"))


def test_clients_are_whole_numbers(tmp_path: Path) -> None:
    for words in (["--attack.clients", "1", "4"], ["--attack.clients=1", "4"]):
        assert configfile.override(Config(), words).attack.clients == (1, 4)
    assert configfile.parse("attack.clients", configfile.shown((1, 4))) == (1, 4)
    path = tmp_path / "config.toml"
    path.write_text("[attack]\nclients = ['1']")
    with pytest.raises(UserError, match=r"attack.clients is .'1'., must be a list of whole numbers"):
        configfile.read(path)
    with pytest.raises(UserError, match=r"attack.clients is .1, 'x'., must be a list of whole numbers"):
        configfile.parse("attack.clients", "1+x")


def test_resumed_run_ends_as_one_that_was_not_stopped(tmp_path: Path, fedmoe: Fedmoe) -> None:
    words = [*SMALL, "--model.local=cnn-5", "--attack.kind=flip", "--attack.clients", 1, 4, "--federation.rounds"]
    told = "attacked: 2 of 5 clients (1, 4) send θ − 10 (θ_k − θ) instead of θ_k\n"
    whole = fedmoe("train", *words, 2, "--run.dir=whole")
    first = fedmoe("train", *words, 1, "--run.dir=parts")
    rest = fedmoe("resume", "parts", "--rounds=2")
    assert all(done.code == 0 and done.out.startswith(told) for done in (whole, first, rest)), (whole, first, rest)
    assert end(tmp_path / "parts") == end(tmp_path / "whole")
    edited = tmp_path / "parts" / "config.toml"
    edited.write_text(edited.read_text().replace('kind = "flip"', 'kind = "scale"'))
    line = fedmoe("resume", "parts", "--rounds=3").one_line()
    assert "attack.kind is 'scale', the run began with 'flip'" in line
