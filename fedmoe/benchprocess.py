"""Runs benchmarks in a process of its own and yields what happens there.

What takes too long is ended and left out; what ends the process has failed; another process goes on with the others.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import fedmoe
from fedmoe.errors import UserError
from fedmoe.profiling.bench_selection import Selection
from fedmoe.signals import handling

Event = dict[str, Any]
"""As `fedmoe.profiling.bench_events` tells it."""

CHECKOUT = Path(fedmoe.__file__).parents[1]

# The project's own settings for its tests (a time limit, strictness about plugins that only tests need) are not these.
PYTEST = ["-o", "addopts=", "-o", "timeout=0", "--import-mode=importlib", "-p", "no:cacheprovider"]
PYTEST += ["-p", "fedmoe.profiling.plugin", "--benchmark", "--continue-on-collection-errors"]


class _Late(Exception):
    """The time is up."""


class _Died(Exception):
    """The process ended before its work; says how, with its last words."""


class _Watch:
    """Follows what a process tells: what has ended, what runs, and until when it may."""

    def __init__(self, selection: Selection) -> None:
        self.selection, self.device, self.running, self.before = selection, "", "", ""
        self.chosen: list[str] | None = None
        self.ended: list[str] = []
        self.until = selection.ends

    def hear(self, event: Event) -> bool:
        """Whether the event is news; a process that goes on for another repeats how it began."""
        kind = event["event"]
        if kind == "environment":
            known, self.device = self.device, event["device"]
            return not known
        if kind == "collected":
            known_, self.chosen = self.chosen, self.chosen or event["chosen"]
            return known_ is None
        self.running, self.until = "", self.selection.ends
        if kind == "begin":
            self.running, limit = event["name"], self.selection.seconds(self.device, event["name"])
            if limit is not None:
                mine = time.monotonic() + limit
                self.until = mine if self.until is None else min(mine, self.until)
        else:
            self.before = event["name"]
            self.ended.append(event["name"])
        return True

    def left(self) -> list[str]:
        """What has not ended."""
        return [name for name in self.chosen or [] if name not in self.ended]

    def again(self) -> None:
        """Another process begins."""
        self.running, self.before, self.until = "", "", self.selection.ends

    def late(self) -> list[Event]:
        """What the end of the time leaves out: what runs, and all that has not begun, unless there is time for that."""
        over = self.over()
        names = [name for name in self.left() if over or name == self.running]
        limit = self.selection.seconds(self.device, self.running)
        own = f"not done within its limit of {limit:.0f} s" if limit is not None else ""
        self.ended += names
        why = dict.fromkeys(names, "the time was up before it began")
        why[self.running] = "the time was up before it was done" if over else own
        return [
            {"event": "end", "name": name, "outcome": "left out", "reason": why[name], "rows": []} for name in names
        ]

    def died(self, why: str) -> list[Event]:
        """What the end of the process costs: what ran, else what was being torn down, or, where none has begun, all."""
        one = self.running or self.before
        names = [one] if one and self.left() else self.left()
        self.ended += names
        return [{"event": "end", "name": name, "outcome": "failed", "reason": why, "rows": []} for name in names]

    def over(self) -> bool:
        """Whether there is no time for anything any more."""
        return self.selection.ends is not None and time.monotonic() >= self.selection.ends


def events(checkout: Path, files: list[Path], selection: Selection) -> Generator[Event]:
    """What happens, from the environment to each benchmark's end; raises UserError where that cannot be known.

    A process whose benchmark takes too long is ended with all that it started; after it, as after one that died,
    another goes on with the others.
    """
    watch = _Watch(selection)
    while True:
        try:
            left = replace(selection, skip=watch.ended)
            with closing(_told(checkout, files, left, watch)) as told:
                for event in told:
                    if watch.hear(event):
                        yield event
            return
        except _Late:
            if not watch.chosen:
                raise UserError("the time was up before the first benchmark: give --budget-seconds more") from None
            yield from watch.late()
        except _Died as error:
            if not watch.chosen:
                raise UserError(str(error)) from None
            yield from watch.died(str(error))
        if watch.over() or not watch.left():
            return
        watch.again()


def _told(checkout: Path, files: list[Path], selection: Selection, watch: _Watch) -> Generator[Event]:
    """What one process tells, of which `watch` hears; raises _Late, and _Died if it ends before its work."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "fedmoe.profiling.bench_events", str(writer), str(checkout), selection.to_json()]
    command += [*PYTEST, *map(str, files)]
    # What pytest prints goes to a file: a pipe that nobody empties would stop it.
    with tempfile.TemporaryFile("w+") as said, os.fdopen(reader, "rb", buffering=0) as pipe:
        path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])  # this fedmoe, no other
        # Neither a user's habits with pytest, nor what pytest tells its workers, where one of those runs this.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        env["PYTHONPATH"] = path
        # A session of its own: whatever it starts, as compilers do, is ended with it.
        options: dict[str, Any] = {"cwd": checkout, "env": env, "start_new_session": True}
        child = subprocess.Popen(command, stdout=said, stderr=said, pass_fds=[writer], **options)
        os.close(writer)

        def stop(number: int, frame: object) -> None:
            raise KeyboardInterrupt

        try:
            with handling(stop):
                told = False
                for line in _lines(pipe, lambda: watch.until):
                    told = True
                    yield json.loads(line)
                code = child.wait()
        finally:
            if child.poll() is None:  # it may be minutes from its next line
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        # Done; some failed, which Python's own failures give as well; nothing is chosen.
        if not told or code not in (0, 1, 5) or watch.left():
            if told and code in (0, 1, 2):  # its last words are of something else
                raise _Died(f"pytest ended with code {code} before it was done")
            said.seek(0)
            words = [line.strip() for line in said if line.strip()] or ["it said nothing"]
            errors = [line for line in words if "error: " in line.lower()]  # where it was started comes after
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise _Died(f"pytest {how}: {(errors or words)[-1]}")


def _lines(pipe: IO[bytes], until: Callable[[], float | None]) -> Iterator[bytes]:
    """Whole lines as they come; raises _Late where none has come when the time is up."""
    rest = b""
    while True:
        end = until()
        ready, _, _ = select.select([pipe], [], [], None if end is None else max(0.0, end - time.monotonic()))
        if not ready:
            raise _Late
        read = pipe.read(2**16)
        if not read:
            return
        *lines, rest = (rest + read).split(b"\n")
        yield from lines
