"""The sections of a run's report: what is known of each subject, in words, tables and plots, the key numbers first."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedmoe import configfile, meaning, outcome, reportfigures
from fedmoe.attack import described
from fedmoe.config import Config
from fedmoe.insight import Gated, Pictured
from fedmoe.measure import ACCURACY, PERPLEXITY, Measure, measure
from fedmoe.outcome import Round
from fedmoe.partitionfigure import partition_figure
from fedmoe.profiling.markup import (
    Cell,
    Figure,
    Row,
    cards,
    details,
    digits,
    paragraphs,
    percent,
    scaled,
    seconds,
    size,
    swatches,
    table,
    text,
)
from fedmoe.profiling.profile import Profile
from fedmoe.profiling.sections import Sections, setup
from fedmoe.profiling.shell import Section

LISTED = 100
"""Most clients in the table, those that do worst; and most rounds in that of clients left out, the last."""
SHARES = (0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Of the best mean accuracy, or of text how often the best perplexity: what reaching them took is in the table."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a report is of; what is not known is empty."""

    name: str
    config: Config
    rounds: Sequence[Round]
    train: Sequence[int]
    """Samples of each client; of its test likewise."""
    test: Sequence[int]
    counts: Tensor
    """int64 [N, C]: samples by client and class."""
    classes: Sequence[str]
    environment: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    gates: Sequence[Gated] = ()
    pictures: Sequence[Pictured] = ()
    target: float | None = None
    """Accuracy, or of text perplexity, that is of interest."""
    profile: Profile | None = None


class ReportSections:
    """Makes the sections, and keeps the figures that they place."""

    def __init__(self, subject: Subject) -> None:
        self.figures: list[Figure] = []
        self._s, self._models = subject, subject.config.model.local
        self._by = measure(subject.config)
        self._last, self._best = outcome.last(subject.rounds), outcome.best(subject.rounds, self._by)

    def all(self) -> Iterator[Section]:
        """Each, with content or without."""
        s, name = self._s, self._by.name
        measured, lost = reportfigures.measured(s.rounds, self._by), reportfigures.loss(s.rounds)
        yield Section("numbers", "Key numbers", self._numbers())
        yield Section(name, f"{name.capitalize()} over rounds", self._figure(measured), half=True)
        yield Section("loss", "Loss over rounds", self._figure(lost), half=True)
        yield Section("clients", "Clients", self._clients())
        yield Section("gate", "The gate", self._gate())
        yield Section("representations", "Representations", self._representations())
        yield Section("target", f"Cost of {self._by.one}", self._target())
        yield Section("partition", "Partition", self._figure(partition_figure(s.counts, s.classes)))
        yield Section("left-out", "Warnings and clients left out", self._left_out())
        if s.profile is not None:
            made = Sections(s.profile, prefix="profile-")
            differs = paragraphs(_differences(s.config, s.profile))
            for section in made.all():
                html = differs * (section.name == "numbers") + section.html
                yield Section(f"profile-{section.name}", f"Profile: {section.title}", html, section.half)
            self.figures += made.figures
        yield Section("setup", "Plan and configuration", setup(s.plan, configfile.flat(s.config), s.environment))

    def _figure(self, figure: Figure | None) -> str:
        if figure is None:
            return ""
        self.figures.append(figure)
        return figure.html()

    def _numbers(self) -> str:
        return cards(self._cards())

    def _cards(self) -> Iterator[tuple[str, str, str]]:
        s, wanted = self._s, self._s.config.federation.rounds
        last, by = self._last, self._by
        for name, aggregated in _kinds(last, by).items():
            assert last is not None
            values = list(outcome.held(last, by, aggregated).values())
            more = f"{by.spread(statistics.pstdev(values))} over {_count(len(values), 'client')}, " if values else ""
            shown = _shown(outcome.mean(last, by, aggregated), by)
            yield f"{by.name}, {name}", shown, f"{more}held-out samples, after round {last.number}"
        if by == PERPLEXITY and last is not None and (shares := outcome.mean(last, ACCURACY)) is not None:
            yield "accuracy", f"{shares:.3f}", "of the next token, mean of clients"
        if self._best is not None and self._best[0] is not last:
            yield f"best {by.name}", _shown(self._best[1], by), f"mean, after round {self._best[0].number}"
        yield "rounds", f"{len(s.rounds)}", "all" if len(s.rounds) == wanted else f"of {wanted}"
        sampled = f", {statistics.median(len(r.sampled) for r in s.rounds):g} a round" if s.rounds else ""
        yield "clients", f"{len(s.train):,}", f"{_count(len(set(self._models[: len(s.train)])), 'model')}{sampled}"
        if bad := described(s.config):
            yield "attack", s.config.attack.kind, f"simulated: {bad}"
        if not s.rounds:
            return
        whole, train = sum(r.seconds for r in s.rounds), sum(r.train_seconds for r in s.rounds)
        samples = sum(r.samples for r in s.rounds)
        yield "time", seconds(whole), f"{seconds(whole / len(s.rounds))} a round; {seconds(train)} of all training"
        if train > 0:
            yield "samples a second", digits(samples / train), "while training"
        up, down = sum(r.bytes_up for r in s.rounds), sum(r.bytes_down for r in s.rounds)
        yield "communication", size(up + down), f"{size(up)} up, {size(down)} down, all clients"
        yield "computed", scaled(sum(r.flops for r in s.rounds), "FLOP"), "in training: products and convolutions"
        if (joules := outcome.energy(s.rounds)) is not None and samples:
            yield "energy", scaled(joules, "J"), f"{scaled(1000 * joules / samples, 'J')} per 1000 samples"
        if s.gates:
            weights = [weight for one in s.gates for weight in one.weights]
            more = f"of the global expert, mean over samples of {_count(len(s.gates), 'client')}"
            yield "gate's weight", digits(statistics.mean(weights)), more

    def _clients(self) -> str:
        line = self._last
        if line is None or line.accuracy is None:
            return ""
        drawn = self._figure(reportfigures.clients(line, self._models, self._by))
        said = f"After round {line.number}, {len(line.evaluated):,} of {_count(len(self._s.train), 'client')}"
        return paragraphs([said]) + drawn + self._models_table(line) + self._clients_table(line)

    def _models_table(self, line: Round) -> str:
        by_model: dict[str, list[float]] = {}
        for client, value in outcome.held(line, self._by).items():
            by_model.setdefault(self._model(client), []).append(value)
        rows = [
            [model, f"{len(v):,}", *(_shown(of(v), self._by) for of in (statistics.mean, min, statistics.median, max))]
            for model, v in sorted(by_model.items())
        ]
        head = ["model", "clients", "mean", "lowest", "median", "highest"]
        return table(f"{self._by.name.capitalize()} by model", head, rows)

    def _clients_table(self, line: Round) -> str:
        by, kinds = self._by, _kinds(line, self._by)
        columns = [(name, outcome.held(line, by, aggregated), by) for name, aggregated in kinds.items()]
        if by == PERPLEXITY:
            columns.append(("accuracy", outcome.held(line, ACCURACY), ACCURACY))
        own = columns[0][1]
        rows: list[Row] = []
        for client in sorted(line.evaluated, key=lambda c: (by.gain(own[c]) if c in own else -math.inf, c))[:LISTED]:
            sizes = [f"{self._s.train[client]:,}", f"{self._s.test[client]:,}"]
            cells = [
                Cell(_shown(values.get(client), of), bar=values.get(client) if of == ACCURACY else None)
                for _, values, of in columns
            ]
            rows.append([str(client), self._model(client), *sizes, *cells])
        many = f"Clients ({LISTED} of {by.worst} {by.name})" if len(line.evaluated) > LISTED else "Clients"
        head = ["client", "model", "train", "test", *(name for name, _, _ in columns)]
        return details(many, table(many, head, rows, words=(0, 1)))

    def _gate(self) -> str:
        s = self._s
        if s.config.method == "static" and s.rounds:
            return paragraphs([f"Fixed: the global expert's weight is {s.config.static_weight} for every sample"])
        if not s.gates:
            return ""
        what = (
            "A gate weighs, for each sample, the shared global expert against the client's own local expert; the two "
            f"weights add up to 1. Of {len(s.gates)} of {_count(len(s.train), 'client')}, on at most "
            f"{max(len(one.weights) for one in s.gates)} held-out samples of each, after round {len(s.rounds)}"
        )
        plots = [reportfigures.gates(s.gates), reportfigures.gates_by_class(s.gates, s.classes)]
        by_class: dict[int, list[float]] = {}
        for one in s.gates:
            for weight, label in zip(one.weights, one.labels, strict=True):
                by_class.setdefault(label, []).append(weight)
        rows = [
            [s.classes[c], f"{len(w):,}", *(f"{of(w):.4f}" for of in (statistics.mean, min, statistics.median, max))]
            for c, w in sorted(by_class.items())
        ]
        # What a text is labelled by is where it comes from.
        kind = "source" if s.config.data.kind == "text" else "class"
        made = table(f"Weight by {kind}", [kind, "samples", "mean", "lowest", "median", "highest"], rows)
        drawn = "".join(f"<div>{self._figure(plot)}</div>" for plot in plots)
        return paragraphs([what]) + f'<div class="pair">{drawn}</div>' + details(f"Weight by {kind}", made)

    def _representations(self) -> str:
        s = self._s
        if not s.pictures:
            return ""
        what = (
            "A t-SNE for each of some clients, of what its experts, and their mixture, make of its held-out samples: "
            "near ones are represented alike; the axes of one client's plots are the same"
        )
        colors = reportfigures.class_colors(label for one in s.pictures for label in one.labels)
        names = [(s.classes[c], color) for c, color in colors.items()]
        if any(label not in colors for one in s.pictures for label in one.labels):
            names.append(("all others", reportfigures.GRAY))
        made = ""
        for client, kind, figure in reportfigures.pictures(s.pictures, s.classes):
            title = f"Client {client} ({self._model(client)}): {kind}"
            made += f"<div><h3>{text(title)}</h3>{self._figure(figure)}</div>"
        return paragraphs([what]) + swatches(names) + f'<div class="grid">{made}</div>'

    def _target(self) -> str:
        s, by = self._s, self._by
        top = by.level(self._best[1]) if self._best else 0.0
        if not top:
            return paragraphs([f"No round has {by.one}, so none reached {s.target}"]) if s.target else ""
        asked = [] if s.target is None else [s.target]
        rows: list[Row] = []
        for target in sorted(
            {*(top * share if by == ACCURACY else top / share for share in SHARES), *asked}, key=by.gain
        ):
            name = Cell(
                by.figure(target, 4), "asked for" if target in asked else f"{percent(target / top)} of the best"
            )
            if (hit := outcome.reached(s.rounds, target, by)) is None:
                rows.append([name, "not reached", *[""] * 5])
                continue
            work = [size(hit.bytes / hit.round), size(hit.bytes), scaled(hit.flops, "FLOP"), seconds(hit.seconds)]
            rows.append([name, str(hit.round), *work, "" if hit.energy is None else scaled(hit.energy, "J")])
        head = [f"mean {by.name}", "rounds", "bytes a round", "communication", "computed", "time", "energy"]
        if not any(row[-1] for row in rows):
            head, rows = head[:-1], [row[:-1] for row in rows]
        limit = "at least that" if by == ACCURACY else "that or lower"
        note = (
            f"Up to the first evaluated round whose mean {by.name} is {limit}. Communication is rounds × bytes a "
            "round, up and down, of all clients; time is of whole rounds, evaluation included"
        )
        return paragraphs([note]) + table(f"Cost of {by.one}", head, rows)

    def _left_out(self) -> str:
        s, rows = self._s, list[Row]()
        lines = [r for r in s.rounds if r.rolled_back or r.rejected or r.kept or r.not_finite or r.parts or r.skipped]
        for r in lines[-LISTED:]:
            rejected = [f"{client} ({why})" for client, why in r.rejected.items()]
            parts = [f"{client} (in {count})" for client, count in r.parts.items()]
            said = [_listed(r.rolled_back), _listed(rejected, 5), r.kept, _listed(r.not_finite), _listed(parts)]
            rows.append([str(r.number), *said, str(r.skipped) if r.skipped else ""])
        head = ["round", "rolled back", "rejected", "θ stays", "loss not finite", "batches in parts", "steps skipped"]
        told = [i for i in range(len(head)) if any(row[i] for row in rows)]
        head, rows = [head[i] for i in told], [[row[i] for i in told] for row in rows]
        notes = meaning.ignored(s.config)
        if times := sum(len(r.rolled_back) for r in lines):
            why = "their training loss or a weight was not finite"
            notes.append(f"Clients were rolled back and left out of the average {times:,} times: {why}")
        if times := sum(len(r.rejected) for r in lines):
            notes.append(f"The server rejected {_count(times, 'result')} of clients, not fit to count")
        if times := sum(bool(r.kept) for r in lines):
            why = "too few results were fit to count"
            notes.append(f"In {_count(times, 'round')} the global expert stayed as it was: {why}")
        if times := sum(bool(r.not_finite) for r in lines):
            notes.append(f"In {times:,} rounds a client's test loss was not finite: it counts in no mean")
        if len(lines) > LISTED:
            notes.append(f"The last {LISTED} of {len(lines)} such rounds")
        if not notes and s.rounds:
            notes.append("None")
        words = tuple(i for i, name in enumerate(head) if name != "steps skipped")
        made = table("Clients left out, by round", head, rows, words=words) if rows else ""
        return paragraphs(notes) + made

    def _model(self, client: int) -> str:
        return self._models[client % len(self._models)]


def _kinds(line: Round | None, by: Measure) -> dict[str, bool]:
    """With which global expert a round is evaluated, by name: whether it is the aggregated one."""
    known = {"personalized": False, "aggregated": True} if line else {}
    return {name: aggregated for name, aggregated in known.items() if line and outcome.tested(line, by, aggregated)}


def _shown(value: float | None, by: Measure) -> str:
    """A value of the measure, or a mean of some."""
    return "not finite" if value is None else by.figure(by.level(value))


def _count(number: int, of: str) -> str:
    return f"{number:,} {of}{'s' * (number != 1)}"


def _listed(clients: Sequence[object], most: int = 20) -> str:
    more = f" and {len(clients) - most} more" if len(clients) > most else ""
    return ", ".join(map(str, clients[:most])) + more


def _differences(config: Config, profile: Profile) -> list[str]:
    """What the profile's configuration has otherwise, as far as it matters for where time goes."""
    return [
        f"{name} is {profile.config[name]} in the profile, {value} in the run"
        for name, value in configfile.flat(config).items()
        if not name.startswith(("run.", "federation.rounds", "checkpoint."))
        and name in profile.config
        and profile.config[name] != (list(value) if isinstance(value, tuple) else value)
    ]
