"""Invented devices and federations to plan for."""

from dataclasses import replace
from typing import Any

from fedmoe.engine.facts import Architecture, Facts, Sizes, Wanted
from fedmoe.engine.fit import LARGE
from fedmoe.engine.plan import Plan, plan

GB = 10**9
NO_KERNELS = "the device has compute capability (7, 5), below (8, 0)"
HOST: dict[str, Any] = {"host_total": 64 * GB, "host_available": 32 * GB, "no_apex": "amp_C is not there"}
OLD = Facts(
    device="cuda",
    name="Old",
    device_total=8 * GB,
    device_free=7 * GB,
    capability=(7, 5),
    multiprocessors=40,
    no_kernels=NO_KERNELS,
    **HOST,
)
CARD = Facts(
    device="cuda", name="Card", device_total=12 * GB, device_free=10 * GB, capability=(8, 6), multiprocessors=28, **HOST
)
H200 = replace(CARD, name="H200", device_total=150 * GB, device_free=148 * GB, capability=(9, 0), multiprocessors=132)
CPU = Facts(
    device="cpu",
    name="the CPU",
    host_total=4 * GB,
    host_available=3 * GB,
    no_kernels="tensor is on cpu",
    no_apex="it needs a CUDA device",
)
DEVICES = [OLD, CARD, H200, CPU]


def kind(name: str = "cnn", clients: int = 20, trainable: int = 3_000_000, **others: Any) -> Architecture:
    given: dict[str, Any] = {"state": 8 * trainable, "activations": 12_800_000} | others
    return Architecture(name=name, clients=clients, trainable=trainable, **given)


def federation(*kinds: Architecture, sampled: int = 10, **others: Any) -> Sizes:
    n = sum(k.clients for k in kinds)
    given = {"batch": 64, "evaluation_batch": 128, "samples": 180_000_000, "branches": 3} | others
    return Sizes(architectures=kinds, clients=n, sampled=sampled, **given)


FIVE = federation(*(kind(f"cnn-{i}") for i in range(1, 6)))
LARGER = federation(kind("large", 4, LARGE), sampled=4)


def decide(facts: Facts, sizes: Sizes = FIVE, /, **wanted: Any) -> Plan:
    """The plan, with no warning."""
    made, warnings = plan(Wanted(**wanted), sizes, facts)
    assert warnings == []
    return made


def refused(facts: Facts, sizes: Sizes = FIVE, /, **wanted: Any) -> tuple[Plan, str]:
    """The plan and its only warning."""
    made, [warning] = plan(Wanted(**wanted), sizes, facts)
    assert "\n" not in warning
    return made, warning
