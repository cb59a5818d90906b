"""Random numbers. Each one follows from a seed and from its purpose; no generator state is saved.

============================  ================================  ===================================
random numbers of             follow from                       in
============================  ================================  ===================================
the initial weights           ``--seed`` + rank (with DDP all   ``main_tokenbridge``, ``main_vae``
                              ranks take rank 0's weights)
a training step: posterior    ``--seed``, rank, epoch, step     ``engine_tokenbridge``
samples, masks, dropout,
dropped labels
an epoch's image order        ``--seed``, epoch                 ``util.data.loaders``
                                                                (``ShuffledRankSampler``)
the choice of mirrored        ``--seed``, epoch, image index    ``util.data.datasets``
images                                                          (``TrainingItems``)
a generated image             ``--gen_seed``, image number      ``evaluation``, ``models.pipeline``
                                                                (:func:`image_seeds`), drawn in
                                                                ``models.sampling``
the region that ``edit``      ``gen_seed``, image number        ``models.pipeline``
regenerates                                                     (:func:`numbered_draws`)
posterior samples and masks   seed, image number                ``evaluation``
of the likelihood                                               (:func:`numbered_draws`)
posterior samples of          ``--seed``, image number          ``reconstruction``
reconstructions                                                 (:func:`numbered_draws`)
============================  ================================  ===================================

So a resumed run draws the numbers that an uninterrupted run would have drawn. The numbers of an
image depend neither on the rest of its batch nor on the number of ranks. (Another batch size may
still change the rounding.)
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from util.devices import to_device


def seed_everything(*seeds: int) -> None:
    """Seed torch's global generators from one or more numbers."""
    seed = seeds[0]
    if len(seeds) > 1:
        seed = int(np.random.SeedSequence(seeds).generate_state(1, dtype=np.uint64)[0])
    torch.manual_seed(seed % 2**63)


def image_seeds(gen_seed: int, numbers: Iterable[int]) -> list[int]:
    """Return one seed per image number. No two images of a run have the same one."""
    base = int(np.random.SeedSequence(gen_seed).generate_state(1)[0])
    return [(base + number) % 2**32 for number in numbers]


class ImageDraws:
    """Random numbers for a batch of B images.

    Args:
        bsz: the number of images, B.
        device: of the numbers.
        seeds: one seed per image. Then each image has its own generator on the CPU: its numbers
            depend neither on the rest of the batch nor on the device. By default all numbers come
            from the device's global generator.
    """

    def __init__(
        self, bsz: int, device: torch.device | str = "cpu", seeds: Sequence[int] | None = None
    ):
        self.bsz = bsz
        self.device = device
        self.generators: list[torch.Generator] | None = None
        if seeds is not None:
            self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, *shape: int) -> Tensor:
        """Return uniform numbers in [0, 1), ``[B, *shape]``."""
        return self._draw(torch.rand, shape)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers, ``[B, *shape]``."""
        return self._draw(torch.randn, shape)

    def _draw(self, draw: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        if self.generators is None:
            return draw(self.bsz, *shape, device=self.device)
        rows = [draw(*shape, generator=generator) for generator in self.generators]
        return to_device(torch.stack(rows), self.device)


def numbered_draws(seed: int, numbers: Sequence[int]) -> ImageDraws:
    """Return random numbers on the CPU that depend only on ``seed`` and each image's number.

    So results depend neither on the batch size nor on the number of ranks.
    """
    seeds = [(2**20 * seed + number) % 2**63 for number in numbers]
    return ImageDraws(len(seeds), seeds=seeds)
