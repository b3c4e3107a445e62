"""What a measurement depends on besides the code: hardware, driver, versions, commit. What is not known is None."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

Facts = dict[str, str | int | None]

DEVICE = {
    "driver": "driver_version",
    "power_limit": "power.limit",
    "max_sm_clock": "clocks.max.sm",
    "max_memory_clock": "clocks.max.memory",
    "set_sm_clock": "clocks.applications.graphics",
}
"""What decides how fast it runs, and NVML's names for that."""


def environment(root: Path) -> Facts:
    """Of this machine and process, and of the checkout at `root`."""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        **(_device() if cuda else dict.fromkeys(DEVICE)),
        "cuda": torch.version.cuda,
        "cublas": _version("nvidia-cublas") or _version("nvidia-cublas-cu12"),  # torch itself does not tell
        "torch": torch.__version__,
        "triton": _version("triton") or _version("pytorch-triton"),
        **{name: _version(name) for name in ("liger-kernel", "cut-cross-entropy", "apex")},
        "python": platform.python_version(),
        "commit": _commit(root),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
    }


def _device() -> dict[str, str | None]:
    said = _said("nvidia-smi", f"--query-gpu={','.join(DEVICE.values())}", "--format=csv,noheader") or ""
    told = [None if value.startswith("[") else value for value in said.split(", ")]  # as in [N/A]
    return dict(zip(DEVICE, told, strict=True)) if len(told) == len(DEVICE) else dict.fromkeys(DEVICE)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    commit = _said("git", "-C", str(root), "rev-parse", "HEAD")
    changed = commit and _said("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if changed else commit


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _said(*command: str) -> str | None:
    """The first line that a command prints; None where there is none, or no such command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.partition("\n")[0].strip() or None if done.returncode == 0 else None
