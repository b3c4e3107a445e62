"""Vision transformers have the published sizes, and patches that keep the number of tokens usual."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmoe.errors import UserError
from fedmoe.experts import build, width
from fedmoe.models.vit import Block, Extractor
from tests.support import size


@pytest.mark.parametrize(
    ("name", "parameters", "d"),
    [("vit-tiny", 5_717_416, 192), ("vit-small", 22_050_664, 384), ("vit-base", 86_567_656, 768)],
)
def test_published_parameter_counts(name: str, parameters: int, d: int) -> None:
    with torch.device("meta"):
        extractor, header = build(name, (3, 224, 224), 1000)
    assert size(extractor, header) == parameters
    assert isinstance(header, nn.Linear) and header.in_features == d


@pytest.mark.parametrize(
    ("height", "width_", "patch"),
    [(32, 32, 4), (28, 28, 4), (64, 64, 8), (96, 96, 8), (224, 224, 16), (384, 384, 16), (100, 100, 10), (48, 96, 6),
     (25, 30, 5), (8, 8, 4), (15, 45, 5)],
)  # fmt: skip
def test_patches(height: int, width_: int, patch: int) -> None:
    with torch.device("meta"):
        extractor = build("vit-tiny", (1, height, width_), 10).extractor
    assert isinstance(extractor, Extractor)
    assert extractor.patches.kernel_size == extractor.patches.stride == (patch, patch)
    assert extractor.places.shape == (1, 1 + height * width_ // patch**2, 192)


@pytest.mark.parametrize(("shape", "better"), [((1, 31, 31), 32), ((3, 34, 34), 32), ((3, 32, 33), 32), ((1, 3, 3), 8)])
def test_images_that_no_patch_divides_are_refused(shape: tuple[int, int, int], better: int) -> None:
    with pytest.raises(UserError, match=rf"'vit-tiny' .* not divide {shape[1]}x{shape[2]}: set .* such as {better}$"):
        build("vit-tiny", shape, 10)


def test_non_square_images_of_any_channels() -> None:
    assert width(build("vit-tiny", (2, 16, 24), 10).extractor, (2, 16, 24)) == 192


def test_block_is_written_out() -> None:
    torch.manual_seed(0)
    block, x = Block(128, 2), torch.randn(3, 5, 128)
    for p in block.parameters():
        nn.init.normal_(p, std=0.1)
    h = F.layer_norm(x, (128,), block.norm1.weight, block.norm1.bias, 1e-6)
    q, k, v = (h @ block.qkv.weight.T + block.qkv.bias).chunk(3, dim=-1)
    heads = []
    for i in (slice(0, 64), slice(64, 128)):
        weights = (q[..., i] @ k[..., i].transpose(1, 2) / 8).softmax(-1)
        heads.append(weights @ v[..., i])
    y = x + block.out(torch.cat(heads, dim=-1))
    h = F.layer_norm(y, (128,), block.norm2.weight, block.norm2.bias, 1e-6)
    torch.testing.assert_close(block(x), y + block.fc2(F.gelu(block.fc1(h))), rtol=1e-4, atol=1e-4)


def test_every_patch_and_its_place_count() -> None:
    torch.manual_seed(0)
    shape = (1, 8, 8)
    extractor = build("vit-tiny", shape, 10).extractor
    x = torch.randn(1, *shape)
    before = extractor(x)
    for row in (0, 4):
        for column in (0, 4):
            changed = x.clone()
            changed[..., row, column] += 1
            assert not torch.allclose(extractor(changed), before, atol=1e-5)
    assert not torch.allclose(extractor(x.roll(4, 2)), before, atol=1e-5)  # the same patches elsewhere
