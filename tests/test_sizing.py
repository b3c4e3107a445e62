"""Ways of taking a step of text, and when which are looked at."""

from dataclasses import replace

import pytest
import torch

from fedmoe import planning
from fedmoe.client import load_data
from fedmoe.config import Config
from fedmoe.engine.facts import Way, facts
from tests.support import changed


@pytest.fixture(scope="module")
def text() -> Config:
    """A small one before a larger one."""
    return changed(
        Config(),
        data={"kind": "text", "name": "stdlib", "sequence_length": 64, "limit": 2000},
        partition={"kind": "natural", "column": "source"},
        federation={"clients": 2},
        model={"local": ("llama-nano", "qwen-tiny"), "global_expert": "llama-nano", "adapter": "linear"},
        training={"batch_size": 8},
    )


def way(config: Config, room: float) -> Way:
    """On a machine with so many bytes."""
    dataset = load_data(config.data, config.seed)
    split = planning.deal(config, dataset)
    on = replace(facts(torch.device("cpu")), host_available=int(room * 5 / 4))
    (found,) = planning.sizes(config, dataset, split, planning.models(config, dataset, split), on).ways
    return found


def test_smaller_parts_where_the_whole_does_not_fit_and_then_checkpointing(text: Config) -> None:
    whole = way(text, 1e12)
    assert (whole.micro_batch, whole.checkpointing) == (0, False)
    assert whole.activations[0] < whole.activations[1]
    part = way(text, whole.activations[1])  # states do not fit beside them
    assert part.micro_batch in (4, 2) and not part.checkpointing
    least = way(text, 1)
    assert (least.micro_batch, least.checkpointing) == (1, True)
    for smaller, larger in ((part, whole), (least, part)):
        assert all(a < b for a, b in zip(smaller.activations, larger.activations, strict=True))


def test_what_is_asked_for_is_kept(text: Config) -> None:
    asked = changed(text, training={"micro_batch": 2}, model={"activation_checkpointing": "on"})
    plenty, none = way(asked, 1e12), way(asked, 1)
    assert (plenty.micro_batch, plenty.checkpointing) == (2, True) and plenty == none
