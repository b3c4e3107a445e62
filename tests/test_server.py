"""The server samples the stated number of clients, checks what comes back, and aggregates it by the stated rule."""

import math
import typing
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedmoe.config import Config, Federation
from fedmoe.config import Server as Rule
from fedmoe.engine.seam import Result
from fedmoe.kernels import native, robust
from fedmoe.kernels.averaging import weighted_mean
from fedmoe.server import Arrivals, Server


def server(**federation: object) -> Server:
    return Server(Config(federation=Federation(**federation)), {"theta": torch.zeros(4)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("clients", "fraction", "k"),
    [(10, 1.0, 10), (50, 0.2, 10), (100, 0.1, 10), (10, 0.01, 1), (7, 0.5, 4), (1, 1.0, 1)],
)
def test_sampled_count_is_max_1_round_fraction_n(clients: int, fraction: float, k: int) -> None:
    sample = server(clients=clients, fraction=fraction).sample(1)
    assert len(sample) == k
    assert sample == sorted(set(sample))
    assert all(0 <= client < clients for client in sample)


def test_sampling_depends_on_seed_and_round_alone_and_reaches_everyone() -> None:
    one, same = server(clients=50, fraction=0.2), server(clients=50, fraction=0.2)
    assert [one.sample(r) for r in range(1, 9)] == [same.sample(r) for r in range(8, 0, -1)][::-1]
    assert one.sample(1) != one.sample(2)
    counts = torch.bincount(torch.tensor([c for r in range(1, 501) for c in one.sample(r)]), minlength=50)
    # 500 draws of probability 0.2: mean 100, standard deviation 9; five of them either way.
    assert counts.min() > 55
    assert counts.max() < 145


def results(weights: list[float]) -> list[Result]:
    generator = torch.Generator().manual_seed(0)
    return [Result(i, {"theta": torch.randn(4, generator=generator)}, w, {}) for i, w in enumerate(weights)]


def aggregated(arrived: list[Result], **rule: object) -> Tensor:
    return Server(Config(server=Rule(**rule)), {"theta": torch.zeros(4)}).aggregate(arrived)["theta"]  # type: ignore[arg-type]


@pytest.mark.parametrize("aggregation", ["mean", "uniform"])
def test_mean(aggregation: str) -> None:
    arrived = results([3.0, 1.0, 6.0])
    shares = [0.3, 0.1, 0.6] if aggregation == "mean" else [1 / 3] * 3
    expected = sum(share * r.payload["theta"].double() for share, r in zip(shares, arrived, strict=True))
    theta = aggregated(arrived, aggregation=aggregation)
    assert theta.dtype == torch.float32
    # Exact in fp64 up to its own rounding, then rounded once: half an fp32 ulp.
    torch.testing.assert_close(theta.double(), expected, rtol=2**-24, atol=1e-12)
    weights = [r.weight if aggregation == "mean" else 1.0 for r in arrived]
    assert torch.equal(theta, weighted_mean([r.payload["theta"] for r in arrived], weights))


@pytest.mark.parametrize("plain", [False, True])
def test_each_rule_is_its_kernel(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(native, "module", None)
    arrived = results([3.0, 1.0, 6.0, 2.0, 5.0, 4.0, 7.0])
    updates, weights = [r.payload["theta"] for r in arrived], [r.weight for r in arrived]
    picked = robust.krum(updates, 2)
    several = robust.krum(updates, 1, 6)
    expected: list[tuple[dict[str, object], Tensor]] = [
        ({"aggregation": "median"}, robust.median(updates)),
        ({"aggregation": "trimmed_mean", "trim": 0.29}, robust.trimmed_mean(updates, 2)),
        ({"aggregation": "clipped_mean"}, robust.clipped_mean(updates, weights, torch.zeros(4))),
        (
            {"aggregation": "clipped_mean", "clip_factor": 0.5},
            robust.clipped_mean(updates, weights, torch.zeros(4), factor=0.5),
        ),
        ({"aggregation": "clipped_mean", "clip_norm": 0.1}, robust.clipped_mean(updates, weights, torch.zeros(4), 0.1)),
        ({"aggregation": "krum", "byzantine": 2}, updates[picked[0]]),
        ({"aggregation": "multi_krum"}, weighted_mean([updates[k] for k in several], [1.0] * 6)),
        ({"aggregation": "multi_krum", "chosen": 7}, weighted_mean(updates, [1.0] * 7)),
    ]
    for rule, theta in expected:
        assert torch.equal(aggregated(arrived, **rule), theta), rule


@pytest.mark.parametrize("aggregation", typing.get_args(typing.get_type_hints(Rule)["aggregation"]))
def test_weight_0_and_what_is_unfit_are_left_out(aggregation: str) -> None:
    rule = Rule(aggregation=aggregation, trim=0.2)  # type: ignore[arg-type]
    arrived = results([3.0, 0.0, 6.0, 1.0, 2.0, 4.0, 5.0])
    first, good = arrived[0], arrived[2:]
    for bad, reason in (
        (replace(first, payload={"theta": torch.ones(3)}), "'theta' is torch.float32 [3], must be torch.float32 [4]"),
        (
            replace(first, payload={"theta": torch.ones(4).half()}),
            "'theta' is torch.float16 [4], must be torch.float32 [4]",
        ),
        (replace(first, payload={}), "'theta' is missing"),
        (
            replace(first, payload={"theta": torch.tensor([1, math.nan, 2, math.inf])}),
            "2 of the 4 numbers of 'theta' are not finite",
        ),
        (
            replace(first, payload={"theta": torch.tensor([1, -math.inf, 2, 3])}),
            "1 of the 4 numbers of 'theta' are not finite",
        ),
        (replace(first, weight=math.nan), "its weight is nan, must be a number of samples, from 0 to 2^53"),
        (replace(first, weight=-1.0), "its weight is -1.0, must be a number of samples, from 0 to 2^53"),
        # Finite, but its product with a finite theta_k is not, nor is the sum of two such.
        (replace(first, weight=1e308), "its weight is 1e+308, must be a number of samples, from 0 to 2^53"),
        (replace(first, metrics={"loss": math.inf}), "its loss is inf, must be finite"),
    ):
        arrivals = Arrivals(rule, {"theta": torch.zeros(4)})
        for result in [bad, *arrived[1:]]:
            arrivals.add(result)
        assert arrivals.rejected == {0: reason} and not arrivals.kept
        assert torch.equal(
            arrivals.theta()["theta"], Server(Config(server=rule), {"theta": torch.zeros(4)}).aggregate(good)["theta"]
        )


def test_too_few_for_krum_leave_theta_and_say_so() -> None:
    theta = {"theta": torch.zeros(4)}
    arrivals = Arrivals(Rule(aggregation="krum"), theta)
    for result in results([1.0] * 4):
        arrivals.add(result)
    assert arrivals.theta() is theta and arrivals.kept == "krum needs 5 results, 4 were fit to count"


@pytest.mark.parametrize("aggregation", ["mean", "uniform", "median"])
def test_nothing_to_go_by_leaves_theta_and_says_so(aggregation: str) -> None:
    theta = {"theta": torch.zeros(4)}
    arrivals = Arrivals(Rule(aggregation=aggregation), theta)  # type: ignore[arg-type]
    for result in results([0.0, 0.0]):
        arrivals.add(result)
    assert arrivals.theta() is theta and arrivals.kept == f"{aggregation} needs 1 result, 0 were fit to count"


def test_a_client_that_is_left_out_does_not_leave_the_others_untrimmed() -> None:
    """A tenth of ten is one on either side; of the nine that a rejected one leaves it would be none."""
    arrived = results([1.0] * 10)
    arrived[0] = replace(arrived[0], payload={"theta": torch.full((4,), torch.nan)})
    arrived[1] = replace(arrived[1], payload={"theta": torch.full((4,), 1e6)})
    trimmed = aggregated(arrived, aggregation="trimmed_mean", trim=0.1)
    assert torch.equal(trimmed, robust.trimmed_mean([r.payload["theta"] for r in arrived[1:]], 1))
    assert trimmed.abs().max() < 100
    for few in (1, 2):  # of which none can be spared
        assert torch.isfinite(aggregated(arrived[-few:], aggregation="trimmed_mean", trim=0.1)).all()


def test_mean_holds_nothing_of_a_client() -> None:
    theta = {"theta": torch.zeros(4)}
    for rule, held in ((Rule(), False), (Rule(aggregation="median"), True)):
        arrivals = Arrivals(rule, theta)
        [result] = results([1.0])
        payload = weakref.ref(result.payload["theta"])
        arrivals.add(result)
        del result
        assert (payload() is not None) == held


def test_jobs_carry_theta_and_settings_and_nothing_else() -> None:
    s = server(clients=4, epochs=3)
    jobs = s.jobs(5)
    assert [(j.client, j.round, dict(j.settings)) for j in jobs] == [(c, 5, {"epochs": 3}) for c in range(4)]
    assert all(j.payload.keys() == {"theta"} for j in jobs)
