"""What a step is said to take, against what PyTorch's allocator is asked for when it is taken."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import profile

from fedmoe import mixture
from fedmoe.config import Config
from fedmoe.engine.arena import Arena, Layout
from fedmoe.engine.footprint import footprint
from fedmoe.engine.graphs import Track
from fedmoe.engine.member import SGD, Samples
from fedmoe.engine.samples import Loader
from fedmoe.engine.step import How, Step

OPTIMIZER = SGD(lr=0.01, momentum=0.9, weight_decay=0.0, reset_theta=True)


def peak(do: Callable[[], object]) -> int:
    """Bytes that are allocated at a time, at most, while `do` runs."""
    with profile(profile_memory=True) as found:
        do()
    assert found.profiler is not None
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("how", [How(), How(optimizer="flat"), How(precision="bf16", optimizer="flat")])
@pytest.mark.parametrize("batch", [8, 32])
def test_footprint_is_what_a_step_allocates(how: How, batch: int) -> None:
    model = mixture.build(Config(), 0, (3, 32, 32), 10)
    samples = Samples(torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64), 0.5, 0.5)
    found = footprint(model, mixture.Mixture.program, samples, OPTIMIZER, how, batch, 64)
    program = model.program()
    layout, device = Layout.of(program, OPTIMIZER), torch.device("cpu")
    arena = Arena(program, layout, torch.zeros(layout.size, dtype=torch.uint8), how.low)
    steps: list[Step] = []

    def train() -> None:
        steps.append(Step(arena, Loader(samples, device, True), OPTIMIZER, how, Track(device, False)))
        steps[0].begin()
        for _ in steps[0].epoch(torch.arange(batch).repeat(2, 1)):
            pass

    assert found.training == pytest.approx(peak(train), rel=0.01)
    steps[0].optimizer.clear()
    evaluated = peak(lambda: list(steps[0].evaluate(torch.arange(64), 64)))
    assert found.evaluation == pytest.approx(evaluated, rel=0.01)
