"""KL tokenizers of the diffusers library (an optional extra) behind the interface of :mod:`models.vae`."""

import torch
from torch import Tensor, nn

from models.posterior import DiagonalGaussianDistribution


class DiffusersVAE(nn.Module):
    """An ``AutoencoderKL`` of diffusers, frozen.

    Args:
        vae: the loaded ``AutoencoderKL``; all of its latents must be scaled by one factor.

    Attributes:
        embed_dim: latent channels C.
        stride: pixels that a latent position covers, each way.
        latent_factor: what latents are multiplied by.
        config: what caches and checkpoints tell of the tokenizer.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae, config = vae, vae.config
        widths = config["block_out_channels"]
        self.embed_dim, self.stride = config["latent_channels"], 2 ** (len(widths) - 1)
        self.latent_factor = float(config["scaling_factor"])
        self.shift = float(config.get("shift_factor") or 0.0)
        self.config = {
            "embed_dim": self.embed_dim,
            "ch_mult": [max(1, width // widths[0]) for width in widths],
        }
        self.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Images ``[B, 3, H, W]`` in [-1, 1] to the posterior of latents ``[B, C, h, w]``, centred by the shift."""
        mean, logvar = self.vae.encode(x).latent_dist.parameters.chunk(2, dim=1)
        return DiagonalGaussianDistribution(torch.cat([mean - self.shift, logvar], dim=1))

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents ``[B, C, h, w]`` to images ``[B, 3, h stride, w stride]``, about [-1, 1], not clipped."""
        return self.vae.decode(z + self.shift).sample
