"""`fedmoe profile`: takes rounds of a federation as training would, and measures them, in a folder that goes after."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
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
from fedmoe.profiling.host import HostMeter
from fedmoe.profiling.nvml import NvmlMeter
from fedmoe.profiling.page import page
from fedmoe.profiling.profile import Energy, Memory, Profile, Round, Transfers
from fedmoe.profiling.roofline import measured, points
from fedmoe.profiling.sampler import Meter, Sampler
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


def check(config: Config) -> None:
    """Raise UserError for what tells nothing of what it does."""
    if config.engine.kind != "fast":
        raise UserError('engine.kind is "reference": only the engine tells what it does; leave it "fast"')


@contextmanager
def subject(config: Config, folder: Path, graphs: bool | None = None) -> Iterator[Subject]:
    """A federation that begins in `folder`, as `fedmoe train` would begin it, but for `graphs` where it is given."""
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


@dataclass(slots=True)
class Taken:
    """What was measured of the rounds themselves."""

    plain: list[Line]
    """Of rounds without observers."""
    seen: list[Line]
    """Of those with."""
    recorder: Recorder
    transfers: Transfers
    """Of those with."""
    meters: dict[str, Any]
    """The sampler's summary, of all."""
    series: dict[str, trace.Series]


def take(config: Config, folder: Path, rounds: int, warmup: int, progress: Progress) -> tuple[Profile, Taken]:
    """Profile `rounds` rounds, each once without and once with observers, after `warmup` of them."""
    task = progress.add_task("warming up", total=warmup + 2 * rounds)
    with subject(config, folder / "run") as made:
        for _ in range(warmup):
            made.round()
            progress.advance(task)
        taken = _rounds(made, rounds, lambda: progress.advance(task))
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
        flat = configfile.flat(made.config)
    uncaptured, notes = None, []
    if plan.graphs:
        progress.update(task, description="a round without graphs")
        with subject(config, folder / "uncaptured", graphs=False) as other:
            other.round()
            uncaptured = _rounds(other, 1, lambda: None).recorder
        notes.append("steps were replayed as CUDA graphs; what is inside of them was measured in a round without")
    quantities = taken.meters["quantities"]
    profile = Profile(
        title=f"{config.method} on {Path(config.data.name).name}",
        environment=environment(Path(__file__).parents[1]) | {"threads": torch.get_num_threads()},
        plan=asdict(plan),
        config=flat,
        rounds=[_round(line) for line in taken.plain],
        observed_seconds=[line["seconds"]["round"] for line in taken.seen],
        steps=profiles.step_seconds(taken.recorder),
        ranges=profiles.ranges(taken.recorder, uncaptured),
        device=profiles.device_use(taken.recorder, uncaptured),
        transfers=taken.transfers,
        memory=memory,
        meters={name: entry for name, entry in quantities.items() if entry is not None},
        missing=taken.meters["missing"],
        energy=_energy(taken.meters, _samples(taken.plain + taken.seen), 2 * rounds),
        roof=roof,
        operators=points(operators.slowest()[:OPERATORS], roof),
        batches=batches,
        notes=notes,
    )
    profile.findings = findings.find(profile)
    return profile, taken


def _rounds(made: Subject, rounds: int, done: Callable[[], None]) -> Taken:
    """Rounds without observers and with, in turns; `done` is called after each."""
    recorder, store = Recorder(made.device), made.engine.store
    moved, waited = dict.fromkeys(store.bytes_moved, 0), 0.0
    plain, seen = [], []
    gpu: list[Meter] = [NvmlMeter(made.device)] if made.device.type == "cuda" else []
    with Sampler([HostMeter(), *gpu]) as sampler:
        start = time.perf_counter()
        for _ in range(rounds):
            plain.append(made.round())
            done()
            before, stood = store.bytes_moved, store.seconds_waited
            with observed(recorder):
                seen.append(made.round())
            done()
            moved = {key: moved[key] + now - before[key] for key, now in store.bytes_moved.items()}
            waited += store.seconds_waited - stood
        recorder.settle()
        end = time.perf_counter()
    summary = sampler.summary(start, end)
    series = {q.name: sampler.series(q.name) for q in sampler.quantities if q.kind == "gauge"}
    names = {f"{tier} {way}": count for (tier, way), count in moved.items()}
    transfers = Transfers(names, _waiting(recorder), waited)
    return Taken(plain, seen, recorder, transfers, summary, series)  # type: ignore[arg-type]


def _samples(lines: list[Line]) -> int:
    return sum(sum(line["clients"]["samples"]) for line in lines)


def _energy(meters: dict[str, Any], samples: int, rounds: int) -> list[Energy]:
    """Of what tells: the GPU, the processor."""
    told = ((name, meters["quantities"].get(f"{name}_energy")) for name in ("gpu", "cpu"))
    return [
        Energy(name, entry["increase"] / rounds, 1000 * entry["increase"] / samples, entry["source"])
        for name, entry in told
        if entry is not None
    ]


def _round(line: Line) -> Round:
    seconds = line["seconds"]
    return Round(seconds["round"], seconds["train"], seconds["evaluate"], _samples([line]), line["flops"])


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


def run(config: Config, rounds: int, warmup: int, out: Path | None, as_json: bool, snapshot: bool = False) -> None:
    """Profile, print the gist (with `as_json` all of it), and write what was found to the folder `out`."""
    if rounds < 1 or warmup < 0:
        raise UsageError(f"--rounds is {rounds} and --warmup {warmup}, expected at least 1 and at least 0")
    check(config)
    if snapshot and not torch.cuda.is_available():
        raise UserError("--memory-snapshot is of a GPU's memory, and there is none: leave it out")
    out = out or Path(time.strftime("profiles/%Y%m%d-%H%M%S"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):  # before the minutes, not after
        raise UserError(f"{out} exists and is not an empty folder: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    console = Output(stderr=as_json)
    columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn()
    with ExitStack() as stack:
        shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedmoe-profile-")))
        if snapshot:
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        try:
            profile, taken = take(config, folder, rounds, warmup, stack.enter_context(shown))
        except Refused as error:
            raise UserError(str(error)) from error
    if snapshot:
        torch.cuda.memory._dump_snapshot(str(out / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    write_atomic(out / "profile.json", profile.to_json().encode())
    write_atomic(out / "trace.json", trace.events(taken.recorder.spans, taken.series).encode())
    write_atomic(out / "profile.html", page(profile, taken.recorder.spans, taken.series).encode())
    if as_json:
        print(profile.to_json())
    else:
        gist(console, profile)
        made = "profile.html, profile.json, trace.json (ui.perfetto.dev opens it)"
        console.print(f"written to {out}: {made}", highlight=False, soft_wrap=True)


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
    lines += [
        f"{e.of.upper()}: {e.joules_a_round:,.1f} J a round, {e.joules_per_1000_samples:,.2f} J for 1000 samples"
        for e in profile.energy
    ]
    for line in [*lines, *profile.notes, *(f"→ {finding.text}" for finding in profile.findings)]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
