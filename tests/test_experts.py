"""Models come by name; a user's model is taken in or refused in one line."""

import pytest
import torch
from torch import nn

from fedmoe.errors import UserError
from fedmoe.experts import FAMILIES, build, width

CIFAR_SHAPE, MNIST_SHAPE = (3, 32, 32), (1, 28, 28)


def test_every_family_is_known_by_name() -> None:
    assert list(FAMILIES) == [
        *(f"cnn-{i}" for i in range(1, 6)),
        *("resnet-18", "resnet-34", "resnet-50"),
        *("vit-tiny", "vit-small", "vit-base"),
    ]


@pytest.mark.parametrize("name", ["cnn-6", "resnet18", "", "timm"])
def test_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(
        UserError, match=f"'{name}' is none of cnn-1, cnn-2, .*vit-base, nor `timm/NAME`, `hf/NAME` or `package"
    ):
        build(name, CIFAR_SHAPE, 10)


def make_pair(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(6)), nn.Linear(6, classes)


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
