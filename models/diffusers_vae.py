"""KL tokenizers of the diffusers library (optional) with the interface of :mod:`models.vae`."""

import torch
from torch import Tensor, nn

from models.posterior import DiagonalGaussianDistribution


class DiffusersVAE(nn.Module):
    """An ``AutoencoderKL`` of diffusers, frozen.

    Args:
        vae: the loaded ``AutoencoderKL``. One factor must scale all latent channels.

    Attributes:
        embed_dim: latent channels C.
        stride: pixels that a latent position covers, in each direction.
        latent_factor: the scale of the latents.
        config: the description of the tokenizer in caches and checkpoints.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        config = vae.config
        widths = config["block_out_channels"]
        self.embed_dim = config["latent_channels"]
        self.stride = 2 ** (len(widths) - 1)
        self.latent_factor = float(config["scaling_factor"])
        self.shift = float(config.get("shift_factor") or 0.0)
        self.config = {
            "embed_dim": self.embed_dim,
            "ch_mult": [max(1, width // widths[0]) for width in widths],
        }
        self.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Return the posterior of the latents ``[B, C, h, w]`` minus the shift.

        Args:
            x: images ``[B, 3, H, W]`` in [-1, 1].
        """
        mean, logvar = self.vae.encode(x).latent_dist.parameters.chunk(2, dim=1)
        return DiagonalGaussianDistribution(torch.cat([mean - self.shift, logvar], dim=1))

    def decode(self, z: Tensor) -> Tensor:
        """Return images ``[B, 3, h stride, w stride]``, about [-1, 1] and not clipped.

        Args:
            z: unscaled latents ``[B, C, h, w]``.
        """
        return self.vae.decode(z + self.shift).sample
