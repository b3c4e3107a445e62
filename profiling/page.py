"""A profile as one HTML page, and what makes a page: one file that opens from disk and asks no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from plotly.offline import get_plotlyjs

from fedmoe.profiling.markup import Figure, script_json, text
from fedmoe.profiling.profile import Profile
from fedmoe.profiling.sections import Sections
from fedmoe.profiling.spans import Span
from fedmoe.profiling.trace import Series

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
"""For the browser, which then holds what is promised: nothing is fetched."""
WIDTHS = {"sizes": "half", "memory": "half"}
"""Of sections that stand side by side on a wide screen."""


def page(profile: Profile, spans: Sequence[Span], series: Mapping[str, Series]) -> str:
    """All of a profile that is known; `spans` of its observed rounds, of which the last is drawn; meters over time."""
    made = Sections(profile, spans, series)
    sections = [section for section in made.all() if section[2]]
    return document(f"Profile: {profile.title}", profile.title, _where(profile), sections, made.figures)


def document(
    title: str, heading: str, line: str, sections: Sequence[tuple[str, str, str]], figures: Sequence[Figure]
) -> str:
    """A page: its title, heading and a line below; sections, each a name, a title and HTML; the figures in these."""
    links = "".join(f'<a href="#{name}">{text(title)}</a>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}" class="{WIDTHS.get(name, "whole")}" aria-labelledby="h-{name}">'
        f'<h2 id="h-{name}">{text(title)}</h2>{inner}</section>\n'
        for name, title, inner in sections
    )
    plots = {f"plot-{figure.name}": {"data": figure.data, "layout": figure.layout} for figure in figures}
    folder = Path(__file__).parent
    scripts = (
        f'<script type="application/json" id="figures">{script_json(plots)}</script>\n'
        f"<script>{get_plotlyjs()}</script>\n<script>\n{(folder / 'page.js').read_text()}</script>\n"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>\n{(folder / 'page.css').read_text()}</style>\n"
        f'</head>\n<body>\n<header><h1>{text(heading)}</h1><p class="environment">{text(line)}</p>'
        f'<nav aria-label="Sections">{links}</nav></header>\n<main>\n{body}\n'
        "<noscript><p>The plots need JavaScript; the tables do not.</p></noscript>\n</main>\n"
        f"{scripts if plots else ''}</body>\n</html>\n"
    )


def _where(profile: Profile) -> str:
    """The environment in a line."""
    e = profile.environment
    cores = [f"{e[name]} {name if e[name] != 1 else name[:-1]}" for name in ("cores", "threads") if e.get(name)]
    said = [e.get("gpu"), " ".join(filter(None, [e.get("cpu"), f"({', '.join(cores)})" if cores else ""]))]
    names = {"driver": "driver", "cuda": "CUDA", "torch": "PyTorch", "triton": "Triton", "python": "Python"}
    said += [f"{name} {e[key]}" for key, name in names.items() if e.get(key)]
    commit, _, changed = str(e.get("commit") or "").partition(" ")
    said.append(f"commit {commit[:10]} {changed}".strip() if commit else None)
    return " · ".join(str(part) for part in said if part)
