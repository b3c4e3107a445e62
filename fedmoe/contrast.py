"""The numbers of a comparison: each variant's, and its paired difference from the first, with a verdict in words."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedmoe import outcome
from fedmoe.attack import described
from fedmoe.errors import UserError
from fedmoe.measure import ACCURACY, PERPLEXITY, Measure
from fedmoe.pairing import CONFIDENCE, Estimate, deviation, holm, paired, unpaired
from fedmoe.variants import Trained, Variant, group, pairs


@dataclass(frozen=True, slots=True)
class Cost:
    """What training took up to the target, or without one, to the round compared; means over seeds."""

    reached: int
    """Seeds that came to the target; the others count in nothing here."""
    rounds: float | None
    bytes: float | None
    """Up and down."""
    flops: float | None
    seconds: float | None
    """Of rounds, evaluation included."""


@dataclass(frozen=True, slots=True)
class Row:
    """A variant at the round compared, on held-out samples, personalized."""

    name: str
    values: Mapping[str, str]
    seeds: list[int]
    folders: list[str]
    accuracy: float | None
    """Mean over seeds of the mean over clients; None if no client of any has one. `test_loss` likewise."""
    test_loss: float | None
    perplexity: float | None
    """Of text, e to the power of the test loss; None of images."""
    over_seeds: float | None
    """Standard deviation of the seeds' means (n − 1), of accuracy or, of text, test loss; None with one seed."""
    over_clients: float | None
    """Standard deviation over the clients of a seed, as in its metrics, averaged over seeds."""
    worst: float | None
    """Accuracy or perplexity of the client that does worst, averaged over seeds as that of all."""
    cost: Cost


@dataclass(frozen=True, slots=True)
class Difference:
    """A variant's accuracy or, of text, test loss, less the first one's."""

    name: str
    estimate: Estimate
    p_holm: float | None
    """`estimate.p`, all comparisons taken together."""
    how: str
    """What was compared with what."""
    better: bool | None
    """None where it may be noise."""
    verdict: str
    ratio: tuple[float | None, float | None, float | None] | None
    """Of text, perplexity over the first one's: e to the power of `estimate.mean`, `low` and `high`."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that a comparison comes to."""

    by: Measure
    round: int
    target: float | None
    fields: list[str]
    """Of the configuration, that differ among the variants."""
    variants: list[Row]
    """The first is the baseline."""
    differences: list[Difference]
    """Of all others."""
    notes: list[str]
    """In sentences: what the intervals cover, and what was odd."""

    def to_json(self) -> dict[str, Any]:
        """As `json` takes it; what is not known is None."""
        return asdict(self)


def contrast(
    runs: Sequence[Trained], number: int | None = None, target: float | None = None
) -> tuple[Report, list[Variant]]:
    """Compare runs at round `number`, by default the last that all have evaluated. The first run's variant is the
    baseline.

    Raises UserError where they have no such round in common, or are judged by different measures.
    """
    by = runs[0].by
    if odd := next((run for run in runs if run.by != by), None):
        raise UserError(
            f"{runs[0].folder} is judged by {by.name} and {odd.folder} by {odd.by.name}, which do not compare: "
            "give runs of images or runs of text"
        )
    by.check_target(target)
    evaluated = [run for run in runs if run.scores]
    if not evaluated:
        raise UserError(f"{runs[0].folder}: no round is evaluated yet: `fedmoe resume {runs[0].folder}` trains on")
    number = _round(evaluated, number)
    variants = group(evaluated)
    rows = [_row(variant, number, target, by) for variant in variants]
    estimates = [_difference(variants[0], other, number) for other in variants[1:]]
    known = [estimate.p for estimate, _ in estimates if estimate is not None and estimate.p is not None]
    adjusted = iter(holm(known))
    differences = []
    for other, (estimate, how) in zip(variants[1:], estimates, strict=True):
        if estimate is not None:
            p = None if estimate.p is None else next(adjusted)
            differences.append(_against(other.name, estimate, p, how, len(known), by))
    told = _oddities(runs, evaluated, variants, number)
    notes = [*_gains(variants, number, by), *_scale(by, differences), *_coverage(differences, len(known)), *told]
    return Report(by, number, target, list(variants[0].values), rows, differences, notes), variants


def _round(runs: Sequence[Trained], number: int | None) -> int:
    if number is None:
        common = set.intersection(*(set(run.scores) for run in runs))
        if not common:
            a, b = runs[0], next(run for run in runs if not set(run.scores) & set(runs[0].scores) or run is runs[-1])
            raise UserError(
                f"no round is evaluated in all runs: {a.folder} has {_few(a.scores)}, {b.folder} {_few(b.scores)}: "
                "leave a run out, or train on"
            )
        return max(common)
    for run in runs:
        if number not in run.scores:
            raise UserError(f"{run.folder} was not evaluated in round {number}, but in {_few(run.scores)}")
    return number


def _few(rounds: Mapping[int, object]) -> str:
    """The numbers of some rounds, not all if there are many."""
    held = sorted(rounds)
    return ", ".join(map(str, held)) if len(held) < 6 else f"{held[0]}, {held[1]}, ..., {held[-1]}"


def _row(variant: Variant, number: int, target: float | None, by: Measure) -> Row:
    held = [list(run.scores[number].values()) for run in variant.runs.values() if run.scores[number]]
    means = [statistics.fmean(values) for values in held]
    worst = _mean([min(values, key=by.gain) for values in held])
    after = [run.rounds[number - 1] for run in variant.runs.values()]
    mean, others = _mean(means), [r.test_loss if by == ACCURACY else r.accuracy for r in after]
    other = _mean([over.mean for over in others if over is not None and over.mean is not None])
    accuracy, loss = (mean, other) if by == ACCURACY else (other, mean)
    return Row(
        variant.name,
        variant.values,
        list(variant.runs),
        [str(run.folder) for run in variant.runs.values()],
        accuracy,
        loss,
        by.level(loss) if by == PERPLEXITY and loss is not None else None,
        deviation(means),
        _mean([statistics.pstdev(values) for values in held]),
        None if worst is None else by.level(worst),
        _cost(variant, number, target, by),
    )


def _cost(variant: Variant, number: int, target: float | None, by: Measure) -> Cost:
    runs = [run.rounds for run in variant.runs.values()]
    found = [outcome.taken(r[:number]) if target is None else outcome.reached(r, target, by) for r in runs]
    took = [one for one in found if one is not None]
    means = {name: _mean([getattr(one, name) for one in took]) for name in ("bytes", "flops", "seconds")}
    return Cost(len(took), rounds=_mean([one.round for one in took]), **means)


def _difference(first: Variant, second: Variant, number: int) -> tuple[Estimate | None, str]:
    """The second less the first, and what was compared; None where one has no value at all."""
    a, b = ({seed: run.scores[number] for seed, run in v.runs.items() if run.scores[number]} for v in (first, second))
    if not a or not b:
        return None, ""
    common = [seed for seed in a if seed in b]
    alike = [s for s in common if first.runs[s].dealt == second.runs[s].dealt and a[s].keys() & b[s].keys()]
    if alike:
        estimate = paired({s: a[s] for s in alike}, {s: b[s] for s in alike})
        count = f"{len(alike)} of {max(len(a), len(b))}" if len(alike) < max(len(a), len(b)) else str(len(alike))
        if estimate.unit == "seed":
            return estimate, f"paired, {count} seeds"
        return estimate, f"paired, {_of(estimate.counts[0], 'client')} of seed {alike[0]}"
    estimate = unpaired(a, b)
    units = " and ".join(map(str, estimate.counts))
    return estimate, f"not paired, {_why(first, second, common)}: {units} {estimate.unit}s"


def _why(first: Variant, second: Variant, common: Sequence[int]) -> str:
    if not common:
        return "no seed in common"
    (data, _, n), (other, _, m) = first.runs[common[0]].dealt, second.runs[common[0]].dealt
    if data != other:
        return "the data differ"
    if n != m:
        return f"{n} clients against {m}"
    return "the partitions differ" if first.runs[common[0]].dealt != second.runs[common[0]].dealt else "other clients"


def _against(
    name: str, estimate: Estimate, p_holm: float | None, how: str, comparisons: int, by: Measure
) -> Difference:
    better = by.gain(estimate.mean) > 0 if p_holm is not None and p_holm <= 1 - CONFIDENCE else None
    ratio = None
    if by == PERPLEXITY:
        low, high = (None if end is None else by.level(end) for end in (estimate.low, estimate.high))
        ratio = by.level(estimate.mean), low, high
    return Difference(name, estimate, p_holm, how, better, _verdict(estimate, p_holm, comparisons, by), ratio)


def _verdict(estimate: Estimate, p_holm: float | None, comparisons: int, by: Measure) -> str:
    if p_holm is None or estimate.p is None:
        if len(estimate.counts) > 1:
            return "no telling: one seed against several shows no noise"
        return f"no telling: {'all differ by the same' if estimate.counts[0] > 1 else 'one client of one seed'}"
    if estimate.low == estimate.high == 0:
        return "none at all"
    if p_holm <= 1 - CONFIDENCE:
        word = "higher" if estimate.mean > 0 else "lower"
        return word if by == ACCURACY else f"{word} ({'better' if word == by.better else 'worse'})"
    if estimate.p <= 1 - CONFIDENCE:
        return f"within the noise of {comparisons} comparisons"
    return "within the noise"


def _gains(variants: Sequence[Variant], number: int, by: Measure) -> Iterator[str]:
    """Of two variants, how many clients the second one serves better, where they are the same."""
    if len(variants) != 2:
        return
    first, second = variants
    gains = [by.gain(b) - by.gain(a) for _, _, a, b in pairs(first, second, number)]
    if gains:
        better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        many = _of(len(gains), "client") + " of all seeds" * (len(second.runs) > 1)
        yield f"{second.name} has the better {by.name} for {better} of {many}, {first.name} for {worse}."


def _scale(by: Measure, differences: Sequence[Difference]) -> Iterator[str]:
    if by == PERPLEXITY and differences:
        yield (
            "Perplexity is e to the power of the mean test loss of a token, and of that loss means over clients and "
            "seeds, differences and intervals are taken: -5 % says that perplexity is 0.95 times the first one's, each "
            "client counting the same."
        )


def _coverage(differences: Sequence[Difference], comparisons: int) -> Iterator[str]:
    units = {d.estimate.unit for d in differences if d.estimate.p is not None}
    if "seed" in units:
        yield (
            "Intervals over seeds hold the difference to be expected with 95 % confidence: they cover what another "
            "seed changes (partition, initialization, sampling, order), not other data or settings."
        )
    if "client" in units:
        yield (
            "Intervals over the clients of one seed cover which clients there are, and not what another seed would "
            "change, which is often more; clients that share an expert are not independent, either. Several seeds tell."
        )
    if comparisons > 1:
        yield (
            f"Each interval is for itself; verdicts take all {comparisons} comparisons together (p by Holm): one false "
            "difference among them all has a chance of 5 % at most."
        )


def _oddities(
    runs: Sequence[Trained], evaluated: Sequence[Trained], variants: Sequence[Variant], number: int
) -> Iterator[str]:
    if left := [str(run.folder) for run in runs if run not in evaluated]:
        yield f"Left out, not evaluated yet: {', '.join(left)}."
    for bad, count in Counter(described(run.config) for run in evaluated).items():
        if bad:
            yield f"Attacked, {_of(count, 'run')}: {bad}."
    if len(variants) == 1:
        yield "The runs are of one variant: there is nothing to compare it with."
    short = [run for run in evaluated if len(run.rounds) < run.config.federation.rounds]
    if short:
        told = ", ".join(f"{r.folder} ({len(r.rounds)} of {r.config.federation.rounds} rounds)" for r in short[:5])
        more = f" and {len(short) - 5} more" if len(short) > 5 else ""
        yield f"Not finished: {told}{more}; compared after round {number}."
    lost = [(run, [c for c in run.rounds[number - 1].evaluated if c not in run.scores[number]]) for run in evaluated]
    for run, clients in [entry for entry in lost if entry[1]]:
        names = ", ".join(map(str, clients[:10])) + (", ..." if len(clients) > 10 else "")
        yield (
            f"{run.folder}: no {run.by.name} of {_of(len(clients), 'client')} ({names}), left out of its mean and "
            "pairs: what is left may look better than it is."
        )
    if len({frozenset(run.scores[number]) for run in evaluated}) > 1 and not any(clients for _, clients in lost):
        yield "Means are over different clients."
    if len({tuple(str(run.environment.get(k)) for k in ("cpu", "gpu", "threads")) for run in evaluated}) > 1:
        yield "The runs were on different machines or numbers of threads: their seconds do not compare."


def _of(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
