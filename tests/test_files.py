"""A folder is there whole or not at all."""

from pathlib import Path

import pytest

from fedmoe.files import whole_folder


def test_a_folder_appears_with_all_that_is_in_it(tmp_path: Path) -> None:
    for path in (tmp_path / "new" / "folder", tmp_path / "empty"):
        if path.name == "empty":
            path.mkdir()
        with whole_folder(path) as made:
            (made / "a").write_text("1")
            assert not (path / "a").exists()
        assert [file.name for file in path.iterdir()] == ["a"]
        assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []
        plain = tmp_path / f"plain-{path.name}"
        plain.mkdir()
        assert path.stat().st_mode == plain.stat().st_mode


def test_what_raises_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "above" / "new") as made:
        (made / "a").write_text("1")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "old").write_text("1")
    with pytest.raises(OSError) as caught, whole_folder(full) as made:
        (made / "new").write_text("1")
    assert caught.value.filename or caught.value.filename2
    assert [file.name for file in full.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [full]
