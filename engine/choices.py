"""How each field of a plan is decided; a choice leaves its reason behind, and a warning where it is not the wanted one.

Memory comes last, in this order: one client must fit, then the samples, then lanes and cohorts, then states.
"""

from dataclasses import replace
from typing import Literal, TypeVar

from fedmoe.engine.facts import Facts, Sizes, Wanted
from fedmoe.engine.fit import LARGE, MOST_LANES, WORKSPACE, Work, in_round, small, together, widest, work

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Place = Literal["device", "host"]
V = TypeVar("V")

MB = 10**6
"""What a budget is given in."""

AMPERE, VOLTA = (8, 0), (7, 0)
"""Compute capabilities from which there are tensor cores for bf16 and tf32, and for fp16."""


class Choices:
    """The choices for one federation on one device, with `reasons` and `warnings` as they come up."""

    def __init__(self, wanted: Wanted, sizes: Sizes, facts: Facts) -> None:
        assert sizes.architectures and sum(a.clients for a in sizes.architectures) == sizes.clients
        self.wanted, self.sizes, self.facts = wanted, sizes, facts
        self.gpu = facts.device == "cuda"
        self.reasons: dict[str, str] = {}
        self.warnings: list[str] = []

    def precision(self) -> Precision:
        """bf16 from Ampere on, fp32 elsewhere; what is wanted where the device computes in it."""
        wanted, capability, able = self.wanted.precision, self.facts.capability, self.facts.capability >= AMPERE
        has = f"compute capability {_dotted(capability)}"
        if wanted == "auto":
            if not self.gpu:
                return self._take("precision", "fp32", "the device is a CPU")
            reason = f"{has}: tensor cores take bf16 from {_dotted(AMPERE)}"
            return self._take("precision", "bf16" if able else "fp32", reason)
        missing = f"{self.facts.name} has {has}, and it needs {_dotted(AMPERE)}" if self.gpu else "the device is a CPU"
        if wanted == "tf32" and not able:
            return self._refuse("precision", wanted, missing, "fp32")
        if wanted == "bf16" and self.gpu and not able:
            return self._refuse("precision", wanted, missing, "fp16" if capability >= VOLTA else "fp32")
        return self._asked("precision", wanted)

    def head(self) -> Literal["plain", "fused"]:
        """Fused on a GPU that runs the kernels."""
        wanted, missing = self.wanted.head, self.facts.no_kernels
        if wanted == "plain":
            return self._asked("head", wanted)
        if wanted == "fused":
            if missing:
                raise ValueError(
                    f'engine.head is "fused", but the kernels cannot run: {missing}; choose "auto" or "plain"'
                )
            return self._asked("head", wanted)
        if missing or not self.gpu:
            return self._take("head", "plain", missing if self.gpu else "the device is a CPU")
        return self._take("head", "fused", f"{self.facts.name} runs the kernels, for the headers that suit them")

    def optimizer(self, precision: Precision) -> Literal["flat", "torch", "apex"]:
        """Flat on a GPU that runs the kernels; apex only on request."""
        wanted = self.wanted.optimizer
        missing = self.facts.no_kernels if self.gpu else "the device is a CPU"
        if precision == "fp16":  # elsewhere the loss scale would have to come to the host
            reason = "fp16 scales the loss on the device"
            if wanted in ("auto", "flat"):
                return self._take("optimizer", "flat", reason)
            return self._refuse("optimizer", wanted, reason, "flat")
        if self.sizes.optimizer == "8-bit adamw":
            reason = "training.optimizer_states = 8bit is a way of the flat optimizer's"
            if wanted in ("auto", "flat"):
                return self._take("optimizer", "flat", reason)
            return self._refuse("optimizer", wanted, reason, "flat")
        if wanted == "apex" and self.sizes.optimizer == "adamw":
            why = "its AdamW counts steps where they cannot be kept with a client"
            return self._refuse("optimizer", wanted, why, "torch" if missing else "flat")
        if wanted == "apex":
            if self.facts.no_apex:
                raise ValueError(
                    f'engine.optimizer is "apex", but NVIDIA apex cannot be used: {self.facts.no_apex}; '
                    'choose "auto", "flat" or "torch"'
                )
            return self._asked("optimizer", wanted)
        if wanted == "torch":
            return self._asked("optimizer", wanted)
        if not missing:
            reason = f"{self.facts.name} runs the kernel that does a whole step in one pass"
            return self._take("optimizer", "flat", reason) if wanted == "auto" else self._asked("optimizer", wanted)
        if wanted == "flat":
            return self._refuse("optimizer", wanted, missing, "torch")
        return self._take("optimizer", "torch", missing)

    def streams(self) -> bool:
        """On where there are streams, and two branches to put on them."""
        branches = self.sizes.branches
        missing = "a CPU has none" if not self.gpu else "the model has 1 branch" if branches < 2 else ""
        return self._switch("streams", self.wanted.streams, missing, f"{branches} branches run side by side")

    def graphs(self, data: Place) -> bool:
        """On where there are graphs, and samples that they can reach."""
        missing = "a CPU has none" if not self.gpu else "samples on the host are out of its reach" * (data == "host")
        return self._switch("graphs", self.wanted.graphs, missing, "a step is launched as a whole")

    def memory(self, precision: Precision) -> tuple[Place, Work, int, int]:
        """Where the samples lie, the work, and the bytes of device and host memory for states."""
        facts, samples, low = self.facts, self.sizes.samples, 2 if precision in ("bf16", "fp16") else 0
        free, room = facts.free, facts.room
        self._way(low, room)
        alone = work(self.sizes, 1, 1, 1, low, self.gpu).fixed + WORKSPACE * self.gpu
        if alone > room:
            raise ValueError(
                f"the largest client takes {amount(alone)} to train, and {amount(room)} can be had, four fifths of the "
                f"{amount(free)} that are free on {facts.name}: choose smaller models, or another run.device"
            )
        data = self._data(room - alone)
        room -= samples if data == "device" else 0
        made = self._work(low, room)
        room -= made.total
        host = facts.host_available * 4 // 5 - (samples if data == "host" else 0) if self.gpu else room
        half = facts.host_available // 2
        device_bytes = 0
        if self.gpu:
            reason = f"what samples, regions and activations leave of four fifths of {amount(free)} free"
            device_bytes = self._budget("device", self.wanted.device_memory_mb, room, room, reason)
        else:
            self.reasons["device_bytes"] = "a CPU has no memory of its own"
            if self.wanted.device_memory_mb:
                self._warn("device_memory_mb", self.wanted.device_memory_mb, self.reasons["device_bytes"], 0)
        reason = f"half of the {amount(facts.host_available)} that the host has available"
        return data, made, device_bytes, self._budget("host", self.wanted.host_memory_mb, max(0, host), half, reason)

    def _way(self, low: int, room: int) -> None:
        """Decide on the first way of taking a step that fits, or else the last; from then on, sizes are that way's."""
        given = self.sizes
        asked, taken = given.backward < given.batch, 0
        for way in given.ways:
            self.sizes = given.taken(way)
            if (taken := work(self.sizes, 1, 1, 1, low, self.gpu).total) <= room:
                break
        chosen = self.sizes
        if asked or not given.ways:
            reason = "training.micro_batch asks for it" if asked else "a batch is taken whole"
        elif taken > room:
            reason = f"no way fits: with one client this takes {amount(taken)} of {amount(room)}"
        elif chosen.backward == chosen.batch:
            reason = f"the whole batch of {chosen.batch} fits: with one client {amount(taken)} of {amount(room)}"
        else:
            reason = f"with more of the {chosen.batch} in a batch, one client does not fit in {amount(room)}"
        self.reasons["micro_batch"] = reason
        on = chosen.checkpointing == "on"
        if given.checkpointing != "auto":
            reason = f"model.activation_checkpointing = {given.checkpointing}"
            reason = reason if given.ways or on else "on where it is asked for"
        else:
            reason = f"without it one client does not fit in {amount(room)}" if on else "one client fits without it"
        self.reasons["activation_checkpointing"] = reason

    def _data(self, room: int) -> Place:
        """On the device if the samples take a quarter of what is free; beside one client they must fit in any case."""
        wanted, samples, free = self.wanted.data, self.sizes.samples, self.facts.device_free
        if not self.gpu:  # the device is the host: either is had
            return self._take("data", "host", f"the device is a CPU: the samples, {amount(samples)}, are there")
        if wanted == "host":
            return self._asked("data", wanted)
        fits, takes = samples <= room, f"{amount(samples)} of samples"
        if wanted == "device":
            why = f"{takes} do not fit in the {amount(room)} that one client leaves"
            return self._asked("data", wanted) if fits else self._refuse("data", wanted, why, "host")
        if fits and 4 * samples <= free:
            return self._take("data", "device", f"{takes} are at most a quarter of {amount(free)} free")
        why = f"are more than a quarter of {amount(free)} free" if fits else f"do not fit in {amount(room)}"
        return self._take("data", "host", f"{takes} {why}")

    def _work(self, low: int, room: int) -> Work:
        """Lanes, cohort and regions."""
        sizes, w = self.sizes, self.wanted
        few = small(sizes)
        kinds, most = min(len(few), sizes.sampled), max((together(a, sizes) for a in few), default=1)
        lanes, cohort = max(1, min(kinds, MOST_LANES)), max((in_round(a, sizes) for a in few), default=1)
        if not self.gpu:
            lanes = cohort = 1
        if not few:
            most_lanes, lanes_limit = 1, f"every client has {LARGE / 1e6:.0f} M trainable parameters or more"
            cohort_limit = lanes_limit
        else:
            most_lanes, lanes_limit = sizes.sampled, f"a round has {sizes.sampled} clients"
            cohort_limit = f"a round has at most {most} clients of an architecture"
        if not self.gpu:
            most_lanes, lanes_limit = 1, "a CPU has no streams"
        if sizes.backward < sizes.batch:  # `together` has 1
            cohort, cohort_limit = 1, f"batches are taken {sizes.micro_batch} samples at a time"
        asked = min(w.lanes or lanes, most_lanes), min(w.cohort or cohort, most)
        # What is chosen here leaves half of the room to states; what is asked for may take it all.
        bound = room if w.lanes or w.cohort else room // 2
        made = widest(sizes, *asked, low, self.gpu, room, bound, cohort_first=bool(w.cohort))
        below = f"below {LARGE / 1e6:.0f} M trainable parameters"
        lanes_reason = f"{kinds} architectures {below} in a round, at most {MOST_LANES}" if few else lanes_limit
        cohort_reason = f"{cohort} clients of an architecture {below} in a round" if few else cohort_limit
        cohort_reason = cohort_limit if sizes.backward < sizes.batch else cohort_reason
        if not self.gpu:
            lanes_reason, cohort_reason = lanes_limit, "the default on a CPU"
        fit = f"more do not fit in {amount(bound)} of memory"
        for name, given, tried, got, limit, reason in (
            ("lanes", w.lanes, asked[0], made.lanes, lanes_limit, lanes_reason),
            ("cohort", w.cohort, asked[1], made.cohort, cohort_limit, cohort_reason),
        ):
            if given > got:
                self._refuse(name, given, fit if got < tried else limit, got)
            elif given:
                self._asked(name, given)
            else:
                self._take(name, got, f"{reason}; {fit}" if got < tried else reason)
        why = "the next client comes in while one trains" if self.gpu else "nothing has to be moved to a CPU"
        if self.gpu and made.regions == 1:
            why = f"two do not fit in {amount(room)}: the next client comes in piece by piece as one goes out"
        self._take("regions", made.regions, why)
        if made.total <= room:
            return made
        names = [a.name for a in sizes.architectures if a.batch_statistics]
        fix = "lower training.batch_size" + (f"; {names[0]} has batch norms, so it cannot be split" if names else "")
        self.warnings.append(
            f"a step of {sizes.backward} samples takes about {amount(made.total)}, there are {amount(room)}: {fix}"
        )
        return replace(made, activations=room - made.fixed)

    def _budget(self, where: Place, wanted_mb: int, most: int, least: int, reason: str) -> int:
        """Bytes for states: the smaller of `most` and `least`, or what is wanted, up to `most`."""
        name, wanted = f"{where}_bytes", wanted_mb * MB
        if wanted > most:
            self._warn(f"{where}_memory_mb", wanted_mb, f"{amount(most)} can be had", amount(most))
            return self._take(name, most, f"{wanted_mb} MB were asked for, {amount(most)} can be had")
        if wanted:
            return self._take(name, wanted, f"engine.{where}_memory_mb asks for it: {wanted_mb} MB of {amount(most)}")
        return self._take(name, min(least, most), reason if least <= most else f"what is left, less than {reason}")

    def _switch(self, name: str, wanted: str, missing: str, reason: str) -> bool:
        if wanted == "off":
            self._asked(name, wanted)
            return False
        if missing:
            return self._refuse(name, wanted, missing, False) if wanted == "on" else self._take(name, False, missing)
        self._take(name, True, reason) if wanted == "auto" else self._asked(name, wanted)
        return True

    def _take(self, name: str, value: V, reason: str) -> V:
        self.reasons[name] = reason
        return value

    def _asked(self, name: str, value: V) -> V:
        return self._take(name, value, f"engine.{name} = {value}")

    def _refuse(self, name: str, wanted: object, why: str, instead: V) -> V:
        self._warn(name, wanted, why, instead)
        return self._take(name, instead, f"engine.{name} = {wanted} cannot be had: {why}")

    def _warn(self, name: str, wanted: object, why: str, instead: object) -> None:
        shown = "off" if instead is False else instead
        self.warnings.append(f"engine.{name} = {wanted} cannot be had: {why}; taken instead: {shown}")


def amount(count: int) -> str:
    """Bytes for people, in powers of 1000."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} bytes"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
