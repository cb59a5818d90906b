"""Every random number of a run follows from a seed and from what it is for; no generator's state is saved.

| what | follows from | where |
|---|---|---|
| initial weights | ``--seed`` + rank (DDP takes rank 0's) | the scripts |
| a training step: posterior samples, masks, dropout, dropped labels | ``--seed``, rank, epoch, step | the engine |
| the order of an epoch's images | ``--seed``, epoch | :class:`util.data.loaders.ShuffledRankSampler` |
| which images are mirrored | ``--seed``, epoch, index of the image | :class:`util.data.datasets.TrainingItems` |
| a generated image | ``--gen_seed``, number of the image | :func:`image_seeds`, :class:`ImageDraws` |
| posterior samples and masks of likelihood and reconstruction | seed, number of the image | :func:`numbered_draws` |

So a resumed run draws what an unbroken one would have, and an image's numbers depend on neither the batch around it nor
the number of processes. (Another batch size may still change rounding.)
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from util.devices import to_device


def seed_everything(*seeds: int) -> None:
    """Seeds torch's global generators from one or more numbers."""
    state = (
        np.random.SeedSequence(seeds).generate_state(1, dtype=np.uint64)[0]
        if len(seeds) > 1
        else seeds[0]
    )
    torch.manual_seed(int(state) % 2**63)


def image_seeds(gen_seed: int, numbers: Iterable[int]) -> list[int]:
    """One seed for each image number: no two images of a run share one."""
    base = int(np.random.SeedSequence(gen_seed).generate_state(1)[0])
    return [(base + number) % 2**32 for number in numbers]


class ImageDraws:
    """Random numbers for B images.

    With ``seeds``, one for each image, each image has its own generator on the CPU, so that its numbers depend neither
    on the rest of the batch nor on the device. Without seeds all numbers come from the device's global generator.
    """

    def __init__(
        self, bsz: int, device: torch.device | str = "cpu", seeds: Sequence[int] | None = None
    ):
        self.bsz, self.device = bsz, device
        self.generators = (
            None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]
        )

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), ``[B, *shape]``."""
        return self._draw(torch.rand, shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, ``[B, *shape]``."""
        return self._draw(torch.randn, shape)

    def _draw(self, draw: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        if self.generators is None:
            return draw(self.bsz, *shape, device=self.device)
        return to_device(
            torch.stack([draw(*shape, generator=each) for each in self.generators]), self.device
        )


def numbered_draws(seed: int, numbers: Sequence[int]) -> ImageDraws:
    """Random numbers on the CPU for numbered images: an image's depend only on ``seed`` and its number.

    Results therefore depend neither on the batch size nor on the number of processes.
    """
    seeds = [(2**20 * seed + number) % 2**63 for number in numbers]
    return ImageDraws(len(seeds), seeds=seeds)
