"""Checkpoints are whole or not there; a bad one is refused by the file's name and the check it failed."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from fedmoe import checkpoint
from fedmoe.checkpoint import Writer, load, read_manifest
from fedmoe.engine.seam import State
from fedmoe.errors import UserError


def given(states: dict[int, State]) -> dict[int, Callable[[], State]]:
    """As an engine gives them."""
    return {client: partial(copy.copy, content) for client, content in states.items()}


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model/w": torch.full((3, 2), value), "model/n": torch.tensor(7)}


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def written(run: Path) -> Writer:
    checkpoint.create(run, {"theta": torch.zeros(4)})
    writer = Writer(run)
    writer.submit(1, {"theta": torch.ones(4)}, given({0: state(1), 3: state(3)}))
    writer.wait()
    return writer


def test_a_run_has_a_checkpoint_before_its_first_round(tmp_path: Path) -> None:
    checkpoint.create(tmp_path, {"theta": torch.ones(4)})
    manifest = read_manifest(tmp_path)
    assert (manifest.round, manifest.clients) == (0, {})
    assert torch.equal(load(tmp_path, manifest.server)["theta"], torch.ones(4))


def test_missing_manifest_is_refused_and_nothing_removed(tmp_path: Path) -> None:
    written(tmp_path).close()
    (tmp_path / "checkpoints" / "manifest.json").unlink()
    before = names(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json: is missing: restore it from a copy"):
        Writer(tmp_path)
    assert names(tmp_path) == before


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written(tmp_path).close()
    manifest = read_manifest(tmp_path)
    assert manifest.round == 1
    assert torch.equal(load(tmp_path, manifest.server)["theta"], torch.ones(4))
    assert list(manifest.clients) == [0, 3]
    back = load(tmp_path, manifest.clients[3])
    assert back.keys() == state(3).keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state(3).items())


def test_only_changed_clients_are_written_and_old_files_go_after(tmp_path: Path) -> None:
    writer = written(tmp_path)
    kept = tmp_path / "checkpoints" / "client-0.r1.safetensors"
    before = kept.stat()
    writer.submit(2, {"theta": torch.zeros(4)}, given({3: state(4)}))
    writer.close()
    assert names(tmp_path) == [
        "client-0.r1.safetensors",
        "client-3.r2.safetensors",
        "manifest.json",
        "server.r2.safetensors",
    ]
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_nothing_shared_is_a_checkpoint_too(tmp_path: Path) -> None:
    checkpoint.create(tmp_path, {})
    writer = Writer(tmp_path)
    writer.submit(1, {}, given({0: state(1)}))
    writer.close()
    manifest = read_manifest(tmp_path)
    assert load(tmp_path, manifest.server) == {}


def test_leftovers_of_a_kill_are_removed_by_the_next_writer(tmp_path: Path) -> None:
    written(tmp_path).close()
    before = names(tmp_path)
    for name in ("client-3.r2.safetensors", "server.r2.safetensors", ".manifest.json.tmp"):
        (tmp_path / "checkpoints" / name).write_bytes(b"half")
    Writer(tmp_path).close()
    assert names(tmp_path) == before


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    writer = written(tmp_path)
    for name in ("notes.txt", "manifest.json.bak", "best.safetensors"):
        (tmp_path / "checkpoints" / name).write_text("mine")
    (tmp_path / "checkpoints" / "server.r9.safetensors.d").mkdir()
    writer.submit(2, {"theta": torch.zeros(4)}, {})
    writer.close()
    Writer(tmp_path).close()
    assert {"notes.txt", "manifest.json.bak", "best.safetensors", "server.r9.safetensors.d"} <= set(names(tmp_path))


@pytest.mark.parametrize("fail_at", range(1, 7))
def test_a_write_that_fails_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    """The disk refuses at each of the flushes of a checkpoint in turn; the error reaches whoever waits."""
    writer = written(tmp_path)
    calls = 0

    def refuse(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    writer.submit(2, {"theta": torch.zeros(4)}, given({0: state(5), 3: state(4)}))
    for _ in range(2):  # every time from then on: what was to be written is not there
        with pytest.raises(OSError, match="No space left"):
            writer.wait()
    manifest = read_manifest(tmp_path)
    if fail_at < 6:  # the sixth comes after the manifest is in place
        assert manifest.round == 1
        assert torch.equal(load(tmp_path, manifest.server)["theta"], torch.ones(4))
        assert torch.equal(load(tmp_path, manifest.clients[3])["model/w"], torch.full((3, 2), 3.0))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "size is .* bytes, the manifest says"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\xff"), "SHA-256 is .*, the manifest says"),
        (lambda p: p.unlink(), "cannot be read .*but the manifest names it"),
    ],
)
def test_bad_file_is_named_with_the_check_it_failed(tmp_path: Path, spoil: object, complaint: str) -> None:
    written(tmp_path).close()
    spoil(tmp_path / "checkpoints" / "client-3.r1.safetensors")  # type: ignore[operator]
    manifest = read_manifest(tmp_path)
    with pytest.raises(UserError, match=rf"client-3\.r1\.safetensors: {complaint}"):
        load(tmp_path, manifest.clients[3])


def test_file_that_is_no_safetensors_file_is_refused_even_with_the_right_hash(tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "checkpoints").mkdir()
    content = b"\x80\x04K\x01."  # a pickle
    (tmp_path / "checkpoints" / "x.safetensors").write_bytes(content)
    entry = checkpoint.Entry("x.safetensors", len(content), hashlib.sha256(content).hexdigest())
    with pytest.raises(UserError, match="not a safetensors file"):
        load(tmp_path, entry)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 1, "round": 1}', '{"format": 1, "round": 1, "server": 3, "clients": {}}']
)
def test_bad_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest"):
        read_manifest(tmp_path)


def test_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    written(tmp_path).close()
    path = tmp_path / "checkpoints" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match="format 2, this version reads 1"):
        read_manifest(tmp_path)


def test_manifest_names_files_of_their_owners_alone(tmp_path: Path) -> None:
    written(tmp_path).close()
    path = tmp_path / "checkpoints" / "manifest.json"
    text = path.read_text()
    for wrong in ("../../server.r1.safetensors", "client-0.r1.safetensors"):
        path.write_text(text.replace("server.r1.safetensors", wrong))
        with pytest.raises(UserError, match="is not a file of server"):
            read_manifest(tmp_path)
    path.write_text(text.replace("client-3.r1", "client-0.r1"))
    with pytest.raises(UserError, match="is not a file of client-3"):
        read_manifest(tmp_path)
