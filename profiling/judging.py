"""Verdicts on numbers to reach, as pure functions of benchmarks' rows.

Rows are as `fedmoe.profiling.bench.Row` has them, as dictionaries. A ratio is shown with its noise: the half ranges of
the middle halves of both times, as independent errors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Rows = Mapping[str, Row]
"""By variant."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was measured, in words, and whether that is enough."""

    figure: str
    reached: bool
    close: bool = False
    """Whether the number to reach is within the figure's noise."""


class Unmeasured(Exception):
    """Says why rows do not tell whether a number is reached."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Judges the rows of some benchmarks, by their names; raises Unmeasured where they do not tell."""

    variants: Sequence[str]
    """Those whose rows it reads; a benchmark has them all, if only to say why one is absent."""
    find: Callable[[Mapping[str, Rows]], Finding]


def faster(ours: Sequence[str], than: Sequence[str], least: float, key: str = "called") -> Judge:
    """At least so many times faster: the fastest of ours, than the fastest of those others that ran; in the worst case.

    `key`: "called", with launches, as a loop has it, or "median", the device's time.
    """

    def find(results: Mapping[str, Rows]) -> Finding:
        found = {}
        for name, rows in results.items():
            mine, other = _fastest(rows, ours, key), _fastest(rows, than, key)
            whose = f"{mine} against {other}{f', {name}' if len(results) > 1 else ''}"
            found[_ratio(rows[other], rows[mine], key)] = _noise(key, rows[mine], rows[other]), whose
        worst = min(found)
        noise, whose = found[worst]
        close = abs(worst - least) < worst * noise
        return Finding(f"{worst:.2f}× ± {worst * noise:.2f} ({whose}{_missing(results, than)})", worst >= least, close)

    return Judge((*ours, *than), find)


def takes(ours: Sequence[str], of: Sequence[str], most: float, key: str = "called") -> Judge:
    """At most so much of the time that the fastest of others takes."""

    def find(results: Mapping[str, Rows]) -> Finding:
        (rows,) = results.values()
        mine, other = _fastest(rows, ours, key), _fastest(rows, of, key)
        share = _ratio(rows[mine], rows[other], key)
        noise = share * _noise(key, rows[mine], rows[other])
        shown = f"{share:.3f}× ± {noise:.3f}" if most > 0.5 else f"{share:.2%} ± {noise:.2%}"
        whose = f"{mine} against {other}{_missing(results, of)}"
        return Finding(f"{shown} ({whose})", share <= most, abs(share - most) < noise)

    return Judge((*ours, *of), find)


def outside(part: str, whole: str, most: float, key: str = "called") -> Judge:
    """At most so much of the whole's time is not the part's."""

    def find(results: Mapping[str, Rows]) -> Finding:
        (rows,) = results.values()
        inside = _ratio(_timed(rows, part), _timed(rows, whole), key)
        share, noise = 1 - inside, inside * _noise(key, rows[part], rows[whole])
        figure = f"{share:.2%} ± {noise:.2%} ({whole} against {part})"
        return Finding(figure, share <= most, abs(share - most) < noise)

    return Judge((part, whole), find)


def within(ours: str, most: float, key: str = "called") -> Judge:
    """At most so many seconds, in the worst case."""

    def find(results: Mapping[str, Rows]) -> Finding:
        taken = {name: _seconds(_timed(rows, ours), key) for name, rows in results.items()}
        worst = max(taken, key=lambda name: taken[name])
        shown = f"{taken[worst]:.2f} s" if taken[worst] >= 1 else f"{taken[worst] * 1e6:,.1f} µs"
        return Finding(f"{shown}{f' ({worst})' if len(taken) > 1 else ''}", taken[worst] <= most)

    return Judge((ours,), find)


def computes(ours: Sequence[str], least: float) -> Judge:
    """At least so many TFLOP/s, the fastest of ours."""

    def find(results: Mapping[str, Rows]) -> Finding:
        (rows,) = results.values()
        rate = rows[_fastest(rows, ours, "called")].get("tflop_per_s")
        if rate is None:
            raise Unmeasured(f"{', '.join(ours)}: what is computed in a second is not known here")
        return Finding(f"{rate:,.0f} TFLOP/s", rate >= least)

    return Judge(tuple(ours), find)


def all_beaten(ours: str, aside: Sequence[str]) -> Judge:
    """Faster than every other variant that ran, but for more of ours and those `aside`; the absent ones are named."""

    def find(results: Mapping[str, Rows]) -> Finding:
        (rows,) = results.values()
        others = [variant for variant in rows if not variant.startswith("ours") and variant not in aside]
        ran = [variant for variant in others if rows[variant]["status"] == "timed"]
        best = _fastest(rows, ran, "median")
        ratio = _ratio(rows[best], _timed(rows, ours), "median")
        noise = ratio * _noise("median", rows[best], rows[ours])
        absent = ", ".join(variant for variant in others if variant not in ran)
        figure = f"{ratio:.2f}× ± {noise:.2f} the fastest, {best}{f'; not there: {absent}' if absent else ''}"
        return Finding(figure, ratio > 1, abs(ratio - 1) < noise)

    return Judge((ours, *aside), find)


def memory(ours: str, most: float) -> Judge:
    """At most so many bytes at its peak."""

    def find(results: Mapping[str, Rows]) -> Finding:
        (rows,) = results.values()
        peak = _timed(rows, ours)["peak_bytes"]
        if peak is None:
            raise Unmeasured(f"{ours}: its memory is not known here")
        return Finding(f"{peak / 1e9:.2f} GB", peak <= most)

    return Judge((ours,), find)


def projected(first: str, later: str, times: int, most: float) -> Judge:
    """Less than so many seconds for a run of which the first part was taken, and some of `times` later ones.

    These are alike; their median stands for those that were not run.
    """

    def find(results: Mapping[str, Rows]) -> Finding:
        (rows,) = results.values()
        begun, each = _seconds(_timed(rows, first), "median"), _seconds(_timed(rows, later), "median")
        whole = begun + times * each
        return Finding(f"{whole:.1f} s, projected: {begun:.2f} s, then {times} × {each:.2f} s", whole < most)

    return Judge((first, later), find)


def _seconds(row: Row, key: str) -> float:
    """On a CPU, and by the host's clock, a call's time is its median."""
    return float(row["median"] if row[key] is None else row[key])


def _missing(results: Mapping[str, Rows], variants: Sequence[str]) -> str:
    """Which of those to compare with were not timed, though one was."""
    lost = {v for rows in results.values() for v in variants if v in rows and rows[v]["status"] != "timed"}
    return f"; not timed: {', '.join(sorted(lost))}" if lost else ""


def _ratio(row: Row, other: Row, key: str) -> float:
    """Of their times; raises Unmeasured where the other's is too short for the clock."""
    if not (seconds := _seconds(other, key)):
        raise Unmeasured(f"{other['variant']}: no time passed by the clock")
    return _seconds(row, key) / seconds


def _noise(key: str, *rows: Row) -> float:
    """Of a ratio of their times, relatively."""
    parts = []
    for row in rows:
        low, high = row["quartiles"] if row[key] is None or key == "median" else row[f"{key}_quartiles"]
        seconds = _seconds(row, key)
        parts.append((high - low) / 2 / seconds if seconds else 0.0)  # of no time at all, there is no share
    return math.hypot(*parts)


def _timed(rows: Rows, variant: str) -> Row:
    if variant not in rows:
        raise Unmeasured(f"there is no variant {variant!r}")
    row = rows[variant]
    if row["status"] != "timed":
        raise Unmeasured(f"{variant}: {row['status']}{': ' * bool(row['reason'])}{row['reason']}")
    return row


def _fastest(rows: Rows, variants: Sequence[str], key: str) -> str:
    """Of the variants that were timed; what is wrong with the first where none was."""
    if not variants:
        raise Unmeasured("there is nothing to compare with")
    timed = [variant for variant in variants if variant in rows and rows[variant]["status"] == "timed"]
    if not timed:
        _timed(rows, variants[0])
    return min(timed, key=lambda variant: _seconds(rows[variant], key))
