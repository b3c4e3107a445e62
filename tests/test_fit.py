"""What a plan does with the memory of invented devices: samples, lanes, cohorts, regions, states."""

from dataclasses import replace
from itertools import pairwise

import pytest

from fedmoe.engine.facts import Wanted
from fedmoe.engine.fit import LARGE, WORKSPACE, place, work
from fedmoe.engine.plan import Plan, plan
from fedmoe.engine.store import PIECE
from tests.plans import CARD, CPU, FIVE, GB, H200, LARGER, OLD, decide, federation, kind, refused


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


def test_micro_batches_take_less_and_one_client_at_a_time() -> None:
    whole, parts = (decide(CARD, replace(FIVE, evaluation_batch=1, micro_batch=n)) for n in (0, 8))
    assert (whole.cohort, parts.cohort) == (2, 1)
    assert parts.reasons["cohort"] == "batches are taken 8 samples at a time"
    made, warning = refused(CARD, replace(FIVE, micro_batch=8), cohort=2)
    assert made.cohort == 1 and "engine.cohort = 2 cannot be had: batches are taken 8 samples at a time" in warning
    assert decide(CARD, replace(FIVE, micro_batch=64)) == decide(CARD)
    low = [work(replace(FIVE, micro_batch=n), 1, 1, 1, 2, False).gradients for n in (0, 8)]
    assert low == [4 * FIVE.architectures[0].trainable, 6 * FIVE.architectures[0].trainable]


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
    sizes = federation(kind(activations=128 * 10**8), sampled=1)
    made, warning = refused(OLD, sizes)
    assert warning.startswith("a step of 64 samples takes about 13.3 GB, there are 5.4 GB: lower training.batch_size")
    assert made.device_total() <= OLD.device_free * 4 // 5 and (made.lanes, made.cohort, made.regions) == (1, 1, 1)
    _, warning = refused(OLD, federation(kind(activations=128 * 10**8, batch_statistics=True), sampled=1))
    assert "cnn has batch norms, so it cannot be split" in warning


def test_reserve_is_what_its_rule_says() -> None:
    sizes = federation(kind(activations=1000))
    assert work(sizes, 2, 3, 1, 0, device=False).activations == 2 * 3 * 1000
    assert work(sizes, 2, 3, 1, 0, device=True).activations == 2 * 3 * 1000 + WORKSPACE


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


def test_constants_are_placed_once_where_they_are_the_same_and_large_states_in_pieces() -> None:
    for same, count in ((True, 1), (False, 3)):
        sizes = federation(kind("a", 3, state=10, constants=6, same=same))
        assert place(sizes, 0, 1000) == (0, 12 + 6 * count, 0)
    sizes = federation(kind("a", 2, state=3 * PIECE))
    assert place(sizes, 2 * PIECE + 1, PIECE) == (2 * PIECE, PIECE, 3 * PIECE)


def test_more_memory_never_keeps_fewer_states_near() -> None:
    kept = [decide(replace(CARD, device_free=gb * GB), cohort=1, lanes=1).device_bytes for gb in (2, 4, 8, 16)]
    assert all(a < b for a, b in pairwise(kept))
