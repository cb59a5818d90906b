"""Tiny autoencoder: the distilled tokenizers TAESD, TAESDXL, TAESD3, TAEF1 and TAEF2.

Source of the architecture and of the weights: https://github.com/madebyollin/taesd.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.posterior import DiagonalGaussianDistribution
from util.model_config import TINY_CONFIG

#: Residual blocks per resolution, the highest resolution first; each lower one is half as large.
BLOCKS = (1, 3, 3, 3)

# --------------------------------------------------------------------------------------------------
# Building blocks: attribute names are those of the published weights


def conv(in_channels: int, out_channels: int, **options) -> nn.Conv2d:
    """Return a 3x3 convolution with padding 1; ``options`` are those of ``nn.Conv2d``."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, **options)


class TinyBlock(nn.Module):
    """Residual block of three 3x3 convolutions, ``[B, width, h, w]`` to the same shape.

    Args:
        pooled: add a branch with a group norm, which pools statistics over all positions (TAEF2).
    """

    def __init__(self, width: int, pooled: bool):
        super().__init__()
        self.conv = nn.Sequential(
            conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width)
        )
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return F.relu(x + self.conv(x))


class Clamp(nn.Module):
    """Soft clamp of latents to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def blocks(number: int, width: int, pooled: bool = False) -> list[nn.Module]:
    """Return the residual blocks of one resolution."""
    return [TinyBlock(width, pooled) for _ in range(number)]


def encoder(embed_dim: int, ch: int, pooled: bool) -> nn.Sequential:
    """Return the network from images ``[B, 3, H, W]`` in [0, 1] to ``[B, C, H / 8, W / 8]``."""
    layers = [conv(3, ch), *blocks(BLOCKS[0], ch)]
    for level, number in enumerate(BLOCKS[1:], start=1):
        lowest = level == len(BLOCKS) - 1
        layers += [conv(ch, ch, stride=2, bias=False), *blocks(number, ch, pooled and lowest)]
    return nn.Sequential(*layers, conv(ch, embed_dim))


def decoder(embed_dim: int, ch: int, pooled: bool) -> nn.Sequential:
    """Return the network from latents ``[B, C, h, w]`` to images ``[B, 3, 8 h, 8 w]`` in [0, 1]."""
    layers = [Clamp(), conv(embed_dim, ch), nn.ReLU()]
    for level, number in reversed(list(enumerate(BLOCKS))[1:]):
        lowest = level == len(BLOCKS) - 1
        layers += blocks(number, ch, pooled and lowest)
        layers += [nn.Upsample(scale_factor=2), conv(ch, ch, bias=False)]
    return nn.Sequential(*layers, *blocks(BLOCKS[0], ch), conv(ch, 3))


# --------------------------------------------------------------------------------------------------
# Autoencoder


class TinyAutoencoder(nn.Module):
    """A tiny autoencoder. It is deterministic: the posterior has no variance.

    Args:
        embed_dim: latent channels C.
        ch: width of all layers; a multiple of 4 if ``pooled``.
        pooled: whether the blocks of the lowest resolution have a second branch (TAEF2).
        shift: subtracted from the latents.

    Attributes:
        stride: pixels per latent position, each way.
        config: description that caches and checkpoints store.
    """

    def __init__(self, embed_dim: int, *, ch: int = 64, pooled: bool = False, shift: float = 0.0):
        super().__init__()
        self.embed_dim, self.shift = embed_dim, float(shift)
        self.encoder = encoder(embed_dim, ch, pooled)
        self.decoder = decoder(embed_dim, ch, pooled)
        self.config = {"embed_dim": embed_dim, **TINY_CONFIG}
        self.config |= {"ch": ch, "pooled": pooled, "shift": self.shift}
        self.stride = 2 ** (len(BLOCKS) - 1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TinyAutoencoder":
        """Return the module that ``config``, one of :attr:`config`, describes."""
        return cls(**{name: value for name, value in config.items() if name not in TINY_CONFIG})

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Return the latents ``[B, C, h, w]`` of images ``[B, 3, H, W]`` in [-1, 1]."""
        latents = self.encoder((x + 1) / 2) - self.shift
        return DiagonalGaussianDistribution(latents, deterministic=True)

    def decode(self, z: Tensor) -> Tensor:
        """Return images ``[B, 3, 8 h, 8 w]`` of unscaled latents, about [-1, 1], not clipped."""
        return self.decoder(z + self.shift) * 2 - 1
