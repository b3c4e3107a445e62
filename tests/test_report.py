"""A run's report: all that is known on one page, of runs of every kind, in few bytes, and nothing fetched."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe import insight, outcome, report, run
from fedmoe.config import Config
from fedmoe.errors import UserError
from fedmoe.measure import ACCURACY
from fedmoe.profiling.markup import THIN
from tests import browser, reports
from tests.support import SMALL, Fedmoe, changed, train
from tests.test_page import HOSTILE, Parsed, full

SHOWN = [word for word in SMALL if word != "--run.no-report"]
ALL = [
    "numbers", "accuracy", "loss", "clients", "gate", "representations", "target", "partition", "left-out", "setup",
]  # fmt: skip


def shown(path: Path) -> Parsed:
    return Parsed(path.read_text())


def said(parsed: Parsed) -> str:
    return parsed.words.replace(THIN, " ")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended with its report."""
    return train(tmp_path_factory.mktemp("report"), *SHOWN, "--evaluation.aggregated")


def test_a_run_ends_with_its_report(trained: Path) -> None:
    page = shown(trained / "report.html")
    assert page.sections == ALL
    assert {f"plot-{name}" for name in ("accuracy", "loss", "clients", "gates", "gates-by-class", "partition")} <= set(
        page.figures
    )
    assert page.figures.keys() == {div["id"] for div in page.all("div") if div.get("role") == "img"}
    assert [f"plot-tsne-{c}-{kind}" for c in range(3) for kind in ("global", "local", "mixed")] == sorted(
        name for name in page.figures if "tsne" in name
    )
    [line] = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()[-1:]]
    accuracy = page.figures["plot-accuracy"]["data"]
    assert accuracy[2]["y"][-1] == pytest.approx(line["accuracy"]["mean"], abs=1e-4)
    assert accuracy[3]["y"][-1] == pytest.approx(line["accuracy_aggregated"]["mean"], abs=1e-4)
    words = said(page)
    for word in ("cnn-3", "5 clients", "2.33 MB", "the device is a CPU", "federation.rounds", "Run: fedmoe on digits"):
        assert word in words, word
    assert "None" not in words.replace("clients left outNone.", "") and "nan" not in words


def test_gates_are_those_of_the_checkpoint(trained: Path) -> None:
    from fedmoe.client import open_client
    from fedmoe.configfile import read

    client = open_client(read(trained / "config.toml"), 3, trained, torch.device("cpu"))
    client.mixture.eval()
    x, y = client.batch(client.held_out)
    with torch.no_grad():
        weights = client.mixture.weights(x)[:, 0]
    figures = shown(trained / "report.html").figures
    [data], [heat] = (figures[name]["data"] for name in ("plot-gates", "plot-gates-by-class"))
    assert data["median"][3] == pytest.approx(float(weights.quantile(0.5)), abs=1e-4)
    seen = [heat["text"][3][i] for i, w in enumerate(heat["z"][3]) if w is not None]
    assert seen == sorted(map(str, set(y.tolist())))
    one = int(seen[0])
    drawn = heat["z"][3][heat["text"][3].index(seen[0])]
    assert drawn == pytest.approx(float(weights[y == one].mean()), abs=1e-4)


def test_made_again_it_is_the_same(trained: Path, fedmoe: Fedmoe) -> None:
    first = (trained / "report.html").read_text()
    done = fedmoe("report", trained)
    assert done.code == 0 and done.out == f"written to {trained / 'report.html'}\n", done
    assert (trained / "report.html").read_text() == first


def test_a_target_and_what_it_took(trained: Path, fedmoe: Fedmoe, tmp_path: Path) -> None:
    done = fedmoe("report", trained, "--out", "b.html", "--target", "0.99")
    assert done.code == 0 and done.out == "written to b.html\n", done
    assert "0.9900asked fornot reached" in said(shown(tmp_path / "b.html"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--target", "1.5"], "--target is 1.5, must be an accuracy, more than 0 and at most 1"),
        (["--target", "nan"], "--target is nan, must be an accuracy, more than 0 and at most 1"),
        (["--out", "no/such/file.html"], "no/such is not a folder that can be written to: choose another --out"),
        (["--out", "."], ". cannot be written: it is there and no page: choose another --out"),
        (["--out", "mine.toml"], "mine.toml cannot be written: it is there and no page"),
        (["--profile", "nowhere"], "nowhere/profile.json: cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_meant(trained: Path, fedmoe: Fedmoe, tmp_path: Path, words: list[str], line: str) -> None:
    (tmp_path / "mine.toml").write_text("seed = 1")
    assert line in fedmoe("report", trained, *words).one_line(2 if "target" in line else 1)
    assert (tmp_path / "mine.toml").read_text() == "seed = 1"


def test_no_run(fedmoe: Fedmoe, tmp_path: Path) -> None:
    assert "nowhere is not a run" in fedmoe("report", "nowhere").one_line()
    assert not list(tmp_path.iterdir())


def test_a_run_in_progress_is_left_alone(trained: Path, fedmoe: Fedmoe) -> None:
    with run.locked(trained):
        assert "is in use by another process" in fedmoe("report", trained).one_line()


def test_damaged_metrics_are_one_line(trained: Path, fedmoe: Fedmoe) -> None:
    path = trained / "metrics.jsonl"
    kept, page = path.read_text(), (trained / "report.html").read_text()
    try:
        path.write_text(kept.replace('"flops"', '"flips"', 1))
        complaint = fedmoe("report", trained).one_line()
    finally:
        path.write_text(kept)
    assert "metrics.jsonl: the line of round 1 is damaged (KeyError: 'flops'): restore it" in complaint
    assert (trained / "report.html").read_text() == page


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"loss": "2.0"}, "'2.0' is not a number"),
        ({"bytes_up": True}, "True is not a number"),
        ({"flops": float("nan")}, "nan is not a number"),
        ({"sampled": [0, 4]}, "are not clients of 0 to 3"),
        ({"rolled_back": None}, "are not clients"),
        ({"evaluated": [0, 1]}, "accuracy is of 4 clients, 2 were evaluated"),
        ({"accuracy": 0.5}, "TypeError"),
        ({"seconds": {"round": 1.0}}, "KeyError: 'train'"),
        ({"parts": {"x": 2}}, "ValueError"),
        ({"rejected": {"4": "odd"}}, "are not clients of 0 to 3"),
        ({"rejected": ["1"]}, "AttributeError"),
        ({"round": 3}, "has no line of round 2 of 2"),
    ],
)
def test_damaged_lines_are_named(change: dict[str, Any], complaint: str) -> None:
    lines = reports.lines(4, 2)
    lines[1] |= change
    with pytest.raises(UserError, match=r"a/metrics\.jsonl: .*" + re.escape(complaint)):
        outcome.rounds(Path("a/metrics.jsonl"), lines, 4, 2)


def test_rounds_beyond_the_checkpoint_are_not_shown() -> None:
    assert len(outcome.rounds(Path("a"), reports.lines(4, 5), 4, 3)) == 3


def _no_report(*args: object) -> None:
    raise RuntimeError("planted")


def plant() -> None:
    report.write = _no_report  # type: ignore[assignment]


def test_a_report_that_fails_costs_no_run(fedmoe: Fedmoe, tmp_path: Path) -> None:
    done = fedmoe("train", *SHOWN, "--run.dir", "a", plant=plant)
    assert done.code == 0 and "run folder: a" in done.out
    assert "warning: no report: RuntimeError: planted; `fedmoe report a` tries again" in done.err
    assert not (tmp_path / "a/report.html").exists()


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        ({"method": "local"}, {"gate"}),
        ({"method": "static"}, set()),
        ({"federation": {"clients": 1}, "partition": {"kind": "iid"}}, set()),
        ({"federation": {"fraction": 0.4}, "evaluation": {"clients": "sampled", "every": 2}}, set()),
        ({"federation": {"rounds": 0}}, set(ALL) - {"numbers", "partition", "setup"}),
    ],
)  # fmt: skip
def test_runs_of_every_kind(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], without: set[str]
) -> None:
    monkeypatch.setattr(insight, "PICTURED", 1)  # they take the most time
    rounds = changes.get("federation", {}).get("rounds", 2)
    engine = {"kind": "reference"}
    config = changed(config, run={"dir": str(tmp_path / "a"), "threads": 1, "report": False}, engine=engine)
    changes = changes | {"federation": {**changes.get("federation", {}), "rounds": 2}}
    with run.started(changed(config, **changes), tmp_path / "a") as (made, device):
        if rounds:
            run._finish(made, tmp_path / "a", device, None)
        report.write(made, tmp_path / "a", device)
    page = shown(tmp_path / "a/report.html")
    assert page.sections == [name for name in ALL if name not in without]
    assert "nan" not in page.words and "1 clients" not in page.words


def test_no_accuracy_at_all_and_no_evaluation() -> None:
    s = reports.subject(4, 3)
    nothing = outcome.Over(None, None, [None] * 4)
    blind = [
        replace(r, loss=None, accuracy=nothing, accuracy_aggregated=None, test_loss=nothing, not_finite=[0])
        for r in s.rounds
    ]
    page = Parsed(report.page(replace(s, rounds=blind, gates=[], pictures=[], target=0.5)))
    assert not page.figures.keys() & {"plot-accuracy", "plot-loss", "plot-clients"}
    assert "not finite" in page.words and "No round has an accuracy, so none reached 0.5" in page.words
    unseen = [replace(r, evaluated=[], accuracy=None, accuracy_aggregated=None, test_loss=None) for r in s.rounds]
    page = Parsed(report.page(replace(s, rounds=unseen)))
    assert "clients" not in page.sections and "plot-loss" in page.figures


def test_gates_that_are_not_finite_are_not_drawn(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(
        config, federation={"rounds": 1}, engine={"kind": "reference"}, run={"report": False, "threads": 1}
    )
    nan = torch.full((4, 2), torch.nan)
    monkeypatch.setattr(insight, "_outputs", lambda client: ({"gate": nan, "local": nan}, torch.zeros(4).long()))
    with run.started(config, tmp_path / "a") as (made, device):
        run._finish(made, tmp_path / "a", device, None)
        report.write(made, tmp_path / "a", device)
    page = shown(tmp_path / "a/report.html")
    assert not {"gate", "representations"} & set(page.sections) and "nan" not in page.words


def test_who_was_left_out_is_named() -> None:
    s = reports.subject(10, 50)
    words = said(Parsed(report.page(s)))
    first = s.rounds[6].rolled_back[0]
    assert f"7{first}47" in words and "left out of the average 2 times" in words
    [client] = s.rounds[49].parts
    [(other, why)] = s.rounds[49].rejected.items()
    assert f"50{other} ({why})krum needs 5 results, 4 were fit to count{client} (in 2)3" in words
    assert "rejected 1 result of clients" in words and "In 1 round the global expert stayed" in words
    assert "θ staysbatches in parts" in words, "a column of nothing"


def test_the_cost_of_an_accuracy() -> None:
    s = reports.subject(4, 20)
    hit = outcome.reached(s.rounds, 0.5, ACCURACY)
    assert hit is not None
    means = [r.accuracy.mean for r in s.rounds if r.accuracy and r.accuracy.mean is not None]
    assert means[hit.round - 1] >= 0.5 > max(means[: hit.round - 1])
    assert hit.bytes == hit.round * 4 * 2 * 466_240 - 466_240 * (hit.round >= 7)
    assert hit.seconds == pytest.approx(2.0 * hit.round) and hit.energy is None
    assert outcome.reached(s.rounds, 0.999, ACCURACY) is None
    metered = [replace(r, energy=5.0) for r in s.rounds]
    hit = outcome.reached(metered, 0.5, ACCURACY)
    assert hit is not None and hit.energy == 5.0 * hit.round
    assert "J" in said(Parsed(report.page(replace(s, rounds=metered))))


def test_a_profile_is_on_the_page(tmp_path: Path) -> None:
    p = full()
    p.config = {"training.lr": 0.7, "seed": 0}
    (tmp_path / "profile.json").write_text(p.to_json())
    read = report.read_profile(tmp_path)
    assert read == p
    page = Parsed(report.page(reports.subject(3, 2, profile=read)))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and "profile-roof" in page.sections
    assert "plot-profile-ranges" in page.figures and "5% of the round is waiting" in page.words
    assert "Training.lr is 0.7 in the profile, 0.01 in the run." in page.words


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"title": 1}', full().to_json().replace("0.412", '"x"')])
def test_what_is_no_profile(tmp_path: Path, content: str) -> None:
    (tmp_path / "profile.json").write_text(content)
    with pytest.raises(UserError, match=r"profile\.json"):
        report.read_profile(tmp_path)


def test_hostile_names_are_only_text() -> None:
    s = reports.subject(6, 3)
    config = changed(s.config, model={"local": (HOSTILE, "cnn-1")}, data={"name": HOSTILE}, training={"lr": 0.7})
    names: dict[str, Any] = {"name": HOSTILE, "config": config, "classes": [f"{HOSTILE}{i}" for i in range(10)]}
    page = Parsed(report.page(replace(s, **names, environment={"cpu": HOSTILE}, plan={HOSTILE: HOSTILE})))
    assert not page.all("img") and len(page.scripts) == 3
    assert "onerror" not in {name for _, attributes in page.tags for name in attributes}
    assert page.words.count("<img src=x") > 15
    assert "<img" not in json.dumps(page.figures) and "<script" not in json.dumps(page.figures)


def test_a_thousand_clients_take_less_than_five_megabytes() -> None:
    page = report.page(reports.subject(1000, 500, classes=100))
    assert len(page.encode()) < 5_000_000
    [bars] = [t for t in Parsed(page).figures["plot-clients"]["data"] if t.get("name") == "cnn-2"]
    assert len(bars["x"]) == 200


@pytest.mark.skipif(bool(browser.missing), reason=f"not installed: {', '.join(browser.missing)}")
def test_a_browser_draws_it_and_asks_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(report.page(reports.subject(300, 100, profile=full())))
    with browser.browser(tmp_path) as window:
        for width, dark in ((1600, False), (360, True)):
            window.requests()
            window.open(path, width, dark)
            assert window.run("return 'drawn' in document.documentElement.dataset")
            plots = "[...document.querySelectorAll('.plot')]"
            assert window.run(f"return {plots}.every((plot) => plot.querySelector('.main-svg'))")
            assert window.run("return document.documentElement.scrollWidth") <= width
            assert window.log("browser") == []  # no error, and nothing that the page's policy refused
            asked = [url for url in window.requests() if not url.startswith(("data:", "blob:", "chrome:"))]
            assert asked == [path.resolve().as_uri()]
