"""Bugs put into kernels, to see that the checks notice them."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

_count = itertools.count()


def planted(module: ModuleType, right: str, wrong: str, folder: Path, place: int | None = None) -> ModuleType:
    """A copy of `module`, written to `folder`, whose one place (or the given of several) that reads `right` is changed.

    What reads `right` then reads `wrong`.
    """
    parts = Path(str(module.__file__)).read_text().split(right)
    assert place is not None or len(parts) == 2, f"{right!r} stands {len(parts) - 1} times in {module.__file__}"
    at = (place or 0) + 1
    path = folder / f"planted_{next(_count)}.py"
    path.write_text(right.join(parts[:at]) + wrong + right.join(parts[at:]))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
