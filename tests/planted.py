"""Bugs put into kernels, to see that the checks notice them."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

_count = itertools.count()


def planted(module: ModuleType, right: str, wrong: str, folder: Path, everywhere: bool = False) -> ModuleType:
    """A copy of `module`, written to `folder`, whose one place (or each) that reads `right` is changed to `wrong`."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(right) == 1 or (everywhere and right in source), (
        f"{right!r} stands {source.count(right)} times in {module.__file__}"
    )
    path = folder / f"planted_{next(_count)}.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
