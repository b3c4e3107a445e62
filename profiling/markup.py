"""Pieces of HTML for pages: numbers as people write them, tables, figures, all text escaped."""

import html
import json
import math
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}
THIN = "\N{NARROW NO-BREAK SPACE}"
"""Between a number and its unit."""
NUMBER = ' class="n"'
"""Of a cell: stands to the right."""
FEW = 4
"""Columns that fit a phone."""


def scaled(value: float, unit: str, least: int = -9, most: int = 15) -> str:
    """Three digits with the unit's prefix, of those from 10^least to 10^most: 24.0 GFLOP/s."""
    if not math.isfinite(value):
        return f"{value}{THIN}{unit}"
    rounded = float(f"{value:.3g}")
    power = 3 * math.floor(math.log10(abs(rounded)) / 3) if rounded else 0
    power = min(max(power, least), most)
    return f"{digits(value / 10**power)}{THIN}{PREFIXES[power]}{unit}"


def seconds(value: float) -> str:
    """A time: 6.45 ms."""
    return scaled(value, "s", most=0)


def size(value: float) -> str:
    """Of memory: 8.04 MB."""
    return scaled(value, "B", least=0)


def digits(value: float) -> str:
    """Three digits, more where there are more before the point."""
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.3g}")
    before = math.floor(math.log10(abs(rounded))) if rounded else 0
    if before < -4:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - before)}f}" if rounded else "0"


def sentence(value: str) -> str:
    """With a capital."""
    return value[:1].upper() + value[1:]


def percent(share: float) -> str:
    """A share: 6.0%, 45%, 0.31%."""
    rounded = float(f"{abs(100 * share):.2g}")
    if not math.isfinite(share):
        return str(share)
    return f"{100 * share:.{0 if rounded >= 10 else 1 if rounded >= 1 or not rounded else 2}f}%"


def quantity(value: float, unit: str) -> str:
    """In whatever unit: with prefixes where they help."""
    if unit in ("bytes", "B"):
        return size(value)
    if unit == "bytes/s":
        return scaled(value, "B/s", least=0)
    if unit == "s":
        return seconds(value)
    if unit == "%":
        return f"{digits(value)}%"
    return scaled(value, unit, least=0) if abs(value) >= 1e6 else f"{digits(value)}{THIN}{unit}".rstrip(THIN)


def text(value: object) -> str:
    """Escaped; safe in an attribute, too."""
    return html.escape(str(value))


def label(value: str, width: int = 36, lines: int = 4) -> str:
    """For Plotly, which knows some HTML: escaped, and in lines that fit a phone."""
    broken = textwrap.wrap(value, width, max_lines=lines, placeholder=" …")
    return "<br>".join(html.escape(line, quote=False) for line in broken)


@dataclass(frozen=True, slots=True)
class Cell:
    """One of a table: text, and what goes with it."""

    text: str
    more: str = ""
    """In small print, below."""
    bar: float | None = None
    """A share that is drawn."""
    color: str = ""
    """Of a swatch before the text."""
    code: bool = False

    def html(self, tag: str, head: str, right: bool) -> str:
        """The element, of the column `head`; `right` is how numbers stand."""
        inner = text(self.text)
        if tag == "th":  # names may break where their parts meet
            inner = inner.replace("_", "_<wbr>").replace(".", ".<wbr>")
        if self.code:
            inner = f"<code>{inner}</code>"
        if self.color:
            inner = f'<span class="swatch" style="color:{self.color}"></span>{inner}'
        if self.more:
            inner += f"<small>{text(self.more)}</small>"
        if self.bar is not None:
            inner += f'<span class="bar"><span style="width:{100 * min(1.0, max(0.0, self.bar)):.1f}%"></span></span>'
        attributes = (' scope="row"' if tag == "th" else f' data-of="{text(head)}"') + NUMBER * right
        attributes += ' class="phase"' * bool(self.color)
        return f"<{tag}{attributes}>{inner}</{tag}>"


Row = Sequence[Cell | str]


def table(caption: str, head: Sequence[str], rows: Iterable[Row], words: Collection[int] = (0,)) -> str:
    """All but the columns `words` are numbers. One with many columns is a list of rows on a narrow screen."""
    names = "".join(f'<th scope="col"{NUMBER * (i not in words)}>{text(name)}</th>' for i, name in enumerate(head))
    lines = []
    for row in rows:
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
        made = (cell.html("td" if i else "th", head[i], i not in words) for i, cell in enumerate(cells))
        lines.append(f"<tr>{''.join(made)}</tr>")
    kind = ' class="wide"' if len(head) > FEW else ' class="words"' if len(words) == len(head) else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table{kind}>'
        f"<thead><tr>{names}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def cards(items: Iterable[tuple[str, str, str]]) -> str:
    """Name, value and small print of each key number."""
    made = "".join(
        f"<div><dt>{text(name)}</dt><dd><b>{_with_unit(value)}</b><small>{text(more)}</small></dd></div>"
        for name, value, more in items
    )
    return f'<dl class="cards">{made}</dl>' if made else ""


def _with_unit(value: str) -> str:
    """A number, and what follows it in smaller print."""
    number, _, unit = value.partition(THIN)
    return text(number) + (f" <span>{text(unit)}</span>" if unit else "")


def swatches(names: Iterable[tuple[str, str]]) -> str:
    """Names, each with its color: a legend of several plots."""
    entries = "".join(
        f'<li><span class="swatch" style="color:{color}"></span>{text(name)}</li>' for name, color in names
    )
    return f'<ul class="legend names">{entries}</ul>' if entries else ""


def paragraphs(sentences: Iterable[str]) -> str:
    """One each, with capital and full stop."""
    return "".join(f"<p>{text(sentence(one))}.</p>" for one in sentences)


def details(summary: str, inner: str) -> str:
    """What is shown when asked for."""
    return f"<details><summary>{text(summary)}</summary>{inner}</details>"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Names and values of what may be nested; what is None or empty is left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            if value:
                yield prefix + str(name), ", ".join(map(str, value))
        elif value is not None and value != "":
            number = isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000
            yield prefix + str(name), f"{value:,}" if number else str(value)


@dataclass(slots=True)
class Figure:
    """A plot: what Plotly is given, and what it says to those who do not see it."""

    name: str
    what: str
    height: int
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    note: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)
    """Name and color of each trace, which it shows or hides; outside of the plot, where it breaks into lines."""

    def html(self) -> str:
        """The place for it; the page's script draws it."""
        entries = "".join(
            f'<li><button type="button" aria-pressed="true" data-plot="plot-{self.name}" data-trace="{trace}">'
            f'<span class="swatch {self.data[trace].get("line", {}).get("dash", "")}" style="color:{color}"></span>'
            f'<span title="{text(name)}">{text(name)}</span></button></li>'
            for trace, (name, color) in enumerate(self.legend)
        )
        legend = f'<ul class="legend">{entries}</ul>' if entries else ""
        note = f"<figcaption>{text(self.note)}</figcaption>" if self.note else ""
        place = f'<div class="plot" id="plot-{self.name}" role="img" style="height:{self.height}px"'
        return f'<figure>{legend}{place} aria-label="{text(self.what)}"></div>{note}</figure>'


def script_json(value: object) -> str:
    """JSON that can stand in a script element: no tag ends within it. What is not finite is null."""
    return json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
