"""What a person sees in the terminal: live progress, a line a round where there is no terminal, the closing table."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fedmoe.config import Config
from fedmoe.engine.seam import Result
from fedmoe.metrics import Line
from fedmoe.partition import Split

MANY = 20
"""Clients up to which each has a row of its own in the closing table."""


class Display:
    """Shows a run's rounds as they pass. Use it as a context manager."""

    def __init__(self, rounds: int, done: int, jobs: int) -> None:
        self.console = Console()
        self.rounds, self.jobs, self._done = rounds, jobs, done
        self._samples, self._start = 0, time.perf_counter()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False))
        self._bar = Progress(
            TextColumn("round"), *columns, *times, console=self.console, disable=not self.console.is_terminal
        )
        self._task = self._bar.add_task("", total=rounds, completed=done, note="")
        self._note = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def trained(self, result: Result) -> None:
        """One client of the round in hand has trained."""
        self._samples += int(result.metrics["samples"])  # type: ignore[arg-type]
        self._bar.update(self._task, advance=1 / self.jobs, note=f"{self._note}{self._rate()}")

    def round(self, line: Line) -> None:
        """A round is over."""
        number = line["round"]
        accuracy = line.get("accuracy")
        if accuracy:
            self._note = f"accuracy {accuracy['mean']:.3f} "
        self._bar.update(self._task, completed=number, note=f"{self._note}{self._rate()}")
        for client in line["rolled_back"]:
            self.message(
                f"round {number}: client {client} rolled back and left out, its loss or a weight is not finite"
            )
        if self._bar.disable:
            figures = [f"loss {line['loss']:.3f}" if line["loss"] is not None else "no loss"]
            if accuracy:
                figures.insert(0, f"accuracy {accuracy['mean']:.3f} ± {accuracy['std']:.3f}")
            self.message(f"round {number}/{self.rounds}  {'  '.join(figures)}  {self._rate()}  {self._left(number)}")

    def _rate(self) -> str:
        return f"{self._samples / (time.perf_counter() - self._start):,.0f} samples/s"

    def _left(self, number: int) -> str:
        seconds = (time.perf_counter() - self._start) / (number - self._done) * (self.rounds - number)
        return f"{seconds:.0f} s left" if seconds else "done"


def summary(console: Console, config: Config, split: Split, lines: list[Line]) -> None:
    """The closing table: accuracy by client, or its spread if there are many, and what the run took."""
    last = next((line for line in reversed(lines) if "accuracy" in line), None)
    if last is None:
        return
    accuracies(console, config, split, last)
    seconds = sum(line["seconds"]["round"] for line in lines)
    samples = sum(sum(line["clients"]["samples"]) for line in lines)
    sent = sum(line["bytes_up"] + line["bytes_down"] for line in lines)
    console.print(
        f"{len(lines)} rounds in {seconds:,.1f} s, {samples / seconds:,.0f} samples/s including evaluation; "
        f"{sent / 1e6:,.1f} MB up and down; {sum(line['flops'] for line in lines) / 1e12:,.2f} TFLOP trained",
        highlight=False,
        soft_wrap=True,
    )


def accuracies(console: Console, config: Config, split: Split, line: Line) -> None:
    """Accuracy on held-out samples, from one line of metrics or of `eval`."""
    kinds = {"accuracy": "accuracy", "accuracy_aggregated": "with the aggregated"}
    shown = {key: title for key, title in kinds.items() if key in line}
    title = f"{config.method} on {config.data.name.rsplit('/')[-1]} after round {line['round']}, held-out samples"
    table = Table(title=title, title_justify="left")
    for column in ("client", "model", "train", "test"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in shown.values():
        table.add_column(name, justify="right")
    clients = line["evaluated"]
    if len(clients) <= MANY:
        for i, client in enumerate(clients):
            model = config.model.local[client % len(config.model.local)]
            sizes = [str(len(split.train(client))), str(len(split.test(client)))]
            table.add_row(str(client), model, *sizes, *(f"{line[key]['clients'][i]:.3f}" for key in shown))
        table.add_section()
    else:
        for name, share in (("lowest", 0.0), ("median", 0.5), ("highest", 1.0)):
            ordered = {key: sorted(line[key]["clients"]) for key in shown}
            at = round(share * (len(clients) - 1))
            table.add_row(name, "", "", "", *(f"{ordered[key][at]:.3f}" for key in shown))
    spreads = [f"{line[key]['mean']:.3f} ± {line[key]['std']:.3f}" for key in shown]
    table.add_row(f"all {len(clients)}", "", "", "", *spreads)
    console.print(table)
