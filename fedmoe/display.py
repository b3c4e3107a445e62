"""What a person sees in the terminal: live progress, a line a round where there is no terminal, the closing table."""

import contextlib
import time
from collections.abc import Iterator
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedmoe.config import Config
from fedmoe.engine.seam import Result
from fedmoe.errors import OutputLost
from fedmoe.measure import ACCURACY, PERPLEXITY
from fedmoe.metrics import Line
from fedmoe.partition import Split

MANY = 20
"""Clients up to which each has a row of its own in the closing table."""


class Output(Console):
    """A console that says when its reader is gone, where rich would end the process."""

    def on_broken_pipe(self) -> None:
        """Called by rich within its own handling of the error."""
        raise OutputLost("nobody reads the output any more")


def say(console: Console, text: str) -> None:
    """A line as it is, whatever names in it look like, and however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def widen(console: Console, least: int = 160) -> None:
    """Have room for wide tables where a file takes them, which has no width that they must keep."""
    if not console.is_terminal:
        console.width = max(console.width, least)


def warn(text: str) -> None:
    """A warning, on the error stream."""
    say(Console(stderr=True), f"fedmoe: warning: {text}")


class Display:
    """Shows a run's rounds as they pass; raises OutputLost if nobody takes it. Use it as a context manager."""

    def __init__(self, config: Config, done: int, jobs: int, console: Console) -> None:
        self.console, self._config = console, config
        self.rounds, self.jobs, self._done = config.federation.rounds, jobs, done
        self._samples, self._seconds = 0.0, 0.0
        self._start = self._since = time.perf_counter()
        self._live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._bar = Progress(
            TextColumn("round"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            BarColumn(20),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=self.rounds, completed=done, note="")
        self._tested = ""
        self._parts: dict[str, int] = {}  # of clients whose batches do not fit, as last told

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OutputLost, OSError):
            self._bar.stop()

    def trained(self, result: Result) -> None:
        """One client of the round in hand has trained."""
        samples, now = result.metrics["samples"], time.perf_counter()
        assert not isinstance(samples, list)
        # By the clock, since clients may train side by side.
        self._samples, self._seconds, self._since = self._samples + samples, self._seconds + now - self._since, now
        with _taken():
            self._bar.update(self._task, advance=0.9 / self.jobs, note=f"{self._tested}{self._rate()}")

    def evaluating(self, done: int, of: int) -> None:
        """`done` of the round's evaluations are done."""
        self._since = time.perf_counter()
        if self._live:
            with _taken():
                self._bar.update(self._task, note=f"{self._tested}evaluating {done}/{of}")

    def round(self, line: Line) -> None:
        """A round is over."""
        self._since = time.perf_counter()
        number, accuracy, text = line["round"], line.get("accuracy"), line.get("perplexity")
        if accuracy:
            self._tested = f"{_perplexity(line)} " if text else f"accuracy {accuracy['mean']:.3f} "
        with _taken():
            self._bar.update(self._task, completed=number, note=f"{self._tested}{self._rate()}")
            for client in line["rolled_back"]:
                self._say(
                    f"round {number}: client {client} rolled back and left out: its loss or a weight is not finite"
                )
            for client, reason in line["rejected"].items():
                self._say(f"round {number}: client {client} rejected and left out: {reason}")
            if "kept" in line:
                self._say(f"round {number}: the global expert stays as it is: {line['kept']}")
            for client, parts in line.get("parts", {}).items():
                if self._parts.get(client) != parts:
                    self._parts[client] = parts
                    self._say(f"round {number}: out of device memory: client {client} takes batches in {parts} parts")
            for client in line.get("not_finite", []):
                self._say(f"round {number}: client {client} has a test loss that is not finite: training diverges")
            if not self._live:
                figures = [f"loss {line['loss']:.3f}" if line["loss"] is not None else "no loss"]
                if accuracy:
                    figures.insert(0, f"accuracy {accuracy['mean']:.3f} ± {accuracy['std']:.3f}")
                if text:
                    figures.append(_perplexity(line))
                self._say(f"round {number}/{self.rounds}  {'  '.join(figures)}  {self._rate()}  {self._left(number)}")

    def _say(self, text: str) -> None:
        say(self.console, text)

    def _rate(self) -> str:
        return per_second(self._config, self._samples, self._seconds)

    def _left(self, number: int) -> str:
        seconds = (time.perf_counter() - self._start) / (number - self._done) * (self.rounds - number)
        return f"{seconds:.0f} s left" if seconds else "done"


@contextlib.contextmanager
def _taken() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputLost(f"the output cannot be written: {error.strerror or error}") from error


def summary(console: Console, config: Config, split: Split, lines: list[Line]) -> None:
    """The closing table: accuracy by client, or its spread if there are many, and what the run took."""
    last = next((line for line in reversed(lines) if "accuracy" in line), None)
    if last is not None:
        accuracies(console, config, split, last)
    seconds = sum(line["seconds"]["train"] for line in lines)
    whole = sum(line["seconds"]["round"] for line in lines)
    samples = sum(sum(line["clients"]["samples"]) for line in lines)
    sent = sum(line["bytes_up"] + line["bytes_down"] for line in lines)
    flops = sum(line["flops"] for line in lines)
    work = f"{flops / 1e12:,.2f} TFLOP" if flops >= 1e12 else f"{flops / 1e9:,.2f} GFLOP"
    text = (
        f"{len(lines)} {'round' if len(lines) == 1 else 'rounds'} in {whole:,.1f} s, "
        f"{per_second(config, samples, seconds)} while training; "
        f"{sent / 1e6:,.1f} MB up and down; {work} trained"
    )
    say(console, text)


def per_second(config: Config, samples: float, seconds: float) -> str:
    """Samples per second, or of text tokens."""
    text = config.data.kind == "text"
    rate = samples * (config.data.sequence_length if text else 1) / max(seconds, 1e-9)
    return f"{rate:,.0f} tokens/s" if text else f"{rate:,.0f} samples/s"


def accuracies(console: Console, config: Config, split: Split, line: Line) -> None:
    """Accuracy on held-out samples, of text perplexity too, from one line of metrics or of `eval`."""
    kinds = {"accuracy": "accuracy", "accuracy_aggregated": "with aggregated θ"}
    kinds |= {"perplexity": "perplexity", "perplexity_aggregated": "with aggregated θ"}
    shown = {key: title for key, title in kinds.items() if key in line}
    title = f"{config.method} on {config.data.name.rsplit('/')[-1]} after round {line['round']}, held-out samples"
    table = Table(title=title, title_justify="left")
    for column in ("client", "model", "train", "test", *shown.values()):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    clients = line["evaluated"]
    if len(clients) <= MANY:
        for i, client in enumerate(clients):
            model = config.model.local[client % len(config.model.local)]
            sizes = [str(len(split.train(client))), str(len(split.test(client)))]
            table.add_row(str(client), model, *sizes, *(_figure(key, line[key]["clients"][i]) for key in shown))
        table.add_section()
    else:
        for name, share in (("lowest", 0.0), ("median", 0.5), ("highest", 1.0)):
            ordered = {key: sorted(v for v in line[key]["clients"] if v is not None) for key in shown}
            of = [
                (key, values[round(share * (len(values) - 1))] if values else None) for key, values in ordered.items()
            ]
            table.add_row(name, "", "", "", *(_figure(key, value) for key, value in of))
    whole = len(clients) == config.federation.clients
    spreads = (_spread(key, line) for key in shown)
    table.add_row(f"all {len(clients)}" if whole else f"these {len(clients)}", "", "", "", *spreads)
    console.print(table)


def _perplexity(line: Line) -> str:
    loss = line["test_loss"]["mean"]
    return "no perplexity" if loss is None else f"perplexity {PERPLEXITY.figure(PERPLEXITY.level(loss))}"


def _spread(key: str, line: Line) -> str:
    """Mean and standard deviation over clients, of perplexity those of its logarithm."""
    by = ACCURACY if key.startswith("accuracy") else PERPLEXITY
    values = line[key.replace("perplexity", "test_loss")]
    if values["mean"] is None:
        return "not finite"
    return f"{by.figure(by.level(values['mean']))} {by.spread(values['std'])}"


def _figure(key: str, value: float | None) -> str:
    return "not finite" if value is None else (ACCURACY if key.startswith("accuracy") else PERPLEXITY).figure(value)
