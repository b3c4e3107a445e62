"""`fedmoe doctor` on this machine, and on machines with planted faults, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedmoe.doctor
from fedmoe.doctor import Fact, facts
from fedmoe.errors import UserError

CALL = "import sys; from fedmoe.cli import main; sys.exit(main(['doctor', *sys.argv[1:]]))"


def doctor(*argv: str, planted: Path | None = None) -> subprocess.CompletedProcess[str]:
    checkout = Path(fedmoe.doctor.__file__).parents[1]
    path = os.pathsep.join(str(p) for p in (planted, checkout) if p)
    return subprocess.run(
        [sys.executable, "-c", CALL, *argv],
        cwd=planted,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def planted_facts(planted: Path) -> dict[str, Fact]:
    result = doctor("--json", planted=planted)
    assert "Traceback" not in result.stderr
    return {fact["name"]: Fact(**fact) for fact in json.loads(result.stdout)}


def plant(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_facts_of_this_machine() -> None:
    found = {fact.name: fact for fact in facts()}
    assert {"Python", "PyTorch", "CPU threads", "NVIDIA driver", "Triton", "native, host", "native, CUDA"} <= set(found)
    assert {"NVIDIA apex", "Hugging Face datasets", "tensorboardX"} <= set(found)
    assert found["Python"].status == found["PyTorch"].status == "ok"
    assert all(fact.found and fact.enables and "\n" not in fact.found for fact in found.values())


def test_table_and_json_say_the_same(tmp_path: Path) -> None:
    table, as_json = doctor(planted=tmp_path), doctor("--json", planted=tmp_path)
    assert table.returncode == as_json.returncode == 0, table.stderr + as_json.stderr
    for fact in json.loads(as_json.stdout):
        assert fact["name"] in table.stdout


def test_unrelated_apex_is_named(tmp_path: Path) -> None:
    fact = planted_facts(plant(tmp_path, {"apex/__init__.py": "", "apex/session.py": ""}))["NVIDIA apex"]
    assert fact.status == "warning"
    assert "unrelated to NVIDIA apex" in fact.found and "pip uninstall apex" in fact.enables


@pytest.mark.parametrize("planted", ["raise RuntimeError('two\\nlines')", "raise SystemExit(3)", "import gone"])
def test_apex_that_fails_to_import_is_a_warning(tmp_path: Path, planted: str) -> None:
    fact = planted_facts(plant(tmp_path, {"apex/__init__.py": planted, "amp_C.py": planted}))["NVIDIA apex"]
    assert fact.status == "warning" and "\n" not in fact.found


def test_genuine_apex_is_accepted(tmp_path: Path) -> None:
    files = {"amp_C.py": "", "apex/__init__.py": "", "apex/optimizers.py": "class FusedAdam: pass"}
    assert planted_facts(plant(tmp_path, files))["NVIDIA apex"].status == "ok"


def test_package_named_like_our_folders_is_a_warning(tmp_path: Path) -> None:
    info = {"METADATA": "Metadata-Version: 2.1\nName: hub-kernels\nVersion: 9.1\n", "top_level.txt": "kernels\n"}
    plant(tmp_path, {"kernels/__init__.py": "", **{f"hub_kernels-9.1.dist-info/{k}": v for k, v in info.items()}})
    found = planted_facts(tmp_path)
    assert found["package `kernels`"].status == "warning"
    assert "hub-kernels 9.1" in found["package `kernels`"].found
    assert "package `engine`" not in found


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("__version__ = '2.8.0+cpu'", "2.8.0+cpu is older than 2.11"),
        ("raise ImportError('libtorch.so')", "libtorch.so"),
    ],
)
def test_unusable_torch_is_broken_in_one_line(tmp_path: Path, source: str, said: str) -> None:
    result = doctor(planted=plant(tmp_path, {"torch.py": source}))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert said in line and "pip install 'torch>=2.11'" in line


def test_driver_without_cuda_torch_is_a_warning(tmp_path: Path) -> None:
    nvml = """
def nvmlInit(): pass
def nvmlSystemGetDriverVersion(): return "580.1"
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(handle): return "NVIDIA H200"
"""
    torch = """
__version__ = "2.13.0+cpu"
class version: cuda = None
class cuda: is_available = staticmethod(lambda: False)
def get_num_threads(): return 1
"""
    found = planted_facts(plant(tmp_path, {"pynvml.py": nvml, "torch.py": torch}))
    assert found["NVIDIA driver"].found == "580.1"
    assert found["GPU"].status == "warning" and "NVIDIA H200" in found["GPU"].found


def test_works_without_rich(tmp_path: Path) -> None:
    result = doctor(planted=plant(tmp_path, {"rich.py": "raise ImportError('gone')"}))
    assert result.returncode == 0 and "PyTorch" in result.stdout


def test_kernels_are_compiled_for_each_architecture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    from fedmoe.kernels import shipped

    some = [made for made in shipped.shipped() if made.kernel in ("gated_head totals", "gated_mix forward")]
    monkeypatch.setattr(shipped, "shipped", lambda: iter(some))
    assert fedmoe.doctor.run(True, kernels=True) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 2 * len(some) and {row["sm"] for row in rows} == {80, 90}
    assert all(row["registers"] > 0 and row["spilled"] == 0 for row in rows)
    assert fedmoe.doctor.run(False, kernels=True) == 0
    assert "gated_mix forward" in capsys.readouterr().out


def test_kernels_without_triton_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedmoe.doctor, "_import", lambda name: (None, "not installed"))
    with pytest.raises(UserError, match="compiles with Triton, which is missing"):
        fedmoe.doctor.run(False, kernels=True)
