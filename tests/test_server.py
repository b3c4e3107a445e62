"""The server samples the stated number of clients and averages by the stated weights."""

import pytest
import torch

from fedmoe.config import Config, Federation
from fedmoe.engine.seam import Result
from fedmoe.server import Server


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


@pytest.mark.parametrize("aggregation", ["weighted", "uniform"])
def test_average(aggregation: str) -> None:
    arrived = results([3.0, 1.0, 6.0])
    shares = [0.3, 0.1, 0.6] if aggregation == "weighted" else [1 / 3] * 3
    expected = sum(share * r.payload["theta"].double() for share, r in zip(shares, arrived, strict=True))
    theta = server(aggregation=aggregation).average(arrived)["theta"]
    assert theta.dtype == torch.float32
    # Exact in fp64 up to its own rounding, then rounded once: half an fp32 ulp.
    torch.testing.assert_close(theta.double(), expected, rtol=2**-24, atol=1e-12)


@pytest.mark.parametrize("aggregation", ["weighted", "uniform"])
def test_weight_0_is_left_out(aggregation: str) -> None:
    arrived = results([3.0, 0.0, 6.0])
    s = server(aggregation=aggregation)
    assert torch.equal(s.average(arrived)["theta"], s.average([arrived[0], arrived[2]])["theta"])


def test_with_nothing_to_average_theta_stays() -> None:
    s = server()
    assert s.average(results([0.0, 0.0])) is s.theta


def test_jobs_carry_theta_and_settings_and_nothing_else() -> None:
    s = server(clients=4, epochs=3)
    jobs = s.jobs(5)
    assert [(j.client, j.round, dict(j.settings)) for j in jobs] == [(c, 5, {"epochs": 3}) for c in range(4)]
    assert all(j.payload.keys() == {"theta"} for j in jobs)
