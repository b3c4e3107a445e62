"""The plan, on invented devices: each field's rule and override, what is predicted, and its JSON."""

import json
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.engine.facts import Architecture, Facts, Sizes, Wanted, Way
from fedmoe.engine.fit import LARGE, WORKSPACE
from fedmoe.engine.plan import CHOICES, Plan, plan
from tests.plans import CARD, CPU, DEVICES, FIVE, GB, H200, NO_KERNELS, OLD, decide, federation, kind, refused


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


def test_optimizers_of_adamw() -> None:
    adamw, coded = replace(FIVE, optimizer="adamw"), replace(FIVE, optimizer="8-bit adamw")
    assert [decide(device, adamw).optimizer for device in (CARD, OLD, CPU)] == ["flat", "torch", "torch"]
    for device in (CARD, OLD, CPU):
        assert decide(device, coded).optimizer == decide(device, coded, optimizer="flat").optimizer == "flat"
        for wanted in ("torch", "apex"):
            made, warning = refused(replace(device, no_apex=""), coded, optimizer=wanted)
            assert made.optimizer == "flat" and f"engine.optimizer = {wanted} cannot be had: training.opt" in warning
        made, warning = refused(replace(device, no_apex=""), adamw, optimizer="apex")
        assert made.optimizer == ("flat" if device is CARD else "torch") and "its AdamW counts steps" in warning


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


number = st.integers(1, 100).map(lambda gb: gb * 10**9 + 1) | st.integers(0, 10**11)  # small ones are drawn often
architecture = st.builds(
    Architecture,
    name=st.just("model"),
    clients=st.integers(1, 10_000),
    trainable=st.integers(1, 10**8),
    frozen=st.integers(0, 10**8),
    buffers=st.integers(0, 10**6),
    state=st.integers(0, 10**9),
    activations=st.integers(0, 10**9),
    batch_statistics=st.booleans(),
)


@st.composite
def federations(draw: st.DrawFn) -> Sizes:
    kinds = tuple(draw(st.lists(architecture, min_size=1, max_size=6)))
    n = sum(k.clients for k in kinds)
    given: dict[str, Any] = {name: draw(st.integers(1, 4096)) for name in ("batch", "evaluation_batch", "micro_batch")}
    given["optimizer"] = draw(st.sampled_from(get_args(get_type_hints(Sizes)["optimizer"])))
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
    with pytest.raises(ValueError, match="the plan lacks 'activation_checkpointing'"):
        Plan.from_json("{}")


def test_a_step_is_taken_the_first_way_that_fits() -> None:
    def way(parts: int, checkpointing: bool, gigabytes: float) -> Way:
        return Way(micro_batch=parts, checkpointing=checkpointing, activations=(int(gigabytes * GB),))

    ways = way(0, False, 20), way(32, False, 10), way(1, False, 7), way(0, True, 4.5), way(1, True, 1)
    large = federation(kind(clients=2, trainable=LARGE), sampled=1, checkpointing="auto", ways=ways)
    for card, expected in ((H200, (0, False)), (CARD, (1, False)), (OLD, (0, True))):
        made = decide(card, replace(large, samples=0), precision="fp32")
        assert (made.micro_batch, made.activation_checkpointing) == expected, card
        chosen = next(w for w in ways if (w.micro_batch, w.checkpointing) == expected)
        assert made.predicted.activations == chosen.activations[0] + WORKSPACE
        for name in ("micro_batch", "activation_checkpointing"):
            assert made.reasons[name]
    made = decide(CARD, replace(large, samples=0, checkpointing="off", ways=ways[:3]), precision="fp32")
    assert (made.micro_batch, made.activation_checkpointing) == (1, False)
    assert "with more of the 64 in a batch, one client does not fit in" in made.reasons["micro_batch"]


def test_a_step_that_fits_in_no_way_is_not_said_to() -> None:
    ways = (Way(micro_batch=0, checkpointing=False, activations=(99 * GB,)),)
    large = federation(kind(clients=2, trainable=LARGE), sampled=1, samples=0, ways=ways)
    made, warning = refused(CARD, large, precision="fp32")
    assert "takes about" in warning and made.reasons["micro_batch"].startswith(
        "no way fits: with one client this takes 99"
    )
