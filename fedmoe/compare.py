"""`fedmoe compare RUN RUN ...`: runs side by side, and which of their differences exceed the noise."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedmoe.comparetable import show
from fedmoe.contrast import contrast
from fedmoe.display import Output, say
from fedmoe.errors import UsageError, UserError
from fedmoe.files import check_page, write_atomic
from fedmoe.variants import read


def run(
    folders: Sequence[Path], as_json: bool, out: Path | None, number: int | None = None, target: float | None = None
) -> None:
    """Compare the runs in the folders, print it, and write its page to `out`.

    Raises UserError for what is no run, or damaged, or cannot be compared.
    """
    if number is not None and number < 1:
        raise UsageError(f"--round is {number}, must be at least 1")
    if out is not None:
        check_page(out)
    report, variants = contrast([read(folder) for folder in _runs(folders)], number, target)
    if as_json:
        print(json.dumps(report.to_json(), indent=1), flush=True)
    else:
        show(Output(), report)
    if out is not None:
        from fedmoe.comparepage import page

        write_atomic(out, page(report, variants).encode())
        say(Output(stderr=as_json), f"page: {out}")


def _runs(folders: Sequence[Path]) -> Iterator[Path]:
    """Run folders, each once; a folder that is none but holds some stands for them, as a sweep's does."""
    seen: dict[Path, Path] = {}
    for folder in folders:
        held = [folder]
        if folder.is_dir() and not (folder / "config.toml").is_file():
            held = sorted(path.parent for path in folder.glob("*/config.toml")) or held
        for path in held:
            place = path.resolve()
            if place in seen:
                raise UserError(f"{path} is given twice, it is {seen[place]}: name each run once")
            seen[place] = path
            yield path
