"""The configuration reference: a table for each section, made from the dataclasses that hold the configuration."""

import json
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object  # which `fedmoe train --help` takes its text from, too

from fedmoe.config import Config

NAMES: dict[Any, str] = {
    bool: "true or false",
    float: "number",
    int: "integer",
    str: "string",
    tuple[str, ...]: "list of strings",
}


def reference() -> str:
    """Markdown of every section and field of the configuration."""
    sections = [field for field in fields(Config) if is_dataclass(field.default_factory)]
    parts = ["## Without a section", _table(Config)]
    for section in sections:
        assert isinstance(section.default_factory, type)
        about = section.default_factory.__doc__ or ""
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in about.split("\n\n"))
        parts += [f"## {section.name}", text, _table(section.default_factory)]
    return "\n\n".join(parts) + "\n"


def documented(section: type) -> dict[str, str]:
    """The docstring of each field of a dataclass that has one, on one line."""
    return {p.arg_name: " ".join((p.description or "").split()) for p in parse_from_object(section).params}


def _table(section: type) -> str:
    hints, texts, default = get_type_hints(section), documented(section), section()
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in fields(section):
        hint = hints[field.name]
        if is_dataclass(hint):
            continue
        value = json.dumps(getattr(default, field.name))  # of these types TOML writes the same
        cells = f"`{field.name}`", _kind(hint), f"`{value}`", texts[field.name]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def _kind(hint: Any) -> str:
    """A type in words; of a Literal its choices."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in get_args(hint))
    return NAMES[hint]
