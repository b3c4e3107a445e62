"""The plan, on invented devices: each field's rule and override, what is predicted, and its JSON."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.engine.facts import Architecture, Facts, Sizes, Wanted
from fedmoe.engine.fit import LARGE, WORKSPACE, place, work
from fedmoe.engine.plan import CHOICES, Plan, plan

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
    given: dict[str, Any] = {"state": 8 * trainable, "activations": 100_000} | others
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
    made, [warning] = plan(Wanted(**wanted), sizes, facts)
    assert "\n" not in warning
    return made, warning


def test_cpu_is_plain() -> None:
    made = decide(CPU)
    assert (made.precision, made.head, made.optimizer, made.data) == ("fp32", "plain", "torch", "host")
    assert (made.streams, made.graphs, made.lanes, made.cohort, made.regions) == (False, False, 1, 1, 1)
    assert (made.device_bytes, made.host_bytes) == (0, CPU.host_available // 2)
    assert made.predicted.low_precision == made.device_total() == 0
    assert "3.0 GB" in made.reasons["host_bytes"]


def test_gpus_use_what_they_have() -> None:
    made = decide(H200)
    assert (made.precision, made.head, made.optimizer, made.data) == ("bf16", "fused", "flat", "device")
    assert (made.streams, made.graphs, made.lanes, made.cohort, made.regions) == (True, True, 4, 2, 2)
    old = decide(OLD)
    assert (old.precision, old.head, old.optimizer) == ("fp32", "plain", "torch")
    assert (old.streams, old.graphs) == (True, True)
    assert old.reasons["head"] == old.reasons["optimizer"] == NO_KERNELS


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((10, 0), "bf16")])
def test_bf16_begins_with_ampere(capability: tuple[int, int], precision: str) -> None:
    made = decide(replace(CARD, capability=capability))
    assert made.precision == precision
    assert "{}.{}".format(*capability) in made.reasons["precision"]


@pytest.mark.parametrize(
    ("facts", "wanted", "got"),
    [
        (OLD, "bf16", "fp16"),
        (replace(OLD, capability=(6, 1)), "bf16", "fp32"),
        (OLD, "tf32", "fp32"),
        (CPU, "tf32", "fp32"),
        (OLD, "fp16", "fp16"),
        (CPU, "fp16", "fp16"),
        (CPU, "bf16", "bf16"),
        (CARD, "tf32", "tf32"),
        (CARD, "fp32", "fp32"),
    ],
)
def test_precision_wanted(facts: Facts, wanted: str, got: str) -> None:
    made, warnings = plan(Wanted(precision=wanted), FIVE, facts)  # type: ignore[arg-type]
    assert made.precision == got
    assert len(warnings) == (wanted != got)
    for warning in warnings:
        assert f"engine.precision = {wanted}" in warning and warning.endswith(f": {got}")
        assert ("7.5" if facts is OLD else "CPU" if facts is CPU else "6.1") in warning
    assert bool(made.predicted.low_precision) == (got in ("bf16", "fp16"))


def test_head_wanted() -> None:
    assert decide(CARD, head="plain").head == "plain"
    assert decide(CARD, head="fused").head == "fused"
    for device in (OLD, CPU):
        with pytest.raises(ValueError, match=r'engine.head is "fused", but the kernels cannot run: t.*choose "auto"'):
            plan(Wanted(head="fused"), FIVE, device)


def test_optimizer_wanted() -> None:
    assert decide(CARD, optimizer="torch").optimizer == "torch"
    assert decide(CARD, optimizer="flat").optimizer == "flat"
    assert decide(replace(CARD, no_apex=""), optimizer="apex").optimizer == "apex"
    assert decide(replace(CARD, no_apex="")).optimizer == "flat"
    for device in (OLD, CPU):
        made, warning = refused(device, optimizer="flat")
        assert made.optimizer == "torch" and "engine.optimizer = flat" in warning
    for device in (CARD, CPU):
        with pytest.raises(ValueError, match=f'engine.optimizer is "apex".* cannot be used: {device.no_apex}'):
            plan(Wanted(optimizer="apex"), FIVE, device)


@pytest.mark.parametrize("name", ["streams", "graphs"])
def test_switches(name: str) -> None:
    assert getattr(decide(CARD, **{name: "on"}), name) is True
    assert getattr(decide(CARD, **{name: "off"}), name) is False
    assert getattr(decide(CPU, **{name: "off"}), name) is False
    made, warning = refused(CPU, **{name: "on"})
    assert getattr(made, name) is False
    assert warning == f"engine.{name} = on cannot be had: a CPU has none; taken instead: off"


def test_one_branch_needs_no_streams() -> None:
    alone = replace(FIVE, branches=1)
    assert (decide(CARD, alone).streams, decide(CARD, alone).graphs) == (False, True)
    assert "1 branch" in decide(CARD, alone).reasons["streams"]
    made, warning = refused(CARD, alone, streams="on")
    assert not made.streams and "1 branch" in warning


def test_samples_up_to_a_quarter_lie_on_the_device() -> None:
    quarter = CARD.device_free // 4
    for samples, where in ((quarter, "device"), (quarter + 1, "host")):
        made = decide(CARD, replace(FIVE, samples=samples))
        assert made.data == where
        assert "2.5 GB" in made.reasons["data"] and "10.0 GB" in made.reasons["data"]
        assert (made.device_total() > 2 * GB + made.predicted.states_device) == (where == "device")
    assert decide(CARD, data="host").data == "host"
    assert decide(CARD, replace(FIVE, samples=2 * quarter), data="device").data == "device"
    made, warning = refused(CARD, replace(FIVE, samples=8 * GB), data="device")
    assert made.data == "host" and "8.0 GB of samples do not fit in the 7." in warning
    assert decide(CPU, data="device").data == "host"


def test_lanes_by_architectures_of_a_round() -> None:
    assert [decide(CARD, federation(*(kind(str(i)) for i in range(n)))).lanes for n in (1, 2, 4, 5)] == [1, 2, 4, 4]
    assert decide(CARD, replace(FIVE, sampled=2)).lanes == 2
    assert decide(CARD, LARGER).lanes == 1
    assert decide(CARD, lanes=3).lanes == 3
    assert decide(CARD, lanes=7, cohort=1).lanes == 7
    made, warning = refused(CARD, lanes=11)
    assert made.lanes == 10 and "a round has 10 clients" in warning
    made, warning = refused(CPU, lanes=2)
    assert made.lanes == 1 and "a CPU has no streams" in warning
    made, warning = refused(CARD, LARGER, lanes=2)
    assert made.lanes == 1 and "16 M trainable parameters or more" in warning


def test_cohort_by_clients_of_a_round() -> None:
    one = kind(clients=100, trainable=10_000)
    assert [decide(CARD, federation(one, sampled=k)).cohort for k in (1, 10, 100)] == [1, 10, 100]
    assert decide(CARD, federation(kind("a", 30), kind("b", 3), sampled=10)).cohort == 10  # 9.09, rounded up
    assert [decide(H200, federation(kind(trainable=n), sampled=2)).cohort for n in (LARGE - 1, LARGE)] == [2, 1]
    assert decide(CARD, cohort=1).cohort == 1
    assert decide(CARD, cohort=10).cohort == 10
    assert decide(CPU, cohort=5).cohort == 5
    made, warning = refused(CARD, cohort=11)
    assert made.cohort == 10 and "at most 10 clients of an architecture" in warning
    made, warning = refused(CARD, LARGER, cohort=2)
    assert made.cohort == 1 and "16 M" in warning


def test_lanes_and_cohorts_shrink_to_half_of_the_room_unless_asked_for() -> None:
    sizes = federation(kind(clients=100, trainable=LARGE - 1), sampled=64)  # 224 MB each, 448 MB in two regions
    made = decide(CARD, sizes, precision="fp32")
    assert made.cohort == 8  # 64 do not fit in half of 7.8 GB, nor do 32 or 16
    assert "more do not fit in 3.9 GB" in made.reasons["cohort"]
    wide, warning = refused(CARD, sizes, precision="fp32", cohort=64)
    assert wide.cohort == 16 and "more do not fit in 7.8 GB" in warning


def test_large_clients_take_one_region_where_two_do_not_fit() -> None:
    def training(count: int) -> Plan:
        return decide(CARD, federation(kind(clients=2, trainable=count), samples=0, sampled=2), precision="fp32")

    # A region is 12 bytes a parameter; 8.0 GB less the reserve: 512 MB and 12.8 MB.
    limit = (8 * GB - WORKSPACE - 12_800_000) // 24
    assert [training(limit + more).regions for more in (0, 1)] == [2, 1]
    assert "8.0 GB" in training(limit + 1).reasons["regions"]


def test_client_that_does_not_fit_is_an_error_with_both_values() -> None:
    huge = federation(kind("huge", 1, 7 * GB), sampled=1)
    for device in (OLD, CPU):
        room = r"5\.6 GB" if device is OLD else r"2\.4 GB"
        with pytest.raises(ValueError, match=rf"the largest client takes 84\..* GB to train, and {room} can be had"):
            plan(Wanted(), huge, device)


def test_batch_that_does_not_fit_is_a_warning() -> None:
    sizes = federation(kind(activations=10**8), sampled=1)
    made, warning = refused(OLD, sizes)
    assert warning.startswith("a step of 64 samples takes about 13.3 GB, there are 5.4 GB: lower training.batch_size")
    assert made.device_total() <= OLD.device_free * 4 // 5 and (made.lanes, made.cohort, made.regions) == (1, 1, 1)
    _, warning = refused(OLD, federation(kind(activations=10**8, batch_statistics=True), sampled=1))
    assert "cnn has batch norms, so it cannot be split" in warning


def test_reserve_is_what_its_rule_says() -> None:
    sizes = federation(kind(activations=1000), batch=10, evaluation_batch=100)
    assert work(sizes, 2, 3, 1, 0, device=False).activations == 2 * 3 * 1000 * 100
    assert work(replace(sizes, batch=60), 2, 3, 1, 0, device=True).activations == 2 * 3 * 1000 * 120 + WORKSPACE


def test_budgets() -> None:
    made = decide(CARD)
    used = made.device_total() - made.predicted.states_device
    assert made.device_bytes == 8 * GB - used
    assert "10.0 GB" in made.reasons["device_bytes"]
    assert made.host_bytes == 16 * GB and "32.0 GB" in made.reasons["host_bytes"]
    made = decide(CARD, device_memory_mb=100, host_memory_mb=50)
    assert (made.device_bytes, made.host_bytes) == (100_000_000, 50_000_000)
    assert "100 MB" in made.reasons["device_bytes"]
    state = FIVE.architectures[0].state  # 24 MB: 4 of them, then 2, and the other 94
    p = made.predicted
    assert (p.states_device, p.states_host, p.states_files) == (4 * state, 2 * state, 94 * state)
    for name, most in (("device", "6.5 GB"), ("host", "25.6 GB")):
        made, warning = refused(CARD, **{f"{name}_memory_mb": 10**6})
        assert f"engine.{name}_memory_mb = 1000000 cannot be had: {most}" in warning
    made, warning = refused(CPU, device_memory_mb=5)
    assert made.device_bytes == 0 and "a CPU has no memory of its own" in warning


def test_whole_clients_are_placed_in_order() -> None:
    sizes = federation(kind("a", 2, state=10), kind("b", 3, state=7))
    assert place(sizes, 18, 17) == (17, 17, 7)
    assert place(sizes, 0, 0) == (0, 0, 41)


number = st.integers(0, 10**11)
architecture = st.builds(
    Architecture,
    name=st.just("model"),
    clients=st.integers(1, 10_000),
    trainable=st.integers(1, 4 * 10**9),
    frozen=st.integers(0, 10**9),
    buffers=st.integers(0, 10**6),
    state=st.integers(0, 5 * 10**10),
    activations=st.integers(0, 10**9),
    batch_statistics=st.booleans(),
)


@st.composite
def federations(draw: st.DrawFn) -> Sizes:
    kinds = tuple(draw(st.lists(architecture, min_size=1, max_size=6)))
    n = sum(k.clients for k in kinds)
    given = {name: draw(st.integers(1, 4096)) for name in ("batch", "evaluation_batch")}
    sampled = draw(st.integers(1, n))
    return Sizes(
        architectures=kinds, clients=n, sampled=sampled, samples=draw(number), branches=draw(st.integers(1, 3)), **given
    )


wishes = st.builds(
    Wanted,
    precision=st.sampled_from(["auto", "fp32", "tf32", "bf16", "fp16"]),
    optimizer=st.sampled_from(["auto", "flat", "torch"]),
    streams=st.sampled_from(["auto", "on", "off"]),
    graphs=st.sampled_from(["auto", "on", "off"]),
    data=st.sampled_from(["auto", "device", "host"]),
    lanes=st.integers(0, 64),
    cohort=st.integers(0, 10_000),
    device_memory_mb=st.integers(0, 10**6),
    host_memory_mb=st.integers(0, 10**6),
)


@given(wishes, federations(), st.sampled_from(DEVICES), number, number)
@settings(max_examples=200, deadline=None)
def test_predictions_never_exceed_the_memory(wanted: Wanted, sizes: Sizes, device: Facts, free: int, host: int) -> None:
    device = replace(device, device_free=free * (device.device == "cuda"), host_available=host)
    try:
        made, warnings = plan(wanted, sizes, device)
    except ValueError as error:
        assert "the largest client takes" in str(error)
        return
    assert (made, warnings) == plan(wanted, sizes, device)  # pure
    assert made.device_total() <= device.device_free * 4 // 5
    pinned = sizes.samples if device.device == "cuda" and made.data == "host" else 0
    assert made.host_total() <= max(host * 4 // 5, pinned)
    p = made.predicted
    assert p.states_device <= made.device_bytes and p.states_host <= made.host_bytes
    states = sum(a.clients * a.state for a in sizes.architectures)
    assert p.states_device + p.states_host + p.states_files == states
    assert min(made.lanes, made.cohort, made.regions) >= 1 and min(vars_of(p)) >= 0
    assert made.reasons.keys() == set(CHOICES) and all(made.reasons.values())
    assert Plan.from_json(made.to_json()) == made


def vars_of(predicted: object) -> list[int]:
    return [getattr(predicted, name) for name in predicted.__slots__]  # type: ignore[attr-defined]


def test_more_memory_never_keeps_fewer_states_near() -> None:
    kept = [decide(replace(CARD, device_free=gb * GB), cohort=1, lanes=1).device_bytes for gb in (2, 4, 8, 16)]
    assert all(a < b for a, b in pairwise(kept))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"colour": 1}, "the plan has the unknown key 'colour'"),
        ({"lanes": None}, "the plan's 'lanes' is None, must be a whole number from 0"),
        ({"lanes": True}, "the plan's 'lanes' is True, must be a whole number"),
        ({"cohort": -1}, "the plan's 'cohort' is -1, must be"),
        ({"graphs": 1}, "the plan's 'graphs' is 1, must be true or false"),
        ({"precision": "fp8"}, "the plan's 'precision' is 'fp8', must be one of fp32, tf32, bf16, fp16"),
        ({"precision": ["fp32"]}, "the plan's 'precision' is \\['fp32'\\], must be one of"),
        ({"reasons": {"lanes": 3}}, "the plan's 'reasons' is {'lanes': 3}, must be an object of strings"),
        ({"predicted": 3}, "the plan's 'predicted' is 3, must be an object"),
        ({"predicted": {}}, "the plan's 'predicted' lacks 'activations'"),
    ],
)
def test_json_that_is_no_plan(change: dict[str, Any], complaint: str) -> None:
    content = json.loads(decide(CARD).to_json())
    with pytest.raises(ValueError, match=complaint):
        Plan.from_json(json.dumps(content | change))


def test_text_that_is_no_json() -> None:
    for text in ("", "{", "[1]"):
        with pytest.raises(ValueError, match="the plan is "):
            Plan.from_json(text)
    with pytest.raises(ValueError, match="the plan lacks 'cohort'"):
        Plan.from_json("{}")
