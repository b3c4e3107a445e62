"""The paper's models have the paper's sizes, at whatever image size they fit."""

import pytest
import torch
from torch import nn

from fedmoe.errors import UserError
from fedmoe.experts import build, width
from fedmoe.models.cnn import CIFAR, MNIST
from tests.support import size

CIFAR_SHAPE, MNIST_SHAPE = (3, 32, 32), (1, 28, 28)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("cnn-1", 2_621_558), ("cnn-2", 1_815_142), ("cnn-3", 1_320_558), ("cnn-4", 1_060_358), ("cnn-5", 670_058)],
)
def test_cifar_family_has_the_papers_parameter_counts(name: str, parameters: int) -> None:
    assert size(*build(name, CIFAR_SHAPE, 10)) == parameters


def test_global_expert_of_the_cifar_family() -> None:
    assert size(build("cnn-5", CIFAR_SHAPE, 10).extractor) == 665_048


@pytest.mark.parametrize(
    ("name", "fc1"), [("cnn-1", 300), ("cnn-2", 200), ("cnn-3", 150), ("cnn-4", 100), ("cnn-5", 50)]
)
def test_mnist_family(name: str, fc1: int) -> None:
    # conv 1->20 and 20->20 of 5x5, 28 -> 24 -> 12 -> 8 -> 4, fc1, fc2 = 50, 10 classes, each with its bias.
    expected = (25 + 1) * 20 + (20 * 25 + 1) * 20 + (20 * 16 + 1) * fc1 + (fc1 + 1) * 50 + 51 * 10
    assert size(*build(name, MNIST_SHAPE, 10)) == expected


@pytest.mark.parametrize(("family", "shape", "d"), [(CIFAR, CIFAR_SHAPE, 500), (MNIST, MNIST_SHAPE, 50)])
def test_all_of_a_family_represent_in_the_same_width(
    family: dict[str, object], shape: tuple[int, int, int], d: int
) -> None:
    assert {width(build(name, shape, 10).extractor, shape) for name in family} == {d}


def test_every_layer_but_the_classifier_is_followed_by_relu() -> None:
    torch.manual_seed(0)
    extractor, header = build("cnn-5", CIFAR_SHAPE, 10)
    x = torch.randn(64, *CIFAR_SHAPE)
    assert extractor(x).min() == 0
    assert header(extractor(x)).min() < 0
    # conv, pool, ReLU twice; fc1, ReLU; fc2, ReLU: written out, in the order that the paper's text gives.
    relu, pool = torch.relu, lambda t: nn.functional.max_pool2d(t, 2)
    e = extractor
    plain = pool(relu(e.conv2(pool(relu(e.conv1(x))))))  # type: ignore[operator]
    plain = relu(e.fc2(relu(e.fc1(plain.flatten(1)))))  # type: ignore[operator]
    assert torch.equal(extractor(x), plain)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 20, 24), (3, 33, 47), (1, 16, 16), (1, 16, 40)])
def test_other_image_sizes_that_fit(shape: tuple[int, int, int]) -> None:
    extractor, header = build("cnn-1", shape, 7)
    assert header(extractor(torch.zeros(2, *shape))).shape == (2, 7)


def test_images_too_small_are_refused() -> None:
    with pytest.raises(UserError, match=r"at least 16x16 pixels, not 8x8: set data\.image_size"):
        build("cnn-1", (1, 8, 8), 10)


@pytest.mark.parametrize("shape", [(3, 224, 224), (1, 160, 320)])
def test_images_that_make_one_layer_absurd_are_refused_with_its_size(shape: tuple[int, int, int]) -> None:
    fc1 = (32 * 53 * 53 if shape[1] == 224 else 32 * 37 * 77) * 2000 / 1e6
    with pytest.raises(UserError, match=f"'cnn-1' would have {fc1:.0f} M parameters in one layer .*{shape[1]}x"):
        build("cnn-1", shape, 10)
    assert width(build("cnn-5", shape, 10).extractor, shape) == 500
