"""Paired differences: against worked values, and by simulation what their intervals cover and what they do not."""

import numpy as np
import pytest
from scipy import stats

from fedmoe.pairing import Scores, deviation, holm, paired, unpaired

Rng = np.random.Generator


def scores(values: list[list[float]], seeds: list[int] | None = None) -> Scores:
    """A list of clients' scores for each seed."""
    return {s: dict(enumerate(row)) for s, row in zip(seeds or range(len(values)), values, strict=True)}


def federation(rng: Rng, seeds: int, clients: int, shift: float = 0.0, between: float = 0.02) -> tuple[Scores, Scores]:
    """Two variants whose scores vary much with seed and client, alike in both; their difference varies little."""
    common = 0.7 + rng.normal(0, 0.1, (seeds, 1)) + rng.normal(0, 0.1, (seeds, clients))
    by_seed = rng.normal(0, between, (seeds, 1))
    other = common + shift + by_seed + rng.normal(0, 0.03, (seeds, clients))
    return scores(common.tolist()), scores(other.tolist())


def test_student_over_seeds_as_scipy_has_it() -> None:
    first = scores([[0.5, 0.7], [0.6, 0.6], [0.4, 0.8], [0.5, 0.5]])
    second = scores([[0.6, 0.7], [0.6, 0.7], [0.5, 0.8], [0.5, 0.7]])
    means = [0.05, 0.05, 0.05, 0.1]
    found = paired(first, second)
    assert (found.unit, found.counts) == ("seed", (4,)) and found.mean == pytest.approx(0.0625)
    expected = stats.ttest_1samp(means, 0)
    interval = expected.confidence_interval(0.95)
    assert [found.low, found.high, found.p] == pytest.approx([*interval, expected.pvalue])


def test_one_seed_is_over_its_clients() -> None:
    a, b = [0.5, 0.7, 0.6], [0.6, 0.75, 0.6]
    found, expected = paired(scores([a]), scores([b])), stats.ttest_rel(b, a)
    assert (found.unit, found.counts) == ("client", (3,)) and found.p == pytest.approx(expected.pvalue)


def test_pairs_are_of_common_seeds_and_clients_alone() -> None:
    first = {0: {0: 0.5, 1: 0.9}, 1: {0: 0.5}, 2: {0: 0.1}, 3: {7: 1.0}}
    second = {0: {0: 0.6, 2: 0.1}, 1: {0: 0.8}, 3: {8: 0.0}}
    found = paired(first, second)
    assert found.mean == pytest.approx(0.2) and found.counts == (2,)
    with pytest.raises(ValueError, match="no client in common"):
        paired({0: {0: 1.0}}, {1: {0: 1.0}})


@pytest.mark.parametrize(("seeds", "unit"), [(1, "client"), (4, "seed")])
def test_welch_as_scipy_has_it(seeds: int, unit: str) -> None:
    rng = np.random.default_rng(seeds)
    a, b = rng.normal(0.7, 0.1, (seeds, 6)), rng.normal(0.8, 0.02, (seeds, 9))
    x, y = (v[0] if seeds == 1 else v.mean(1) for v in (a, b))
    expected = stats.ttest_ind(y, x, equal_var=False)
    interval = expected.confidence_interval(0.95)
    found = unpaired(scores(a.tolist()), scores(b.tolist(), list(range(10, 10 + seeds))))
    assert found.unit == unit and found.mean == pytest.approx(y.mean() - x.mean())
    assert [found.low, found.high, found.p] == pytest.approx([*interval, expected.pvalue])


def test_where_noise_cannot_be_seen_there_is_no_interval() -> None:
    one = scores([[0.5]])
    for found in (
        paired(one, scores([[0.6]])),  # one client of one seed
        paired(scores([[0.5, 0.6]]), scores([[0.6, 0.7]])),  # all differ by the same
        unpaired(one, scores([[0.5, 0.6], [0.6, 0.6]])),  # one seed against two
    ):
        assert found.low is found.high is found.p is None
    same = paired(scores([[0.5, 0.6]]), scores([[0.5, 0.6]]))
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_holm_as_worked_out() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]


def test_deviation() -> None:
    assert deviation([0.1, 0.2, 0.6]) == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1))
    assert deviation([1.0]) is None


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_over_seeds_covers_as_often_as_it_says_and_no_difference_is_seldom_one(seeds: int) -> None:
    rng, times = np.random.default_rng(seeds), 2000
    covered = false = 0
    for _ in range(times):
        found = paired(*federation(rng, seeds, 8, shift=0.01))
        assert found.low is not None and found.high is not None
        covered += found.low <= 0.01 <= found.high
        p = paired(*federation(rng, seeds, 8)).p
        false += p is not None and p <= 0.05
    chance = 3.5 * (0.05 * 0.95 / times) ** 0.5
    assert abs(covered / times - 0.95) < chance
    assert abs(false / times - 0.05) < chance


def test_pairing_sees_what_hides_in_the_spread_of_clients_and_seeds() -> None:
    first, second = federation(np.random.default_rng(0), 5, 10, shift=0.05, between=0.005)
    together, apart = paired(first, second), unpaired(first, second)
    assert together.mean == pytest.approx(apart.mean)
    assert together.low is not None and together.high is not None and together.low > 0.03
    assert apart.low is not None and apart.high is not None
    assert apart.high - apart.low > 3 * (together.high - together.low)


def test_one_seed_covers_its_clients_and_not_other_seeds() -> None:
    """Which is why it is told apart: with a difference that depends on the seed, it misses far more than 1 in 20."""
    rng, times = np.random.default_rng(1), 1000

    def covered(between: float) -> float:
        made = (paired(*federation(rng, 1, 10, between=between)) for _ in range(times))
        return sum(e.low is not None and e.high is not None and e.low <= 0 <= e.high for e in made) / times

    assert abs(covered(0.0) - 0.95) < 3.5 * (0.05 * 0.95 / times) ** 0.5
    assert covered(0.03) < 0.7


def test_holm_holds_the_chance_of_any_false_difference() -> None:
    rng, times, wrong = np.random.default_rng(2), 600, 0
    for _ in range(times):
        ps = [paired(*federation(rng, 3, 4)).p or 0.0 for _ in range(5)]
        wrong += min(holm(ps)) <= 0.05
    assert wrong / times < 0.05 + 3.5 * (0.05 * 0.95 / times) ** 0.5
