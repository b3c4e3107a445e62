"""An imitation of `pynvml` with one GPU, whole or in slices, that fails on demand; `test_nvml` compares the two."""

from types import SimpleNamespace
from typing import Any, ClassVar

UUID = "ffc79498-8ff3-c2dc-3b0d-fafd804516ae"
"""As `torch.cuda.get_device_properties` gives it, without a prefix."""

ERRORS = {
    "INVALID_ARGUMENT": 2,
    "NOT_SUPPORTED": 3,
    "NO_PERMISSION": 4,
    "NOT_FOUND": 6,
    "DRIVER_NOT_LOADED": 9,
    "TIMEOUT": 10,
    "LIBRARY_NOT_FOUND": 12,
    "FUNCTION_NOT_FOUND": 13,
    "GPU_IS_LOST": 15,
    "LIB_RM_VERSION_MISMATCH": 18,
}


class FakeNvml:
    """Set an attribute to change what it says, and `fails[function]` to an error's name to have a function fail."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    NVML_TEMPERATURE_GPU = 0
    NVML_PCIE_UTIL_TX_BYTES, NVML_PCIE_UTIL_RX_BYTES = 0, 1
    NVML_PSTATE_UNKNOWN = 32

    class NVMLError(Exception):
        """As theirs, its number is in `value`."""

        NAMES: ClassVar[dict[int, str]] = {10: "Timeout"}

        def __init__(self, value: int) -> None:
            self.value = value

        def __str__(self) -> str:
            return self.NAMES.get(self.value, "?")

    def __init__(self) -> None:
        for name, value in ERRORS.items():
            setattr(self, f"NVML_ERROR_{name}", value)
        self.fails: dict[str, str] = {}
        self.calls: list[str] = []
        self.open = 0
        """How often it was initialized, less how often shut down."""
        self.handles = {f"GPU-{UUID}": "gpu"}
        self.mig = False
        self.milliwatts, self.millijoules = 412_345, 9_876_543_210
        self.gpu_percent, self.memory_percent = 97, 41
        self.used, self.total = {"gpu": 5_000, "slice": 500}, {"gpu": 80_000, "slice": 10_000}
        self.clocks, self.max_clocks = {1: 1755, 2: 2619}, {1: 1980, 2: 3201}
        self.celsius, self.reasons, self.pstate = 61, 0, 0
        self.kilobytes = {0: 1_234, 1: 56_789}

    def nvmlInit(self) -> None:
        self._call("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self._call("nvmlShutdown")
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        self._call("nvmlSystemGetDriverVersion")
        return "580.95.05"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        self._call("nvmlDeviceGetHandleByUUID")
        if uuid not in self.handles:
            raise self.NVMLError(ERRORS["NOT_FOUND"])
        return self.handles[uuid]

    def nvmlDeviceGetMigMode(self, device: Any) -> list[int]:
        self._call("nvmlDeviceGetMigMode", device)
        return [int(self.mig), int(self.mig)]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, migDevice: Any) -> Any:
        self._call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", migDevice)
        return "gpu"

    def nvmlDeviceGetName(self, handle: Any) -> str:
        self._call("nvmlDeviceGetName", handle)
        return "NVIDIA H200" + " MIG 1g.18gb" * (handle == "slice")

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        self._call("nvmlDeviceGetPowerUsage", handle)
        return self.milliwatts

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        self._call("nvmlDeviceGetTotalEnergyConsumption", handle)
        return self.millijoules

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any) -> int:
        self._call("nvmlDeviceGetEnforcedPowerLimit", handle)
        return 700_000

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        self._call("nvmlDeviceGetUtilizationRates", handle)
        return SimpleNamespace(gpu=self.gpu_percent, memory=self.memory_percent)

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        self._call("nvmlDeviceGetMemoryInfo", handle)
        return SimpleNamespace(used=self.used[handle], total=self.total[handle])

    def nvmlDeviceGetClockInfo(self, handle: Any, type: int) -> int:
        self._call("nvmlDeviceGetClockInfo", handle)
        return self.clocks[type]

    def nvmlDeviceGetMaxClockInfo(self, handle: Any, type: int) -> int:
        self._call("nvmlDeviceGetMaxClockInfo", handle)
        return self.max_clocks[type]

    def nvmlDeviceGetTemperatureV(self, handle: Any, sensor: int) -> int:
        self._call("nvmlDeviceGetTemperatureV", handle)
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self.celsius

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:
        self._call("nvmlDeviceGetTemperature", handle)
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self.celsius

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any) -> int:
        self._call("nvmlDeviceGetCurrentClocksEventReasons", handle)
        return self.reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any) -> int:
        self._call("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return self.reasons

    def nvmlDeviceGetPerformanceState(self, handle: Any) -> int:
        self._call("nvmlDeviceGetPerformanceState", handle)
        return self.pstate

    def nvmlDeviceGetPcieThroughput(self, device: Any, counter: int) -> int:
        self._call("nvmlDeviceGetPcieThroughput", device)
        return self.kilobytes[counter]

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: Any) -> int:
        self._call("nvmlDeviceGetCurrPcieLinkGeneration", handle)
        return 1

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: Any) -> int:
        self._call("nvmlDeviceGetMaxPcieLinkGeneration", handle)
        return 5

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: Any) -> int:
        self._call("nvmlDeviceGetCurrPcieLinkWidth", handle)
        return 8

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: Any) -> int:
        self._call("nvmlDeviceGetMaxPcieLinkWidth", handle)
        return 16

    def _call(self, function: str, handle: Any = None) -> None:
        self.calls.append(f"{function}({handle})" if handle else function)
        error = self.fails.get(function)
        if error == "AttributeError":  # as where this version of the library lacks it
            raise AttributeError(f"module 'pynvml' has no attribute '{function}'")
        if error:
            raise self.NVMLError(ERRORS[error])
