"""What is printed of a comparison: tables for a terminal, whose cells are those of its page, too."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmoe.contrast import Difference, Report, Row
from fedmoe.display import say, widen
from fedmoe.measure import ACCURACY, Measure

COSTS = ("rounds", "MB", "TFLOP", "seconds")
DIFFERENCES = ("variant", "difference", "95 % interval", "p", "p, all", "verdict", "compared")


def show(console: Console, report: Report) -> None:
    """Print all of it, in tables that a terminal of 80 columns has room for."""
    widen(console)
    rows = [cells(row, report) for row in report.variants]
    head = columns(report)
    split = len(head)
    console.print(_table(f"held-out {report.by.name} after round {report.round}", head, [row[:split] for row in rows]))
    console.print(_table(_took(report), ("variant", *COSTS), [[row[0], *row[split:]] for row in rows]))
    if report.differences:
        shown, hows = [0, 1, 2, 4, 5, 6], {difference.how for difference in report.differences}
        said = against(report)
        if len(hows) == 1:
            shown, said = shown[:-1], f"{said}; {hows.pop()}"
        lines = [difference_cells(difference, report.by) for difference in report.differences]
        console.print(_table(said, [DIFFERENCES[i] for i in shown], [[line[i] for i in shown] for line in lines]))
    for note in report.notes:
        say(console, note)


def _table(said: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=Text(said), title_justify="left")
    for name in head:
        words = name in ("variant", "verdict", "compared")
        table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def title(report: Report) -> str:
    """What the variants' table shows."""
    return f"held-out {report.by.name} after round {report.round}, and {_took(report)}"


def _took(report: Report) -> str:
    if report.target is None:
        return "what it took till then"
    return f"what it took to {report.by.one} of {report.target:g}"


def against(report: Report) -> str:
    """What the differences' table shows."""
    return f"{report.by.name} {'less' if report.by == ACCURACY else 'against'} that of {report.variants[0].name}"


def columns(report: Report) -> tuple[str, ...]:
    """Of the variants' table, before what training took."""
    by = report.by
    return ("variant", "seeds", by.name, "clients", by.worst, "test loss" if by == ACCURACY else "accuracy")


def cells(row: Row, report: Report) -> list[str]:
    """A variant's, in the order of the columns."""
    by, level = report.by, row.accuracy if report.by == ACCURACY else row.perplexity
    spread = "" if row.over_seeds is None else f" {by.spread(row.over_seeds, 4)}"
    many = ", ".join(map(str, row.seeds)) if len(row.seeds) < 6 else f"{len(row.seeds)} seeds"
    return [
        row.name,
        many,
        "none" if level is None else f"{by.figure(level, 4)}{spread}",
        "" if row.over_clients is None else by.spread(row.over_clients),
        "" if row.worst is None else by.figure(row.worst),
        _figure(row.test_loss, "{:,.4g}") if by == ACCURACY else _figure(row.accuracy, "{:.4f}"),
        *_costs(row, report.target is not None),
    ]


def _costs(row: Row, targeted: bool) -> Iterator[str]:
    cost = row.cost
    if targeted and not cost.reached:
        yield "not reached"
        yield from ("", "", "")
        return
    some = f" ({cost.reached} of {len(row.seeds)} seeds)" if cost.reached < len(row.seeds) else ""
    yield _figure(cost.rounds, "{:,.4g}") + some
    yield _figure(cost.bytes, "{:,.1f}", 1e6)
    yield _figure(cost.flops, "{:,.4g}", 1e12)
    yield _figure(cost.seconds, "{:,.1f}")


def difference_cells(difference: Difference, by: Measure) -> list[str]:
    """A difference's cells."""
    e = difference.estimate
    interval = "" if e.low is None or e.high is None else f"{by.change(e.low)} to {by.change(e.high)}"
    return [
        difference.name,
        by.change(e.mean),
        interval,
        _probability(e.p),
        _probability(difference.p_holm),
        difference.verdict,
        difference.how,
    ]


def _probability(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _figure(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value / unit)
