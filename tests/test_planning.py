"""Facts of this machine, sizes of a federation, and `fedmoe plan`."""

from pathlib import Path

import pytest
import torch

from fedmoe import planning
from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.engine.facts import Sizes, facts
from fedmoe.engine.fit import place
from fedmoe.engine.plan import CHOICES, Plan
from fedmoe.engine.step import How
from tests.engines import engine
from tests.hfmodels import save
from tests.support import SMALL, Fedmoe, begin, changed


def test_facts_of_this_machine() -> None:
    found = facts(torch.device("cpu"))
    assert (found.device, found.device_total, found.capability) == ("cpu", 0, (0, 0))
    assert 0 < found.host_available <= found.host_total
    assert found.no_kernels and found.no_apex


def measured(config: Config) -> Sizes:
    dataset = load_data(config.data, config.seed)
    split = planning.deal(config, dataset)
    return planning.sizes(config, dataset, split, planning.models(config, dataset, split), facts(torch.device("cpu")))


def test_sizes_of_a_federation(config: Config) -> None:
    config = changed(config, federation={"clients": 7, "fraction": 0.5}, model={"local": ("cnn-1", "cnn-5", "cnn-1")})
    sizes = measured(config)
    assert [(a.name, a.clients) for a in sizes.architectures] == [("cnn-1", 5), ("cnn-5", 2)]
    assert (sizes.clients, sizes.sampled, sizes.batch, sizes.branches) == (7, 4, 16, 3)
    assert sizes.samples == 300 * (28 * 28 + 8)
    first = sizes.architectures[0]
    assert 0 <= first.state - 8 * first.trainable < 2 * 256 * 40 and not first.frozen and not first.batch_statistics
    # Input, and each layer's as the next one's input: at least the two convolutions' outputs, of both experts.
    assert first.activations > 4 * (28 * 28 + 2 * 20 * 24 * 24)
    normed = measured(changed(config, gate={"norm": "paper"}, training={"momentum": 0.0})).architectures[0]
    assert normed.batch_statistics and normed.buffers and normed.state > 8 * normed.trainable + normed.buffers
    assert measured(changed(config, method="local")).branches == 1


def test_states_take_what_a_store_of_them_holds(config: Config, tmp_path: Path) -> None:
    """Of clients whose pretrained weights do not train."""
    local = (f"hf/{save('vit', tmp_path)}", "cnn-5")
    config = changed(config, model={"local": local, "tune": "frozen", "adapter": "linear", "global_expert": "cnn-5"})
    sizes = measured(config)
    with engine(config, begin(config, tmp_path / "run"), How()) as made:
        for client in range(5):
            made.site.roster[client]
        assert place(sizes, 0, 10**12) == (0, made.store.held["host"], 0)
    assert sizes.architectures[0].same and sizes.architectures[0].constants > 0


def test_command_shows_table_and_json(fedmoe: Fedmoe, tmp_path: Path) -> None:
    done = fedmoe("plan", *SMALL, "--run.device=cpu", "--engine.graphs=on")
    assert done.code == 0 and all(name in done.out for name in (*CHOICES, "samples", "gradients"))
    assert done.err == "fedmoe: warning: engine.graphs = on cannot be had: a CPU has none; taken instead: off\n"
    (tmp_path / "c.toml").write_text("[engine]\ncohort = 1\n")
    done = fedmoe("plan", "c.toml", "--json", *SMALL, "--run.device=cpu")
    assert done.code == 0 and done.err == ""
    assert Plan.from_json(done.out).reasons["cohort"] == "engine.cohort = 1"
    assert [path.name for path in tmp_path.iterdir()] == ["c.toml"]


@pytest.mark.parametrize(
    ("words", "line", "code"),
    [
        (["nowhere.toml"], "nowhere.toml: cannot be read", 1),
        (["--engine.lanes=-1"], "engine.lanes is -1, must be 0 or more", 1),
        (["--engine.head=fused"], 'engine.head is "fused", but the kernels cannot run', 1),
        (["--engine.optimizer=apex"], 'engine.optimizer is "apex", but NVIDIA apex cannot be used', 1),
        (["--model.local=cnn-9"], "model 'cnn-9' is none of cnn-1", 1),
        (["--engine.lane=2"], "unknown key '--engine.lane'; the nearest is 'engine.lanes'", 2),
    ],
)
def test_command_fails_in_one_line(fedmoe: Fedmoe, words: list[str], line: str, code: int) -> None:
    path = [w for w in words if w.endswith(".toml")]
    done = fedmoe("plan", *path, *SMALL, "--run.device=cpu", *(w for w in words if w not in path))
    assert line in done.one_line(code)
