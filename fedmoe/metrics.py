"""What a run measures, a line a round: `metrics.jsonl`, and the same for TensorBoard."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from fedmoe.errors import UserError
from fedmoe.files import naming

Line = dict[str, Any]


def read(run: Path) -> list[Line]:
    """The lines of the run's `metrics.jsonl`, without a last one that a kill cut short; UserError if it is damaged."""
    path = run / "metrics.jsonl"
    return [line for _, line in _lines(path)] if path.exists() else []


def _lines(path: Path) -> Iterator[tuple[int, Line]]:
    """Each whole line with the position of its end in bytes."""
    end = 0
    for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not raw.endswith(b"\n"):
            return
        try:
            line = json.loads(raw)
            if not isinstance(line["round"], int):
                raise TypeError("its round is not a number")
        except (ValueError, KeyError, TypeError) as error:
            kind = type(error).__name__
            raise UserError(
                f"{path}: line {number} is no round's metrics ({kind}: {error}): repair or remove it"
            ) from error
        end += len(raw)
        yield end, line


def spread(values: list[float]) -> Line:
    """{mean, std (population), clients}: how a number is distributed over clients, each counting the same.

    Values that are not finite become None and do not count; with none left, so do mean and std.
    """
    finite = [value for value in values if math.isfinite(value)]
    clients = [value if math.isfinite(value) else None for value in values]
    if not finite:
        return {"mean": None, "std": None, "clients": clients}
    mean = math.fsum(finite) / len(finite)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / len(finite))
    return {"mean": mean, "std": std, "clients": clients}


class Log:
    """Appends to a run's metrics. Opening cuts them back to the first `rounds` rounds, those its checkpoint holds."""

    def __init__(self, run: Path, rounds: int) -> None:
        # Only here: importing it takes half a second that --help need not wait for.
        from tensorboardX import SummaryWriter

        self._path = run / "metrics.jsonl"
        with self._path.open("ab") as file:
            file.truncate(max((end for end, line in _lines(self._path) if line["round"] <= rounds), default=0))
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(run), purge_step=rounds + 1)

    def append(self, line: Line) -> None:
        """Add a round's line, whole, and hand it to the operating system, so that it outlives the process."""
        text = json.dumps(line, allow_nan=False) + "\n"
        with naming(self._path):
            self._file.write(text)
            self._file.flush()
        for name, value in line.items():
            if isinstance(value, int | float) and name != "round":
                self._board.add_scalar(name, value, line["round"])
            elif isinstance(value, dict) and name != "clients":
                for part, number in value.items():
                    if isinstance(number, int | float):
                        self._board.add_scalar(f"{name}/{part}", number, line["round"])

    def sync(self) -> None:
        """Have the lines survive the machine, too."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        with contextlib.suppress(OSError):  # a full disk: the lines are what counts, TensorBoard's are a copy
            self._board.close()
