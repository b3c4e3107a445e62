"""Runs of text are judged by perplexity throughout: differences, targets, tables, pages and reports.

In the made-up runs who has the lower test loss has the lower accuracy, too: what went by accuracy would be reversed.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from fedmoe import outcome, report
from fedmoe.comparepage import page
from fedmoe.contrast import contrast
from fedmoe.errors import UsageError, UserError
from fedmoe.measure import ACCURACY, PERPLEXITY, measure
from fedmoe.metrics import spread
from fedmoe.variants import read
from tests import reports
from tests.support import Fedmoe, changed
from tests.test_page import Parsed
from tests.trained import made

TEXT: dict[str, Any] = {"data__kind": "text", "data__name": "stdlib"}
LOSSES = [[1.5, 2.0, 3.0], [1.0, 2.5, 2.0], [1.2, 2.2, 2.9]]
"""By seed and client, after the second of two rounds; a nat more after the first."""
GAINS = [[0.1, 0.2, 0.3], [0.25, 0.2, 0.0], [0.2, 0.1, 0.15]]
"""So much lower are they with the method local."""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed, (losses, gains) in enumerate(zip(LOSSES, GAINS, strict=True)):
        lower = [loss - gain for loss, gain in zip(losses, gains, strict=True)]
        for method, values in (("fedmoe", losses), ("local", lower)):
            rounds = [[value + 1 for value in values], values]
            made(tmp_path / "runs" / f"{method}{seed}", rounds, seed=seed, method=method, **TEXT)
    return tmp_path / "runs"


def geometric(losses: list[list[float]]) -> float:
    return math.exp(sum(map(sum, losses)) / 9)


def test_differences_are_of_the_loss_and_shown_as_ratios_of_perplexity(runs: Path) -> None:
    found, _ = contrast([read(folder) for folder in sorted(runs.iterdir())])
    first, second = found.variants
    [difference] = found.differences
    means = [-sum(gains) / 3 for gains in GAINS]
    interval = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    expected = [sum(means) / 3, *interval]
    e = difference.estimate
    assert [e.mean, e.low, e.high] == pytest.approx(expected) and e.unit == "seed"
    assert difference.ratio == pytest.approx([math.exp(x) for x in expected])
    assert (difference.verdict, difference.better) == ("lower (better)", True)
    assert first.perplexity == pytest.approx(geometric(LOSSES)) and first.test_loss == pytest.approx(6.1 / 3)
    assert first.perplexity and second.perplexity
    assert second.perplexity / first.perplexity == pytest.approx(math.exp(expected[0]))
    assert first.worst == pytest.approx(math.exp((3.0 + 2.5 + 2.9) / 3)), "not of the client with the highest loss"
    other, _ = contrast([read(folder) for folder in sorted(runs.iterdir(), reverse=True)])
    assert (other.differences[0].verdict, other.differences[0].better) == ("higher (worse)", False)


def test_table_page_and_json_agree(runs: Path, fedmoe: Fedmoe) -> None:
    done = fedmoe("compare", "runs", "--out", "page.html", "--target", "7")
    assert done.code == 0, done
    [difference] = contrast([read(folder) for folder in sorted(runs.iterdir())], target=7)[0].to_json()["differences"]
    change, low, high = (f"{100 * (ratio - 1):+.2f} %" for ratio in difference["ratio"])
    shown = Parsed((runs.parent / "page.html").read_text())
    for words in (
        "held-out perplexity after round 2", f"{geometric(LOSSES):.2f} ± ", f"{change}", f"{low} to {high}",
        "lower (better)", "what it took to a perplexity of 7", "perplexity against that of method=fedmoe",
        "method=local has the better perplexity for 8 of 9 clients of all seeds, method=fedmoe for 0.",
    ):  # fmt: skip
        assert words in " ".join(done.out.split()), words
        assert words.casefold() in " ".join(shown.words.casefold().split()), words
    assert "highest" in done.out and "lowest" not in done.out
    curves, forest, clients = (shown.figures[f"plot-{name}"] for name in ("curves", "forest", "clients"))
    assert curves["layout"]["yaxis"]["type"] == "log"
    assert curves["data"][0]["y"] == pytest.approx([math.e * geometric(LOSSES), geometric(LOSSES)])
    assert forest["data"][0]["x"] == pytest.approx([100 * (difference["ratio"][0] - 1)])
    assert forest["data"][0]["marker"]["color"] == ["var(--accent)"]
    assert clients["data"][0]["x"][0] == pytest.approx(math.exp(1.5)) and "lower is better" in shown.words


def test_a_target_is_a_perplexity_that_is_reached_from_above(runs: Path) -> None:
    trained = [read(folder) for folder in sorted(runs.iterdir())]
    by_seed = [math.exp(sum(losses) / 3) for losses in LOSSES]  # 8.7, 6.3, 8.2

    def costs(target: float) -> list[tuple[int, float | None]]:
        return [(row.cost.reached, row.cost.rounds) for row in contrast(trained, target=target)[0].variants]

    assert costs(max(by_seed) + 0.01) == [(3, 2), (3, 2)]
    assert costs(min(by_seed) + 0.01) == [(1, 2), (1, 2)]
    assert costs(2.0) == [(0, None), (0, None)] and costs(100.0) == [(3, 1), (3, 1)]


@pytest.mark.parametrize("target", [0.5, math.inf, math.nan])
def test_what_is_no_perplexity(runs: Path, target: float) -> None:
    with pytest.raises(UsageError, match=f"--target is {target:g}, must be a perplexity, 1 or more"):
        contrast([read(folder) for folder in runs.iterdir()], target=target)


def test_text_and_images_do_not_compare(runs: Path) -> None:
    images = made(runs / "images", [[0.5, 0.6], [0.5, 0.6]])
    with pytest.raises(UserError, match=r"fedmoe0 is judged by perplexity and .*images by accuracy, which do not comp"):
        contrast([read(runs / "fedmoe0"), read(images)])


def test_a_perplexity_that_is_no_number_is_left_out_and_named(tmp_path: Path) -> None:
    a, b = (
        made(tmp_path / m, [[2.0, 800.0, last, 1.0]], method=m, **TEXT) for m, last in (("fedmoe", 3.0), ("local", 2.9))
    )
    found, variants = contrast([read(a), read(b)])
    assert found.variants[0].perplexity == pytest.approx(math.exp(2)) and found.differences[0].estimate.counts == (3,)
    assert any("no perplexity of 1 client (1)" in note for note in found.notes)
    json.dumps(found.to_json(), allow_nan=False)
    assert "method=local" in page(found, variants)


def test_changes_in_figures() -> None:
    assert [PERPLEXITY.change(math.log(ratio)) for ratio in (0.95, 1.5, 1e6)] == ["-5.00 %", "+50.00 %", "+1e+08 %"]
    assert ACCURACY.change(-0.05) == "-0.0500"
    PERPLEXITY.check_target(40)
    ACCURACY.check_target(0.4)
    with pytest.raises(UsageError, match="--target is 40, must be an accuracy, more than 0 and at most 1"):
        ACCURACY.check_target(40)


def test_a_report_of_text_is_by_perplexity() -> None:
    images = reports.subject(4, 3)
    config = changed(images.config, data={"kind": "text"})
    assert measure(config) == PERPLEXITY
    lines = reports.lines(4, 3)
    for line, down in zip(lines, (2.0, 1.0, 1.2), strict=True):
        losses = [down, down + 1, down + 2, down + 0.5]
        line |= {"accuracy": spread([v / 100 for v in losses]), "test_loss": spread(losses)}
        line |= {"test_loss_aggregated": spread([v + 0.1 for v in losses])}
    text = replace(images, config=config, rounds=outcome.rounds(Path("m"), lines, 4, 3), target=7.0)
    shown = Parsed(report.page(text))
    assert shown.sections[:3] == ["numbers", "perplexity", "loss"] and "accuracy" not in shown.sections
    mean, aggregated = shown.figures["plot-perplexity"]["data"][-2:]
    levels = [math.exp(down + 0.875) for down in (2.0, 1.0, 1.2)]
    assert mean["y"] == pytest.approx(levels, rel=1e-3)
    assert aggregated["y"] == pytest.approx([math.exp(0.1) * level for level in levels], rel=1e-3)
    assert f"best perplexity{levels[1]:.2f}mean, after round 2" in shown.words
    assert f"perplexity, personalized{levels[2]:.2f}" in shown.words
    assert "Cost of a perplexity" in shown.words and "is that or lower" in shown.words
    bars = shown.figures["plot-clients"]["data"]
    assert {data["y"][0]: data["x"][0] for data in bars if data["type"] == "bar"} == pytest.approx(
        {float(f"{math.exp(loss):.4g}"): place for place, loss in enumerate((3.2, 2.2, 1.7, 1.2))}
    ), "not the worst client first"
    assert "7.00asked for2" in shown.words and "200% of the best" in shown.words
