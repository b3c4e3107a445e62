"""Every command that the pages show works as shown."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, Command


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/aggregation.md"])
def test_commands_run_as_shown(tmp_path: Path, page: str) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for block in blocks(page, "python") + blocks(page, "toml"):
        name = re.match(r"# ([\w/]+\.(py|toml))\n", block)
        assert name, block
        (tmp_path / name[1]).write_text(block)
    shown = [line.removeprefix("$ ") for block in blocks(page, "console") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in shown]
    ran = 0
    for program, *words in commands:
        if program == "fedmoe":
            done = Command(tmp_path, *words).wait()
            assert done.code == 0, (words, done)
            ran += 1
        elif program == "pytest":  # which has our plugin where the project is installed
            env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "pytest", "-p", "fedmoe.profiling.plugin", *words]
            done_ = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
            assert done_.returncode == 0 and "test_scale twice" in done_.stdout, done_.stdout + done_.stderr
        else:  # the two commands of a fresh machine, and entering their environment
            assert program in ("make", ".")
    assert ran


def test_readme_names_every_command_and_no_other() -> None:
    from fedmoe.cli import _parser

    [commands] = [action.choices for action in _parser()._actions if action.dest == "command"]
    assert commands is not None
    named = re.findall(r"^\| `fedmoe (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert named == list(commands)
