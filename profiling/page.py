"""A profile as one HTML page: plots, tables and findings."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedmoe.profiling.profile import Profile
from fedmoe.profiling.sections import Sections
from fedmoe.profiling.shell import shell
from fedmoe.profiling.spans import Span
from fedmoe.profiling.trace import Series


def page(profile: Profile, spans: Sequence[Span], series: Mapping[str, Series]) -> str:
    """All of a profile that is known; `spans` of its observed rounds, of which the last is drawn; meters over time."""
    made = Sections(profile, spans, series)
    sections = list(made.all())
    return shell(f"Profile: {profile.title}", where(profile.environment), sections, made.figures)


def where(environment: Mapping[str, Any]) -> str:
    """The environment in a line."""
    e = environment
    cores = [f"{e[name]} {name if e[name] != 1 else name[:-1]}" for name in ("cores", "threads") if e.get(name)]
    said = [e.get("gpu"), " ".join(filter(None, [e.get("cpu"), f"({', '.join(cores)})" if cores else ""]))]
    names = {"driver": "driver", "cuda": "CUDA", "torch": "PyTorch", "triton": "Triton", "python": "Python"}
    said += [f"{name} {e[key]}" for key, name in names.items() if e.get(key)]
    commit, _, changed = str(e.get("commit") or "").partition(" ")
    said.append(f"commit {commit[:10]} {changed}".strip() if commit else None)
    return " · ".join(str(part) for part in said if part)
