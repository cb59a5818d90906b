"""KL tokenizers of the diffusers library (an optional extra) behind the interface of :mod:`models.vae`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.vae import DiagonalGaussianDistribution
from util.checkpoint import VAE_NAMES
from util.errors import UserError, reason


class DiffusersVAE(nn.Module):
    """An ``AutoencoderKL`` of diffusers, frozen.

    Args:
        path: its weights, ``diffusion_pytorch_model.safetensors``, beside their ``config.json``.
        config: what that holds.

    Raises:
        UserError: diffusers is not installed, the files are damaged or do not fit each other, or its latents are
            scaled channel by channel, for which the quantizer has no levels.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]):
        super().__init__()
        if path.name != VAE_NAMES[-1]:  # diffusers would read another file of the folder
            raise UserError(f"{path}: tokenizers of diffusers are read from {VAE_NAMES[-1]}; name their folder")
        try:
            from diffusers import AutoencoderKL
        except ModuleNotFoundError as error:
            raise UserError(f"{path} is a tokenizer of diffusers, which is missing: pip install diffusers") from error
        try:
            self.vae, loaded = AutoencoderKL.from_pretrained(
                str(path.parent), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False,
                output_loading_info=True, torch_dtype=torch.float32,
            )  # fmt: skip
        except Exception as error:  # damaged files and sizes that cannot be fail in many ways
            raise UserError(f"{path} cannot be read by diffusers ({reason(error)})") from error
        wrong = {what: names for what in ("missing_keys", "mismatched_keys") if (names := loaded.get(what))}
        wrong |= {"not finite": [name for name, value in self.vae.state_dict().items() if not value.isfinite().all()]}
        if any(wrong.values()):
            raise UserError(f"{path} does not fit its config.json: {wrong}")
        about = self.vae.config
        if about.get("latents_mean") is not None or about.get("latents_std") is not None:
            raise UserError(f"{path} scales each latent channel on its own (latents_mean, latents_std): not supported")
        widths = about["block_out_channels"]
        self.embed_dim, self.stride = about["latent_channels"], 2 ** (len(widths) - 1)
        self.latent_factor = float(about["scaling_factor"])
        self.shift = float(about.get("shift_factor") or 0.0)
        #: What caches and checkpoints tell of it.
        self.config = {"embed_dim": self.embed_dim, "ch_mult": [max(1, width // widths[0]) for width in widths]}
        self.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Images ``[B, 3, H, W]`` in [-1, 1] to the posterior of latents ``[B, C, h, w]``, centred by the shift."""
        mean, logvar = self.vae.encode(x).latent_dist.parameters.chunk(2, dim=1)
        return DiagonalGaussianDistribution(torch.cat([mean - self.shift, logvar], dim=1))

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents ``[B, C, h, w]`` to images ``[B, 3, h stride, w stride]``, about [-1, 1], not clipped."""
        return self.vae.decode(z + self.shift).sample
