"""What every test on a GPU leaves behind is put back: the process is that of the other tests, too."""

from collections.abc import Iterator

import pytest
import torch

from fedmoe.engine.device import prepare


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")
    prepare("cpu", 0, False)
