"""The tokenizer: images to scaled latents and back (a frozen VAE and the scale of its latents)."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from models.posterior import DiagonalGaussianDistribution
from models.vae import AutoencoderKL
from util.checksums import fingerprint
from util.config import TokenizerInfo
from util.data.images import to_uint8
from util.precision import autocast, check_finite, extremes

#: Pixels that are encoded or decoded at once, by device type.
PIXEL_BUDGET = {"cpu": 2**19, "cuda": 2**22}


def images_at_once(device: torch.device, pixels: int) -> int:
    """Return how many images of ``pixels`` pixels the VAE encodes or decodes at once."""
    return max(1, PIXEL_BUDGET.get(device.type, 2**22) // pixels)


class LatentPosterior:
    """The posterior of scaled latents ``[B, C, h, w]``: a VAE's, times the latent factor.

    Attributes:
        moments: ``[B, 2C, h, w]``, mean and log variance as the encoder computes them, not scaled;
            the mean alone, ``[B, C, h, w]``, if the tokenizer is deterministic.
        mean, std: ``[B, C, h, w]``, scaled.
    """

    def __init__(self, distribution: DiagonalGaussianDistribution, latent_factor: float):
        self.distribution, self.latent_factor = distribution, latent_factor
        self.moments = distribution.parameters

    @property
    def mean(self) -> Tensor:
        return self.distribution.mean * self.latent_factor

    @property
    def std(self) -> Tensor:
        return self.distribution.std * self.latent_factor

    @property
    def shape(self) -> torch.Size:
        """The shape of the latents, ``[B, C, h, w]``."""
        return self.distribution.mean.shape

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Return one sample; standard normal ``noise`` of its shape replaces the global generator's."""
        return self.distribution.sample(noise).float() * self.latent_factor

    def mode(self) -> Tensor:
        """Return the most probable latents."""
        return self.distribution.mode().float() * self.latent_factor


class Tokenizer:
    """A frozen VAE with the scale of its latents.

    Args:
        vae: an :class:`models.vae.AutoencoderKL`, :class:`models.diffusers_vae.DiffusersVAE` or
            :class:`models.tiny_vae.TinyAutoencoder`.
        latent_factor: the scale. Models are trained on the VAE's latents times this factor.
        source: where the VAE was read from, for messages.

    Attributes:
        embed_dim: latent channels C.
        stride: pixels that a latent position covers, in each direction.
    """

    def __init__(self, vae: Any, latent_factor: float, source: str = "the tokenizer"):
        self.vae = vae
        self.latent_factor, self.source = latent_factor, source
        self.embed_dim, self.stride = self.vae.embed_dim, self.vae.stride

    @classmethod
    def from_pretrained(cls, path: str) -> "Tokenizer":
        """Load a tokenizer on the CPU; see :meth:`models.pretrained.PretrainedVAE.from_pretrained`.

        Raises:
            UserError: the file is missing, unreadable, or does not hold the weights of a tokenizer.
        """
        vae, latent_factor = AutoencoderKL.from_pretrained(path)
        return cls(vae, latent_factor, path)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the VAE's weights."""
        return fingerprint(self.vae)

    @property
    def info(self) -> TokenizerInfo:
        """The description of this tokenizer that caches and checkpoints store."""
        return TokenizerInfo(self.vae.config, self.latent_factor, self.source, self.fingerprint)

    def to(self, device: torch.device | str, **options) -> "Tokenizer":
        """Move the VAE to ``device``; ``options`` are those of :meth:`torch.nn.Module.to`."""
        self.vae.to(device, **options)
        return self

    def encode(self, images: Tensor) -> LatentPosterior:
        """Return the posterior of the scaled latents of images ``[B, 3, H, W]`` in [-1, 1]."""
        return LatentPosterior(self.vae.encode(images), self.latent_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Return images ``[B, 3, H, W]``, about [-1, 1] and not clipped, of scaled latents ``[B, C, h, w]``."""
        return self.vae.decode(latents / self.latent_factor)

    @torch.no_grad()
    def decode_images(
        self, latents: Tensor, precision: str, precision_flag: str = "--precision"
    ) -> Tensor:
        """Decode scaled latents ``[N, C, h, w]`` to bytes ``[N, 3, H, W]`` on the CPU, in parts that fit memory.

        Args:
            precision: of the decoder: ``bf16``, ``fp16`` or ``fp32``.
            precision_flag: the flag that sets it, for the error message.

        Raises:
            NotFinite: the decoder overflows.
        """
        pixels = latents.shape[2] * latents.shape[3] * self.stride**2
        parts, limits = [], []
        for part in latents.float().split(images_at_once(latents.device, pixels)):
            with autocast(latents.device, precision):
                decoded = self.decode(part.contiguous(memory_format=torch.channels_last))
                parts.append(to_uint8(decoded))
                limits.append(extremes(decoded))  # bytes do not show NaN
        images = torch.cat(parts).cpu()  # the only wait for the device
        check_finite(torch.stack(limits), "the tokenizer's decoder", precision, precision_flag)
        return images


class CachedMoments:
    """Cached moments in place of images, with the ``encode`` of a :class:`Tokenizer`.

    Args:
        latent_factor: the scale of the tokenizer that made the cache.
        deterministic: whether that tokenizer is deterministic: moments are means alone.
    """

    def __init__(self, latent_factor: float, deterministic: bool = False):
        self.latent_factor, self.deterministic = latent_factor, deterministic

    def encode(self, moments: Tensor) -> LatentPosterior:
        """Return the posterior of the scaled latents that ``moments`` of a cache describe."""
        distribution = DiagonalGaussianDistribution(moments, self.deterministic)
        return LatentPosterior(distribution, self.latent_factor)


#: What turns the batches of a loader into latents.
Encoder = Tokenizer | CachedMoments
