"""The distribution of latents that a KL tokenizer's encoder predicts."""

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """A normal distribution with independent dimensions.

    Args:
        moments: ``[B, 2C, h, w]``, the mean, then the log variance.
        deterministic: the moments are only the mean, ``[B, C, h, w]``, and the variance is 0.

    Attributes:
        parameters: the moments, unchanged.
        mean, logvar, std: ``[B, C, h, w]``; the log variance is clamped to [-30, 20].
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
        """Return one sample ``[B, C, h, w]``.

        Args:
            noise: standard normal, of the sample's shape; by default from the global generator.
        """
        return self.mean + self.std * (torch.randn_like(self.mean) if noise is None else noise)

    def mode(self) -> Tensor:
        """Return the most probable latents, ``[B, C, h, w]``."""
        return self.mean

    def kl(self) -> Tensor:
        """Return the KL divergence from the standard normal in nats, summed per image: ``[B]``.

        It is infinite without a variance.
        """
        # In float32: a sum of thousands of terms in bf16 has an error near 1%.
        mean = self.mean.float()
        logvar = self.logvar.float()
        return 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)
