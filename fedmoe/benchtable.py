"""What `fedmoe bench` shows and writes of a report: tables for a terminal, and the same as Markdown."""

from collections.abc import Callable, Iterable
from typing import Any

from rich.table import Table
from rich.text import Text

Row = dict[str, Any]
"""A variant's, as `fedmoe.profiling.bench.Row` has it."""
Report = dict[str, Any]
"""What the JSON file holds."""

TINY = "CPU: kernels at tiny sizes, which shows that they work and no more; rounds on one thread, for their ratios"
COLUMNS = (
    "variant",
    "time",
    "± half IQR",
    "as called",
    "cold L2",
    "× first",
    "peak memory",
    "GB/s",
    "TFLOP/s",
    "of floor",
    "energy",
    "note",
)
TARGETS = ("what", "number to reach", "counts on", "measured", "verdict")


def tables(report: Report) -> list[Table]:
    """Every variant's row, where a benchmark ran; and the verdicts, if they were asked for."""
    made = [_benchmarks(report)] if report["benchmarks"] else []
    return [*made, _verdicts(report)] if "targets" in report else made


def markdown(report: Report) -> str:
    """A page of the same."""
    lines = [f"# {_title(report)}", "", environment(report)]
    if "targets" in report:
        lines += ["", "## Targets", "", *_grid(TARGETS, map(_target, report["targets"]))]
    for benchmark in report["benchmarks"]:
        outcome = _outcome(benchmark)
        lines += ["", f"## {benchmark['name']}", "", *([outcome, ""] if outcome else [])]
        if benchmark["rows"]:
            lines += _grid(COLUMNS, map(_cells, benchmark["rows"]))
    return "\n".join(lines) + "\n"


def environment(report: Report) -> str:
    """What is known of the machine, in one line."""
    facts = {k: v for k, v in report.get("environment", {}).items() if v is not None}
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _benchmarks(report: Report) -> Table:
    """One table; a column that nothing here fills is left out."""
    lines = [(benchmark, [_cells(row) for row in benchmark["rows"]]) for benchmark in report["benchmarks"]]
    kept = [i for i in range(len(COLUMNS)) if i == 0 or any(cells[i] for _, rows in lines for cells in rows)]
    if len(COLUMNS) - 1 not in kept and any(map(_outcome, report["benchmarks"])):
        kept.append(len(COLUMNS) - 1)
    table = Table(title=Text(_title(report)), title_justify="left")
    for i in kept:
        left = COLUMNS[i] in ("variant", "note")
        table.add_column(COLUMNS[i], justify="left" if left else "right", no_wrap=COLUMNS[i] != "note")
    for benchmark, rows in lines:
        outcome = ["", *[""] * (len(kept) - 2), _outcome(benchmark)][1 : len(kept)]
        table.add_row(Text(benchmark["name"], "bold"), *map(Text, outcome))
        for cells in rows:
            table.add_row(*(Text(cells[i]) for i in kept))
        table.add_section()
    return table


def _verdicts(report: Report) -> Table:
    gpu = report.get("environment", {}).get("gpu")
    here = f", set for an H200; this is a {gpu}" if gpu and "H200" not in gpu else ""
    table = Table(*TARGETS, title=f"Targets{here}", title_justify="left")
    before = None
    for target in report["targets"]:
        if before not in (None, target["what"]):
            table.add_section()
        what, *rest = map(Text, _target(target))
        table.add_row(what if target["what"] != before else "", *rest)
        before = target["what"]
    return table


def _target(target: Row) -> list[str]:
    verdict = target["verdict"] + ", within the noise" * target["close"]
    return [target["what"], target["number"], target["on"], target["figure"] or target["why"], verdict]


def _grid(titles: tuple[str, ...], rows: Iterable[list[str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(titles), line(["---"] * len(titles)), *map(line, rows)]


def _title(report: Report) -> str:
    title = f"Benchmarks: {report['suite']}"
    return title if report.get("device") == "cuda" else f"{title} ({TINY})"


def _outcome(benchmark: dict[str, Any]) -> str:
    return "" if benchmark["outcome"] == "passed" else f"{benchmark['outcome']}: {benchmark['reason']}"


def _cells(row: Row) -> list[str]:
    """A variant's row of the table; what is not known is empty."""

    def shown(key: str, form: Callable[[Any], str]) -> str:
        return "" if row[key] is None else form(row[key])

    note = row["note"] if row["status"] == "timed" else f"{row['status']}: {row['reason']}".removesuffix(": ")
    return [
        row["variant"],
        shown("median", _seconds),
        shown("quartiles", lambda q: f"{50 * (q[1] - q[0]) / row['median']:.1f}%" if row["median"] else ""),
        shown("called", _seconds),
        shown("cold", _seconds),
        shown("relative", "{:.2f}".format),
        shown("peak_bytes", _bytes),
        shown("gb_per_s", "{:,.1f}".format),
        shown("tflop_per_s", "{:,.3g}".format),
        shown("floor_share", "{:.1%}".format),
        shown("energy_j", "{:,.3g} J".format),
        note,
    ]


def _seconds(seconds: float) -> str:
    for unit, name in ((1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit:
            return f"{seconds / unit:,.2f} {name}"
    return f"{seconds / 1e-9:,.0f} ns"


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
