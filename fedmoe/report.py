"""`report.html`: what a run came to, on one page that opens from disk and asks no network."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from fedmoe import checkpoint, engines, insight, metrics, outcome
from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.errors import UserError
from fedmoe.files import write_atomic
from fedmoe.partition import Split
from fedmoe.profiling.page import where
from fedmoe.profiling.profile import Profile
from fedmoe.profiling.sections import Sections
from fedmoe.profiling.shell import shell
from fedmoe.reportsections import ReportSections, Subject

NAME = "report.html"


def write(
    config: Config,
    run: Path,
    device: torch.device,
    out: Path | None = None,
    target: float | None = None,
    profile: Profile | None = None,
) -> Path:
    """Write the report of the run in folder `run`, whose lock is held, to `out` or into the folder; returns where.

    `target` is an accuracy, of text a perplexity, whose cost is shown; `profile` is shown with it. Raises UserError
    where the run is damaged, OSError where the disk refuses.
    """
    made = page(subject(config, run, device, target, profile))
    path = out or run / NAME
    write_atomic(path, made.encode())
    return path


def page(subject: Subject) -> str:
    """The page."""
    made = ReportSections(subject)
    sections = list(made.all())
    name = f"{subject.config.method} on {subject.config.data.name.rstrip('/').rsplit('/')[-1]}"
    known = {key: value for key, value in subject.environment.items() if value != "none"}
    line = " · ".join(filter(None, [subject.name, where(known)]))
    return shell(f"Run: {name}", line, sections, made.figures)


def subject(
    config: Config, run: Path, device: torch.device, target: float | None = None, profile: Profile | None = None
) -> Subject:
    """All that a report shows of the run in folder `run`, as its last checkpoint has it."""
    dataset, split = load_data(config.data, config.seed), Split.load(run / "partition.safetensors")
    done, n = checkpoint.read_manifest(run).round, len(split)
    rounds = outcome.rounds(run / "metrics.jsonl", metrics.read(run), n, done)
    plan = engines.read(run)
    environment = json.loads((run / "environment.json").read_text())
    gates, pictures = insight.look(config, run, device)
    return Subject(
        name=run.resolve().name,
        config=config,
        rounds=rounds,
        train=[len(split.train(client)) for client in range(n)],
        test=[len(split.test(client)) for client in range(n)],
        counts=split.counts(dataset.labels, len(dataset.classes)),
        classes=dataset.classes,
        environment={key: value for key, value in environment.items() if key != "config"},
        plan=asdict(plan) if plan else {},
        gates=gates,
        pictures=pictures,
        target=target,
        profile=profile,
    )


def read_profile(folder: Path) -> Profile:
    """What `fedmoe profile` wrote to the folder. Raises UserError naming the file and what is wrong."""
    path = folder / "profile.json"
    try:
        profile = Profile.from_json(path.read_text())
        list(Sections(profile).all())  # numbers where there should be numbers
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}: give the folder of a `fedmoe profile`") from error
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path}: {error}: give the folder of a `fedmoe profile`") from error
    return profile
