"""Encode images to scaled latents and decode them, with a frozen VAE and a latent factor."""

from functools import cached_property
from typing import Any, Protocol

import models.location  # noqa: F401, before packages of the same names

import torch
from torch import Tensor

from models.posterior import DiagonalGaussianDistribution
from models.vae import AutoencoderKL
from util.checksums import fingerprint
from util.config import TokenizerInfo
from util.data.images import to_uint8
from util.precision import autocast, check_finite, extremes

#: Pixels per call of the VAE, by device type: limits the memory of activations.
PIXEL_BUDGET = {"cpu": 2**17, "cuda": 2**22}


def images_at_once(device: torch.device, pixels: int) -> int:
    """Return the number of images of ``pixels`` pixels each to pass to the VAE in one call."""
    return max(1, PIXEL_BUDGET.get(device.type, 2**22) // pixels)


class VAE(Protocol):
    """What a tokenizer needs of an autoencoder, a module."""

    embed_dim: int  # latent channels C
    stride: int  # pixels that a latent position covers, in each direction
    config: dict[str, Any]  # caches and checkpoints store it

    def encode(self, images: Tensor) -> DiagonalGaussianDistribution:
        """Return the posterior of the latents ``[B, C, h, w]`` of images in [-1, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return images ``[B, 3, H, W]``, about [-1, 1]."""


class LatentPosterior:
    """The posterior of the scaled latents ``[B, C, h, w]`` of images.

    Args:
        distribution: the VAE's posterior of unscaled latents.
        latent_factor: the scale of the latents.

    Attributes:
        moments: ``[B, 2C, h, w]``, mean and log variance of the unscaled latents; only the
            mean, ``[B, C, h, w]``, if the tokenizer is deterministic.
    """

    def __init__(self, distribution: DiagonalGaussianDistribution, latent_factor: float):
        self.distribution = distribution
        self.latent_factor = latent_factor
        self.moments = distribution.parameters

    @property
    def mean(self) -> Tensor:
        """The mean of the scaled latents, ``[B, C, h, w]``."""
        return self.distribution.mean * self.latent_factor

    @property
    def std(self) -> Tensor:
        """The std of the scaled latents, ``[B, C, h, w]``."""
        return self.distribution.std * self.latent_factor

    @property
    def shape(self) -> torch.Size:
        """The shape of the latents, ``[B, C, h, w]``."""
        return self.distribution.mean.shape

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Return one sample ``[B, C, h, w]``.

        Args:
            noise: standard normal, of the sample's shape; by default from the global generator.
        """
        return self.distribution.sample(noise).float() * self.latent_factor

    def mode(self) -> Tensor:
        """Return the most probable latents, ``[B, C, h, w]``."""
        return self.distribution.mode().float() * self.latent_factor


class Tokenizer:
    """A frozen VAE with the scale of its latents.

    Args:
        vae: a :class:`VAE`, such as :class:`models.vae.AutoencoderKL`,
            :class:`models.diffusers_vae.DiffusersVAE` or :class:`models.tiny_vae.TinyAutoencoder`.
        latent_factor: the scale of the latents. Models are trained on latents times this factor.
        source: the path or address of the VAE, for messages.

    Attributes:
        embed_dim: latent channels C.
        stride: pixels that a latent position covers, in each direction.
    """

    def __init__(self, vae: Any, latent_factor: float, source: str = "the tokenizer"):
        self.vae = vae
        self.latent_factor = latent_factor
        self.source = source
        self.embed_dim = vae.embed_dim
        self.stride = vae.stride

    @classmethod
    def from_pretrained(cls, path: str) -> "Tokenizer":
        """Return the tokenizer of a file, folder or address on the Hub, on the CPU.

        The arguments are those of :meth:`models.pretrained.PretrainedVAE.from_pretrained`.

        Raises:
            UserError: the file is missing, unreadable, or not a tokenizer.
        """
        vae, latent_factor = AutoencoderKL.from_pretrained(path)
        return cls(vae, latent_factor, path)

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the VAE's weights."""
        return fingerprint(self.vae)

    @property
    def info(self) -> TokenizerInfo:
        """The description of this tokenizer that caches and checkpoints store."""
        return TokenizerInfo(self.vae.config, self.latent_factor, self.source, self.fingerprint)

    def to(self, device: torch.device | str, **options) -> "Tokenizer":
        """Move the VAE to ``device`` and return this tokenizer; ``options`` as of ``Module.to``."""
        self.vae.to(device, **options)
        return self

    def encode(self, images: Tensor) -> LatentPosterior:
        """Return the posterior of the scaled latents of images ``[B, 3, H, W]`` in [-1, 1]."""
        return LatentPosterior(self.vae.encode(images), self.latent_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Return images ``[B, 3, H, W]``, about [-1, 1] and not clipped.

        Args:
            latents: ``[B, C, h, w]``, scaled.
        """
        return self.vae.decode(latents / self.latent_factor)

    @torch.no_grad()
    def decode_images(
        self, latents: Tensor, precision: str, precision_flag: str = "--precision"
    ) -> Tensor:
        """Return images, bytes ``[N, 3, H, W]`` on the CPU, decoded in parts that fit in memory.

        Args:
            latents: ``[N, C, h, w]``, scaled.
            precision: of the decoder: ``bf16``, ``fp16`` or ``fp32``.
            precision_flag: the flag that sets the precision, for the error message.

        Raises:
            NotFinite: the decoder computes NaN or infinity.
        """
        pixels = latents.shape[2] * latents.shape[3] * self.stride**2
        parts: list[Tensor] = []
        limits: list[Tensor] = []
        for part in latents.float().split(images_at_once(latents.device, pixels)):
            with autocast(latents.device, precision):
                decoded = self.decode(part.contiguous(memory_format=torch.channels_last))
                parts.append(to_uint8(decoded))
                # Before the conversion to bytes, which cannot represent NaN.
                limits.append(extremes(decoded))
        images = torch.cat(parts).cpu()  # the only synchronization with the device
        check_finite(torch.stack(limits), "the tokenizer's decoder", precision, precision_flag)
        return images


class CachedMoments:
    """Replaces a :class:`Tokenizer` for batches of cached moments instead of images.

    Args:
        latent_factor: the scale of the latents of the tokenizer that wrote the cache.
        deterministic: whether its moments are only means, ``[B, C, h, w]``.
    """

    def __init__(self, latent_factor: float, deterministic: bool = False):
        self.latent_factor, self.deterministic = latent_factor, deterministic

    def encode(self, moments: Tensor) -> LatentPosterior:
        """Return the posterior of the scaled latents of unscaled moments of a cache."""
        distribution = DiagonalGaussianDistribution(moments, self.deterministic)
        return LatentPosterior(distribution, self.latent_factor)


#: Converts the batches of a loader, images or cached moments, to latents.
LatentEncoder = Tokenizer | CachedMoments
