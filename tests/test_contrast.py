"""A comparison's numbers: which round, what is paired with what, what it took, and the words for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmoe.comparetable import cells, difference_cells
from fedmoe.contrast import Report, contrast
from fedmoe.errors import UserError
from fedmoe.variants import read
from tests.trained import made


def compared(folder: Path, *runs: dict[str, Any], **options: Any) -> Report:
    """Of runs with these accuracies and fields."""
    return contrast([read(made(folder / f"r{i}", **fields)) for i, fields in enumerate(runs)], **options)[0]


def accuracies(shift: float, seed: int, clients: int = 5, noise: float = 0.005) -> list[list[float]]:
    """Of one round: as the seed has it, and a shift."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(0.4, 0.8, clients)
    return [(base + shift + np.random.default_rng([seed, int(1e3 * shift)]).normal(0, noise, clients)).tolist()]


def seeds(shift: float, count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"accuracies": accuracies(shift, seed), "seed": seed} | fields for seed in range(count)]


def test_a_difference_beyond_the_noise_and_one_within(tmp_path: Path) -> None:
    report = compared(
        tmp_path, *seeds(0.0, 4), *seeds(0.1, 4, method="local"), *seeds(0.001, 4, method="static"),
    )  # fmt: skip
    assert [row.name for row in report.variants] == ["method=fedmoe", "method=local", "method=static"]
    better, same = report.differences
    assert better.verdict == "higher" and better.how == "paired, 4 seeds"
    assert better.estimate.low is not None and 0.09 < better.estimate.low < better.estimate.mean < 0.11
    assert same.verdict == "within the noise"
    assert better.p_holm == pytest.approx(2 * (better.estimate.p or 0))
    assert any("cover what another seed changes" in note for note in report.notes)
    assert any("all 2 comparisons together" in note for note in report.notes)
    assert compared(tmp_path / "2", *seeds(0.1, 3), *seeds(0.0, 3, method="local")).differences[0].verdict == "lower"


def test_a_difference_that_many_comparisons_leave_open_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.4, 0.6, 5)
    runs: list[dict[str, Any]] = [{"accuracies": [base.tolist()]}]
    runs.append(
        {"accuracies": [(base + np.array([0.01, 0.01, 0.02, 0.02, 0.001])).tolist()], "training__lr": 0.1}
    )  # p = 0.03
    for i in range(2, 5):
        runs.append({"accuracies": [(base + rng.normal(0, 0.1, 5)).tolist()], "training__lr": float(i)})
    found = compared(tmp_path, *runs).differences[0]
    assert found.estimate.p is not None and found.estimate.p < 0.05 < (found.p_holm or 0)
    assert found.verdict == "within the noise of 4 comparisons"


def test_one_seed_is_over_its_clients_and_says_what_that_leaves_out(tmp_path: Path) -> None:
    report = compared(tmp_path, *seeds(0.0, 1), *seeds(0.1, 1, method="local"))
    assert report.differences[0].how == "paired, 5 clients of seed 0"
    assert any("not what another seed would change" in note for note in report.notes)
    assert report.variants[0].over_seeds is None


def test_what_cannot_be_paired_says_why(tmp_path: Path) -> None:
    def how(name: str, other: dict[str, Any], count: int = 1) -> str:
        second = [{**fields, "method": "local", **other} for fields in seeds(0.1, count)]
        return compared(tmp_path / name, *seeds(0.0, count), *second).differences[0].how

    assert how("partition", {"environment": {"partition": "q"}}) == (
        "not paired, the partitions differ: 5 and 5 clients"
    )
    assert how("data", {"environment": {"data": "e"}}, 2) == "not paired, the data differ: 2 and 2 seeds"
    assert how("clients", {"accuracies": [[0.5] * 3 + [0.6]]}) == "not paired, 5 clients against 4: 5 and 4 clients"
    assert how("seed", {"seed": 7}) == "not paired, no seed in common: 5 and 5 clients"


def test_only_seeds_in_common_are_paired(tmp_path: Path) -> None:
    report = compared(tmp_path, *seeds(0.0, 3), *seeds(0.1, 2, method="local"))
    assert report.differences[0].how == "paired, 2 of 3 seeds" and report.variants[0].seeds == [0, 1, 2]


def test_no_telling(tmp_path: Path) -> None:
    far = {"method": "local", "environment": {"partition": "q"}}
    report = compared(tmp_path / "1", *seeds(0.0, 3), {"accuracies": [[0.5, 0.6]], "seed": 0} | far)
    assert report.differences[0].verdict == "no telling: one seed against several shows no noise"
    report = compared(tmp_path / "2", {"accuracies": [[0.5]]}, {"accuracies": [[0.7]], "method": "local"})
    assert report.differences[0].verdict == "no telling: one client of one seed"
    report = compared(tmp_path / "3", {"accuracies": [[0.5] * 3]}, {"accuracies": [[0.75] * 3], "method": "local"})
    assert report.differences[0].verdict == "no telling: all differ by the same"
    report = compared(tmp_path / "4", {"accuracies": [[0.5] * 3]}, {"accuracies": [[0.5] * 3], "method": "local"})
    assert report.differences[0].verdict == "none at all"


def test_the_last_round_that_all_have_evaluated(tmp_path: Path) -> None:
    a = {"accuracies": {n: [0.1 * n, 0.1] for n in (2, 4, 6)}}
    b = {"accuracies": {n: [0.1 * n, 0.2] for n in (3, 4)}, "method": "local", "rounds": 9}
    report = compared(tmp_path / "1", a, b)
    assert report.round == 4 and report.variants[0].accuracy == pytest.approx(0.25)
    assert report.notes[-1] == f"Not finished: {tmp_path}/1/r1 (4 of 9 rounds); compared after round 4."
    with pytest.raises(UserError, match="r1 was not evaluated in round 6, but in 3, 4"):
        compared(tmp_path / "2", a, b, number=6)
    with pytest.raises(UserError, match=r"evaluated in all runs: .*r0 has 2, .*r1 3: leave a run out, or train on"):
        compared(tmp_path / "3", {"accuracies": {2: [0.5]}}, {"accuracies": {3: [0.5]}, "method": "local"})


def test_runs_without_evaluation_are_left_out_and_said_to_be(tmp_path: Path) -> None:
    report = compared(tmp_path / "1", *seeds(0.0, 1), {"accuracies": {}, "method": "local"})
    assert [row.name for row in report.variants] == ["method=fedmoe"] and report.differences == []
    assert f"Left out, not evaluated yet: {tmp_path}/1/r1." in report.notes
    assert "The runs are of one variant: there is nothing to compare it with." in report.notes
    with pytest.raises(UserError, match="no round is evaluated yet: `fedmoe resume"):
        compared(tmp_path / "2", {"accuracies": {}})


def test_what_a_target_took(tmp_path: Path) -> None:
    rising = [[0.1 * n, 0.1 * n] for n in range(1, 8)]
    slow = [[0.05 * n, 0.05 * n] for n in range(1, 8)]
    report = compared(
        tmp_path, {"accuracies": rising}, {"accuracies": slow, "seed": 1}, {"accuracies": slow, "method": "local"},
        target=0.4,
    )  # fmt: skip
    first, second = (row.cost for row in report.variants)
    assert (first.reached, first.rounds, first.bytes, first.seconds) == (1, 4, 8000, 2.0)
    assert (second.reached, second.rounds, second.bytes) == (0, None, None)
    report = compared(tmp_path / "2", {"accuracies": rising})
    assert (report.variants[0].cost.rounds, report.variants[0].cost.flops) == (7, 7e9)


def test_clients_without_an_accuracy_are_named_and_not_paired(tmp_path: Path) -> None:
    nan = float("nan")
    report = compared(
        tmp_path / "1", {"accuracies": [[0.5, 0.6, 0.7]]}, {"accuracies": [[0.6, nan, 0.75]], "method": "local"}
    )
    assert report.differences[0].estimate.mean == pytest.approx(0.075)
    assert report.variants[1].accuracy == pytest.approx(0.675)
    assert any("r1: no accuracy of 1 client (1), left out of its mean and pairs" in note for note in report.notes)
    report = compared(tmp_path / "2", {"accuracies": [[0.5, 0.6]]}, {"accuracies": [[nan, nan]], "method": "local"})
    assert report.variants[1].accuracy is None and report.differences == []


def test_spreads(tmp_path: Path) -> None:
    report = compared(tmp_path, {"accuracies": [[0.4, 0.6]]}, {"accuracies": [[0.5, 0.9]], "seed": 1})
    [row] = report.variants
    assert row.accuracy == pytest.approx(0.6) and row.over_seeds == pytest.approx(0.2 / 2**0.5)
    assert row.over_clients == pytest.approx(0.15) and row.worst == pytest.approx(0.45)
    assert row.test_loss == pytest.approx(0.4)


def test_numbers_of_images_are_what_they_were(tmp_path: Path) -> None:
    """Before text was compared by its perplexity: to the digit."""
    runs = [
        {"accuracies": [[0.5 + 0.1 * s + g * (1 + 0.1 * s), 0.61 + g, 0.7 - 0.02 * s - g / 2]], "seed": s, "method": m}
        for m, g in (("fedmoe", 0), ("local", 0.05), ("static", -0.004))
        for s in range(3)
    ]
    report = compared(tmp_path, *runs)
    assert [cells(row, report)[2:6] for row in report.variants] == [
        ["0.6300 ± 0.0267", "± 0.051", "0.570", "0.37"],
        ["0.6567 ± 0.0283", "± 0.037", "0.613", "0.3433"],
        ["0.6279 ± 0.0265", "± 0.053", "0.566", "0.3721"],
    ]
    assert [difference_cells(difference, report.by)[1:6] for difference in report.differences] == [
        ["+0.0267", "+0.0225 to +0.0308", "0.001", "0.003", "higher"],
        ["-0.0021", "-0.0025 to -0.0018", "0.001", "0.003", "lower"],
    ]
    e = report.differences[0].estimate
    assert [e.mean, e.low, e.high] == pytest.approx([0.0266666666666667, 0.0225264371470828, 0.0308068961862506])
    assert [difference.better for difference in report.differences] == [True, False]
    assert [difference.ratio for difference in report.differences] == [None, None]


def test_other_machines_are_said(tmp_path: Path) -> None:
    other = {"environment": {"cpu": "another"}, "method": "local"}
    report = compared(tmp_path, *seeds(0.0, 1), *seeds(0.0, 1, **other))
    assert any("their seconds do not compare" in note for note in report.notes)
