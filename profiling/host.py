"""What the host did: CPU time, memory and load, and the processor's energy, from Linux's /proc and /sys.

Elsewhere, and in a container that lacks them, what comes from there is missing, and the reason is known.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fedmoe.profiling.sampler import Quantity, Value
from fedmoe.profiling.timing import reason

CHILDREN_SECONDS = 1.0
"""How often to look for new children: it opens a file for each of our threads, 2 ms for 64 of them."""

NO_RAPL = "no RAPL interface: not an x86 processor, a virtual machine, or a container without /sys/class/powercap"
NOT_READABLE = "permission denied: since Linux 5.10 only root reads RAPL's energy"


class _Missing(Exception):
    """Says why there is no value."""


class HostMeter:
    """Reads this process, the machine and its processors. Other folders stand in for `/proc` and `/sys`."""

    def __init__(self, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> None:
        self.missing: dict[str, str] = {}
        self._proc = proc
        self._children = _Children(proc)
        self._packages = [_Package(zone) for zone in _packages(sys)]
        self._main = _clock_of(threading.main_thread())
        self._fields: list[tuple[Quantity, Callable[[], float]]] = [
            (
                Quantity("cpu_time", "s", "counter", "time of all CPUs that this process and its children took"),
                lambda: time.process_time() + self._children.seconds(),
            ),
            (
                Quantity("cpu_time_main_thread", "s", "counter", "of it, what the main thread took"),
                self._main,
            ),
            (
                Quantity("cpu_time_machine", "s", "counter", "time of all CPUs that all processes took"),
                self._machine,
            ),
            (
                Quantity("load", "tasks", "gauge", "tasks of the machine that run or want to, over the last minute"),
                lambda: float(self._text("loadavg").split()[0]),
            ),
            (
                Quantity("memory_resident", "bytes", "gauge", "memory of this process, without its children"),
                lambda: float(int(self._text("self/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")),
            ),
            (
                Quantity("cpu_energy", "J", "counter", "energy of all processors, without their memory, since begun"),
                self._energy,
            ),
        ]

    @property
    def quantities(self) -> list[Quantity]:
        """What it reads."""
        return [quantity for quantity, _ in self._fields]

    def read(self) -> dict[str, Value]:
        """The values now."""
        return {quantity.name: self._read(quantity.name, get) for quantity, get in self._fields}

    def close(self) -> None:
        """Nothing is held."""

    def _read(self, name: str, get: Callable[[], float]) -> Value:
        try:
            value = get()
        except Exception as error:
            self.missing[name] = str(error) if isinstance(error, _Missing) else reason(error)
            return None
        self.missing.pop(name, None)
        return value

    def _text(self, path: str) -> str:
        try:
            return (self._proc / path).read_text()
        except OSError as error:
            raise _Missing(f"{self._proc / path} cannot be read: {error.strerror}") from None

    def _machine(self) -> float:
        user, nice, system, _idle, _wait, irq, softirq = (int(n) for n in self._text("stat").split()[1:8])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")

    def _energy(self) -> float:
        if not self._packages:
            raise _Missing(NO_RAPL)
        try:
            return sum(package.joules() for package in self._packages)
        except PermissionError:
            raise _Missing(NOT_READABLE) from None


class _Package:
    """A processor's energy. Its counter, of 32 bits, returns to 0, at 200 W within half an hour."""

    def __init__(self, zone: Path) -> None:
        self._zone = zone
        self._last: int | None = None
        self._total = 0  # µJ

    def joules(self) -> float:
        """Since this was first called."""
        now = int((self._zone / "energy_uj").read_text())
        if self._last is not None:
            wrapped = int((self._zone / "max_energy_range_uj").read_text()) if now < self._last else 0
            self._total += now - self._last + wrapped
        self._last = now
        return self._total / 1e6


def _packages(sys: Path) -> list[Path]:
    """The zones of whole processors; of the others `core` and `dram` are within these, and `psys` is around them."""
    found = []
    for zone in sorted((sys / "class" / "powercap").glob("intel-rapl:*")):  # of AMD's processors, too
        with contextlib.suppress(OSError):
            if (zone / "name").read_text().startswith("package"):
                found.append(zone)
    return found


class _Children:
    """CPU time of this process's children, of theirs, and so on: of those that have ended, and of those that have not.

    A child that ends between these two readings is missed once; so the sum is kept from going back.
    """

    def __init__(self, proc: Path) -> None:
        self._proc = proc
        self._looked = -CHILDREN_SECONDS
        self._known: list[str] = []
        self._most = 0.0

    def seconds(self) -> float:
        """User and system time."""
        ended = os.times()
        if time.monotonic() - self._looked >= CHILDREN_SECONDS:
            self._known, self._looked = self._find(), time.monotonic()
        now = ended.children_user + ended.children_system + sum(self._of(child) for child in self._known)
        self._most = max(self._most, now)
        return self._most

    def _of(self, process: str) -> float:
        """With its own children that have ended; 0 when it has itself."""
        try:
            text = (self._proc / process / "stat").read_text()
        except OSError:
            return 0.0
        fields = text.rpartition(")")[2].split()  # before it stands a name, which may hold spaces
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def _find(self) -> list[str]:
        found: list[str] = []
        todo = ["self"]
        while todo:
            tasks = self._proc / todo.pop() / "task"
            try:
                threads = list(tasks.iterdir())
            except OSError:  # it has ended, or this is not Linux
                continue
            for thread in threads:
                try:
                    children = (thread / "children").read_text().split()
                except OSError:  # the thread has ended
                    continue
                found += children
                todo += children
        return found


def _clock_of(thread: threading.Thread) -> Callable[[], float]:
    """Gives the CPU time of a thread."""

    def seconds() -> float:
        if not hasattr(time, "pthread_getcpuclockid") or thread.ident is None:
            raise _Missing("this system has no clock for a thread")
        return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))

    return seconds
