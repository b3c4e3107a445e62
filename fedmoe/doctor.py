"""`fedmoe doctor`: what this machine has, and what each part enables. Never fails on a part that is missing."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Literal

from fedmoe.errors import UserError

PYTHON = (3, 11)
TORCH = (2, 11)


@dataclass(frozen=True, slots=True)
class Fact:
    """One part of the machine; only `broken` keeps FedMoE from running."""

    name: str
    status: Literal["ok", "absent", "warning", "broken"]
    found: str
    """What is there, or why it is not."""
    enables: str
    """What it is for, or what to do."""


def facts() -> list[Fact]:
    """Every fact, in the order in which the parts build on each other."""
    probes: list[Callable[[], Iterator[Fact]]] = [_python, _torch, _gpu, _triton, _native, _apex, _names, _libraries]
    found: list[Fact] = []
    for probe in probes:
        try:
            found.extend(probe())
        except Exception as error:  # whatever a broken installation throws, the other facts still count
            found.append(Fact(probe.__name__.lstrip("_"), "warning", _line(error), "could not be examined"))
    return found


def run(as_json: bool, kernels: bool = False) -> int:
    """Print the facts, or what each kernel compiles to, as a table or JSON; 0, or 1 where something is broken."""
    if kernels:
        return _kernels(as_json)
    found = facts()
    if as_json:
        print(json.dumps([asdict(fact) for fact in found], indent=2, ensure_ascii=False))
    else:
        _print_table(found)
    broken = [fact for fact in found if fact.status == "broken"]
    if broken:
        print("fedmoe doctor: " + "; ".join(f"{f.name}: {f.found}: {f.enables}" for f in broken), file=sys.stderr)
    return int(bool(broken))


def _print_table(found: list[Fact]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for fact in found:
            print(f"{fact.status:8} {fact.name}: {fact.found} ({fact.enables})")
        return
    styles = {"ok": "green", "absent": "dim", "warning": "yellow", "broken": "red"}
    table = Table("part", "", "found", "enables")
    for fact in found:  # Text: what is found may contain brackets, which rich would take for markup
        table.add_row(fact.name, Text(fact.status, styles[fact.status]), Text(fact.found), Text(fact.enables))
    Console().print(table)


def _kernels(as_json: bool) -> int:
    """Compile every kernel in every shipped configuration for each architecture, and print what the code takes."""
    triton, reason = _import("triton")
    if triton is None:
        raise UserError(
            f"fedmoe doctor --kernels compiles with Triton, which is missing ({reason}): pip install triton"
        )
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from fedmoe.kernels.aot import compiled
    from fedmoe.kernels.launch import INTERPRETED
    from fedmoe.kernels.shipped import shipped

    if INTERPRETED:
        raise UserError("TRITON_INTERPRET=1 is set, and interpreted kernels cannot be compiled: unset it")
    rows = []
    progress = Console(stderr=True)
    for made in track(list(shipped()), "Compiling", console=progress, transient=True, disable=not progress.is_terminal):
        for arch in (80, 90):
            got = compiled(made.launch, arch)
            products = " ".join(f"{count} {name}" for name, count in got.products.items())
            copies = f"{len(got.copies)} of {_range(got.copies)}" if got.copies else ""
            row = {"kernel": made.kernel, "configuration": made.configuration, "sm": arch, "registers": got.registers}
            rows.append(row | {"spilled": got.stack, "shared": got.shared, "products": products, "copies": copies})
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    heads = {"registers": "registers", "spilled": "spilled, bytes", "shared": "shared, bytes"}
    heads |= {"products": "tensor cores", "copies": "async copies, bytes"}
    table = Table(*(heads.get(name, name) for name in rows[0]))
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console = Console()
    if not console.is_terminal:  # a file has no width that the table must keep
        console.width = max(console.width, 170)
    console.print(table)
    return 0


def _range(sizes: list[int]) -> str:
    return "-".join(str(size) for size in sorted({min(sizes), max(sizes)}))


def _python() -> Iterator[Fact]:
    version = platform.python_version()
    if sys.version_info[:2] < PYTHON:
        yield Fact("Python", "broken", version, f"install Python {_dotted(PYTHON)} or later")
    else:
        yield Fact("Python", "ok", f"{version}, {platform.system()} {platform.machine()}", "everything")


def _torch() -> Iterator[Fact]:
    torch, reason = _import("torch")
    fix = f"pip install 'torch>={_dotted(TORCH)}'"
    if torch is None:
        yield Fact("PyTorch", "broken", reason, fix)
        return
    version = str(torch.__version__)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < TORCH:
        yield Fact("PyTorch", "broken", f"{version} is older than {_dotted(TORCH)}", fix)
        return
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    yield Fact("PyTorch", "ok", f"{version}, {build}", "training on the CPU" + " and the GPU" * (build[:4] == "CUDA"))
    yield Fact("CPU threads", "ok", f"{torch.get_num_threads()} of {os.cpu_count()} cores", "`run.threads` sets them")


def _gpu() -> Iterator[Fact]:
    driver, names = _nvml()
    torch, reason = _import("torch")
    devices = _cuda_devices(torch)
    if devices:
        for index, (name, gigabytes, capability) in enumerate(devices):
            found = f"{name}, {gigabytes:.0f} GiB, compute capability {_dotted(capability)}"
            yield Fact(f"GPU {index}", "ok", found, "training on it, in fp32: `run.device`")
    elif names and torch is not None:
        found = f"{', '.join(names)}, which this PyTorch ({torch.__version__}) cannot use"
        yield Fact("GPU", "warning", found, "install a CUDA build of PyTorch that suits the driver")
    else:
        yield Fact(
            "GPU", "absent", f"PyTorch: {reason}" if reason else "none that PyTorch sees", "training runs on the CPU"
        )
    yield driver


def _cuda_devices(torch: Any) -> list[tuple[str, float, tuple[int, int]]]:
    """(name, GiB, compute capability) of each device; empty without torch, or where it sees none."""
    if torch is None or not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [(p.name, p.total_memory / 2**30, (p.major, p.minor)) for p in properties]


def _nvml() -> tuple[Fact, list[str]]:
    """The driver, and the names of the GPUs that it (not PyTorch) sees."""
    pynvml, reason = _import("pynvml")
    enables = "telling a missing driver from a PyTorch without CUDA"
    if pynvml is None:
        return Fact("NVIDIA driver", "absent", reason, f"pip install nvidia-ml-py: {enables}"), []
    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return Fact("NVIDIA driver", "ok", str(version), enables), [str(pynvml.nvmlDeviceGetName(h)) for h in handles]
    except Exception as error:
        return Fact("NVIDIA driver", "absent", _line(error), enables), []


def _triton() -> Iterator[Fact]:
    triton, reason = _import("triton")
    found = reason if triton is None else str(triton.__version__)
    yield Fact("Triton", "ok" if triton else "absent", found, "fused kernels: `engine.head`, `fedmoe bench`")


def _native() -> Iterator[Fact]:
    host, reason = _import("fedmoe.kernels._native")
    if host is None:
        yield Fact("native, host", "absent", reason, "`pip install .` builds it: aggregation in one pass over memory")
    else:
        found = f"built, uses {host.instruction_set()}"
        yield Fact("native, host", "ok", found, "aggregation in one pass over memory")
    cuda, reason = _import("fedmoe.kernels._native_cuda")
    if cuda is None:
        yield Fact("native, CUDA", "absent", reason, "built where nvcc is found: aggregation on the GPU")
        return
    count, reason = cuda.device_count()
    found = f"built; {count} device{'s' * (count != 1)}" + f": {reason}" * bool(reason)
    yield Fact("native, CUDA", "ok" if count else "absent", found, "aggregation on the GPU")


def _apex() -> Iterator[Fact]:
    enables = "nothing yet: training uses PyTorch's optimizer"
    if importlib.util.find_spec("apex") is None:
        yield Fact("NVIDIA apex", "absent", "not installed", enables)
        return
    _import("torch")  # amp_C links against it
    extension, missing = _import("amp_C")
    optimizers, reason = _import("apex.optimizers")
    if extension is not None and hasattr(optimizers, "FusedAdam"):
        yield Fact("NVIDIA apex", "ok", "amp_C and FusedAdam", enables)
    else:
        found = f"the installed `apex` is unrelated to NVIDIA apex, or was built without CUDA ({missing or reason})"
        fix = "pip uninstall apex, then build github.com/NVIDIA/apex with --cuda_ext, or do without"
        yield Fact("NVIDIA apex", "warning", found, fix)


def _names() -> Iterator[Fact]:
    """Installed packages that a checkout's folders of the same name would hide from others (transformers, say)."""
    installed = importlib.metadata.packages_distributions()
    for name in ("kernels", "engine", "profiling"):
        for distribution in sorted(set(installed.get(name, []))):
            found = f"{distribution} {importlib.metadata.version(distribution)} installs a top-level `{name}`"
            fix = f"outside a checkout nothing; at its root our folder {name}/ hides that package: run elsewhere"
            yield Fact(f"package `{name}`", "warning", found, fix)


def _libraries() -> Iterator[Fact]:
    for name, distribution, enables in (
        ("Hugging Face datasets", "datasets", "data sets by name, and local parquet"),
        ("tensorboardX", "tensorboardX", "writing `events.*` into the run folder"),
        ("TensorBoard", "tensorboard", "looking at `events.*`: tensorboard --logdir runs"),
    ):
        try:
            yield Fact(name, "ok", importlib.metadata.version(distribution), enables)
        except importlib.metadata.PackageNotFoundError:
            yield Fact(name, "absent", "not installed", f"pip install {distribution}: {enables}")


def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why not, in one line."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        return None, "not installed" if error.name == name else _line(error)
    except (Exception, SystemExit) as error:
        return None, _line(error)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
