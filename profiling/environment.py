"""What a measurement depends on besides the code: hardware, driver, versions, commit. What is not known is None."""

import os
import platform
import subprocess
from pathlib import Path

import torch

Facts = dict[str, str | int | None]


def environment(root: Path) -> Facts:
    """Of this machine and process, and of the checkout at `root`."""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
        "commit": _commit(root),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
    }


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


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
