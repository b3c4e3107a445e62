"""What NVML tells of a GPU: a meter of all that changes while it runs, its energy alone, and what does not change.

Without nvidia-ml-py, without a driver, or where the driver refuses, values are missing, and the reason is known. On a
slice of a GPU (MIG) power, energy, utilization and PCIe traffic are those of all slices together, and so are missing.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fedmoe.profiling.nvml_device import Gpu, Scope, Unavailable, code, open_gpu, why
from fedmoe.profiling.sampler import Quantity, Value

Get = Callable[[Any, Any], Any]
"""Given `pynvml` and a handle."""

THROTTLES = {
    0x1: "idle",
    0x2: "clocks set by the user",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, by software",
    0x40: "thermal, by hardware",
    0x80: "power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
"""Why clocks are not at their highest: the bits of nvmlClocksEventReasons, which older drivers call ThrottleReasons."""

FINAL = ("NO_PERMISSION", "NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "GPU_IS_LOST")
"""Errors after which there is no use in asking again."""


@dataclass(frozen=True, slots=True)
class Field:
    """One quantity, and how to get it."""

    quantity: Quantity
    scope: Scope
    get: Get


def _throttles(nvml: Any, handle: Any) -> frozenset[str]:
    names = "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"
    bits = _first(nvml, names, handle)
    set_ = (1 << place for place in range(64) if bits >> place & 1)
    return frozenset(THROTTLES.get(bit, f"reason {bit:#x}") for bit in set_)


def _temperature(nvml: Any, handle: Any) -> float:
    names = "nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"
    return float(_first(nvml, names, handle, nvml.NVML_TEMPERATURE_GPU))


def _first(nvml: Any, names: tuple[str, str], *arguments: Any) -> Any:
    """Call the newer of two functions, or the older one, where `pynvml` or the driver does not have the newer one yet.

    Nor can it be the older one only: drivers of CUDA 14 will have it no more.
    """
    try:
        return getattr(nvml, names[0])(*arguments)
    except Exception as error:
        if not isinstance(error, AttributeError) and code(nvml, error) != "FUNCTION_NOT_FOUND":
            raise
    return getattr(nvml, names[1])(*arguments)


def _performance_state(nvml: Any, handle: Any) -> float:
    state = nvml.nvmlDeviceGetPerformanceState(handle)
    if state == nvml.NVML_PSTATE_UNKNOWN:
        raise Unavailable("NVML does not know it")
    return float(state)


def _traffic(counter: str) -> Get:
    return lambda nvml, handle: 1e3 * nvml.nvmlDeviceGetPcieThroughput(handle, getattr(nvml, counter))


def _clock(of: str) -> Get:
    return lambda nvml, handle: float(nvml.nvmlDeviceGetClockInfo(handle, getattr(nvml, of)))


POWER = Quantity("gpu_power", "W", "gauge", "power of the board; on Ampere (but A100) and later over the last second")
ENERGY = Quantity("gpu_energy", "J", "counter", "energy of the board since the driver was loaded", rate=POWER.name)

FIELDS = (
    Field(POWER, "whole", lambda nvml, handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
    Field(ENERGY, "whole", lambda nvml, handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3),
    Field(
        Quantity("gpu_utilization", "%", "gauge", "time in which a kernel ran, over the last sixth to whole second"),
        "whole",
        lambda nvml, handle: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
    ),
    Field(
        Quantity("gpu_memory_utilization", "%", "gauge", "time in which device memory was read or written, likewise"),
        "whole",
        lambda nvml, handle: float(nvml.nvmlDeviceGetUtilizationRates(handle).memory),
    ),
    Field(
        Quantity("gpu_memory_used", "bytes", "gauge", "device memory that all processes and the driver use"),
        "slice",
        lambda nvml, handle: float(nvml.nvmlDeviceGetMemoryInfo(handle).used),
    ),
    Field(Quantity("gpu_sm_clock", "MHz", "gauge", "clock of the multiprocessors"), "shared", _clock("NVML_CLOCK_SM")),
    Field(Quantity("gpu_memory_clock", "MHz", "gauge", "clock of device memory"), "shared", _clock("NVML_CLOCK_MEM")),
    Field(Quantity("gpu_temperature", "°C", "gauge", "temperature of the chip"), "shared", _temperature),
    Field(Quantity("gpu_throttle", "", "flags", "why clocks are not at their highest"), "shared", _throttles),
    Field(Quantity("gpu_performance_state", "", "gauge", "from 0, the fastest, to 15"), "shared", _performance_state),
    # Each of these waits for the 20 ms that it measures, so they come last.
    Field(
        Quantity("gpu_pcie_rx", "bytes/s", "gauge", "what the GPU receives over PCIe, over 20 ms"),
        "whole",
        _traffic("NVML_PCIE_UTIL_RX_BYTES"),
    ),
    Field(
        Quantity("gpu_pcie_tx", "bytes/s", "gauge", "what the GPU sends over PCIe, over 20 ms"),
        "whole",
        _traffic("NVML_PCIE_UTIL_TX_BYTES"),
    ),
)

STATIC: dict[str, tuple[Scope, Get]] = {
    "name": ("any", lambda nvml, handle: nvml.nvmlDeviceGetName(handle)),
    "driver": ("any", lambda nvml, handle: nvml.nvmlSystemGetDriverVersion()),
    "power_limit": ("whole", lambda nvml, handle: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3),
    "max_sm_clock": ("shared", lambda nvml, handle: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
    "max_memory_clock": ("shared", lambda nvml, handle: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)),
    "memory_total": ("slice", lambda nvml, handle: nvml.nvmlDeviceGetMemoryInfo(handle).total),
    "pcie_generation": ("shared", lambda nvml, handle: nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)),
    "max_pcie_generation": ("shared", lambda nvml, handle: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
    "pcie_width": ("shared", lambda nvml, handle: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
    "max_pcie_width": ("shared", lambda nvml, handle: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
}


class NvmlMeter:
    """Reads all of `FIELDS`. `nvml` stands in for `pynvml`."""

    def __init__(self, device: torch.device, nvml: Any = None) -> None:
        self.quantities = [field.quantity for field in FIELDS]
        self.missing: dict[str, str] = {}
        self._refused: set[str] = set()
        self._gpu: Gpu | None = None
        try:
            self._gpu = open_gpu(device, nvml)
        except Unavailable as error:
            self.missing = {quantity.name: str(error) for quantity in self.quantities}

    def read(self) -> dict[str, Value]:
        """What NVML tells now; takes 40 ms, for PCIe."""
        return {field.quantity.name: self._read(self._gpu, field) if self._gpu else None for field in FIELDS}

    def close(self) -> None:
        """Let go of NVML."""
        if self._gpu:
            self._gpu.nvml.nvmlShutdown()
            self._gpu = None

    def _read(self, gpu: Gpu, field: Field) -> Value:
        name = field.quantity.name
        if name in self._refused:
            return None
        try:
            value: Value = gpu.ask(field.scope, field.get)
        except Exception as error:
            self.missing[name] = why(gpu.nvml, error)
            if code(gpu.nvml, error) in FINAL:
                self._refused.add(name)
            return None
        self.missing.pop(name, None)
        return value


def energy_counter(device: torch.device, nvml: Any = None) -> Callable[[], float] | None:
    """Gives joules since the driver was loaded, to be subtracted; None where NVML does not count them for `device`.

    A call raises Unavailable when NVML ceases to.
    """
    try:
        gpu = open_gpu(device, nvml)
    except Unavailable:
        return None
    get = next(field.get for field in FIELDS if field.quantity is ENERGY)

    def joules() -> float:
        try:
            return float(gpu.ask("whole", get))
        except Exception as error:
            raise Unavailable(why(gpu.nvml, error)) from error

    try:
        joules()
    except Unavailable:
        gpu.nvml.nvmlShutdown()
        return None
    return joules


def static(device: torch.device, nvml: Any = None) -> dict[str, str | float | None]:
    """What does not change while it runs, in W, MHz and bytes; None where it is not known.

    An idle GPU slows its link, so that what PCIe is now counts only under load; hence also what it can be.
    """
    facts: dict[str, str | float | None] = dict.fromkeys(STATIC)
    try:
        gpu = open_gpu(device, nvml)
    except Unavailable:
        return facts
    for name, (scope, get) in STATIC.items():
        with contextlib.suppress(Exception):
            facts[name] = gpu.ask(scope, get)
    gpu.nvml.nvmlShutdown()
    return facts
