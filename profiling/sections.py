"""The sections of a profile's page: what is known of each subject, in words, tables and plots, the findings first."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedmoe.profiling import figures, timeline
from fedmoe.profiling.markup import (
    THIN,
    Cell,
    Figure,
    Row,
    details,
    digits,
    flat,
    percent,
    quantity,
    scaled,
    seconds,
    sentence,
    size,
    table,
    text,
)
from fedmoe.profiling.profile import Profile, quantiles
from fedmoe.profiling.roofline import Point
from fedmoe.profiling.shell import Section
from fedmoe.profiling.spans import Span
from fedmoe.profiling.trace import Series

SLOWEST = 15
"""Operators in the table; the others are shown when asked for."""
SOURCES = {"host": "host's clock", "events": "CUDA events", "uncaptured": "round without graphs"}


class Sections:
    """Makes the sections, and keeps the figures that they place."""

    def __init__(self, profile: Profile, spans: Sequence[Span], series: Mapping[str, Series]) -> None:
        self.figures: list[Figure] = []
        self._p, self._spans, self._series = profile, spans, series
        phases = [*(r.phase for r in profile.ranges), *(span.phase for span in spans)]
        self._colors = figures.palette(phases)

    def all(self) -> Iterator[Section]:
        """Each, with content or without."""
        p = self._p
        yield Section("findings", "Findings", self._findings())
        yield Section("numbers", "Key numbers", self._numbers())
        yield Section("ranges", "Where the rounds went", self._ranges())
        yield Section("time", "Timeline of one round", self._figure(timeline.figure(self._spans, self._colors)))
        yield Section("roof", "Roofline", self._figure(figures.roofline(p.operators, p.roof)))
        yield Section("operators", "Slowest operators", self._operators())
        yield Section("sizes", "Batch sizes", self._figure(figures.batches(p.batches)), half=True)
        yield Section("memory", "Memory", self._memory(), half=True)
        yield Section("meters", "Meters", self._meters())
        yield Section("setup", "Plan and configuration", self._setup())

    def _figure(self, figure: Figure | None) -> str:
        if figure is None:
            return ""
        self.figures.append(figure)
        return figure.html()

    def _findings(self) -> str:
        items = []
        for finding in self._p.findings:
            given = "".join(f"<li>{text(name)} <b>{_value(name, v)}</b></li>" for name, v in finding.figures.items())
            items.append(f"<li><p>{text(sentence(finding.text))}</p>{f'<ul>{given}</ul>' if given else ''}</li>")
        return f'<ol class="findings">{"".join(items)}</ol>' if items else ""

    def _numbers(self) -> str:
        cards = "".join(
            f"<div><dt>{text(name)}</dt><dd><b>{_with_unit(value)}</b><small>{text(more)}</small></dd></div>"
            for name, value, more in self._cards()
        )
        notes = "".join(f"<p>{text(sentence(note))}.</p>" for note in self._p.notes)
        return (f'<dl class="cards">{cards}</dl>' if cards else "") + notes

    def _cards(self) -> Iterator[tuple[str, str, str]]:
        p = self._p
        rounds = [r.seconds for r in p.rounds]
        if rounds:
            many = f"median of {len(rounds)}, {seconds(min(rounds))} to {seconds(max(rounds))}; "
            train = statistics.median(r.train_seconds for r in p.rounds)
            yield "round", seconds(p.round_seconds), many * (len(rounds) > 1) + f"{seconds(train)} of it training"
        if all(r.train_seconds for r in p.rounds) and rounds:
            yield "samples a second", digits(p.samples_per_second), "while training"
            if p.flops_per_second:
                roof = p.roof.flops_per_second
                of = f"{percent(p.flops_per_second / roof)} of the {scaled(roof, 'FLOP/s')} of a large product"
                yield "computing", scaled(p.flops_per_second, "FLOP/s"), of
        p50, p95 = quantiles(p.steps)
        if p50 is not None and p95 is not None:
            clock = "on the device" if p.device else "on the host"
            yield "training step", seconds(p50), f"p50; p95 is {seconds(p95)}; {len(p.steps):,} steps, {clock}"
        for e in p.energy:
            more = f"{scaled(e.joules_per_1000_samples, 'J')} per 1000 samples"
            more += "" if e.source == "counter" else f"; {_words(e.source)}"
            yield f"{e.of.upper()} energy a round", scaled(e.joules_a_round, "J"), more
        if p.device:
            yield "device busy", percent(p.device.busy), "of the observed rounds a step was under way"
            if p.device.overlap is not None:
                yield "experts overlap", percent(p.device.overlap), "of the shorter one's time"
        if p.observed_seconds and rounds:
            apart = (max(rounds) - min(rounds)) / p.round_seconds
            noise = f"; the others vary by {percent(apart)}" if len(rounds) > 1 else ""
            sign = "+" if p.observing >= 0 else "\N{MINUS SIGN}"
            yield "observing costs", sign + percent(abs(p.observing)), f"of a round, in observed ones only{noise}"

    def _ranges(self) -> str:
        p = self._p
        rows: list[Row] = []
        total = sum(p.observed_seconds)
        on_device = any(r.device_seconds is not None for r in p.ranges)
        for r in p.ranges:
            inside = r.source == "uncaptured"  # of a graph, where the host is not
            row: list[Cell | str] = [Cell(r.phase, color=self._colors[r.phase]), f"{r.count:,}"]
            row += ["", ""] if inside else [seconds(r.seconds), Cell(percent(r.share), bar=r.share)]
            if on_device:
                there = r.device_seconds
                bar = there / total if there is not None and total and not inside else None
                row += ["" if there is None else Cell(seconds(there), bar=bar), SOURCES[r.source]]
            rows.append(row)
        if not rows:
            return ""
        head = ["phase", "count", "host", "share", *["device", "by"] * on_device]
        note = "Host: exclusive of what is within a phase, so that the shares add up to the observed rounds."
        if on_device:
            note += " Device: with what is within, streams added up."
        if any(r.source == "uncaptured" for r in p.ranges):
            note += " Inside of replayed graphs the host hears nothing: those times are of a round without graphs."
        parts = [self._figure(figures.ranges(p.ranges, self._colors)), table("Time by phase", head, rows, words=(0, 5))]
        return f'{parts[0]}<div class="beside">{parts[1]}<div><p>{text(note)}</p>{self._transfers(total)}</div></div>'

    def _transfers(self, total: float) -> str:
        moved = [(way, size(count)) for way, count in self._p.transfers.bytes.items() if count]
        waited = self._p.transfers
        if not moved and not waited.seconds:
            return ""
        rows: list[Row] = [[f"states, {way}", count] for way, count in moved]
        for name, took in (("waiting for states", waited.seconds), ("of it for files", waited.file_seconds)):
            if took:
                rows.append([name, seconds(took) + (f", {percent(took / total)} of the rounds" if total else "")])
        return table("Transfers", ["transfers", ""], rows)

    def _operators(self) -> str:
        p = self._p.operators
        whole = sum(point.seconds for point in p)
        rows = [_operator(point, whole) for point in p]
        if not rows:
            return ""
        head = ["operator, inputs", "calls", "time", "of all", "FLOP/s", "bytes/s", "of the roof"]
        first, rest = rows[:SLOWEST], rows[SLOWEST:]
        note = (
            "Of a training step of each architecture, one operator at a time. The roof is what bounds an operator by "
            "its FLOPs and bytes: more than 100% is possible where operands lie in a cache."
        )
        more = details(f"{len(rest)} more", table("More operators", head, rest)) if rest else ""
        return f"<p>{note}</p>{table('Slowest operators', head, first)}{more}"

    def _memory(self) -> str:
        most = max((m.bytes for m in self._p.memory), default=0)
        rows: list[Row] = [
            [m.what, m.where, Cell(size(m.bytes), bar=m.bytes / most if most else None)]
            for m in sorted(self._p.memory, key=lambda m: -m.bytes)
        ]
        made = table("Memory by use", ["what", "where", "size"], rows, words=(0, 1))
        if any("allocator" in m.what for m in self._p.memory):
            made += "<p>The allocator's has the others on the device in it: they do not add up.</p>"
        return made if rows else ""

    def _meters(self) -> str:
        p, parts = self._p, []
        units = {name: str(s.get("unit") or "") for name, s in p.meters.items() if isinstance(s, Mapping)}
        zero = min((min(times) for times, _ in self._series.values() if times), default=0.0)
        for number, (name, values) in enumerate(self._series.items()):
            unit = units.get(name, "")
            if drawn := figures.meter(number, _words(name), values, unit, zero):
                title = _words(name) + (f" [{unit}]" if unit else "")
                parts.append(f"<div><h3>{text(title)}</h3>{self._figure(drawn)}</div>")
        plots = f'<div class="grid">{"".join(parts)}</div>' if parts else ""
        missing: list[Row] = [[_words(name), reason] for name, reason in p.missing.items()]
        absent = f"<h3>Not measured</h3>{table('Not measured', ['quantity', 'why'], missing, words=(0, 1))}"
        return plots + _summaries(p.meters) + absent * bool(missing)

    def _setup(self) -> str:
        p = self._p
        reasons = p.plan.get("reasons")
        reasons = reasons if isinstance(reasons, Mapping) else {}
        plan = [
            [name, value, str(reasons.get(name, ""))]
            for name, value in flat({k: v for k, v in p.plan.items() if k != "reasons"})
        ]
        rounds = [
            [str(i + 1), *map(seconds, (r.seconds, r.train_seconds, r.evaluate_seconds)), f"{r.samples:,}"]
            for i, r in enumerate(p.rounds)
        ]
        tables: list[tuple[str, list[str], list[Any]]] = [
            ("Plan", ["field", "value", "because"], plan),
            ("Configuration", ["field", "value"], [list(pair) for pair in flat(p.config)]),
            ("Environment", ["what", "value"], [list(pair) for pair in flat(p.environment)]),
        ]
        made = [details(name, table(name, head, rows, range(len(head)))) for name, head, rows in tables if rows]
        head = ["round", "time", "training", "evaluation", "samples"]
        return "".join(made) + details("Measured rounds", table("Measured rounds", head, rounds))


def _operator(p: Point, whole: float) -> list[Cell | str]:
    took = Cell(percent(p.seconds / whole), bar=p.seconds / whole)
    rates = [scaled(work / p.seconds, unit) if work else "" for work, unit in ((p.flops, "FLOP/s"), (p.bytes, "B/s"))]
    return [Cell(p.name, p.shapes, code=True), f"{p.calls:,}", seconds(p.seconds), took, *rates, percent(p.share)]


def _summaries(meters: Mapping[str, Any]) -> str:
    """A table of meters: numbers in columns as far as they have them, the rest in words."""
    known = {name: s for name, s in meters.items() if isinstance(s, Mapping)}
    columns = list(dict.fromkeys(key for s in known.values() for key, value in s.items() if _number(value)))
    rows: list[Row] = []
    for name, summary in known.items():
        unit = str(summary.get("unit") or "")
        units = {"per_second": f"{unit}/s"}
        cells = [quantity(summary[key], units.get(key, unit)) if _number(summary.get(key)) else "" for key in columns]
        words = [value for key, value in summary.items() if key != "unit" and isinstance(value, str)]
        words = [_words(value) for value in words if value != "counter"]  # what a sum comes from, if all is well
        flags = [value for value in summary.values() if isinstance(value, Mapping)]
        for shares in flags:
            words.append(", ".join(f"{which} {percent(v)}" for which, v in shares.items() if _number(v)) or "none")
        if any(cells) or flags:
            rows.append([Cell(_words(name), "; ".join(filter(None, words))), *cells])
    return table("Meters", ["quantity", *map(_words, columns)], rows) if rows else ""


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _with_unit(value: str) -> str:
    """A number, and what follows it in smaller print."""
    number, _, unit = value.partition(THIN)
    return text(number) + (f" <span>{text(unit)}</span>" if unit else "")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(name: str, value: float) -> str:
    """One of a finding."""
    if name.endswith("bytes"):
        return size(value)
    if isinstance(value, float) and abs(value) <= 1:
        return percent(value)
    return f"{value:,.0f}" if float(value).is_integer() else digits(value)
