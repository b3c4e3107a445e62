"""What a run measures, a line a round: `metrics.jsonl`, and the same for TensorBoard."""

import json
import math
import os
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read(run: Path) -> list[Line]:
    """The lines of the run's `metrics.jsonl`, without a last one that a kill cut short."""
    lines = []
    try:
        content = (run / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    for raw in content.splitlines(keepends=True):
        if raw.endswith(b"\n"):
            lines.append(json.loads(raw))
    return lines


def spread(values: list[float]) -> Line:
    """{mean, std (population), clients}: how a number is distributed over clients, each counting the same."""
    mean = math.fsum(values) / len(values)
    return {"mean": mean, "std": math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)), "clients": values}


class Log:
    """Appends to a run's metrics. Opening cuts them back to the first `rounds` rounds, those its checkpoint holds."""

    def __init__(self, run: Path, rounds: int) -> None:
        # Only here: importing it takes half a second that --help need not wait for.
        from tensorboardX import SummaryWriter

        path = run / "metrics.jsonl"
        with path.open("ab") as file:
            kept = 0
            for raw in path.read_bytes().splitlines(keepends=True):
                if not raw.endswith(b"\n") or json.loads(raw)["round"] > rounds:
                    break
                kept += len(raw)
            file.truncate(kept)
        self._file = path.open("a")
        self._board = SummaryWriter(str(run), purge_step=rounds + 1)

    def append(self, line: Line) -> None:
        """Add a round's line, whole, and hand it to the operating system, so that it outlives the process."""
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in line.items():
            if isinstance(value, int | float) and name != "round":
                self._board.add_scalar(name, value, line["round"])
            elif isinstance(value, dict) and name != "clients":
                for part, number in value.items():
                    if isinstance(number, int | float):
                        self._board.add_scalar(f"{name}/{part}", number, line["round"])

    def close(self) -> None:
        """Write out what is left."""
        os.fsync(self._file.fileno())
        self._file.close()
        self._board.close()
