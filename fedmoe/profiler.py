"""`fedmoe profile`: takes rounds of a federation as training would, and measures them, in a folder that goes after."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from fedmoe import checkpoint, configfile, engines
from fedmoe.config import Config
from fedmoe.display import Output
from fedmoe.engine.device_engine import DeviceEngine
from fedmoe.engine.ranges import observed
from fedmoe.engine.seam import Refused, Result
from fedmoe.errors import UsageError, UserError
from fedmoe.files import write_atomic
from fedmoe.metrics import Line
from fedmoe.profiling import findings, probe, trace
from fedmoe.profiling import profile as profiles
from fedmoe.profiling.environment import environment
from fedmoe.profiling.profile import Memory, Profile, Round, Transfers
from fedmoe.profiling.roofline import measured, points
from fedmoe.profiling.spans import Recorder
from fedmoe.rounds import take_round
from fedmoe.run import started
from fedmoe.server import Server

OPERATORS = 200
"""Most operators that a profile lists."""


class Subject:
    """A federation under measurement: an engine, a server, and the round to come."""

    def __init__(self, config: Config, device: torch.device, engine: DeviceEngine, theta: dict[str, torch.Tensor]):
        self.config, self.device, self.engine = config, device, engine
        self._server = Server(config, theta)
        self._number = 0

    def round(self) -> Line:
        """Take the next round; its line of metrics."""
        self._number += 1
        line, theta = take_round(self.config, self._server, self.engine, self._number, self)
        self.engine.commit()
        self._server.theta = theta
        return line

    def trained(self, result: Result) -> None:
        """Nothing to tell of."""

    def evaluating(self, done: int, of: int) -> None:
        """Nothing to tell of."""


@contextmanager
def subject(config: Config, folder: Path, graphs: bool | None = None) -> Iterator[Subject]:
    """A federation that begins in `folder`, as `fedmoe train` would begin it, but for `graphs` where it is given."""
    if config.engine.kind != "fast":
        raise UserError('engine.kind is "reference": only the engine tells what it does; leave it "fast"')
    # Its rounds are as many as are taken: the last would be evaluated in any case.
    config = replace(config, federation=replace(config.federation, rounds=1_000_000))
    with ExitStack() as stack:
        config, device = stack.enter_context(started(config, folder))
        if graphs is not None:
            plan = engines.read(folder)
            assert plan is not None
            engines.write(folder, replace(plan, graphs=graphs))
        engine = stack.enter_context(engines.opened(config, folder, device))
        assert isinstance(engine, DeviceEngine)
        yield Subject(config, device, engine, checkpoint.load(folder, checkpoint.read_manifest(folder).server))


def take(config: Config, folder: Path, rounds: int, warmup: int, progress: Progress) -> tuple[Profile, Recorder]:
    """Profile `rounds` rounds, each once without and once with observers, after `warmup` of them."""
    notes: list[str] = []
    with subject(config, folder / "run") as made:
        task = progress.add_task("warming up", total=warmup + 2 * rounds)
        for _ in range(warmup):
            made.round()
            progress.advance(task)
        recorder, plain, seen = Recorder(made.device), [], []
        before = made.engine.store.bytes_moved, made.engine.store.seconds_waited
        moved, waited = dict.fromkeys(before[0], 0), 0.0
        for number in range(rounds):
            progress.update(task, description=f"round {number + 1} of {rounds}")
            plain.append(made.round())
            progress.advance(task)
            before = made.engine.store.bytes_moved, made.engine.store.seconds_waited
            with observed(recorder):
                seen.append(made.round())
            after = made.engine.store.bytes_moved
            moved = {key: moved[key] + after[key] - before[0][key] for key in moved}
            waited += made.engine.store.seconds_waited - before[1]
            progress.advance(task)
        recorder.settle()
        plan = engines.read(folder / "run")
        assert plan is not None
        progress.update(task, description="operators and batch sizes", total=None)
        kinds = probe.architectures(made.engine)
        operators = probe.operators(made.engine, list(kinds.values()))
        batches = probe.batch_sizes(made.engine, next(iter(kinds.values())))
        memory = list(_memory(made, operators.peak_bytes))
        progress.update(task, description="what the hardware could do")
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan.precision, torch.float32)
        roof = measured(made.device, dtype)
        made_of = {"device": made.device, "config": configfile.flat(made.config)}
    uncaptured = None
    if plan.graphs:
        progress.update(task, description="a round without graphs")
        with subject(config, folder / "uncaptured", graphs=False) as other:
            other.round()
            uncaptured = Recorder(other.device)
            with observed(uncaptured):
                other.round()
            uncaptured.settle()
        notes.append("steps were replayed as CUDA graphs; what is inside of them was measured in a round without")
    names = {f"{tier} {way}": count for (tier, way), count in moved.items()}
    profile = Profile(
        title=f"{config.method} on {Path(config.data.name).name}",
        environment=environment(Path(__file__).parents[1]) | {"threads": torch.get_num_threads()},
        plan=asdict(plan),
        config=made_of["config"],  # type: ignore[arg-type]
        rounds=[_round(line) for line in plain],
        observed_seconds=[line["seconds"]["round"] for line in seen],
        steps=profiles.step_seconds(recorder),
        ranges=profiles.ranges(recorder, uncaptured),
        device=profiles.device_use(recorder, uncaptured),
        transfers=Transfers(names, _waiting(recorder), waited),
        memory=memory,
        meters={},
        missing={},
        roof=roof,
        operators=points(operators.slowest()[:OPERATORS], roof),
        batches=batches,
        notes=notes,
    )
    profile.findings = findings.find(profile)
    return profile, recorder


def _round(line: Line) -> Round:
    seconds = line["seconds"]
    samples = sum(line["clients"]["samples"])
    return Round(seconds["round"], seconds["train"], seconds["evaluate"], samples, line["flops"])


def _waiting(recorder: Recorder) -> float:
    """Seconds in which training waited for states: on the device's clock where there is one."""
    spans = [span for span in recorder.spans if span.phase in ("transfer in", "transfer out")]
    return sum(span.device[1] - span.device[0] if span.device else span.seconds for span in spans)


def _memory(made: Subject, peak: int) -> Iterator[Memory]:
    engine, gpu = made.engine, made.device.type == "cuda"
    here: Any = "device" if gpu else "host"
    layouts = [engine.site.roster[client][1] for client in engine.site.roster]
    share = sum(4 * layout.weights for layout in layouts) / sum(layout.size for layout in layouts)
    for tier, count in engine.store.held.items():
        where: Any = "files" if tier == "file" else tier
        if count:
            yield Memory("clients' weights and buffers", count - int(count * share), where)
            yield Memory("clients' momentum", int(count * share), where)
    yield Memory("rooms of clients that train", sum(len(r.region) for lane in engine.lanes for r in lane.rooms), here)
    yield Memory("gradients and activations of a step, at their peak", peak, here)
    samples = engine.site.federation.samples
    yield Memory(
        "samples", samples.images.nbytes + samples.labels.nbytes, here if engine.site.loader.resident else "host"
    )
    if gpu:
        reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        yield Memory("PyTorch's allocator, at its peak", allocated, "device")
        yield Memory("kept by it for later", reserved - allocated, "device")


def run(config: Config, rounds: int, warmup: int, out: Path | None, as_json: bool) -> None:
    """Profile, print the gist (with `as_json` all of it), and write what was found to the folder `out`."""
    if rounds < 1 or warmup < 0:
        raise UsageError(f"--rounds is {rounds} and --warmup {warmup}, expected at least 1 and at least 0")
    out = out or Path(time.strftime("profiles/%Y%m%d-%H%M%S"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):  # before the minutes, not after
        raise UserError(f"{out} exists and is not an empty folder: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    console = Output(stderr=as_json)
    columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn()
    with ExitStack() as stack:
        shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedmoe-profile-")))
        try:
            profile, recorder = take(config, folder, rounds, warmup, stack.enter_context(shown))
        except Refused as error:
            raise UserError(str(error)) from error
    write_atomic(out / "profile.json", profile.to_json().encode())
    write_atomic(out / "trace.json", trace.events(recorder.spans).encode())
    if as_json:
        print(profile.to_json())
    else:
        gist(console, profile)
        console.print(
            f"written to {out}: profile.json, trace.json (ui.perfetto.dev opens it)", highlight=False, soft_wrap=True
        )


def gist(console: Console, profile: Profile) -> None:
    """The figures that matter most, a table of ranges, and the findings."""
    if not console.is_terminal:  # a file has no width that a table must keep
        console.width = max(console.width, 120)
    table = Table(
        "range",
        "count",
        "time",
        "of the rounds",
        "on the device",
        "by",
        title=Text(profile.title),
        title_justify="left",
    )
    for i in range(1, 5):
        table.columns[i].justify = "right"
    for r in profile.ranges:
        inside = r.source == "uncaptured"  # of a graph, where the host is not
        own = ["", ""] if inside else [f"{1e3 * r.seconds:,.1f} ms", f"{r.share:.1%}"]
        on_device = "" if r.device_seconds is None else f"{1e3 * r.device_seconds:,.1f} ms"
        table.add_row(r.phase, str(r.count), *own, on_device, r.source)
    console.print(table)
    p50, p95 = profiles.quantiles(profile.steps)
    share = profile.flops_per_second / profile.roof.flops_per_second
    lines = [
        f"round {profile.round_seconds:,.3f} s (median of {len(profile.rounds)}); observing costs "
        f"{profile.observing:+.1%}",
        f"{profile.samples_per_second:,.0f} samples/s while training",
        f"{profile.flops_per_second / 1e9:,.1f} GFLOP/s, {share:.0%} of the "
        f"{profile.roof.flops_per_second / 1e9:,.0f} that a large product reaches",
    ]
    if p50 is not None and p95 is not None:
        lines.append(f"a training step takes {1e3 * p50:,.2f} ms (p50), {1e3 * p95:,.2f} ms (p95)")
    for line in [*lines, *profile.notes, *(f"→ {finding.text}" for finding in profile.findings)]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
