"""`fedmoe compare RUN RUN`: tables, JSON and the page, and every odd request in one line."""

import json
from pathlib import Path

import pytest

from fedmoe.comparepage import clients, curves, forest, page
from fedmoe.contrast import contrast
from fedmoe.measure import ACCURACY
from fedmoe.variants import read
from tests.support import Fedmoe
from tests.test_page import Parsed
from tests.trained import made


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two variants of three seeds, in a folder."""
    for seed in range(3):
        base = [0.5 + 0.1 * seed, 0.6, 0.7 - 0.02 * seed]
        made(tmp_path / "runs" / f"a{seed}", [[a - 0.3 for a in base], base], seed=seed)
        better = [a + 0.1 + 0.002 * i * seed for i, a in enumerate(base)]
        made(tmp_path / "runs" / f"b{seed}", [base, better], seed=seed, method="local")
    return tmp_path / "runs"


def test_tables(runs: Path, fedmoe: Fedmoe) -> None:
    done = fedmoe("compare", *sorted(runs.iterdir()), "--target", "0.5")
    assert done.code == 0, done
    assert "held-out accuracy after round 2\n" in done.out.replace(" \n", "\n").replace(" " * 2, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.out.splitlines() if "│" in line]
    assert rows[0][:3] == ["method=fedmoe", "0, 1, 2", "0.6267 ± 0.0267"]
    assert "what it took to an accuracy of 0.5" in done.out
    assert [row[:2] for row in rows[2:4]] == [["method=fedmoe", "2"], ["method=local", "1"]]
    assert "accuracy less that of method=fedmoe; paired, 3 seeds" in done.out
    assert rows[4][0] == "method=local" and rows[4][-1] == "higher"
    assert "method=local has the better accuracy for 9 of 9 clients of all seeds, method=fedmoe for 0." in done.out
    assert "95 % confidence" in done.out


def test_json_and_a_folder_of_runs(runs: Path, tmp_path: Path, fedmoe: Fedmoe) -> None:
    done = fedmoe("compare", "runs", "--json", "--round", "1", "--out", "page.html")
    report = json.loads(done.out)
    assert done.code == 0 and report["round"] == 1 and report["fields"] == ["method"]
    assert [row["seeds"] for row in report["variants"]] == [[0, 1, 2]] * 2
    [difference] = report["differences"]
    assert difference["estimate"]["mean"] == pytest.approx(0.3) and difference["estimate"]["unit"] == "seed"
    assert done.err == "page: page.html\n" and (tmp_path / "page.html").is_file()


def test_page(runs: Path) -> None:
    report, variants = contrast([read(folder) for folder in sorted(runs.iterdir())])
    shown = Parsed(page(report, variants))
    assert shown.sections == ["variants", "curves", "differences", "clients", "fields", "runs"]
    assert set(shown.figures) == {"plot-curves", "plot-forest", "plot-clients"}
    for words in ("paired, 3 seeds", "0.6267 ± 0.0267", "method=local", "95 % confidence", str(runs / "a0")):
        assert words in shown.words
    lines, bands = shown.figures["plot-curves"]["data"][:2], shown.figures["plot-curves"]["data"][2:]
    assert [(t["legendgroup"], t["x"]) for t in lines] == [("method=fedmoe", [1, 2]), ("method=local", [1, 2])]
    assert [t["legendgroup"] for t in bands] == ["method=fedmoe", "method=local"]
    assert bands[0]["y"] == pytest.approx([1.06 / 3, 1.96 / 3, 0.6, 0.3])  # seeds 2 and 2, 0 and 0
    forest = shown.figures["plot-forest"]["data"][0]
    estimate = report.differences[0].estimate
    assert forest["x"] == [estimate.mean] and estimate.high is not None
    assert forest["error_x"]["array"] == [pytest.approx(estimate.high - estimate.mean)]
    assert len(shown.figures["plot-clients"]["data"][0]["x"]) == 9


def test_a_page_of_one_variant_of_three_and_of_names_that_are_markup(tmp_path: Path) -> None:
    one = [read(made(tmp_path / "one", [[0.5, 0.6]]))]
    report, variants = contrast(one)
    assert forest(report) is None and clients(variants, 1, ACCURACY) is None
    assert Parsed(page(report, variants)).sections == ["variants", "curves", "runs"]
    [line, band] = curves(variants, 1, ACCURACY).data
    assert line["mode"] == "markers" and band["y"] == [pytest.approx(0.575), pytest.approx(0.525)]
    odd = "<script>alert(1)</script>"
    three = [*one, *(read(made(tmp_path / f"{i}", [[0.5, 0.7]], model__global_expert=odd * i)) for i in (1, 2))]
    report, variants = contrast(three)
    source = page(report, variants)
    assert odd not in source and clients(variants, 1, ACCURACY) is None
    assert Parsed(source).sections == ["variants", "curves", "differences", "fields", "runs"]


def test_a_page_where_nothing_has_an_accuracy(tmp_path: Path) -> None:
    nan = [[float("nan")] * 2]
    runs = [read(made(tmp_path / m, nan, method=m)) for m in ("fedmoe", "local")]
    report, variants = contrast(runs)
    assert "none" in Parsed(page(report, variants)).words


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["runs/a0", "nowhere"], "nowhere is not a run, it has no config.toml"),
        (["runs/a0", "runs/../runs/a0"], "runs/../runs/a0 is given twice, it is runs/a0: name each run once"),
        (["runs", "--round", "7"], "runs/a0 was not evaluated in round 7, but in 1, 2"),
        (["runs", "--out", "."], "cannot be written: it is there and no page: choose another --out"),
        (["runs", "--out", "runs/a0/config.toml"], "runs/a0/config.toml cannot be written: it is there and no page"),
        (["runs", "--out", "no/page.html"], "no is not a folder that can be written to: choose another --out"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    runs: Path, tmp_path: Path, fedmoe: Fedmoe, words: list[str], line: str
) -> None:
    assert line in fedmoe("compare", *words).one_line()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--target", "90"], "--target is 90, must be an accuracy, more than 0 and at most 1"),
        (["--target", "nan"], "--target is nan"),
        (["--round", "0"], "--round is 0, must be at least 1"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_words_that_are_not_understood(runs: Path, fedmoe: Fedmoe, words: list[str], line: str) -> None:
    assert line in fedmoe("compare", "runs", *words).one_line(2)


def test_fifty_runs(tmp_path: Path, fedmoe: Fedmoe) -> None:
    for i in range(50):
        made(tmp_path / "runs" / f"{i}", [[0.5, 0.6 + 0.001 * i]], seed=i % 2, training__lr=0.01 * (1 + i // 2))
    done = fedmoe("compare", "runs", "--out", "page.html")
    assert (
        done.code == 0 and done.out.count("training.lr=") == 75
    )  # 25 variants in two tables, 24 in a third, one in its title
