"""Vision transformers (Dosovitskiy et al., arXiv 2010.11929; the smaller two: Touvron et al., arXiv 2012.12877)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmoe.errors import UserError


class Layers(NamedTuple):
    """Width of a token, the heads that attend to it, each to 64 of it, and the number of blocks."""

    width: int
    heads: int
    depth: int = 12


VITS = {"vit-tiny": Layers(192, 3), "vit-small": Layers(384, 6), "vit-base": Layers(768, 12)}
NAMES = tuple(VITS)
TOKENS = 196
"""Patches of an image of 224x224 pixels, 16x16 each."""


class Block(nn.Module):
    """Attention of all tokens to all, then a perceptron for each, both around a shortcut and behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)  # [B, heads, T, 64]
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class Extractor(nn.Module):
    """Patches as tokens with learned places, a class token before them, whose last value is the representation."""

    def __init__(self, shape: tuple[int, int, int], patch: int, layers: Layers) -> None:
        super().__init__()
        channels, height, width = shape
        patches = (height // patch) * (width // patch)
        self.patches = nn.Conv2d(channels, layers.width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, layers.width))
        self.places = nn.Parameter(torch.zeros(1, 1 + patches, layers.width))
        self.blocks = nn.Sequential(*(Block(layers.width, layers.heads) for _ in range(layers.depth)))
        self.norm = nn.LayerNorm(layers.width, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.patches.weight, std=(channels * patch**2) ** -0.5)
        nn.init.trunc_normal_(self.places, std=0.02)
        nn.init.trunc_normal_(self.token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, D]."""
        patches = self.patches(x).flatten(2).transpose(1, 2)  # [B, T - 1, D]
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], dim=1) + self.places
        out: Tensor = self.norm(self.blocks(tokens)[:, 0])
        return out


def make(name: str, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    """D = 192, 384 or 768. Raises UserError for images that no patch fits."""
    layers = VITS[name]
    return Extractor(shape, _patch(name, shape), layers), nn.Linear(layers.width, classes)


def _patch(name: str, shape: tuple[int, int, int]) -> int:
    """Side of a patch: of 4 to 16 pixels the least that divides both sides and makes at most TOKENS; else the largest.

    So 4 at 28 and 32 pixels, 8 at 64, 16 from 224 on.
    """
    _, height, width = shape
    fits = [side for side in range(4, 17) if height % side == 0 and width % side == 0]
    if not fits:
        raise UserError(
            f"model {name!r} cuts images into squares of 4 to 16 pixels a side, which do not divide {height}x{width}: "
            f"set data.image_size to a multiple of 8, such as {max(8, round(max(height, width) / 8) * 8)}"
        )
    return next((side for side in fits if height * width <= TOKENS * side**2), fits[-1])
