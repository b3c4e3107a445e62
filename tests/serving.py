"""Makes trained clients to serve, without a run: their batch statistics and adapters are not what they began as."""

from dataclasses import replace

import torch
from torch import nn

from fedmoe import mixture
from fedmoe.config import Config, Data, Gate, Model
from fedmoe.models import resnet, vit
from fedmoe.serving import Card, Served, Serving

SHAPE = (1, 16, 20)


def residual(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    """A ResNet of two blocks, one with a stride."""
    extractor = resnet.Extractor(shape, resnet.Layers((1, 1, 0, 0), False))
    return extractor, nn.Linear(extractor.width, classes)


def transformer(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    """A ViT of one block."""
    return vit.Extractor(shape, 4, vit.Layers(64, 2, 1)), nn.Linear(64, classes)


CONFIGS = {
    "batch norms": Config(gate=Gate(norm="paper")),
    "local": Config(method="local"),
    "static": Config(method="static", static_weight=0.3),
    "resnet with a transformer": Config(
        model=Model(local=(f"{__name__}:residual",), global_expert=f"{__name__}:transformer", adapter="linear")
    ),
}


def served(kind: str) -> Served:
    """A model that has seen some images in training."""
    config, classes = replace(CONFIGS[kind], data=Data(mean=0.4, std=0.2)), tuple("abcdefg")
    model = mixture.build(config, 0, SHAPE, len(classes)).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            model(3 * torch.randn(8, *SHAPE, generator=generator) + 1)
    theta = "none" if config.method == "local" else "own"
    card = Card(client=3, round=7, theta=theta, shape=SHAPE, classes=classes, width=50, config=config)  # type: ignore[arg-type]
    return Served(card, Serving(model, config.data.mean, config.data.std))


def images(n: int) -> torch.Tensor:
    """Noise, uint8 [n, channels, height, width]."""
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
