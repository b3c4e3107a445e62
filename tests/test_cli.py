"""The command line: help within a moment, and every kind of bad input in one line, with nothing on disk harmed."""

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe import checkpoint, metrics
from tests.support import ROOT, SMALL, Command, Fedmoe
from tests.test_data import write

Disk = dict[Path, bytes]


def disk(folder: Path) -> Disk:
    """All files below a folder, but for the empty lock."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture
def run(tmp_path: Path, fedmoe: Fedmoe) -> Path:
    """A run of two rounds, extended to have something to resume."""
    assert fedmoe("train", *SMALL, "--run.dir=run").code == 0
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace("rounds = 2", "rounds = 4"))
    return tmp_path / "run"


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)


def test_help_and_version_need_neither_torch_nor_the_extension() -> None:
    for words in (["--help"], ["resume", "--help"], ["train", "--help"], ["plan", "--help"], ["--version"]):
        done = python(
            "import sys\nfrom fedmoe.cli import main\n"
            f"try:\n    main({words})\nexcept SystemExit as stop:\n    assert not stop.code\n"
            "print([m for m in ('torch', 'numpy', 'fedmoe.kernels._native') if m in sys.modules])"
        )
        assert done.stdout.endswith("[]\n"), done.stdout


def test_help_lists_commands_and_every_field(fedmoe: Fedmoe) -> None:
    done = python("from fedmoe.cli import main; main(['train', '--help'])")
    for option in (
        "--seed",
        "--federation.rounds",
        "--gate.norm",
        "--training.theta_momentum",
        "--run.no_deterministic",
    ):
        assert option in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "fedmoe", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for command in ("train", "resume", "eval", "report", "plan", "bench", "doctor"):
        assert f"\n    {command} " in done.stdout


def test_wrong_usage_is_one_line_and_exit_code_2() -> None:
    for words in (["trane"], [], ["resume"], ["eval", "x", "--what"], ["resume", "x", "--rounds", "many"]):
        done = subprocess.run([sys.executable, "-m", "fedmoe", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("fedmoe: error: ")


NARROW = """
from torch import nn

def make(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32)), nn.Linear(32, classes)
"""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere.toml"], "nowhere.toml: cannot be read: No such file or directory"),
        (["--federation.rounds=0"], "federation.rounds is 0, must be more than 0"),
        (["--run.device=cuda"], 'run.device is "cuda", but PyTorch'),
        (["--federation.clients=100"], "clients of at least 10 samples need 1000, the data set has 300"),
        (
            ["--partition.kind=dirichlet", "--partition.min_samples=55"],
            "no Dirichlet split in 11 draws gives each of 5 clients",
        ),
        (["--model.local=narrow:make"], "in 32 numbers, global expert 'cnn-5' in 50: both must be equal"),
        (["--model.local=cnn-9"], "model 'cnn-9' is none of cnn-1"),
        (["--data.name=./nowhere"], "nowhere does not exist"),
        (["--data.image_size=8"], "needs images of at least 16x16 pixels, not 8x8"),
        (["--gate.norm=bach"], 'gate.norm is "bach", must be none, paper, or three of'),
        (
            ["--gate.norm=paper", "--training.batch_size=1"],
            "model 'cnn-1', client 0: a training step with 1 samples fails: ",
        ),
    ],
)
def test_bad_setting(tmp_path: Path, fedmoe: Fedmoe, words: list[str], line: str) -> None:
    (tmp_path / "narrow.py").write_text(NARROW)
    before = disk(tmp_path)
    path = [w for w in words if w.endswith(".toml")]
    rest = [w for w in words if w not in path]
    done = fedmoe("train", *path, *SMALL, "--run.dir=run", *rest)
    assert line in done.one_line()
    after = {p: c for p, c in disk(tmp_path).items() if "__pycache__" not in p.parts}
    assert after == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--federation.round=3"], "unknown key '--federation.round'; the nearest is 'federation.rounds'"),
        (["--lr=3"], "unknown key '--lr'; the nearest is 'training.lr'"),
        (["--data.limit=x"], "--data.limit: "),
        (["--seed=1", "other.toml"], "the configuration file comes first, and there is only one): other.toml"),
    ],
)
def test_words_that_are_not_understood(tmp_path: Path, fedmoe: Fedmoe, words: list[str], line: str) -> None:
    assert line in fedmoe("train", "--run.dir=run", *words).one_line(2)
    assert disk(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("afile/sub", "afile is not a folder that can be written to: choose another --run.dir"),
        ("afile", "afile exists and is not a run"),
        ("x" * 300, "File name too long"),
        ("/proc/x", "/proc/x"),
    ],
)
def test_run_folders_that_cannot_be(tmp_path: Path, fedmoe: Fedmoe, name: str, line: str) -> None:
    (tmp_path / "afile").write_text("mine")
    assert line in fedmoe("train", *SMALL, f"--run.dir={name}").one_line()
    assert disk(tmp_path) == {Path("afile"): b"mine"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_fused_head_where_kernels_cannot_run(fedmoe: Fedmoe) -> None:
    done = fedmoe("train", *SMALL, "--engine.head=fused", "--run.device=cpu")
    assert (done.code, done.out) == (1, "")
    assert 'engine.head is "fused", but the kernels cannot run: ' in done.err and done.err.count("\n") == 1
    assert fedmoe("train", *SMALL, "--engine.head=auto", "--run.dir=auto", "--run.device=cpu").code == 0


def test_no_gpu_where_one_was_asked_for_says_what_to_do(fedmoe: Fedmoe) -> None:
    assert fedmoe("train", "--run.device=cuda").one_line().endswith('use "auto" or "cpu"')


def damage_file(folder: Path) -> str:
    path = folder / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    return "test-00000-of-00001.parquet: not a whole parquet file"


def damage_label(folder: Path) -> str:
    write(folder / "test-00000-of-00001.parquet", [0, 1, 7])
    return "test-00000-of-00001.parquet: row 2: label 7 out of range, 0 to 2"


def damage_image(folder: Path) -> str:
    write(folder / "test-00000-of-00001.parquet", [0, 1], images=[b"no image", b""])
    return "test-00000-of-00001.parquet: row 0: image cannot be decoded"


@pytest.mark.parametrize("damage", [damage_file, damage_label, damage_image])
def test_bad_data(tmp_path: Path, fedmoe: Fedmoe, damage: Callable[[Path], str]) -> None:
    folder = tmp_path / "images"
    write(folder / "train-00000-of-00001.parquet", [row % 3 for row in range(60)])
    write(folder / "test-00000-of-00001.parquet", [0, 1, 2])
    line = damage(folder)
    before = disk(tmp_path)
    done = fedmoe("train", "--data.name=images", "--run.dir=run", "--federation.clients=3", "--data.image_size=28")
    assert line in done.one_line()
    assert disk(tmp_path) == before


def spoil_client(run: Path) -> str:
    path = next((run / "checkpoints").glob("client-3.*"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    return f"{path.name}: SHA-256 is "


def spoil_server(run: Path) -> str:
    path = next((run / "checkpoints").glob("server.*"))
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path.name}: size is "


def spoil_manifest(run: Path) -> str:
    path = run / "checkpoints" / "manifest.json"
    path.write_text(path.read_text()[:-10])
    return "manifest.json: not a manifest"


def spoil_no_manifest(run: Path) -> str:
    (run / "checkpoints" / "manifest.json").unlink()
    return "manifest.json: is missing: restore it from a copy"


def spoil_client_beyond(run: Path) -> str:
    path = run / "checkpoints" / "manifest.json"
    path.write_text(path.read_text().replace('"4": {', '"7": {').replace("client-4.", "client-7."))
    return "manifest.json: names client 7, the last is 4"


def spoil_lr(run: Path) -> str:
    path = run / "config.toml"
    path.write_text(path.read_text().replace("lr = 0.01", "lr = 0.1"))
    return "config.toml: training.lr is 0.1, the run began with 0.01: put it back, or start a new run"


def spoil_clients(run: Path) -> str:
    path = run / "config.toml"
    path.write_text(path.read_text().replace("clients = 5", "clients = 4"))
    return "config.toml: federation.clients is 4, the run began with 5"


def spoil_threads(run: Path) -> str:
    path = run / "environment.json"
    path.write_text(path.read_text().replace('"threads": 1', '"threads": "x"'))
    return "environment.json: is missing or damaged (ValueError: threads is 'x')"


def spoil_missing(run: Path) -> str:
    next((run / "checkpoints").glob("client-0.*")).unlink()
    return "but the manifest names it"


def spoil_partition(run: Path) -> str:
    path = run / "partition.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    return "partition.safetensors: fingerprint is "


def spoil_config(run: Path) -> str:
    path = run / "config.toml"
    path.write_text(path.read_text().replace("rounds", "round"))
    return "config.toml: unknown key 'federation.round'; the nearest is 'federation.rounds'"


def spoil_environment(run: Path) -> str:
    (run / "environment.json").write_text("{")
    return "environment.json: is missing or damaged (JSONDecodeError"


@pytest.mark.parametrize("command", ["resume", "eval"])
@pytest.mark.parametrize(
    "spoil",
    [
        spoil_client,
        spoil_server,
        spoil_manifest,
        spoil_no_manifest,
        spoil_client_beyond,
        spoil_missing,
        spoil_partition,
        spoil_config,
        spoil_lr,
        spoil_clients,
        spoil_environment,
        spoil_threads,
    ],
)
def test_bad_run(run: Path, fedmoe: Fedmoe, spoil: Callable[[Path], str], command: str) -> None:
    line = spoil(run)
    before = disk(run)
    assert line in fedmoe(command, run).one_line()
    assert disk(run) == before


def test_folders_that_are_no_runs_or_are_already(tmp_path: Path, run: Path, fedmoe: Fedmoe) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all my work")
    before = disk(tmp_path)
    for command in ("resume", "eval"):
        assert "is not a run, it has no config.toml" in fedmoe(command, "mine").one_line()
    assert (
        "mine exists and is not a run: choose another --run.dir" in fedmoe("train", *SMALL, "--run.dir=mine").one_line()
    )
    line = fedmoe("train", *SMALL, "--run.dir=run").one_line()
    assert "run already holds a run: `fedmoe resume run` continues it" in line
    assert "there is no client 5: the run has clients 0 to 4" in fedmoe("eval", run, "--clients", 5).one_line()
    assert disk(tmp_path) == before


def test_one_process_at_a_time(tmp_path: Path, fedmoe: Fedmoe) -> None:
    first = Command(tmp_path, "train", *SMALL, "--run.dir=run", "--federation.rounds=500")
    deadline = time.monotonic() + 60
    while not metrics.read(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.02)
    for command in ("resume", "eval"):
        assert "run is in use by another process" in fedmoe(command, "run").one_line()
    os.kill(first.pid, signal.SIGINT)
    assert first.wait().code == 130
    # The lock goes with the process, even one that is killed.
    second = Command(tmp_path, "resume", "run")
    with (tmp_path / "run" / ".lock").open() as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(file, fcntl.LOCK_UN)
                time.sleep(0.001)
            except BlockingIOError:
                break
    second.process.kill()
    second.wait()
    assert "run has trained" in fedmoe("resume", "run", "--rounds=1").one_line()


def limit_file_size(limit: int) -> None:
    """Files of this process can grow to `limit` bytes, then writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_keeps_the_last_checkpoint(full_disk: Path, tmp_path: Path) -> None:
    """One checkpoint of about 7.5 MB fits, the next beside it does not."""
    run = full_disk / "run"
    done = Command(tmp_path, "train", *SMALL, f"--run.dir={run}").wait()
    assert done.code == 1, done
    assert (
        "No space left on device; the last checkpoint is whole: make room, then continue with: fedmoe resume"
        in done.one_line()
    )
    manifest = checkpoint.read_manifest(run)
    assert manifest.round >= 1
    subprocess.run(["mount", "-o", "remount,size=64m", full_disk], check=True)
    assert Command(tmp_path, "resume", run).wait().code == 0


def test_write_that_fails_keeps_the_last_checkpoint(run: Path, tmp_path: Path) -> None:
    """The same where nothing can be mounted: no file may exceed 1 MB, which the clients' do."""
    before = {p: c for p, c in disk(run).items() if p.parts[0] == "checkpoints"}
    done = Command(tmp_path, "resume", run, plant=limit_file_size, plant_args=(10**6,)).wait()
    assert (
        "File too large; the last checkpoint is whole: make room, then continue with: fedmoe resume" in done.one_line()
    )
    after = disk(run)
    assert {p: after[p] for p in before} == before
    assert Command(tmp_path, "resume", run).wait().code == 0


def test_start_that_was_killed_before_it_was_a_run_can_be_repeated(tmp_path: Path, fedmoe: Fedmoe) -> None:
    (tmp_path / "run").mkdir()
    for name in (".lock", "partition.safetensors", ".config.toml.tmp"):
        (tmp_path / "run" / name).write_bytes(b"half")
    assert "is not a run" in fedmoe("resume", "run").one_line()
    assert fedmoe("train", *SMALL, "--run.dir=run").code == 0


def test_traceback_on_request(fedmoe: Fedmoe) -> None:
    done = fedmoe("resume", "nowhere", env={"FEDMOE_TRACEBACK": "1"})
    assert done.code == 1
    assert "Traceback" in done.err


def test_no_module_can_unpickle() -> None:
    """Nothing here imports a pickle, and no loader that may use one is called."""
    for folder in ("fedmoe", "engine", "kernels", "profiling"):
        for path in (ROOT / folder).glob("*.py"):
            text = path.read_text()
            for word in ("import pickle", "torch.load(", "np.load(", "numpy.load(", "joblib", "allow_pickle"):
                assert word not in text, (path, word)


def test_damaged_metrics_are_refused_before_anything_changes(run: Path, fedmoe: Fedmoe) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write("garbage\n")
    before = disk(run)
    assert "metrics.jsonl: line 3 is no round's metrics" in fedmoe("resume", run, "--rounds=9").one_line()
    assert disk(run) == before


def test_output_that_nobody_reads_stops_the_run_in_order(tmp_path: Path) -> None:
    words = ["train", *SMALL, "--run.dir=run", "--federation.rounds=1000000", "--checkpoint.every=7"]
    script = f"{sys.executable} -m fedmoe {' '.join(words)} | head -n 2"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    rounds = checkpoint.read_manifest(tmp_path / "run").round
    assert done.stderr == (
        f"fedmoe: stopped after round {rounds} of 1000000 (nobody reads the output any more); "
        "continue with: fedmoe resume run\n"
    )
    assert len(metrics.read(tmp_path / "run")) == rounds
    assert rounds >= 2


def test_output_that_is_refused(tmp_path: Path, fedmoe: Fedmoe) -> None:
    assert fedmoe("train", *SMALL, "--run.dir=run").code == 0
    command = [sys.executable, "-m", "fedmoe", "eval", str(tmp_path / "run"), "--json"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (1, "fedmoe: error: output: No space left on device\n")


def test_terminal_that_knows_no_plus_minus(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fedmoe", "train", *SMALL, "--run.dir=run"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy 0." in done.stdout


def caught(process: int) -> int:
    """The signals that a process handles, a bit each."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("SigCgt:")[2].split()[0], 16)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_before_there_is_anything_to_save(tmp_path: Path, number: signal.Signals) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fedmoe", "train", *SMALL, "--run.dir=run"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not caught(process.pid) >> (signal.SIGHUP - 1) & 1:  # the last to be taken over
        time.sleep(0.01)
    process.send_signal(number)  # in the middle of the imports, which take a second
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "fedmoe: interrupted\n")
    assert disk(tmp_path) == {}


def test_second_signal_stops_at_once_and_keeps_the_checkpoint(tmp_path: Path, fedmoe: Fedmoe) -> None:
    command = Command(tmp_path, "train", *SMALL, "--run.dir=run", "--federation.epochs=1000", plant=signal_twice)
    done = command.wait()
    assert done.code == 130
    assert done.err == "fedmoe: stopped at once, the last checkpoint is whole; continue with: fedmoe resume run\n"
    assert checkpoint.read_manifest(tmp_path / "run").round == 0
    assert fedmoe("eval", "run").code == 0


def signal_twice() -> None:
    """Have this process send itself the signal twice in its third training step."""
    from fedmoe.engine.samples import Loader

    batch, count = Loader.batch, 0

    def counted(self: Loader, indices: torch.Tensor, channels_last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal count
        count += 1
        if count == 10:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, indices, channels_last)

    Loader.batch = counted  # type: ignore[method-assign]


def test_second_signal_while_the_first_is_obeyed_loses_nothing(tmp_path: Path) -> None:
    options = ("--federation.rounds=50", "--checkpoint.every=20")
    done = Command(tmp_path, "train", *SMALL, *options, "--run.dir=a b", plant=signal_in_rollback).wait()
    assert done.code == 130
    assert done.err == "fedmoe: stopped after round 3 of 50; continue with: fedmoe resume 'a b'\n"
    assert checkpoint.read_manifest(tmp_path / "a b").round == len(metrics.read(tmp_path / "a b")) == 3


def signal_in_rollback() -> None:
    """Have this process send itself a signal once round 3 is recorded, and another when it rolls back for it."""
    from fedmoe.engine.device_engine import DeviceEngine
    from fedmoe.metrics import Line, Log

    append, rollback = Log.append, DeviceEngine.rollback

    def signalling(self: Log, line: Line) -> None:
        append(self, line)
        if line["round"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def again(self: DeviceEngine) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        rollback(self)

    Log.append, DeviceEngine.rollback = signalling, again  # type: ignore[method-assign]


def test_signals_that_the_parent_had_ignored_stay_so(tmp_path: Path) -> None:
    done = Command(tmp_path, "train", *SMALL, "--run.dir=run", plant=hang_up_ignored).wait()
    assert done.code == 0, done
    assert len(metrics.read(tmp_path / "run")) == 2


def hang_up_ignored() -> None:
    """As under nohup, when the terminal goes in round 1."""
    from fedmoe.metrics import Line, Log

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    append = Log.append

    def signalling(self: Log, line: Line) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        append(self, line)

    Log.append = signalling  # type: ignore[method-assign]


def test_handlers_are_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    from fedmoe.cli import main

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert main(["resume", "nowhere"]) == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_checkpoints_that_someone_kept_are_not_taken_over(tmp_path: Path, run: Path, fedmoe: Fedmoe) -> None:
    shutil.copytree(run / "checkpoints", tmp_path / "kept" / "checkpoints")
    before = disk(tmp_path)
    assert "kept exists and is not a run" in fedmoe("train", *SMALL, "--run.dir=kept").one_line()
    assert disk(tmp_path) == before


def test_model_that_fails_late_loses_no_round(tmp_path: Path, fedmoe: Fedmoe) -> None:
    options = ("--federation.rounds=50", "--checkpoint.every=20", "--run.dir=run")
    done = Command(tmp_path, "train", *SMALL, *options, plant=fail_in_round_3).wait()
    assert done.one_line() == "client 4 has had enough"
    assert checkpoint.read_manifest(tmp_path / "run").round == len(metrics.read(tmp_path / "run")) == 2
    assert fedmoe("resume", "run", "--rounds=3").code == 0


def fail_in_round_3() -> None:
    """Have client 4 refuse its third training."""
    from fedmoe.engine.lane import Lane
    from fedmoe.errors import UserError

    train, count = Lane._train, 0

    def failing(self: Lane, unit: Any, *others: Any) -> Any:
        nonlocal count
        count += unit.clients == [4]
        if count == 3:
            raise UserError("client 4 has had enough")
        return train(self, unit, *others)

    Lane._train = failing  # type: ignore[assignment, method-assign]


def test_full_disk_for_states_that_no_memory_has_room_for(tmp_path: Path) -> None:
    words = ("train", *SMALL, "--run.dir=run", "--engine.host_memory_mb=1")
    line = Command(tmp_path, *words, plant=full_scratch).wait().one_line()
    assert ".block: No space left on device; the last checkpoint is whole: make room, then continue with: " in line
    assert Command(tmp_path, "resume", "run").wait().code == 0


def full_scratch() -> None:
    """Have this process find no room for files of states."""
    from fedmoe.engine import staging

    def refuse(path: Path, data: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    staging.write_bytes = refuse


def test_memory_that_does_not_suffice_is_told_once(tmp_path: Path) -> None:
    done = Command(tmp_path, "train", *SMALL, "--run.dir=run", plant=little_memory).wait()
    told = [line for line in done.out.splitlines() if "out of device memory" in line]
    assert done.code == 0 and len(told) == 5
    assert told[0] == "round 1: out of device memory: client 0 takes batches in 4 parts"
    assert metrics.read(tmp_path / "run")[1]["parts"] == {str(client): 4 for client in range(5)}
    done = Command(tmp_path, "train", *SMALL, "--run.dir=other", "--gate.norm=paper", plant=little_memory).wait()
    assert "needs whole batches: lower training.batch_size" in done.one_line()


def little_memory() -> None:
    """Have this process find memory for 20 samples at a time in training."""
    from fedmoe.engine import step

    limited = step.branches

    def branches(program: Any, x: torch.Tensor, streams: Any) -> Any:
        if program.modules.training and len(x) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return limited(program, x, streams)

    step.branches = branches


def test_metrics_that_the_disk_refuses_between_checkpoints(tmp_path: Path, fedmoe: Fedmoe) -> None:
    words = ("train", *SMALL, "--run.dir=run", "--federation.rounds=50", "--checkpoint.every=100")
    done = Command(tmp_path, *words, plant=fill_disk_in_round_3).wait()
    assert "metrics.jsonl: No space left on device; the last checkpoint is whole: make room, then" in done.one_line()
    assert checkpoint.read_manifest(tmp_path / "run").round == 0
    assert fedmoe("resume", "run", "--rounds=1").code == 0


def fill_disk_in_round_3() -> None:
    """Have `metrics.jsonl` reach the limit of a file's size in the middle of its third line."""
    from fedmoe.metrics import Line, Log

    append = Log.append

    def filling(self: Log, line: Line) -> None:
        if line["round"] == 3:
            limit_file_size(self._path.stat().st_size + 10)
        append(self, line)

    Log.append = filling  # type: ignore[method-assign]


def test_a_field_that_is_newer_than_the_run_is_taken_by_its_default(run: Path, fedmoe: Fedmoe) -> None:
    path = run / "environment.json"
    text = path.read_text()
    assert '  "training.theta_momentum": "reset",\n' in text
    path.write_text(text.replace('  "training.theta_momentum": "reset",\n', ""))
    assert fedmoe("resume", run).code == 0


def test_lines_that_are_missing_from_metrics_are_noticed(run: Path, fedmoe: Fedmoe) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[1])
    assert "metrics.jsonl: has no line of round 1, the checkpoint does" in fedmoe("resume", run).one_line()


def test_closed_output(tmp_path: Path) -> None:
    script = f"{sys.executable} -m fedmoe train {' '.join(SMALL)} --run.dir=run >&- 2>&-"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0
    assert len(metrics.read(tmp_path / "run")) == 2
