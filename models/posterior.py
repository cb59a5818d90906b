"""What a KL tokenizer's encoder predicts: a normal distribution of the latents with independent dimensions."""

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """A normal with independent dimensions, from its moments ``[B, 2C, h, w]``: mean, then log variance.

    Args:
        deterministic: the moments are the mean alone, ``[B, C, h, w]``, and the variance is 0.

    Attributes:
        parameters: the moments as given.
        mean, std: ``[B, C, h, w]``; the log variance is clamped to [-30, 20].
    """

    def __init__(self, moments: Tensor, deterministic: bool = False):
        self.parameters = moments
        if deterministic:
            self.mean, self.logvar = moments, torch.full_like(moments, -torch.inf)
        else:
            self.mean, logvar = moments.chunk(2, dim=1)
            self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """One draw ``[B, C, h, w]``; ``noise``, standard normal of that shape, replaces the global generator's."""
        return self.mean + self.std * (torch.randn_like(self.mean) if noise is None else noise)

    def mode(self) -> Tensor:
        """The most probable latents, ``[B, C, h, w]``."""
        return self.mean

    def kl(self) -> Tensor:
        """Divergence from the standard normal in nats, summed over all but the batch: ``[B]``.

        It is infinite without a variance.
        """
        mean, logvar = (
            self.mean.float(),
            self.logvar.float(),
        )  # sums of thousands of terms, in bf16 only near 1%
        return 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)
