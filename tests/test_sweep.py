"""`fedmoe sweep`: its runs are those of `fedmoe train`, it goes on after any stop, and what fails stops no other."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import Command, Done, Fedmoe
from tests.test_kill import die_at, end, hashes, signal_at

SMALL = ("--data.limit=100", "--federation.clients=2", "--federation.rounds=2", "--model.local=cnn-5",
         "--run.threads=1", "--training.batch_size=16", "--partition.kind=iid")  # fmt: skip
GRID = (*SMALL, "--method", "fedmoe,local", "--seeds", "2")
RUNS = [f"method={method},seed={seed}" for seed in (0, 1) for method in ("fedmoe", "local")]


def ends(sweep: Path) -> dict[str, Any]:
    """Of every run, what must be equal: its metrics but for times, and the hash of every state."""
    found = {}
    for name in RUNS:
        lines, manifest = end(sweep / name)
        found[name] = lines, hashes(manifest)
    return found


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that was not disturbed; not to be changed."""
    folder = tmp_path_factory.mktemp("swept")
    done = Command(folder, "sweep", *GRID).wait()
    assert done.code == 0, done
    (folder / "out").write_text(done.out)
    return folder / "runs" / "sweep"


def test_folder_and_tables(swept: Path) -> None:
    assert {path.name for path in swept.iterdir()} == {*RUNS, "sweep.json", "compare.html", ".lock"}
    told = json.loads((swept / "sweep.json").read_text())
    assert [(run["name"], run["error"]) for run in told["runs"]] == [(name, None) for name in RUNS]
    report = told["comparison"]
    assert report["fields"] == ["method"] and report["round"] == 2
    assert [row["seeds"] for row in report["variants"]] == [[0, 1]] * 2
    assert [d["how"] for d in report["differences"]] == ["paired, 2 seeds"]
    out = (swept.parents[1] / "out").read_text()
    assert "run 4 of 4: method=local,seed=1\n" in out and "round 2/2" in out
    assert "accuracy less that of method=fedmoe" in out
    assert out.endswith("written to runs/sweep: sweep.json, compare.html\n")


def test_each_run_is_that_of_train(swept: Path, tmp_path: Path, fedmoe: Fedmoe) -> None:
    words = ("--method=local", "--seed=1", "--run.dir=run")
    assert fedmoe("train", *SMALL, *words).code == 0
    assert end(tmp_path / "run") == end(swept / RUNS[-1])


def test_called_again_it_trains_nothing(swept: Path, tmp_path: Path, fedmoe: Fedmoe) -> None:
    shutil.copytree(swept, tmp_path / "runs" / "sweep")
    before = {path: path.read_bytes() for path in (tmp_path / "runs").glob("sweep/*/**/*") if path.is_file()}
    done = fedmoe("sweep", *GRID, "--json")
    told = json.loads(done.out)
    assert done.code == 0 and told == json.loads((swept / "sweep.json").read_text().replace(str(swept), "runs/sweep"))
    assert done.err.count("finished before, 2 rounds") == 4
    assert before == {path: path.read_bytes() for path in before}


def interrupt_before(name: str) -> None:
    """Have this process interrupt itself when it begins the run."""
    from fedmoe import sweep

    take = sweep._take

    def interrupted(one: Any, *more: Any) -> None:
        if one.name == name:
            os.kill(os.getpid(), signal.SIGTERM)
        take(one, *more)

    sweep._take = interrupted  # type: ignore[assignment]


def test_stopped_in_whatever_way_and_called_again_it_ends_the_same(swept: Path, tmp_path: Path, fedmoe: Fedmoe) -> None:
    def stopped(plant: Callable[..., None], *args: Any) -> Done:
        return Command(tmp_path, "sweep", *GRID, plant=plant, plant_args=args).wait()

    said = f"continue with: fedmoe sweep {' '.join(GRID)} --dir runs/sweep\n"
    assert stopped(die_at, 1).code == -signal.SIGKILL  # as it writes its own record
    assert stopped(die_at, 40).code == -signal.SIGKILL  # as it writes a checkpoint
    done = stopped(signal_at, 10, signal.SIGINT)
    assert (done.code, done.err) == (130, f"fedmoe: stopped after round 1 of 2; {said}")
    done = stopped(interrupt_before, RUNS[-1])
    assert (done.code, done.err) == (130, f"fedmoe: stopped before {RUNS[-1]} went on; {said}")
    assert fedmoe("sweep", *GRID).code == 0
    assert ends(tmp_path / "runs" / "sweep") == ends(swept)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((*GRID[:-1], "3"), "another sweep (the seeds: [0, 1, 2], began with [0, 1]), by: fedmoe sweep --data.limit"),
        ((*GRID, "--training.lr", "0.5"), "another sweep (training.lr: 0.5, began with 0.01)"),
        (
            (*GRID, "--training.lr", "0.5,0.6"),
            '(the alternatives: {"method": ["fedmoe", "local"], "training.lr": [0.5, 0.6]}, began with {"method"',
        ),
        ((*GRID, "--training.lr", "0.5,fast"), "training.lr is 'fast', must be a number"),
        ((*GRID, "--model.global_expert", "cnn-5,cnn-9"), "model 'cnn-9' is none of cnn-1, cnn-2"),
        ((*GRID, "--dir", "."), ". exists and is not a sweep: choose another --dir"),
        ((*GRID, "--dir", "file"), "file exists and is not a sweep: choose another --dir"),
        ((*GRID, "--dir", "file/below"), "file is not a folder that can be written to: choose another --dir"),
    ],
)
def test_what_is_refused_is_one_line_and_harms_nothing(
    swept: Path, tmp_path: Path, fedmoe: Fedmoe, words: tuple[str, ...], line: str
) -> None:
    shutil.copytree(swept, tmp_path / "runs" / "sweep")
    (tmp_path / "file").touch()
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if not path.name.startswith("."))
    assert line in fedmoe("sweep", *words).one_line(2 if "fast" in line else 1)
    after = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if not path.name.startswith("."))
    assert [path for path, _ in after] == [path for path, _ in before]
    assert [entry for entry in after if entry[0].is_file()] == [entry for entry in before if entry[0].is_file()]


def test_a_damaged_record_is_named(swept: Path, tmp_path: Path, fedmoe: Fedmoe) -> None:
    shutil.copytree(swept, tmp_path / "runs" / "sweep")
    (tmp_path / "runs" / "sweep" / "sweep.json").write_text("{")
    assert "sweep.json: is damaged (JSONDecodeError" in fedmoe("sweep", *GRID).one_line()


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path, fedmoe: Fedmoe) -> None:
    words = (*SMALL, "--partition.min_samples", "10,99", "--federation.epochs=1,2", "--partition.alpha=2")
    done = fedmoe("sweep", *words)
    assert done.code == 1
    assert done.err == 'fedmoe: warning: partition.alpha = 2.0 has no effect with partition.kind = "iid"\n'  # once
    assert "2 of 4 runs failed" in done.out
    assert done.out.count("failed: ") == 2 and "clients of at least 99 samples need 198" in done.out
    assert "accuracy less that of federation.epochs=1" in done.out
    told = json.loads((tmp_path / "runs" / "sweep" / "sweep.json").read_text())
    assert [run["error"] is None for run in told["runs"]] == [True, True, False, False]


def test_all_fail(tmp_path: Path, fedmoe: Fedmoe) -> None:
    done = fedmoe("sweep", *SMALL, "--model.global_expert", "no.where:a,no.where:b")
    assert done.code == 1 and "2 of 2 runs failed" in done.out
    assert not (tmp_path / "runs" / "sweep" / "compare.html").exists()


def test_another_run_in_the_place_of_one_is_not_taken_for_it(swept: Path, tmp_path: Path, fedmoe: Fedmoe) -> None:
    sweep = tmp_path / "runs" / "sweep"
    shutil.copytree(swept, sweep)
    shutil.rmtree(sweep / RUNS[0])
    (sweep / RUNS[1]).rename(sweep / RUNS[0])
    (sweep / RUNS[2] / "metrics.jsonl").write_text("{}\n")
    done = fedmoe("sweep", *GRID)
    assert done.code == 1 and "2 of 4 runs failed" in done.out
    assert "holds another run, its method is 'local', not 'fedmoe': move it away" in done.out
    assert "metrics.jsonl: line 1 is no round's metrics" in done.out
