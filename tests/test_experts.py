"""The paper's models have the paper's sizes; a user's model is taken in or refused in one line."""

import pytest
import torch
from torch import nn

from fedmoe.errors import UserError
from fedmoe.experts import CIFAR, MNIST, build, width

CIFAR_SHAPE, MNIST_SHAPE = (3, 32, 32), (1, 28, 28)


def size(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


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


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 20, 24), (3, 33, 47), (1, 16, 16)])
def test_other_image_sizes_that_fit(shape: tuple[int, int, int]) -> None:
    extractor, header = build("cnn-1", shape, 7)
    assert header(extractor(torch.zeros(2, *shape))).shape == (2, 7)


def test_images_too_small_are_refused() -> None:
    with pytest.raises(UserError, match=r"at least 16x16 pixels, not 8x8: set data\.image_size"):
        build("cnn-1", (1, 8, 8), 10)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match="'cnn-6' is none of cnn-1, cnn-2"):
        build("cnn-6", CIFAR_SHAPE, 10)


def make_pair(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(6)), nn.Linear(6, classes)


def make_module(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.ModuleDict(dict(zip(("extractor", "header"), make_pair(shape, classes), strict=True)))


def make_one(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Flatten()


def make_that_fails(shape: tuple[int, int, int], classes: int) -> None:
    raise KeyError("x")


def make_that_exits(shape: tuple[int, int, int], classes: int) -> None:
    raise SystemExit(3)


class Pair(nn.Flatten):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return x, x


def make_tuples(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return Pair(), nn.Linear(6, classes)


SHARED = nn.Sequential(nn.Flatten(), nn.Linear(784, 50))


def make_shared(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return SHARED, nn.Linear(50, classes)


def make_wrong_classes(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return nn.Flatten(), nn.LazyLinear(classes + 1)


def make_that_does_not_run(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(nn.Flatten(), nn.Linear(3, 6)), nn.Linear(6, classes)


def test_factory() -> None:
    extractor, header = build(f"{__name__}:make_pair", CIFAR_SHAPE, 10)
    assert width(extractor, CIFAR_SHAPE) == 6
    assert header(extractor(torch.zeros(3, *CIFAR_SHAPE))).shape == (3, 10)


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("no_such_module:make", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        (f"{__name__}:no_such_name", "cannot be imported: AttributeError: module .* has no attribute 'no_such_name'"),
        (f"{__name__}:MNIST_SHAPE", "is a tuple, must be a callable"),
        ("os:getcwd", "cannot be made .*: TypeError: "),
        (f"{__name__}:make_that_fails", "cannot be made .*: KeyError: 'x'"),
        (f"{__name__}:make_that_exits", "cannot be made .*: SystemExit: 3"),
        (":make", "cannot be imported: ValueError: Empty module name"),
        (f"{__name__}:make_tuples", "does not run on images of .*: "),
        (f"{__name__}:make_one", r"gave Flatten, must give \(extractor, header\)"),
        (f"{__name__}:make_wrong_classes", r"logits \[2, 11\] for 2 images, must give \[2, D\] and \[2, 10\]"),
        (f"{__name__}:make_that_does_not_run", r"does not run on images of \[3, 32, 32\]"),
    ],
)
def test_factory_that_does_not_fit(factory: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build(factory, CIFAR_SHAPE, 10)


def test_factory_that_hands_out_one_object_does_not_have_clients_share_it() -> None:
    first, second = (build(f"{__name__}:make_shared", MNIST_SHAPE, 10).extractor for _ in range(2))
    assert first is not second
    assert not {p.data_ptr() for p in first.parameters()} & {p.data_ptr() for p in second.parameters()}
