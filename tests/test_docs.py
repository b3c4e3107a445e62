"""Every command that the README and the documentation show works as shown; the site builds without a warning."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from docs import reference
from fedmoe.config import Config
from tests.support import ROOT, SMALL, Command

NOT_RUN = ("make", ".", "pip")
"""Programs of a fresh machine: the test is in what they make."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if blocks(page, "console")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_run_as_shown(tmp_path: Path, page: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for block in blocks(page, "python") + blocks(page, "toml"):
        name = re.match(r"# ([\w/-]+\.(py|toml))\n", block)
        assert name, f"the first line must be a comment that names the file:\n{block}"
        (tmp_path / name[1]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name[1]).write_text(block)
    for line in "".join(blocks(page, "console")).splitlines():
        assert line.startswith("$ "), line
        program, *words = shlex.split(line.removeprefix("$ "), comments=True)
        if program == "fedmoe":
            done = Command(tmp_path, *words).wait()
            assert done.code == 0, (words, done)
        elif program == "python":
            subprocess.run([sys.executable, *words], cwd=tmp_path, check=True)
        elif program == "pytest":  # which has our plugin where the project is installed
            env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "pytest", "-p", "fedmoe.profiling.plugin", *words]
            done_ = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
            assert done_.returncode == 0, done_.stdout + done_.stderr
        else:
            assert program in NOT_RUN, line


def test_pages_with_commands_are_found() -> None:
    assert {"README.md", "first-run.md", "own-model.md", "benchmarks.md"} <= {page.name for page in PAGES}


def test_make_targets_that_pages_show_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {name for page in pages for name in re.findall(r"(?:\$ |`)make (\w+)", page.read_text())}
    assert {"demo", "docs"} <= shown <= targets


def test_readme_names_every_command_and_no_other() -> None:
    from fedmoe.cli import _parser

    [commands] = [action.choices for action in _parser()._actions if action.dest == "command"]
    assert commands is not None
    named = re.findall(r"^\| `fedmoe (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert named == list(commands)


def test_what_a_run_leaves_is_documented(tmp_path: Path) -> None:
    done = Command(tmp_path, "train", *SMALL, "--evaluation.aggregated", "--run.dir", "a").wait()
    assert done.code == 0, done
    page = (ROOT / "docs" / "first-run.md").read_text().partition("## The run folder")[2].partition("## Repro")[0]
    files, keys = (set(re.findall(r"`([^`]+)`", part)) for part in page.split("## Metrics"))
    made = {path.name + "/" * path.is_dir() for path in (tmp_path / "a").iterdir()} - {".lock"}
    assert {re.sub(r"^events\..+", "events.*", name) for name in made} <= files
    line = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line.keys() | line["clients"].keys() | line["seconds"].keys() <= keys


def test_every_field_has_a_docstring_and_is_in_the_reference() -> None:
    sections: dict[str, type] = {"Without a section": Config} | reference.sections()
    assert len(sections) == 1 + sum(is_dataclass(getattr(Config(), f.name)) for f in fields(Config))
    parts = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", reference.reference(), re.MULTILINE | re.DOTALL))
    assert list(parts) == list(sections)
    for name, section in sections.items():
        texts = reference.documented(section)
        plain = [f.name for f in fields(section) if section is not Config or f.name not in sections]
        assert [field for field in plain if not texts.get(field)] == [], f"no docstring in section {name}"
        assert re.findall(r"^`(\w+)`: .+; default `.+`\n: .", parts[name], re.MULTILINE) == plain


def test_reference_of_a_field() -> None:
    text = reference.reference()
    assert '\n`theta_momentum`: `"keep"`, `"reset"`; default `"reset"`\n: What becomes of the global' in text
    assert (
        '\n`local`: list of strings; default `["cnn-1", "cnn-2", "cnn-3", "cnn-4", "cnn-5"]`\n: Local models; ' in text
    )
    assert "\n`deterministic`: true or false; default `false`\n: Use " in text


def test_every_page_is_listed_and_every_link_leads_somewhere() -> None:
    pages, index = sorted((ROOT / "docs").rglob("*.md")), (ROOT / "docs" / "index.md").read_text()
    listed = {(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)#:]+\.md)", index)}
    assert set(pages) - listed == {ROOT / "docs" / "index.md"}
    for page in [*pages, ROOT / "README.md"]:
        for link in re.findall(r"\]\(([^)#:]+)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"


def test_site_builds_without_a_warning_and_asks_no_network(tmp_path: Path) -> None:
    for module in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(module, reason="`make docs` installs what builds the documentation")
    words = ["-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-d", str(tmp_path / "doctrees")]
    done = subprocess.run([sys.executable, *words, "docs", str(tmp_path / "site")], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {path.name for path in pages} >= {"index.html", "search.html", "configuration.html"}
    for page in pages:
        asked = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*", page.read_text())
        assert asked == [], page
    assert "Dirichlet distribution" in (tmp_path / "site" / "configuration.html").read_text()
