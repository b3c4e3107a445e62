"""Checkpoints: safetensors files that are never modified, and a manifest, renamed into place last, that names them.

`checkpoints/manifest.json` gives the round, the server's file and every trained client's, each with its size and
SHA-256. A client that has not changed since keeps its file. Files the manifest does not name are leftovers of a kill
and are removed by the next writer. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fedmoe.engine.seam import State
from fedmoe.errors import UserError
from fedmoe.files import sync_folder, write_atomic

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a checkpoint."""

    file: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file:
            raise ValueError(f"file {self.file!r} is not a plain name")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole checkpoint: what the run was after `round` rounds."""

    round: int
    server: Entry
    clients: dict[int, Entry] = field(default_factory=dict)


def read_manifest(run: Path) -> Manifest | None:
    """The checkpoint of the run in folder `run`; None if it has none yet. Raises UserError if it cannot be read."""
    path = run / "checkpoints" / "manifest.json"
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise UserError(
                f"{path}: format {content['format']}, this version reads {FORMAT}: use the version that wrote it"
            )
        clients = {int(client): Entry(**entry) for client, entry in content["clients"].items()}
        return Manifest(int(content["round"]), Entry(**content["server"]), clients)
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest ({type(error).__name__}: {error}); restore it from a copy") from error


def load(run: Path, entry: Entry) -> State:
    """The tensors of one file of the run's checkpoint. Raises UserError naming the file and the check that failed."""
    path = run / "checkpoints" / entry.file
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise UserError(f"{path}: size is {size} bytes, the manifest says {entry.bytes}: restore it from a copy")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry.sha256:
            raise UserError(
                f"{path}: SHA-256 is {digest[:12]}..., the manifest says {entry.sha256[:12]}...: restore it from a copy"
            )
        return load_file(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}), but the manifest names it: restore it from a copy"
        ) from error
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error}): restore it from a copy") from error


class Writer:
    """Writes a run's checkpoints on a thread of its own, one after the other."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoints"
        self.folder.mkdir(exist_ok=True)
        self.manifest = read_manifest(run)
        self._remove_unnamed()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, round: int, server: State, changed: dict[int, State]) -> float:
        """Have the state after `round` written: the server's, and those clients' that changed since the last time.

        The tensors must not change afterwards. Returns the seconds the caller was held up, waiting for the write
        before this one. Raises what that write raised.
        """
        start = time.perf_counter()
        self.wait()
        self._pending = self._thread.submit(self._write, round, server, changed)
        return time.perf_counter() - start

    def wait(self) -> None:
        """Return when everything submitted is on disk; raise what writing it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait, then end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, round: int, server: State, changed: dict[int, State]) -> None:
        before = self.manifest.clients if self.manifest else {}
        server_entry = self._write_file(f"server.r{round}.safetensors", server)
        after = {client: self._write_file(f"client-{client}.r{round}.safetensors", s) for client, s in changed.items()}
        sync_folder(self.folder)
        manifest = Manifest(round, server_entry, dict(sorted((before | after).items())))
        content = {"format": FORMAT} | asdict(manifest)
        write_atomic(self.folder / "manifest.json", json.dumps(content, indent=1).encode())
        self.manifest = manifest
        self._remove_unnamed()

    def _write_file(self, name: str, state: State) -> Entry:
        content = save(state)
        with (self.folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return Entry(name, len(content), hashlib.sha256(content).hexdigest())

    def _remove_unnamed(self) -> None:
        named = {"manifest.json"}
        if self.manifest:
            named |= {self.manifest.server.file} | {entry.file for entry in self.manifest.clients.values()}
        for path in self.folder.iterdir():
            if path.name not in named:
                path.unlink()
