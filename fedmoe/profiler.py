"""`fedmoe profile`: takes rounds of a federation as training would, and measures them, in a folder that goes after."""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fedmoe import checkpoint, configfile, engines
from fedmoe.config import Config
from fedmoe.display import Output, say
from fedmoe.engine.device_engine import DeviceEngine
from fedmoe.engine.ranges import observed
from fedmoe.engine.seam import Refused, Result
from fedmoe.errors import UsageError, UserError
from fedmoe.files import check_above, write_atomic
from fedmoe.metrics import Line
from fedmoe.profiletable import gist
from fedmoe.profiling import findings, probe, trace
from fedmoe.profiling import profile as profiles
from fedmoe.profiling.annotations import Nvtx
from fedmoe.profiling.environment import environment
from fedmoe.profiling.host import HostMeter
from fedmoe.profiling.nvml import NvmlMeter
from fedmoe.profiling.operators import Operators
from fedmoe.profiling.page import page
from fedmoe.profiling.profile import Energy, Memory, Profile, Round, Transfers
from fedmoe.profiling.roofline import measured, points
from fedmoe.profiling.sampler import Sampler
from fedmoe.profiling.spans import Recorder
from fedmoe.rounds import take_round
from fedmoe.run import started
from fedmoe.server import Server
from fedmoe.signals import interrupting

OPERATORS = 200
"""Most operators that a profile lists."""


class Subject:
    """A federation under measurement: an engine, a server, and the round to come."""

    def __init__(self, config: Config, device: torch.device, engine: DeviceEngine, theta: dict[str, torch.Tensor]):
        self.config, self.device, self.engine = config, device, engine
        self._server = Server(config, theta)
        self._number = 0

    def round(self, evaluated: bool = True) -> Line:
        """Take the next round; its line of metrics."""
        self._number += 1
        evaluation = replace(self.config.evaluation, every=1 if evaluated else sys.maxsize)
        config = replace(self.config, evaluation=evaluation)
        line, theta = take_round(config, self._server, self.engine, self._number, self)
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
    config = replace(config, federation=replace(config.federation, rounds=2**31 - 1))
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


def take(
    config: Config, folder: Path, rounds: int, warmup: int, progress: Progress, snapshot: Path | None = None
) -> tuple[Profile, Taken]:
    """Profile `rounds` rounds, each once without and once with observers, after `warmup` of them.

    `snapshot`: where to write PyTorch's record of GPU memory in the rounds. Raises UserError where a round cannot be
    taken.
    """
    task = progress.add_task("warming up", total=warmup + 2 * rounds)
    notes, operators, batches = [], None, []
    with subject(config, folder / "run") as made:
        plan = engines.read(folder / "run")
        assert plan is not None
        for _ in range(warmup):
            made.round()
            progress.advance(task)
        with _recorded(made.device, snapshot):
            taken = _rounds(made, rounds, lambda: progress.advance(task))
        peaks = _peaks(made.device)
        progress.update(task, description="operators and batch sizes", total=None)
        kinds = list(probe.architectures(made.engine).values())
        try:
            operators = probe.operators(made.engine, kinds)
            if plan.cohort == 1:  # else a step alone is not what is taken
                most = max(kinds, key=lambda client: made.engine.site.roster[client][0].training)
                batches = probe.batch_sizes(made.engine, most)
        except torch.OutOfMemoryError:
            notes.append("device memory did not suffice to look at operators and batch sizes")
        memory = [*_memory(made, operators), *peaks]
        threads = torch.get_num_threads()
    device, uncaptured = made.device, None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if plan.graphs:
        progress.update(task, description="a round without graphs")
        with subject(config, folder / "uncaptured", graphs=False) as other:
            other.round()
            uncaptured = _rounds(other, 1, lambda: None).recorder
        notes.append("steps were replayed as CUDA graphs; what is inside of them was measured in a round without")
    progress.update(task, description="what the hardware could do")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan.precision, torch.float32)
    roof = measured(device, dtype)
    if plan.cohort > 1:
        notes.append(f"a step may be of up to {plan.cohort} clients together")
    if (every := config.evaluation.every) > 1:
        seen = sum("accuracy" in line for line in taken.plain)
        notes.append(f"a run is evaluated every {every} rounds; of these {rounds}, {seen} were")
    quantities = taken.meters["quantities"]
    profile = Profile(
        title=f"{config.method} on {Path(config.data.name).name}",
        environment=environment(Path(__file__).parents[1]) | {"threads": threads},
        plan=asdict(plan),
        config=configfile.flat(config),
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
        operators=[] if operators is None else points(operators.slowest()[:OPERATORS], roof),
        batches=batches,
        notes=notes,
    )
    profile.findings = findings.find(profile)
    return profile, taken


@contextmanager
def _recorded(device: torch.device, snapshot: Path | None) -> Iterator[None]:
    """Within the block what is allocated on the GPU is recorded, and written to the file at its end."""
    if snapshot is None:
        yield
        return
    if device.type != "cuda":
        raise UserError("--memory-snapshot is of a GPU's memory, and the run is on a CPU: leave it out")
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(snapshot))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _rounds(made: Subject, rounds: int, done: Callable[[], None]) -> Taken:
    """Rounds without observers and with, in turns, either first; `done` is called after each."""
    recorder, store = Recorder(made.device), made.engine.store
    moved, waited = dict.fromkeys(store.bytes_moved, 0), 0.0
    plain: list[Line] = []
    seen: list[Line] = []
    cuda = made.device.type == "cuda"
    with Sampler([HostMeter(), *([NvmlMeter(made.device)] if cuda else [])]) as sampler:
        start = time.perf_counter()
        for number in range(1, rounds + 1):
            evaluated = number % made.config.evaluation.every == 0 or number == rounds
            for watched in (False, True) if number % 2 else (True, False):
                if not watched:
                    plain.append(made.round(evaluated))
                else:
                    before, stood = store.bytes_moved, store.seconds_waited
                    with observed(recorder), observed(Nvtx()) if cuda else nullcontext():
                        seen.append(made.round(evaluated))
                    moved = {key: moved[key] + now - before[key] for key, now in store.bytes_moved.items()}
                    waited += store.seconds_waited - stood
                done()
        recorder.settle()
        end = time.perf_counter()
    summary = sampler.summary(start, end)
    series: Any = {q.name: sampler.series(q.name) for q in sampler.quantities if q.kind == "gauge"}
    names = {f"{tier} {way}": count for (tier, way), count in moved.items()}
    return Taken(plain, seen, recorder, profiles.transfers(recorder, names, waited), summary, series)


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
    return Round(
        seconds["round"], seconds["train"], seconds["evaluate"], _samples([line]), line["flops"], "accuracy" in line
    )


def _memory(made: Subject, step: Operators | None) -> Iterator[Memory]:
    engine, gpu = made.engine, made.device.type == "cuda"
    here: Any = "device" if gpu else "host"
    layouts = [engine.site.roster[client][1] for client in engine.site.roster]
    share = sum(layout.optimizer for layout in layouts) / sum(layout.size for layout in layouts)
    for tier, count in engine.store.held.items():
        where: Any = "files" if tier == "file" else tier
        if count:
            yield Memory("clients' weights and buffers", count - int(count * share), where)
            yield Memory("clients' optimizer state", int(count * share), where)
    yield Memory("rooms of clients that train", sum(len(r.region) for lane in engine.lanes for r in lane.rooms), here)
    if step is not None:
        yield Memory("gradients and activations of one client's step, at their peak", step.peak_bytes, here)
    samples = engine.site.federation.samples
    yield Memory(
        "samples", samples.inputs.nbytes + samples.labels.nbytes, here if engine.site.loader.resident else "host"
    )


def _peaks(device: torch.device) -> list[Memory]:
    """Of a GPU so far."""
    if device.type != "cuda":
        return []
    reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    return [
        Memory("PyTorch's allocator, at its peak", allocated, "device"),
        Memory("kept by it for later", reserved - allocated, "device"),
    ]


def run(config: Config, rounds: int, warmup: int, out: Path | None, as_json: bool, snapshot: bool = False) -> None:
    """Profile, print the gist (with `as_json` all of it), and write what was found to the folder `out`."""
    if rounds < 1 or warmup < 0:
        raise UsageError(f"--rounds is {rounds} and --warmup {warmup}, expected at least 1 and at least 0")
    check(config)
    out = (out or Path(time.strftime("profiles/%Y%m%d-%H%M%S"))).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):  # before the minutes, not after
        raise UserError(f"{out} exists and is not an empty folder: choose another --out")
    above = check_above(out, "--out")
    console = Output(stderr=as_json)
    with measuring(console, above) as (folder, progress):
        record = folder / "memory.pickle" if snapshot else None
        profile, taken = take(config, folder, rounds, warmup, progress, record)
        if as_json:
            print(profile.to_json(), flush=True)
        else:
            gist(console, profile)
        out.mkdir(parents=True, exist_ok=True)
        if record is not None:
            shutil.move(record, out / record.name)
        spans, series = taken.recorder.spans, taken.series
        write_atomic(out / "profile.json", profile.to_json().encode())
        write_atomic(out / "trace.json", trace.events(spans, series).encode())
        write_atomic(out / "profile.html", page(profile, spans, series).encode())
    made = "profile.html, profile.json, trace.json (ui.perfetto.dev opens it)"
    say(console, f"written to {out}: {made}")


@contextmanager
def measuring(console: Output, above: Path) -> Iterator[tuple[Path, Progress]]:
    """A folder for what is measured, gone after, however that ends, and a bar; what memory refuses is one line."""
    columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn()
    with interrupting(), tempfile.TemporaryDirectory(prefix=".fedmoe-profile-", dir=above) as folder:
        try:
            with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
                yield Path(folder), progress
        except (Refused, torch.OutOfMemoryError) as error:
            raise UserError(str(error).splitlines()[0]) from error
