"""The command line: which command does what, every failure in one line; a command's imports wait until it runs."""

import argparse
import contextlib
import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fedmoe import __version__
from fedmoe.config import EXPORTS
from fedmoe.errors import OutputLost, UsageError, UserError
from fedmoe.signals import handling

if TYPE_CHECKING:
    from fedmoe.config import Config


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Print the complaint and exit with 2."""
        self.exit(2, f"fedmoe: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped by the user."""
    # None where it was closed.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no ± gets a ? in its place
            stream.reconfigure(errors="replace")
    with handling(_end):
        parser = _parser()
        args, rest = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv))
        if args.command == "predict":  # files behind options, which the parser takes for superfluous
            args.inputs += [Path(word) for word in rest if not word.startswith("-")]
            rest = [word for word in rest if word.startswith("-")]
        if rest and args.command not in ("train", "sweep", "plan", "partition", "profile"):
            args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        code = _run(args, rest)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at the end
    return code


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    """The exit code of the command, every failure told in one line."""
    try:
        code = int(args.act(args, rest) or 0)
        sys.stdout.flush()
        return code
    except (BrokenPipeError, OutputLost):  # the reader of our output has gone, as `fedmoe train --help | head` does
        return 0
    except KeyboardInterrupt as stop:
        _complain(str(stop) or "interrupted")
        return 130
    except (UserError, OSError) as error:
        if os.environ.get("FEDMOE_TRACEBACK"):
            raise
        what = str(error)
        if isinstance(error, OSError) and error.strerror:
            what = f"{error.filename or 'output'}: {error.strerror}"
        _complain(f"error: {what}")
        return 2 if isinstance(error, UsageError) else 1


def _end(number: int, frame: object) -> None:
    """Until a run takes them over, the signals to stop find nothing to save: one line, and the end."""
    os.write(2, b"fedmoe: interrupted\n")
    os._exit(128 + number)


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):  # there may be nobody left to hear it
        print(f"fedmoe: {text}", file=sys.stderr, flush=True)


def _parser() -> Parser:
    parser = Parser(prog="fedmoe", description="Train federations of heterogeneous models with a shared expert.")
    parser.add_argument("--version", action="version", version=f"fedmoe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    train = commands.add_parser("train", help="start a run", add_help=False)
    train.set_defaults(act=_train)

    resume = commands.add_parser("resume", help="continue a run that was stopped or killed")
    resume.add_argument("run", type=Path, metavar="RUN", help="run folder")
    resume.add_argument("--rounds", type=int, help="train on to this many rounds in all")
    resume.set_defaults(act=_resume, parser=resume)

    evaluate = commands.add_parser("eval", help="evaluate a run's clients on their held-out samples")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run folder")
    evaluate.add_argument("--clients", type=int, nargs="+", default=[], metavar="ID", help="only these clients")
    evaluate.add_argument("--aggregated", action="store_true", help="also with the aggregated global expert")
    evaluate.add_argument("--json", action="store_true", help="print one line of JSON")
    evaluate.set_defaults(act=_evaluate, parser=evaluate)

    report = commands.add_parser("report", help="show what a run came to, on one page")
    report.add_argument("run", type=Path, metavar="RUN", help="run folder")
    report.add_argument("--out", type=Path, metavar="FILE", help="write the page there, not to RUN/report.html")
    report.add_argument("--profile", type=Path, metavar="DIR", help="show this folder of `fedmoe profile`, too")
    report.add_argument(
        "--target", type=float, metavar="T", help="show what reaching this accuracy, of text perplexity, took"
    )
    report.set_defaults(act=_report, parser=report)

    compare = commands.add_parser("compare", help="compare runs: which of their differences exceed the noise")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, or a folder of some")
    compare.add_argument("--round", type=int, metavar="R", help="at this round; else the last that all have evaluated")
    compare.add_argument(
        "--target", type=float, metavar="T", help="also what each took to this accuracy, of text perplexity"
    )
    compare.add_argument("--out", type=Path, metavar="FILE", help="write a page with plots there (HTML)")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.set_defaults(act=_compare, parser=compare)

    sweep = commands.add_parser(
        "sweep", help="train every combination of settings, and compare", add_help=False, allow_abbrev=False
    )
    sweep.add_argument("--seeds", default="1")
    sweep.add_argument("--dir", type=Path, default=Path("runs/sweep"))
    sweep.add_argument("--json", action="store_true")
    sweep.set_defaults(act=_sweep)

    export = commands.add_parser("export", help="write a trained client as files to serve it from")
    export.add_argument("run", type=Path, metavar="RUN", help="run folder")
    export.add_argument("--client", type=int, required=True, metavar="K", help="whose model")
    export.add_argument("--format", nargs="+", choices=EXPORTS, default=[], help="else all that can be had")
    export.add_argument("--aggregated", action="store_true", help="with the aggregated global expert, not its own")
    export.add_argument("--out", type=Path, metavar="DIR", help="a folder that is new or empty; else one in the run's")
    export.set_defaults(act=_export, parser=export)

    predict = commands.add_parser("predict", help="predict images with a trained client, or how a text goes on")
    predict.add_argument("model", type=Path, metavar="MODEL", help="an export, or a run folder")
    of_inputs = "image file, or a folder of some; of text a file with a prompt"
    predict.add_argument("inputs", type=Path, nargs="*", default=[], metavar="INPUT", help=of_inputs)
    predict.add_argument("--client", type=int, metavar="K", help="whose model, if MODEL is a run folder")
    predict.add_argument("--top", type=int, metavar="N", help="images: the N most probable classes (3)")
    predict.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text: go on after this")
    predict.add_argument("--tokens", type=int, metavar="N", help="text: up to N tokens (100)")
    predict.add_argument("--temperature", type=float, metavar="X", help="text: draw; 0 takes the most probable (0)")
    predict.add_argument("--seed", type=int, metavar="S", help="text: what is drawn (0)")
    predict.add_argument("--json", action="store_true", help="print a line of JSON for each image or prompt")
    predict.set_defaults(act=_predict, parser=predict)

    plan = commands.add_parser("plan", help="show how the engine would train, and why", add_help=False)
    plan.add_argument("--json", action="store_true")
    plan.add_argument("--gpu", choices=("rtx-4090", "a100", "h100", "h200"), default="")
    plan.set_defaults(act=_plan)

    partition = commands.add_parser("partition", help="show what each client would get of the data", add_help=False)
    partition.add_argument("--json", action="store_true")
    partition.add_argument("--out", type=Path)
    partition.set_defaults(act=_partition)

    profile = commands.add_parser("profile", help="measure some rounds: where their time goes", add_help=False)
    profile.add_argument("--rounds", type=int)
    profile.add_argument("--warmup", type=int, default=1)
    profile.add_argument("--out", type=Path)
    profile.add_argument("--json", action="store_true")
    profile.add_argument("--memory-snapshot", action="store_true")
    profile.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"))
    profile.set_defaults(act=_profile)

    bench = commands.add_parser("bench", help="time kernels, engine and federation against what else there is")
    suites = "kernels, engine, federation, lm, aggregation; or acceptance: what targets are measured by, with verdicts"
    bench.add_argument("suite", nargs="?", metavar="SUITE", help=f"only this suite: {suites}")
    bench.add_argument("--only", default="", metavar="NAME", help="only benchmarks with this in their name")
    budget = "leave out what does not fit into so many seconds (acceptance: 565 unless given)"
    bench.add_argument("--budget-seconds", type=float, metavar="N", help=budget)
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every figure and the environment there")
    bench.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    bench.set_defaults(act=_bench, parser=bench)

    doctor = commands.add_parser("doctor", help="show what this machine has and what it enables")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--kernels", action="store_true", help="compile every kernel and show what its code takes")
    doctor.set_defaults(act=_doctor, parser=doctor)
    return parser


def _train(args: argparse.Namespace, rest: list[str]) -> None:
    config = _config(rest, "train", "Train a federation.")
    from fedmoe.run import train

    train(config)


def _plan(args: argparse.Namespace, rest: list[str]) -> None:
    does = (
        "Show how the engine would train a federation here, and why. `--json`: as JSON; `--gpu NAME`: as if this "
        "machine had that GPU (rtx-4090, a100, h100, h200)."
    )
    config = _config(rest, "plan", does)
    from fedmoe import planning

    planning.run(config, args.json, args.gpu)


def _partition(args: argparse.Namespace, rest: list[str]) -> None:
    does = (
        "Show what each client would get of the data, and train nothing. `--json`: as JSON; `--out FILE.html`: also as "
        "a picture on a page."
    )
    config = _config(rest, "partition", does)
    from fedmoe import preview

    preview.run(config, args.json, args.out)


def _profile(args: argparse.Namespace, rest: list[str]) -> None:
    does = (
        "Measure some rounds of a federation and say where their time goes. `--rounds 3`: how many, each once more "
        "observed; `--warmup 1`: rounds before; `--out`: a folder for page, JSON and trace; `--json`: print the JSON; "
        "`--memory-snapshot`: also PyTorch's record of GPU memory. "
        "`--compare A.toml B.toml`: rounds of both in turns (`--rounds 10`), and which differences exceed the noise."
    )
    if args.compare is None:
        config = _config(rest, "profile", does)
        from fedmoe import profiler

        rounds = 3 if args.rounds is None else args.rounds
        profiler.run(config, rounds, args.warmup, args.out, args.json, args.memory_snapshot)
        return
    if args.out or args.memory_snapshot or (rest and not rest[0].startswith("-")):
        raise UsageError(
            "--compare takes two configuration files, options for both, and neither --out nor --memory-snapshot"
        )
    first, second = (_config([str(path), *rest], "profile", does) for path in args.compare)
    from fedmoe import comparison

    comparison.run((first, second), 10 if args.rounds is None else args.rounds, args.warmup, args.json)


def _config(words: list[str], command: str, does: str) -> "Config":
    """The configuration from a file, if the first word is one, and from options."""
    from fedmoe import configfile

    return configfile.override(_file(words), words, command, does)


def _file(words: list[str]) -> "Config":
    """The configuration from a file, if the first word, which is then taken away, is one."""
    from fedmoe import configfile
    from fedmoe.config import Config

    return configfile.read(Path(words.pop(0))) if words and not words[0].startswith("-") else Config()


def _resume(args: argparse.Namespace, rest: list[str]) -> None:
    from fedmoe.run import resume

    resume(args.run, args.rounds)


def _evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    from fedmoe.run import evaluate

    evaluate(args.run, args.clients, args.aggregated, args.json)


def _report(args: argparse.Namespace, rest: list[str]) -> None:
    from fedmoe.run import write_report

    write_report(args.run, args.out, args.target, args.profile)


def _compare(args: argparse.Namespace, rest: list[str]) -> None:
    from fedmoe import compare

    compare.run(args.runs, args.json, args.out, args.round, args.target)


def _sweep(args: argparse.Namespace, rest: list[str]) -> int:
    said = shlex.join(["fedmoe", "sweep", *rest, "--seeds", args.seeds, "--dir", str(args.dir)])
    base = _file(rest)
    from fedmoe import grid

    planned = grid.parse(base, rest, args.seeds)
    from fedmoe import sweep

    return sweep.run(planned, args.dir, args.json, said)


def _export(args: argparse.Namespace, rest: list[str]) -> None:
    from fedmoe import export

    export.run(args.run, args.client, args.format, args.aggregated, args.out)


def _predict(args: argparse.Namespace, rest: list[str]) -> int:
    from fedmoe import predict, textpredict

    text = textpredict.Wanted(tuple(args.prompt), args.tokens, args.temperature, args.seed)
    return predict.run(args.model, args.inputs, args.top, args.json, args.client, text)


def _bench(args: argparse.Namespace, rest: list[str]) -> int:
    from fedmoe import bench

    return bench.run(args.suite, args.only, args.json, args.markdown, budget=args.budget_seconds)


def _doctor(args: argparse.Namespace, rest: list[str]) -> int:
    from fedmoe import doctor

    return doctor.run(args.json, args.kernels)
