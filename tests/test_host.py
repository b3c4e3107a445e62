"""The host: CPU time, memory, load and RAPL's energy, from imitations of /proc and /sys and from the real ones."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedmoe.profiling import host
from fedmoe.profiling.host import NO_RAPL, NOT_READABLE, HostMeter
from fedmoe.profiling.nvml import NvmlMeter
from fedmoe.profiling.sampler import Meter, Sampler
from tests.fake_nvml import UUID, FakeNvml

TICK = 1 / os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "stat").write_text("cpu  100 20 30 4000 500 6 7 800 9 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
    (folder / "loadavg").write_text("2.31 1.96 1.35 3/113 18490\n")
    (folder / "self" / "statm").write_text("765 447 418 5 0 123 0\n")
    return folder


@pytest.fixture
def sys_(tmp_path: Path) -> Path:
    (tmp_path / "sys" / "class" / "powercap").mkdir(parents=True)
    return tmp_path / "sys"


def zone(sys_: Path, folder: str, name: str, microjoules: int, most: int = 262_143_328_850) -> Path:
    path = sys_ / "class" / "powercap" / folder
    path.mkdir(exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    return path


def process(proc: Path, name: str, children: str = "", ticks: tuple[int, int, int, int] = (0, 0, 0, 0)) -> None:
    """(user, system, user of its ended children, system of those)"""
    (proc / name / "task" / "1").mkdir(parents=True)
    (proc / name / "task" / "1" / "children").write_text(children)
    times = " ".join(map(str, ticks))
    (proc / name / "stat").write_text(f"{name} (a (strange) name) S 1 2 3 0 -1 4194304 55 66 77 88 {times} 20 0 1 0\n")


def test_the_machine_and_memory(proc: Path, sys_: Path) -> None:
    meter = HostMeter(proc, sys_)
    values = meter.read()
    assert list(values) == [quantity.name for quantity in meter.quantities]
    assert values["memory_resident"] == 447 * PAGE
    assert values["load"] == 2.31
    assert values["cpu_time_machine"] == pytest.approx((100 + 20 + 30 + 6 + 7) * TICK)  # neither idle nor waiting
    kinds = {quantity.name: (quantity.unit, quantity.kind) for quantity in meter.quantities}
    assert kinds == {
        "cpu_time": ("s", "counter"),
        "cpu_time_main_thread": ("s", "counter"),
        "cpu_time_machine": ("s", "counter"),
        "load": ("tasks", "gauge"),
        "memory_resident": ("bytes", "gauge"),
        "cpu_energy": ("J", "counter"),
    }


def test_where_there_is_no_proc(tmp_path: Path) -> None:
    meter = HostMeter(tmp_path / "proc", tmp_path / "sys")
    values = meter.read()
    unknown = {"cpu_time_machine": "stat", "load": "loadavg", "memory_resident": "self/statm"}
    assert {name for name, value in values.items() if value is None} == {*unknown, "cpu_energy"}
    for name, file in unknown.items():
        assert meter.missing[name] == f"{tmp_path / 'proc' / file} cannot be read: No such file or directory"
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "loadavg").write_text("1.5 1 1 1/1 1")
    assert meter.read()["load"] == 1.5
    assert "load" not in meter.missing


def test_a_file_of_another_shape_is_missing(proc: Path, sys_: Path) -> None:
    (proc / "loadavg").write_text("much")
    meter = HostMeter(proc, sys_)
    assert meter.read()["load"] is None
    assert meter.missing["load"].startswith("ValueError: could not convert")


def test_energy_of_all_packages_and_nothing_within_or_around_them(proc: Path, sys_: Path) -> None:
    first = zone(sys_, "intel-rapl:0", "package-0", 5_000_000)
    second = zone(sys_, "intel-rapl:1", "package-1", 70_000_000)
    others = [
        zone(sys_, "intel-rapl:0:0", "core", 0),
        zone(sys_, "intel-rapl:0:1", "dram", 0),
        zone(sys_, "intel-rapl:2", "psys", 0),
        zone(sys_, "intel-rapl-mmio:0", "package-0", 0),  # the same processor, by another way
    ]
    meter = HostMeter(proc, sys_)
    assert meter.read()["cpu_energy"] == 0.0
    (first / "energy_uj").write_text("5500000\n")
    (second / "energy_uj").write_text("72000000\n")
    for other in others:
        (other / "energy_uj").write_text("9000000\n")
    assert meter.read()["cpu_energy"] == pytest.approx(0.5 + 2.0)


def test_energy_that_returns_to_0_goes_on(proc: Path, sys_: Path) -> None:
    package = zone(sys_, "intel-rapl:0", "package-0", 90_000_000, most=100_000_000)
    meter, seen = HostMeter(proc, sys_), []
    for microjoules in (90_000_000, 97_000_000, 4_000_000, 5_000_000, 1_000_000):
        (package / "energy_uj").write_text(str(microjoules))
        seen.append(meter.read()["cpu_energy"])
    assert seen == pytest.approx([0, 7, 14, 15, 111])


def test_energy_without_an_interface(proc: Path, sys_: Path, tmp_path: Path) -> None:
    zone(sys_, "intel-rapl:0", "psys", 1)
    (sys_ / "class" / "powercap" / "intel-rapl:1").mkdir()  # nameless
    for folder in (sys_, tmp_path / "nowhere"):
        meter = HostMeter(proc, folder)
        assert meter.read()["cpu_energy"] is None
        assert meter.missing["cpu_energy"] == NO_RAPL


def test_energy_that_only_root_may_read(proc: Path, sys_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(sys_, "intel-rapl:0", "package-0", 1)
    meter, read = HostMeter(proc, sys_), Path.read_text

    def refuse(path: Path) -> str:  # file modes do not bind root, as whom tests may run
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert meter.read()["cpu_energy"] is None
    assert meter.missing["cpu_energy"] == NOT_READABLE
    monkeypatch.undo()
    assert meter.read()["cpu_energy"] == 0.0
    assert not meter.missing


def children(proc: Path, sys_: Path, monkeypatch: pytest.MonkeyPatch, ended: float = 0.0) -> float:
    monkeypatch.setattr(time, "process_time", lambda: 1000.0)
    monkeypatch.setattr(os, "times", lambda: os.times_result((1, 1, ended, 2 * ended, 1)))
    value = HostMeter(proc, sys_).read()["cpu_time"]
    assert isinstance(value, float)
    return value - 1000.0


def test_children_count_with_theirs(proc: Path, sys_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert children(proc, sys_, monkeypatch, ended=5.0) == pytest.approx(5 + 10)
    process(proc, "self", "71 72 ")
    process(proc, "71", "73", ticks=(100, 20, 3, 4))
    process(proc, "72", ticks=(1000, 0, 0, 0))
    process(proc, "73", ticks=(0, 50_000, 0, 0))
    expected = 5 + 10 + (127 + 1000 + 50_000) * TICK
    assert children(proc, sys_, monkeypatch, ended=5.0) == pytest.approx(expected)


def test_children_of_every_thread(proc: Path, sys_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process(proc, "self", "71")
    (proc / "self" / "task" / "2").mkdir()
    (proc / "self" / "task" / "2" / "children").write_text("72")
    (proc / "self" / "task" / "3").mkdir()  # has just ended
    process(proc, "71", ticks=(100, 0, 0, 0))
    process(proc, "72", ticks=(0, 10, 0, 0))
    assert children(proc, sys_, monkeypatch) == pytest.approx(110 * TICK)


def test_time_of_a_child_does_not_go_back_as_it_ends(proc: Path, sys_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    ended = 0.0
    monkeypatch.setattr(os, "times", lambda: os.times_result((0, 0, ended, 0, 0)))
    process(proc, "self", "71")
    process(proc, "71", ticks=(300, 0, 0, 0))
    meter = HostMeter(proc, sys_)
    alive = meter.read()["cpu_time"]
    (proc / "71" / "stat").unlink()
    between = meter.read()["cpu_time"]
    ended = 310 * TICK
    after = meter.read()["cpu_time"]
    assert (alive, between, after) == pytest.approx((300 * TICK, 300 * TICK, 310 * TICK))


def test_new_children_are_looked_for_now_and_then(proc: Path, sys_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    monkeypatch.setattr(os, "times", lambda: os.times_result((0, 0, 0, 0, 0)))
    now = 50.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    process(proc, "self", "")
    process(proc, "71", ticks=(10, 0, 0, 0))
    meter = HostMeter(proc, sys_)
    assert meter.read()["cpu_time"] == 0
    (proc / "self" / "task" / "1" / "children").write_text("71")
    now += host.CHILDREN_SECONDS / 2
    assert meter.read()["cpu_time"] == 0
    now += host.CHILDREN_SECONDS / 2
    assert meter.read()["cpu_time"] == pytest.approx(10 * TICK)


def test_the_main_thread_has_a_share(proc: Path, sys_: Path) -> None:
    meter = HostMeter(proc, sys_)

    def spent() -> tuple[float, float]:
        values = meter.read()
        whole, main = values["cpu_time"], values["cpu_time_main_thread"]
        assert isinstance(whole, float) and isinstance(main, float)
        return whole, main

    def work() -> None:
        begun = time.thread_time()
        while time.thread_time() < begun + 0.05:
            pass

    before = spent()
    work()
    between = spent()
    assert between[1] - before[1] >= 0.05
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    after = spent()
    assert after[0] - between[0] >= 0.05
    assert after[1] - between[1] < 0.05 <= (after[0] - between[0])  # the other's work is not the main thread's


def test_a_system_without_clocks_of_threads(proc: Path, sys_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)
    meter = HostMeter(proc, sys_)
    assert meter.read()["cpu_time_main_thread"] is None
    assert meter.missing["cpu_time_main_thread"] == "this system has no clock for a thread"


def test_sampled_together_with_a_gpu_whose_energy_is_not_counted(
    proc: Path, sys_: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    fake, now = FakeNvml(), 0.0
    fake.fails = {"nvmlDeviceGetTotalEnergyConsumption": "NOT_SUPPORTED"}
    package = zone(sys_, "intel-rapl:0", "package-0", 0)
    meters: list[Meter] = [HostMeter(proc, sys_), NvmlMeter(torch.device("cuda"), fake)]
    sampler = Sampler(meters, clock=lambda: now)
    for now, fake.milliwatts in ((0.0, 100_000), (1.0, 300_000), (2.0, 300_000)):
        (package / "energy_uj").write_text(str(int(50e6 * now)))
        sampler.sample()
    summary = sampler.summary(0.0, 2.0)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert not summary["missing"]
    energy = {name: summary["quantities"][name] for name in ("gpu_energy", "cpu_energy")}
    assert {name: found["increase"] for name, found in energy.items()} == {"gpu_energy": 500.0, "cpu_energy": 100.0}
    assert energy["gpu_energy"]["source"] == "integrated from gpu_power"
    assert energy["cpu_energy"]["source"] == "counter"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_on_this_machine() -> None:
    meter = HostMeter()
    before = meter.read()
    loop = "import time\nwhile time.process_time() < 0.2: pass"
    subprocess.run([sys.executable, "-c", loop], check=True)
    after = meter.read()
    low, high = before["cpu_time"], after["cpu_time"]
    assert isinstance(low, float) and isinstance(high, float) and high - low >= 0.2 - 2 * TICK
    resident, load = after["memory_resident"], after["load"]
    assert isinstance(resident, float) and resident > 10e6
    assert isinstance(load, float) and load >= 0
    assert set(meter.missing) <= {"cpu_energy"}
