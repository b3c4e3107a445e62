"""What a run measures, a line a round: `metrics.jsonl`, and the same for TensorBoard."""

import contextlib
import errno
import json
import math
import os
import time
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
        self._path = run / "metrics.jsonl"
        # Unbuffered: what a full disk refuses must not be left over for the closing to stumble on.
        self._file = self._path.open("ab", buffering=0)
        self._file.truncate(max((end for end, line in _lines(self._path) if line["round"] <= rounds), default=0))
        self._board = Board(run, rounds)

    def append(self, line: Line) -> None:
        """Add a round's line, whole, and hand it to the operating system, so that it outlives the process."""
        text = json.dumps(line, allow_nan=False).encode() + b"\n"
        with naming(self._path):
            if self._file.write(text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        scalars: dict[str, float] = {}
        for name, value in line.items():
            parts = {f"{name}/{part}": v for part, v in value.items()} if isinstance(value, dict) else {name: value}
            scalars |= {tag: v for tag, v in parts.items() if isinstance(v, int | float) and tag != "round"}
        self._board.add(scalars, line["round"])

    def sync(self) -> None:
        """Have the lines survive the machine, too."""
        with naming(self._path):
            os.fsync(self._file.fileno())
        self._board.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._board.flush()


class Board:
    """The scalars for TensorBoard: a copy, so what the disk refuses of it ends it and nothing else.

    Not tensorboardX's SummaryWriter: its thread dies of a refused write, and the tenth value after that waits forever.
    """

    def __init__(self, run: Path, rounds: int) -> None:
        # Only here: importing it takes half a second that --help need not wait for.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar, self._writer = Event, scalar, None
        with contextlib.suppress(OSError):
            self._writer = EventsWriter(str(run / "events"))
            # What an earlier process wrote of rounds from here on is void.
            self._writer.write_event(Event(step=rounds + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, scalars: dict[str, float], step: int) -> None:
        """Add a step's values."""
        for tag, value in scalars.items():
            self._do("write_event", self._event(wall_time=time.time(), step=step, summary=self._scalar(tag, value)))

    def flush(self) -> None:
        """Hand what was added to the disk."""
        self._do("flush")

    def _do(self, name: str, *arguments: object) -> None:
        if self._writer is not None:
            try:
                getattr(self._writer, name)(*arguments)
            except OSError:
                self._writer = None
