"""How Sphinx builds the site: from the Markdown pages, the list of pages in index.md, and the reference of fields."""

import re

from sphinx.application import Sphinx

from docs.reference import reference  # the root of the checkout is where `make docs` runs
from fedmoe import __version__

project = "FedMoE"
version = release = __version__
extensions = ["myst_parser"]
myst_enable_extensions = ["deflist"]
source_suffix = {".md": "markdown"}
root_doc = "index"
myst_heading_anchors = 3
nitpicky = True

html_theme = "furo"  # system fonts, no network
html_title = "FedMoE"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_show_sphinx = False
html_show_search_summary = False  # would fetch pages, which a browser refuses for files on disk


def _add(app: Sphinx, name: str, source: list[str]) -> None:
    """Give the index its tree of pages, in the order of its lists, and the configuration its reference."""
    if name == root_doc:
        for heading, text in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", source[0], re.MULTILINE | re.DOTALL):
            if pages := re.findall(r"^- \[(.+?)\]\((.+?)\.md\)", text, re.MULTILINE):
                tree = "\n".join(f"{title} <{page}>" for title, page in pages)
                source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{tree}\n```\n"
    elif name == "configuration":
        source[0] += "\n" + reference()


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add)
