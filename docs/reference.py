"""The configuration reference: a list for each section, made from the dataclasses that hold the configuration."""

import json
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object  # which `fedmoe train --help` takes its text from, too

from fedmoe.config import Config

NAMES: dict[Any, str] = {
    bool: "true or false",
    dict[str, Any]: "table",
    float: "number",
    int: "integer",
    str: "string",
    tuple[float, float]: "list of two numbers",
    tuple[str, ...]: "list of strings",
    tuple[int, ...]: "list of whole numbers",
}


def reference() -> str:
    """Markdown of every section and field of the configuration."""
    parts = ["## Without a section", _list(Config)]
    for name, section in sections().items():
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in (section.__doc__ or "").split("\n\n"))
        parts += [f"## {name}", text, _list(section)]
    return "\n\n".join(parts) + "\n"


def sections() -> dict[str, type]:
    """The sections of the configuration by name."""
    return {name: hint for name, hint in get_type_hints(Config).items() if is_dataclass(hint)}


def documented(section: type) -> dict[str, str]:
    """The docstring of each field of a dataclass that has one, on one line."""
    return {p.arg_name: " ".join((p.description or "").split()) for p in parse_from_object(section).params}


def _list(section: type) -> str:
    hints, texts, default = get_type_hints(section), documented(section), section()
    entries = []
    for field in fields(section):
        if not is_dataclass(hints[field.name]):
            value = json.dumps(getattr(default, field.name))  # of these types TOML writes the same
            entries.append(f"`{field.name}`: {_kind(hints[field.name])}; default `{value}`\n: {texts[field.name]}")
    return "\n\n".join(entries)


def _kind(hint: Any) -> str:
    """A type in words; of a Literal its choices."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in get_args(hint))
    return NAMES[hint]
