"""Checkpoints: safetensors files that are never modified, and a manifest, renamed into place last, that names them.

`checkpoints/manifest.json` gives the round, the server's file and every trained client's, each with its size and
SHA-256. A client that has not changed since keeps its file. Files the manifest does not name are leftovers of a kill
and are removed by the next writer. A run has one from its start, before the first round. Nothing is ever unpickled.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fedmoe.engine.seam import State
from fedmoe.errors import UserError
from fedmoe.files import sync_folder, write, write_atomic

FORMAT = 1
OURS = re.compile(r"(server|client-\d+)\.r\d+\.safetensors|\.manifest\.json\.tmp")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a checkpoint."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole checkpoint: what the run was after `round` rounds."""

    round: int
    server: Entry
    clients: dict[int, Entry] = field(default_factory=dict)


def read_manifest(run: Path) -> Manifest:
    """The checkpoint of the run in folder `run`. Raises UserError if it is missing or is not one."""
    path = run / "checkpoints" / "manifest.json"
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            found = content["format"]
            raise UserError(f"{path}: format {found}, this version reads {FORMAT}: use the version that wrote it")
        clients = {int(client): Entry(**entry) for client, entry in content["clients"].items()}
        manifest = Manifest(int(content["round"]), Entry(**content["server"]), clients)
        owners = {"server": manifest.server} | {f"client-{client}": entry for client, entry in clients.items()}
        for owner, entry in owners.items():
            if not re.fullmatch(rf"{owner}\.r\d+\.safetensors", entry.file):
                raise ValueError(f"{entry.file!r} is not a file of {owner}")
        return manifest
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing: restore it from a copy") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest ({type(error).__name__}: {error}): restore it from a copy") from error


def load(run: Path, entry: Entry) -> State:
    """The tensors of one file of the run's checkpoint. Raises UserError naming the file and the check that failed."""
    return read_state(run / "checkpoints", entry, "the manifest")


def read_state(folder: Path, entry: Entry, by: str) -> State:
    """The tensors of a file whose size and SHA-256 `by` states. Raises UserError where they differ, or it is none."""
    path = verified(folder, entry, by)
    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): restore it from a copy") from error
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error}): restore it from a copy") from error


def verified(folder: Path, entry: Entry, by: str) -> Path:
    """A file whose size and SHA-256 are those that `by` states. Raises UserError where they differ."""
    path = folder / entry.file
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise UserError(f"{path}: size is {size} bytes, {by} says {entry.bytes}: restore it from a copy")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry.sha256:
            raise UserError(
                f"{path}: SHA-256 is {digest[:12]}..., {by} says {entry.sha256[:12]}...: restore it from a copy"
            )
        return path
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}), but {by} names it: restore it from a copy"
        ) from error


class Writer:
    """Writes a run's checkpoints on a thread of its own, one after the other."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoints"
        self.manifest = read_manifest(run)
        self._remove_unnamed()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, round: int, server: State, changed: Mapping[int, Callable[[], State]]) -> None:
        """Have the state after `round` written: the server's, and those clients' that changed since the last time.

        What the callables give must not change afterwards: they are called one after the other, on the writer's
        thread. Waits for the write before this one, and raises what that raised.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, round, server, changed)

    def wait(self) -> None:
        """Return when everything submitted is on disk. Raises OSError if it is not, from then on every time."""
        if self._pending is not None:
            self._pending.result()

    def close(self) -> None:
        """End the thread, once it has written what was submitted."""
        self._thread.shutdown()

    def _write(self, round: int, server: State, changed: Mapping[int, Callable[[], State]]) -> None:
        entry = write_state(self.folder, f"server.r{round}.safetensors", server)
        new = {c: write_state(self.folder, f"client-{c}.r{round}.safetensors", s()) for c, s in changed.items()}
        self.manifest = Manifest(round, entry, dict(sorted((self.manifest.clients | new).items())))
        write_manifest(self.folder, self.manifest)
        self._remove_unnamed()

    def _remove_unnamed(self) -> None:
        named = {self.manifest.server.file} | {entry.file for entry in self.manifest.clients.values()}
        for path in self.folder.iterdir():
            if path.name not in named and OURS.fullmatch(path.name):
                path.unlink()


def create(run: Path, server: State) -> None:
    """The checkpoint of a run before its first round."""
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    write_manifest(folder, Manifest(0, write_state(folder, "server.r0.safetensors", server)))


def entry_of(folder: Path, name: str) -> Entry:
    """What states a file that is there."""
    path = folder / name
    with path.open("rb") as file:
        return Entry(name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_state(folder: Path, name: str, state: State) -> Entry:
    """Write one file of a checkpoint, which no manifest names yet."""
    content = save(state)
    write(folder / name, content)
    return Entry(name, len(content), hashlib.sha256(content).hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make the checkpoint that `manifest` describes the run's, all at once."""
    sync_folder(folder)
    content = {"format": FORMAT} | asdict(manifest)
    write_atomic(folder / "manifest.json", json.dumps(content, indent=1).encode())
