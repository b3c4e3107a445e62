"""NVML: every quantity and every failure, against an imitation of its library; what is missing is never 0."""

import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedmoe.profiling.nvml import FIELDS, STATIC, THROTTLES, NvmlMeter, energy_counter, static
from fedmoe.profiling.nvml_device import Unavailable
from tests.fake_nvml import ERRORS, UUID, FakeNvml

CUDA = torch.device("cuda", 1)
NAMES = [field.quantity.name for field in FIELDS]
NEWER = ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetCurrentClocksEventReasons")
"""Those that an older library lacks."""
UNSHARED = ("gpu_power", "gpu_energy", "gpu_utilization", "gpu_memory_utilization", "gpu_pcie_rx", "gpu_pcie_tx")
"""What NVML gives of the slices of a GPU together only."""
FUNCTIONS = {
    "gpu_power": ("nvmlDeviceGetPowerUsage",),
    "gpu_energy": ("nvmlDeviceGetTotalEnergyConsumption",),
    "gpu_utilization": ("nvmlDeviceGetUtilizationRates",),
    "gpu_memory_utilization": ("nvmlDeviceGetUtilizationRates",),
    "gpu_memory_used": ("nvmlDeviceGetMemoryInfo",),
    "gpu_sm_clock": ("nvmlDeviceGetClockInfo",),
    "gpu_memory_clock": ("nvmlDeviceGetClockInfo",),
    "gpu_temperature": ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"),
    "gpu_throttle": ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"),
    "gpu_performance_state": ("nvmlDeviceGetPerformanceState",),
    "gpu_pcie_rx": ("nvmlDeviceGetPcieThroughput",),
    "gpu_pcie_tx": ("nvmlDeviceGetPcieThroughput",),
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    def properties(device: torch.device) -> Any:
        assert device == CUDA
        return SimpleNamespace(uuid=UUID)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return FakeNvml()


def test_every_quantity_in_its_unit(fake: FakeNvml) -> None:
    fake.reasons = 0x4 | 0x40
    meter = NvmlMeter(CUDA, fake)
    assert meter.read() == {
        "gpu_power": 412.345,
        "gpu_energy": 9_876_543.21,
        "gpu_utilization": 97.0,
        "gpu_memory_utilization": 41.0,
        "gpu_memory_used": 5_000.0,
        "gpu_sm_clock": 1755.0,
        "gpu_memory_clock": 2619.0,
        "gpu_temperature": 61.0,
        "gpu_throttle": frozenset({"power cap", "thermal, by hardware"}),
        "gpu_performance_state": 0.0,
        "gpu_pcie_rx": 56_789_000.0,
        "gpu_pcie_tx": 1_234_000.0,
    }
    assert not meter.missing
    units = {quantity.name: (quantity.unit, quantity.kind) for quantity in meter.quantities}
    assert units == {
        "gpu_power": ("W", "gauge"),
        "gpu_energy": ("J", "counter"),
        "gpu_utilization": ("%", "gauge"),
        "gpu_memory_utilization": ("%", "gauge"),
        "gpu_memory_used": ("bytes", "gauge"),
        "gpu_sm_clock": ("MHz", "gauge"),
        "gpu_memory_clock": ("MHz", "gauge"),
        "gpu_temperature": ("°C", "gauge"),
        "gpu_throttle": ("", "flags"),
        "gpu_performance_state": ("", "gauge"),
        "gpu_pcie_rx": ("bytes/s", "gauge"),
        "gpu_pcie_tx": ("bytes/s", "gauge"),
    }
    assert next(q for q in meter.quantities if q.name == "gpu_energy").rate == "gpu_power"


def test_what_waits_comes_last(fake: FakeNvml) -> None:
    NvmlMeter(CUDA, fake).read()
    assert [call.partition("(")[0] for call in fake.calls][-2:] == ["nvmlDeviceGetPcieThroughput"] * 2


@pytest.mark.parametrize("bit", [*THROTTLES, 1 << 20])
def test_each_reason_to_throttle(fake: FakeNvml, bit: int) -> None:
    meter = NvmlMeter(CUDA, fake)
    assert meter.read()["gpu_throttle"] == frozenset()  # none is something known, and not missing
    fake.reasons = bit
    assert meter.read()["gpu_throttle"] == frozenset({THROTTLES.get(bit, "reason 0x100000")})


@pytest.mark.parametrize("lacks", ["FUNCTION_NOT_FOUND", "AttributeError"])
@pytest.mark.parametrize("age", [0, 1])
def test_drivers_and_libraries_before_and_after_a_renaming(fake: FakeNvml, lacks: str, age: int) -> None:
    fake.reasons = 0x80
    for name in ("gpu_throttle", "gpu_temperature"):
        fake.fails[FUNCTIONS[name][age]] = lacks
    values = NvmlMeter(CUDA, fake).read()
    assert (values["gpu_throttle"], values["gpu_temperature"]) == (frozenset({"power brake"}), 61.0)


def test_unknown_performance_state_is_missing(fake: FakeNvml) -> None:
    fake.pstate = 32
    meter = NvmlMeter(CUDA, fake)
    assert meter.read()["gpu_performance_state"] is None
    assert meter.missing == {"gpu_performance_state": "NVML does not know it"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("NOT_SUPPORTED", "this GPU or its driver does not give it"),
        ("NO_PERMISSION", "no permission: the driver lets only administrators read it"),
        ("GPU_IS_LOST", "the GPU is lost: it has fallen off the bus"),
        ("FUNCTION_NOT_FOUND", "this driver is too old to give it"),
        ("TIMEOUT", "NVML: Timeout"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_is_refused_is_missing_alone(fake: FakeNvml, name: str, error: str, said: str) -> None:
    everything = NvmlMeter(CUDA, fake).read()
    fake.fails = dict.fromkeys(FUNCTIONS[name], error)
    meter = NvmlMeter(CUDA, fake)
    values = meter.read()
    lost = {other for other in NAMES if FUNCTIONS[other] == FUNCTIONS[name]}
    assert values == {other: None if other in lost else value for other, value in everything.items()}
    assert meter.missing == dict.fromkeys(lost, said)


def test_only_what_may_come_back_is_asked_for_again(fake: FakeNvml) -> None:
    meter = NvmlMeter(CUDA, fake)
    fake.fails = {"nvmlDeviceGetPowerUsage": "TIMEOUT", "nvmlDeviceGetMemoryInfo": "NOT_SUPPORTED"}
    meter.read()
    assert set(meter.missing) == {"gpu_power", "gpu_memory_used"}
    fake.fails = {}
    fake.calls.clear()
    values = meter.read()
    assert values["gpu_power"] == 412.345 and values["gpu_memory_used"] is None
    assert set(meter.missing) == {"gpu_memory_used"}
    assert "nvmlDeviceGetMemoryInfo(gpu)" not in fake.calls


def test_lost_while_it_runs(fake: FakeNvml) -> None:
    meter = NvmlMeter(CUDA, fake)
    assert None not in meter.read().values()
    fake.fails = {name: "GPU_IS_LOST" for names in FUNCTIONS.values() for name in names}
    assert meter.read() == dict.fromkeys(NAMES)
    assert meter.missing == dict.fromkeys(NAMES, "the GPU is lost: it has fallen off the bus")


Break = Callable[[FakeNvml, pytest.MonkeyPatch], None]


def failing(function: str, error: str) -> Break:
    return lambda fake, patch: fake.fails.update({function: error})


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (failing("nvmlInit", "LIBRARY_NOT_FOUND"), "no NVIDIA driver: libnvidia-ml is not found"),
        (failing("nvmlInit", "DRIVER_NOT_LOADED"), "the NVIDIA driver is not loaded"),
        (failing("nvmlInit", "LIB_RM_VERSION_MISMATCH"), "the NVIDIA driver was updated but not loaded again: reboot"),
        (failing("nvmlInit", "NO_PERMISSION"), "no permission: the driver lets only administrators read it"),
        (failing("nvmlDeviceGetHandleByUUID", "GPU_IS_LOST"), "the GPU is lost: it has fallen off the bus"),
        (failing("nvmlDeviceGetHandleByUUID", "NO_PERMISSION"), "no permission: the driver lets only administrat"),
        (lambda fake, patch: fake.handles.clear(), f"NVML sees no GPU with the UUID {UUID}"),
        (lambda fake, patch: patch.delattr(torch.cuda, "get_device_properties"), "AttributeError: module 'torch.cuda'"),
    ],
)
def test_without_nvml_all_is_missing_for_one_reason(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch, broken: Break, said: str
) -> None:
    broken(fake, monkeypatch)
    meter = NvmlMeter(CUDA, fake)
    assert meter.read() == dict.fromkeys(NAMES)
    assert set(meter.missing) == set(NAMES)
    (reason,) = set(meter.missing.values())
    assert reason.startswith(said)
    assert energy_counter(CUDA, fake) is None
    assert static(CUDA, fake) == dict.fromkeys(STATIC)
    meter.close()
    assert fake.open == 0


def test_without_the_library_or_a_gpu(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # which an import takes for not installed
    meter = NvmlMeter(CUDA)
    assert set(meter.missing.values()) == {"pynvml is not installed: pip install nvidia-ml-py"}
    assert energy_counter(CUDA) is None and static(CUDA) == dict.fromkeys(STATIC)
    meter = NvmlMeter(torch.device("cpu"), fake)
    assert set(meter.missing.values()) == {"cpu is not a GPU"}
    assert not fake.calls


def test_the_library_is_imported_when_it_is_needed(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert NvmlMeter(CUDA).read()["gpu_power"] == 412.345
    assert static(CUDA)["driver"] == "580.95.05"


@pytest.mark.parametrize("parent", ["", "NO_PERMISSION"])
def test_a_slice_has_its_memory_and_the_clocks_of_all(fake: FakeNvml, parent: str) -> None:
    fake.handles = {f"MIG-{UUID}": "slice"}
    fake.fails = {"nvmlDeviceGetDeviceHandleFromMigDeviceHandle": parent}
    meter = NvmlMeter(CUDA, fake)
    values = meter.read()
    assert {name for name, value in values.items() if value is None} == set(UNSHARED)
    assert meter.missing == dict.fromkeys(UNSHARED, "MIG: NVML gives it for the whole GPU, not for a slice")
    assert values["gpu_memory_used"] == 500.0
    assert f"nvmlDeviceGetClockInfo({'slice' if parent else 'gpu'})" in fake.calls
    assert not any("Power" in call or "Energy" in call for call in fake.calls)
    assert energy_counter(CUDA, fake) is None
    facts = [static(CUDA, fake)[name] for name in ("name", "power_limit", "memory_total", "max_sm_clock")]
    assert facts == ["NVIDIA H200 MIG 1g.18gb", None, 10_000, 1980]


def test_a_slice_that_has_only_its_gpus_name_lacks_its_memory_too(fake: FakeNvml) -> None:
    fake.mig = True
    meter = NvmlMeter(CUDA, fake)
    values = meter.read()
    assert {name for name, value in values.items() if value is None} == {*UNSHARED, "gpu_memory_used"}
    assert meter.missing["gpu_memory_used"] == "MIG: NVML does not tell which slice of the GPU this is"
    assert values["gpu_sm_clock"] == 1755.0
    assert energy_counter(CUDA, fake) is None
    assert static(CUDA, fake)["memory_total"] is None


def test_a_gpu_that_cannot_be_cut_is_whole(fake: FakeNvml) -> None:
    fake.fails = {"nvmlDeviceGetMigMode": "NOT_SUPPORTED"}
    assert None not in NvmlMeter(CUDA, fake).read().values()


def test_closing_ends_nvml_once(fake: FakeNvml) -> None:
    meter = NvmlMeter(CUDA, fake)
    assert fake.open == 1
    meter.close()
    meter.close()
    assert fake.open == 0
    assert meter.read() == dict.fromkeys(NAMES)


def test_energy_counter(fake: FakeNvml) -> None:
    joules = energy_counter(CUDA, fake)
    assert joules is not None
    before = joules()
    fake.millijoules += 1_500
    assert joules() - before == pytest.approx(1.5, rel=1e-6)
    fake.fails = {"nvmlDeviceGetTotalEnergyConsumption": "GPU_IS_LOST"}
    with pytest.raises(Unavailable, match=r"^the GPU is lost"):
        joules()
    assert fake.open == 1
    fake.fails = {"nvmlDeviceGetTotalEnergyConsumption": "NOT_SUPPORTED"}
    assert energy_counter(CUDA, fake) is None
    assert fake.open == 1


def test_static(fake: FakeNvml) -> None:
    expected: dict[str, str | float | None] = {
        "name": "NVIDIA H200",
        "driver": "580.95.05",
        "power_limit": 700.0,
        "max_sm_clock": 1980,
        "max_memory_clock": 3201,
        "memory_total": 80_000,
        "pcie_generation": 1,
        "max_pcie_generation": 5,
        "pcie_width": 8,
        "max_pcie_width": 16,
    }
    assert static(CUDA, fake) == expected
    fake.fails = {"nvmlDeviceGetMaxPcieLinkWidth": "NOT_SUPPORTED", "nvmlDeviceGetName": "GPU_IS_LOST"}
    assert static(CUDA, fake) == expected | {"max_pcie_width": None, "name": None}
    assert fake.open == 0


def test_the_imitation_is_like_the_library() -> None:
    real = pytest.importorskip("pynvml")
    fake = FakeNvml()
    for name, function in inspect.getmembers(fake, inspect.ismethod):
        if not name.startswith("nvml") or (name in NEWER and not hasattr(real, name)):
            continue
        theirs = inspect.signature(getattr(real, name)).parameters.values()
        required = [p.name for p in theirs if p.default is inspect.Parameter.empty]
        assert required == list(inspect.signature(function).parameters), name
    for name, error in ERRORS.items():
        assert getattr(real, f"NVML_ERROR_{name}") == error
        raised = real.NVMLError(error)
        assert isinstance(raised, real.NVMLError) and raised.value == error
    for name in vars(FakeNvml):
        if name.startswith("NVML_"):
            assert getattr(real, name) == getattr(fake, name)
    assert str(real.NVMLError(ERRORS["TIMEOUT"])) == "Timeout"
    bits = {value for name, value in vars(real).items() if name.startswith("nvmlClocksThrottleReason")}
    assert bits - {real.nvmlClocksThrottleReasonNone, real.nvmlClocksThrottleReasonAll} <= set(THROTTLES)
