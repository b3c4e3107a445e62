"""A profile: what a federation's rounds took, where it went, what the hardware could do; plain numbers, as JSON."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from fedmoe.profiling.roofline import Ceilings, Point
from fedmoe.profiling.spans import ELSEWHERE, Recorder, covered, overlap

BRANCHES = ("global", "local")
"""The experts, whose overlap is of interest."""
IN_STEP = ("batch", *BRANCHES, "gate", "header", "backward", "optimizer")
"""Phases inside a step: in a replayed graph the host hears nothing of them."""


@dataclass(frozen=True, slots=True)
class Round:
    """One measured round, without observers."""

    seconds: float
    train_seconds: float
    evaluate_seconds: float
    samples: int
    """Trained on."""
    flops: float
    """Of training, as counted for matrix products and convolutions."""
    evaluated: bool = True


@dataclass(frozen=True, slots=True)
class Range:
    """A phase, over all observed rounds."""

    phase: str
    count: int
    seconds: float
    """On the host, exclusive of what is within: the values of all ranges add up to the rounds."""
    share: float
    """Of the rounds."""
    device_seconds: float | None
    """On the device, inclusive, streams added up; None on a CPU, and for what no event was recorded for."""
    source: Literal["host", "events", "uncaptured"]
    """Host's clock; also CUDA events; or, of a phase inside replayed graphs, both of a run without graphs."""


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What the device did in the observed rounds."""

    busy: float
    """Share of the time in which a step was under way on some stream; gaps between its kernels are in it."""
    overlap: float | None
    """Share of the shorter expert's time in which the other was under way, too; where steps are replayed as graphs, of
    the run without, in which the host may launch them too slowly to overlap. None where they were not seen."""


@dataclass(frozen=True, slots=True)
class Transfers:
    """States of clients on their way, in the observed rounds."""

    bytes: dict[str, int]
    """By tier and direction, as `host in`: from host memory to the device."""
    seconds: float
    """In which training waited for them and no step was under way: on a GPU on the device's clock, else the host's."""
    copying: float
    """In which some copy was under way; what was not waited for was hidden."""
    file_seconds: float
    """Of the host, waiting for files."""


@dataclass(frozen=True, slots=True)
class Memory:
    """One use of memory."""

    what: str
    bytes: int
    where: Literal["device", "host", "files"]


@dataclass(frozen=True, slots=True)
class Energy:
    """Taken by the GPU, or by the processor's package, over all measured rounds, observed ones included."""

    of: str
    """`gpu` or `cpu`."""
    joules_a_round: float
    joules_per_1000_samples: float
    """Trained on; evaluation's energy is in it."""
    source: str
    """`counter`, or `integrated from` power."""


@dataclass(frozen=True, slots=True)
class BatchSize:
    """What a step takes with another batch size."""

    size: int
    seconds: float

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.size / self.seconds


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know, in words, with its figures."""

    name: str
    text: str
    share: float
    """Of the time that it is about, for sorting."""
    figures: dict[str, float]


@dataclass(kw_only=True, slots=True)
class Profile:
    """All that was measured. What is not known on this machine is None or missing, never 0."""

    title: str
    environment: dict[str, Any]
    plan: dict[str, Any]
    config: dict[str, Any]
    rounds: list[Round]
    observed_seconds: list[float]
    """Of rounds with observers: how much more they take is what observing costs."""
    steps: list[float]
    """Seconds of training steps in the observed rounds: on a GPU on the device."""
    ranges: list[Range]
    device: DeviceUse | None
    transfers: Transfers
    memory: list[Memory]
    meters: dict[str, Any]
    """Summaries by quantity, over the measured rounds."""
    missing: dict[str, str]
    """Quantities that no meter gives, and why."""
    energy: list[Energy]
    """Of what tells."""
    roof: Ceilings
    operators: list[Point]
    """Of a training step of each architecture, taken operator by operator; those that took most first."""
    batches: list[BatchSize]
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def round_seconds(self) -> float:
        """Median of the measured rounds."""
        return statistics.median(r.seconds for r in self.rounds)

    @property
    def samples_per_second(self) -> float:
        """Median over rounds, while training."""
        return statistics.median(r.samples / r.train_seconds for r in self.rounds)

    @property
    def flops_per_second(self) -> float:
        """Likewise."""
        return statistics.median(r.flops / r.train_seconds for r in self.rounds)

    @property
    def observing(self) -> float:
        """What observers cost, as a share of the round."""
        return statistics.median(self.observed_seconds) / self.round_seconds - 1

    def share(self, *phases: str) -> float:
        """Of the observed rounds, exclusive."""
        return sum(r.share for r in self.ranges if r.phase in phases)

    def to_json(self) -> str:
        """All of it, and what follows from it."""
        steps = quantiles(self.steps)
        made = {
            "round_seconds": self.round_seconds,
            "samples_per_second": self.samples_per_second,
            "flops_per_second": self.flops_per_second,
            "of_ceiling": self.flops_per_second / self.roof.flops_per_second,
            "step_seconds": {"p50": steps[0], "p95": steps[1]},
            "observing": self.observing,
        }
        return json.dumps(made | asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, source: str) -> "Profile":
        """Of what `to_json` wrote. Raises ValueError where it is something else."""
        lists = {"rounds": Round, "ranges": Range, "memory": Memory, "energy": Energy}
        lists |= {"operators": Point, "batches": BatchSize, "findings": Finding}
        single = {"device": DeviceUse, "transfers": Transfers, "roof": Ceilings}
        try:
            made = json.loads(source)
            given = {field.name: made[field.name] for field in fields(cls)}
            given |= {name: [kind(**one) for one in given[name]] for name, kind in lists.items()}
            given |= {name: given[name] and kind(**given[name]) for name, kind in single.items()}
            return cls(**given)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a profile ({type(error).__name__}: {error})") from error


def quantiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Median and 95th percentile; None of none."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (None, None)
    return statistics.median(values), statistics.quantiles(values, n=20, method="inclusive")[-1]


def ranges(recorder: Recorder, uncaptured: Recorder | None = None) -> list[Range]:
    """What each phase took; those inside of replayed graphs are taken from `uncaptured`, a run without graphs.

    The host's shares are then still those of the first: what is inside the graphs is in its `step`.
    """
    host = {phase: seconds for phase, seconds in recorder.exclusive.items() if phase != ELSEWHERE}
    if uncaptured is not None:  # what was heard of them was a capture, or a step that is not replayed
        host["step"] = host.get("step", 0.0) + sum(host.pop(phase, 0.0) for phase in IN_STEP)
    total = sum(host.values())
    found: list[Range] = []
    for source, phases in ((recorder, tuple(host)), (uncaptured, IN_STEP)):
        for phase in phases if source is not None else ():
            spans = [span for span in source.spans if span.phase == phase]  # type: ignore[union-attr]
            if not spans:
                continue
            on_device = [end - start for start, end in (span.device for span in spans if span.device)]
            own = source is recorder
            seconds = host[phase] if own else 0.0
            found.append(
                Range(
                    phase,
                    len(spans),
                    seconds,
                    seconds / total,
                    sum(on_device) if on_device else None,
                    "uncaptured" if not own else "events" if on_device else "host",
                )
            )
    return sorted(found, key=lambda r: (-r.seconds, -(r.device_seconds or 0)))


def step_seconds(recorder: Recorder) -> list[float]:
    """Of training, not of evaluation; on the device where that is known."""
    steps = [span for span in recorder.spans if span.phase == "step" and "evaluation" not in span.within]
    return [span.device[1] - span.device[0] if span.device else span.seconds for span in steps]


def transfers(recorder: Recorder, moved: dict[str, int], file_seconds: float) -> Transfers:
    """Of the observed rounds: bytes moved by tier and direction, and seconds that the host waited for files."""

    def of(*phases: str) -> list[tuple[float, float]]:
        return [span.device or (span.start, span.end) for span in recorder.spans if span.phase in phases]

    waits, steps = of("transfer in", "transfer out"), of("step")
    return Transfers(moved, covered(waits) - overlap(waits, steps), covered(of("copy")), file_seconds)


def device_use(recorder: Recorder, uncaptured: Recorder | None = None) -> DeviceUse | None:
    """Of a GPU; None without one."""
    rounds = [span.device for span in recorder.spans if span.phase == "round" and span.device]
    if not rounds:
        return None
    steps = [span.device for span in recorder.spans if span.phase == "step" and span.device]
    source = uncaptured or recorder
    both = [[s.device for s in source.spans if s.phase == name and s.device] for name in BRANCHES]
    shorter = min(map(covered, both))
    return DeviceUse(
        busy=covered(steps) / sum(end - start for start, end in rounds),
        overlap=overlap(*both) / shorter if shorter else None,
    )
