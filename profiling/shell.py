"""A page of sections, tables and plots as one HTML file that opens from disk and asks no network."""

import base64
import gzip
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from plotly.offline import get_plotlyjs

from fedmoe.profiling.markup import Figure, script_json, text

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
"""For the browser, which then holds what is promised: nothing is fetched."""


class Section(NamedTuple):
    """One of a page; without content it is left out."""

    name: str
    """Its id."""
    title: str
    html: str
    half: bool = False
    """Whether it stands beside another on a wide screen."""


def shell(title: str, where: str, sections: Iterable[Section], figures: Iterable[Figure]) -> str:
    """The page: `where` is a line about the machine or the run, `figures` those that the sections place."""
    shown = [section for section in sections if section.html]
    links = "".join(f'<a href="#{section.name}">{text(section.title)}</a>' for section in shown)
    body = "".join(
        f'<section id="{section.name}" class="{"half" if section.half else "whole"}" '
        f'aria-labelledby="h-{section.name}">'
        f'<h2 id="h-{section.name}">{text(section.title)}</h2>{section.html}</section>\n'
        for section in shown
    )
    plots = {f"plot-{figure.name}": {"data": figure.data, "layout": figure.layout} for figure in figures}
    folder = Path(__file__).parent
    scripts = (
        f'<script type="application/json" id="figures">{script_json(plots)}</script>\n'
        f'<script type="application/octet-stream" id="library">{_library()}</script>\n'
        f"<script>\n{(folder / 'page.js').read_text()}</script>\n"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>\n{(folder / 'page.css').read_text()}</style>\n"
        f'</head>\n<body>\n<header><h1>{text(title)}</h1><p class="environment">{text(where)}</p>'
        f'<nav aria-label="Sections">{links}</nav></header>\n<main>\n'
        "<noscript><p>The plots need JavaScript; the tables do not.</p></noscript>\n"
        f'<p id="trouble" hidden></p>\n{body}\n</main>\n'
        f"{scripts if plots else ''}</body>\n</html>\n"
    )


@cache
def _library() -> str:
    """Plotly, compressed: 2.0 MB in place of 4.8; the page's script unpacks it."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 6, mtime=0)).decode()
