"""What a plan is made from: what the user wants, what the device is, and how large the models and the data are."""

import importlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from fedmoe.kernels.launch import FLOATS, refusal

Switch = Literal["auto", "on", "off"]


@dataclass(kw_only=True, frozen=True, slots=True)
class Wanted:
    """What the user asks for, as in the configuration's `[engine]`; "auto" and 0 leave it to the plan."""

    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    head: Literal["auto", "plain", "fused"] = "auto"
    optimizer: Literal["auto", "flat", "torch", "apex"] = "auto"
    streams: Switch = "auto"
    graphs: Switch = "auto"
    data: Literal["auto", "device", "host"] = "auto"
    lanes: int = 0
    cohort: int = 0
    device_memory_mb: int = 0
    host_memory_mb: int = 0


@dataclass(kw_only=True, frozen=True, slots=True)
class Facts:
    """A device and its host, as they are once the data set has been read into host memory."""

    device: Literal["cpu", "cuda"]
    name: str
    device_total: int = 0
    """Bytes of device memory; 0 on a CPU, whose memory is the host's."""
    device_free: int = 0
    """Of these, bytes that nobody has taken."""
    capability: tuple[int, int] = (0, 0)
    """Compute capability; (0, 0) on a CPU."""
    multiprocessors: int = 0
    host_total: int
    """Bytes of host memory."""
    host_available: int
    """Of these, bytes that can be had without swapping."""
    no_kernels: str = ""
    """Why the Triton kernels do not run on this device; empty where they do."""
    no_apex: str = ""
    """Why NVIDIA apex cannot be used on this device; empty where it can."""

    @property
    def free(self) -> int:
        """Bytes that can be had where clients train."""
        return self.device_free if self.device == "cuda" else self.host_available

    @property
    def room(self) -> int:
        """Of these, four fifths, which count: allocators leave fragments, and others use the machine too."""
        return self.free * 4 // 5


@dataclass(kw_only=True, frozen=True, slots=True)
class Architecture:
    """One kind of client: its whole model, shared part included."""

    name: str
    clients: int
    trainable: int
    """Parameters that train, by number; their gradients and the optimizer's work are in fp32."""
    frozen: int = 0
    """Parameters that do not train, by number."""
    buffers: int = 0
    """Bytes of buffers."""
    state: int
    """Bytes that persist: parameters, buffers, optimizer state."""
    constants: int = 0
    """Of these, bytes that never change: they come in with a client, but do not go out."""
    same: bool = False
    """Whether all its clients have the same constants, which are then kept once."""
    activations: int = 0
    """Bytes that a step, or a batch of an evaluation if that is more, takes besides state and gradients."""
    batch_statistics: bool = False
    """Whether any module normalizes over the batch, so that no batch can be split."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Way:
    """A way of taking a step, and what it takes."""

    micro_batch: int
    """Samples in a backward pass at most; 0: all of a step."""
    checkpointing: bool
    """Whether what is within layers is computed twice rather than kept."""
    activations: tuple[int, ...]
    """Bytes by architecture, as `Architecture.activations`."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Sizes:
    """The federation's."""

    architectures: tuple[Architecture, ...]
    """At least one; their clients add up to `clients`."""
    clients: int
    """Number of clients, N."""
    sampled: int
    """Clients in a round, K."""
    batch: int
    """Samples in a training step."""
    micro_batch: int = 0
    """Samples in a backward pass at most; 0: all of a step, or where there are `ways`, as the plan chooses."""
    checkpointing: Literal["auto", "on", "off"] = "off"
    """Activation checkpointing; "auto" leaves it to the plan."""
    ways: tuple[Way, ...] = ()
    """Those that the plan may choose from, the fastest first; none: as the fields say."""
    optimizer: Literal["sgd", "adamw", "8-bit adamw"] = "sgd"
    evaluation_batch: int
    """Samples in a forward pass of the evaluation."""
    samples: int
    """Bytes of the data set."""
    branches: int
    """Parts of a model that may run side by side."""

    def taken(self, way: Way) -> "Sizes":
        """These where steps are taken that way."""
        kinds = zip(self.architectures, way.activations, strict=True)
        return replace(
            self,
            micro_batch=way.micro_batch,
            checkpointing="on" if way.checkpointing else "off",
            architectures=tuple(replace(a, activations=count) for a, count in kinds),
        )

    @property
    def backward(self) -> int:
        """Samples in a backward pass."""
        return min(self.micro_batch or self.batch, self.batch)


CARDS = {
    "rtx-4090": ("an RTX 4090", 24, (8, 9), 128),
    "a100": ("an A100 80GB", 80, (8, 0), 108),
    "h100": ("an H100", 80, (9, 0), 132),
    "h200": ("an H200", 141, (9, 0), 132),
}
"""GPUs that may be planned for elsewhere: name, GB, compute capability, multiprocessors."""


def as_if(card: str) -> Facts:
    """The facts of this machine if it had this GPU of `CARDS`, with nothing but its driver on it, and kernels ran."""
    name, gigabytes, capability, multiprocessors = CARDS[card]
    host_total, host_available = host_memory()
    return Facts(
        device="cuda",
        name=name,
        device_total=gigabytes * 10**9,
        device_free=gigabytes * 10**9 - 600 * 10**6,
        capability=capability,
        multiprocessors=multiprocessors,
        host_total=host_total,
        host_available=host_available,
        no_apex="it is not looked for on another machine",
    )


def facts(device: torch.device) -> Facts:
    """The facts of `device` and this machine, as they are now."""
    host_total, host_available = host_memory()
    no_kernels = refusal([("tensor", torch.empty(1, device=device), FLOATS)])
    if device.type != "cuda":
        return Facts(
            device="cpu",
            name="the CPU",
            host_total=host_total,
            host_available=host_available,
            no_kernels=no_kernels,
            no_apex="it needs a CUDA device",
        )
    properties = torch.cuda.get_device_properties(device)
    device_free, device_total = torch.cuda.mem_get_info(device)
    return Facts(
        device="cuda",
        name=properties.name,
        device_total=device_total,
        device_free=device_free,
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        host_total=host_total,
        host_available=host_available,
        no_kernels=no_kernels,
        no_apex=_no_apex(),
    )


def host_memory() -> tuple[int, int]:
    """Total and available bytes of host memory; in a container no more than that may have."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    # Free pages alone would leave out the page cache, which is most of the memory of a machine that has run a while.
    lines = _read("/proc/meminfo").splitlines()
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    available = 1024 * int(kilobytes[0]) if kilobytes else page * os.sysconf("SC_AVPHYS_PAGES")
    # A container sees the memory of the whole machine, but is killed at a limit of its own.
    groups = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    for limit, used in ((_read(f"/sys/fs/cgroup/{a}"), _read(f"/sys/fs/cgroup/{b}")) for a, b in groups):
        if limit.isdecimal() and used.isdecimal():
            total, available = min(total, int(limit)), min(available, max(0, int(limit) - int(used)))
    return total, available


def _read(path: str) -> str:
    """What a small file of the system says; empty where there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _no_apex() -> str:
    """Why NVIDIA apex cannot be used; the package of that name on PyPI is unrelated, and has neither of the two."""
    try:
        importlib.import_module("amp_C")
        importlib.import_module("apex.optimizers").FusedAdam  # noqa: B018
    except Exception as error:  # whatever a broken installation throws
        return f"amp_C or apex.optimizers.FusedAdam is not there ({type(error).__name__}: {error})".splitlines()[0]
    return ""
