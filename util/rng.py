"""Random numbers for a batch of images."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class ImageDraws:
    """Random numbers for B images.

    With ``seeds``, one for each image, each image has its own generator on the CPU, so that its numbers depend neither
    on the rest of the batch nor on the device. Without seeds all numbers come from the device's global generator.
    """

    def __init__(self, bsz: int, device: torch.device | str = "cpu", seeds: Sequence[int] | None = None):
        self.bsz, self.device = bsz, device
        self.generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), ``[B, *shape]``."""
        return self._draw(torch.rand, shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, ``[B, *shape]``."""
        return self._draw(torch.randn, shape)

    def _draw(self, draw: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        if self.generators is None:
            return draw(self.bsz, *shape, device=self.device)
        return torch.stack([draw(*shape, generator=generator) for generator in self.generators]).to(self.device)


def numbered_draws(seed: int, numbers: Sequence[int]) -> ImageDraws:
    """Random numbers on the CPU for numbered images: an image's depend only on ``seed`` and its number.

    Results therefore depend neither on the batch size nor on the number of processes.
    """
    seeds = [(2**20 * seed + number) % 2**63 for number in numbers]
    return ImageDraws(len(seeds), seeds=seeds)
