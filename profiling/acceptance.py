"""The numbers to reach, as data: what each is measured by, where it counts, and in how much time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmoe.profiling.judging import (
    Finding,
    Judge,
    Unmeasured,
    all_beaten,
    computes,
    faster,
    memory,
    outside,
    projected,
    takes,
    within,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One number to reach."""

    what: str
    """The thing; several numbers may be about it."""
    number: str
    on: str
    """Where it counts: a GPU's name (ratios are of use on any), "CPU" (a machine without a GPU), or "anywhere"."""
    judge: Judge | str
    """Or why nothing measures it yet."""
    benchmarks: Sequence[str] = ()
    """By name; the judge needs them all."""
    hoped: bool = False
    """Whether it is more than is asked for: "not yet" is then no miss."""

    def counts_on(self, device: str) -> bool:
        """Whether it is to be measured on a device, "cuda" or "cpu"."""
        return self.on == "anywhere" or (self.on == "CPU") == (device == "cpu")


def about(
    what: str, on: str, benchmarks: Sequence[str], *numbers: tuple[str, Judge | str], hoped: bool = False
) -> list[Target]:
    """The targets for one thing."""
    return [Target(what=what, number=n, on=on, judge=judge, benchmarks=benchmarks, hoped=hoped) for n, judge in numbers]


BUDGET = 565.0
"""Seconds that all of it may take."""

LM_HEAD = "gated_lm_head[8192-4096-128256-bfloat16]"
PRODUCTS = ("three products, 2 chunks", "three products, whole")
HEADS = [f"gated_head[{rows}-500-{classes}-bfloat16]" for rows, classes in ((64, 10), (512, 100))]
"""The least and the most of what is asked for: compiling baselines for more would take too long."""
HEAD = ("ours, step, graph",)
AVERAGES = {
    "100 clients × 0.67 M": "averaging[100-665048]",
    "100 clients × 11 M": "averaging[100-11000000]",
    "1000 clients × 0.67 M": "averaging[1000-665048]",
}
ORDERED = {"median": "median[100-66504]", "trimmed mean": "trimmed_mean[100-66504]"}
LOOPS, GRAPHS = (
    tuple(f"eager loop{graph}{layout}{dtype}" for layout in ("", ", channels-last") for dtype in ("", ", bf16"))
    for graph in ("", ", graph")
)
PLAIN_LM = ("transformers alone, autocast", "transformers alone, all bf16")
ALONE, TOGETHER = ("engine", "engine, bf16"), ("together", "together, bf16")

LIMITS: Mapping[str, Mapping[str, float]] = {
    "cuda": {
        **dict.fromkeys(HEADS, 45),
        LM_HEAD: 90,
        "step": 25,
        "step_in_cohort": 25,
        "lm_step": 80,
        "paper_run": 35,
        "overlap": 10,
        "paging": 20,
        "bandwidth": 10,
        "evaluation": 12,
        "start": 58,
        "checkpoints": 25,
        "bookkeeping": 12,
        **dict(zip(AVERAGES.values(), (5, 14, 9), strict=True)),
        **dict.fromkeys(ORDERED.values(), 5),
    },
    "cpu": {
        "federated_round": 126,
        "checkpoints": 100,
        "bookkeeping": 100,
        **dict(zip(AVERAGES.values(), (18, 95, 42), strict=True)),
        **dict.fromkeys(ORDERED.values(), 12),
    },
}
"""Seconds in which a benchmark is done, by device: those that are run there, in this order."""

TARGETS = [
    *about(
        "vocabulary head: 8192 tokens, D 4096, C 128256, bf16, forward and backward",
        "H200",
        [LM_HEAD],
        ("≤ 1.10× the three bare products", takes(("ours, step",), PRODUCTS, 1.10, "median")),
        ("≤ 1.3 GB above inputs and gradients", memory("ours, step", 1.3e9)),
        ("faster than every baseline", all_beaten("ours, step", PRODUCTS)),
    ),
    *about(
        "class head: B 64 to 512, D 500, C 10 to 100 (its smallest and largest shape)",
        "H200",
        HEADS,
        ("≥ 15× eager", faster(HEAD, ("eager",), 15)),
        ("≥ 6× eager under a graph", faster(HEAD, ("eager, graph",), 6, "median")),
        ("≥ 2× compiled, under a graph", faster(HEAD, ("compile, graph",), 2, "median")),
        ("≤ 9 µs", within(HEAD[0], 9e-6, "median")),
    ),
    *about(
        "whole step: CNN-1 and CNN-5, batch 64",
        "H200",
        ["step"],
        ("≥ 6× an eager loop", faster(ALONE, LOOPS, 6)),
        ("≥ 1.5× that loop under a graph", faster(ALONE, GRAPHS, 1.5)),
    ),
    *about(
        "whole step: CNN-1 and CNN-5, batch 64",
        "H200",
        ["step"],
        ("≥ 10× an eager loop (moonshot)", faster(ALONE, LOOPS, 10)),
        hoped=True,
    ),
    *about(
        "whole step of a client in a cohort: CNN-1 and CNN-5, batch 64",
        "H200",
        ["step_in_cohort"],
        ("≥ 20× an eager loop", faster(TOGETHER, LOOPS, 20)),
    ),
    *about(
        "the paper's CIFAR-10: N 100, fraction 0.1, 500 rounds, E 10, checkpoints on",
        "H200",
        ["paper_run"],
        ("< 60 s", projected("start and first rounds, to an evaluation", "rounds, to the next evaluation", 49, 60)),
    ),
    *about(
        "two streams: experts of equal size that do not fill the GPU",
        "H200",
        ["overlap"],
        ("≥ 1.6× the serial forward", faster(("two streams",), ("one stream",), 1.6, "median")),
    ),
    *about(
        "paging clients that exceed the budget, compute ≥ 1.5× their transfer",
        "H200",
        ["bandwidth"],
        ("≥ 90% of the bandwidth of pinned copies", faster(("ours",), ("bare copies",), 0.9)),
    ),
    *about(
        "paging clients that exceed the budget, compute ≥ 1.5× their transfer",
        "H200",
        ["paging"],
        ("≤ 2% of the round not hidden", outside("in device memory", "in host memory", 0.02)),
    ),
    *about(
        "large client: 1 B parameters, sequence 2048, 16 k tokens a step, bf16",
        "H200",
        ["lm_step"],
        ("≥ 50% MFU, of the 989 TFLOP/s of its data sheet", computes(("engine",), 0.5 * 989)),
        ("≤ 3% below the same model trained alone", takes(("engine",), PLAIN_LM, 1.03)),
    ),
    *about(
        "start to first step, cold caches, capture included",
        "H200",
        ["start"],
        ("≤ 20 s", within("start to the end of a run of one step", 20)),
    ),
    *about(
        "evaluation",
        "H200",
        ["evaluation"],
        ("≥ 3× the training samples/s", faster(("evaluation",), ("training",), 3)),
    ),
    *about(
        "checkpoint stall",
        "anywhere",
        ["checkpoints"],
        ("≤ 1% of the round longer", outside("a checkpoint at the end", "a checkpoint every round", 0.01)),
        ("≤ 1% of the round held up", takes(("held up by checkpoints",), ("a checkpoint every round",), 0.01)),
    ),
    *about(
        "bookkeeping outside forward, backward and optimizer",
        "anywhere",
        ["bookkeeping"],
        ("≤ 3% of the round", outside("steps alone", "round", 0.03)),
    ),
    *about(
        "whole round, 1 thread, against an eager loop",
        "CPU",
        ["federated_round"],
        ("≤ 0.95× with default SGD", takes(("engine",), ("plain loop",), 0.95)),
        ("≤ 1.00× with fused SGD", takes(("engine",), ("plain loop, fused SGD",), 1.00)),
    ),
    *(
        target
        for size, name in AVERAGES.items()
        for target in about(
            f"averaging {size} parameters, all at once, on the host",
            "anywhere",
            [name],
            ("≥ 0.9× the bandwidth of reading", faster(("ours, native",), ("read",), 0.9)),
            ("≥ 1.4× a loop in PyTorch", faster(("ours, native",), ("torch loop",), 1.4)),
            ("≥ 2.3× NumPy", faster(("ours, native",), ("NumPy",), 2.3)),
        )
    ),
    *(
        target
        for rule, name in ORDERED.items()
        for target in about(
            f"{rule} of 100 clients × 66,504 parameters, on the host",
            "anywhere",
            [name],
            ("≥ 5× torch.sort, blocked", faster(("ours, native",), ("torch.sort",), 5)),
        )
    ),
]


def judged(device: str, benchmarks: Sequence[Mapping[str, Any]], partly: bool = False) -> list[dict[str, Any]]:
    """Every target with its figure and verdict, from what `fedmoe bench` has collected on a device, "cuda" or "cpu".

    A verdict is "reached", "missed" ("not yet" where it is only hoped for) or, with `why`, "not measured"; `close`
    where the noise leaves either open.
    `partly`: only those that a benchmark was run for.
    """
    ran = {benchmark["name"]: benchmark for benchmark in benchmarks}
    made = []
    for target in TARGETS:
        if partly and not (target.counts_on(device) and any(name in ran for name in target.benchmarks)):
            continue
        told: dict[str, Any]
        try:
            found = _found(target, device, ran)
            verdict = "reached" if found.reached else "not yet" if target.hoped else "missed"
            told = {"figure": found.figure, "verdict": verdict, "close": found.close, "why": ""}
        except Unmeasured as error:
            told = {"figure": "", "verdict": "not measured", "close": False, "why": str(error)}
        known = {"what": target.what, "number": target.number, "on": target.on, "benchmarks": list(target.benchmarks)}
        made.append(known | told)
    return made


def _found(target: Target, device: str, ran: Mapping[str, Mapping[str, Any]]) -> Finding:
    """What its judge finds; raises Unmeasured where there is nothing to judge, or not all of it."""
    if isinstance(target.judge, str):
        raise Unmeasured(target.judge)
    if not target.counts_on(device):
        needs = "a machine without a GPU (CUDA_VISIBLE_DEVICES= hides one)" if target.on == "CPU" else "a GPU"
        raise Unmeasured(f"not measurable here: needs {needs}")
    for name in target.benchmarks:
        if name not in ran:
            raise Unmeasured(f"{name} was not run")
        if ran[name]["outcome"] != "passed":
            raise Unmeasured(f"{name} {ran[name]['outcome']}: {ran[name]['reason']}")
    return target.judge.find({name: {row["variant"]: row for row in ran[name]["rows"]} for name in target.benchmarks})
