"""Baselines: the released implementation, and MAR's diffusion head."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import fast, layers
from models.backbone import MaskedBackbone
from models.channel_head import ChannelHead, FinalLayer, ada_ln, modulate
from models.layers import gather_tokens
from models.quantizer import ScalarQuantizer

# --------------------------------------------------------------------------------------------------
# The released implementation.


def argmin_over_levels(quantizer: ScalarQuantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and values of the nearest levels (Eq. 4 and 5), of the shape of ``x``.

    Compares each latent with all K levels, in an array of K times the size of ``x``.
    """
    distance = (quantizer.normalize(x)[..., None] - quantizer.reconstruction_values).abs()
    indices = distance.argmin(dim=-1)
    return indices, quantizer.dequantize(indices)


class RecomputingHead(ChannelHead):
    """A channel head without a cache of keys and values.

    Every channel step recomputes all steps before it: 136 steps for 16 channels instead of 16.
    """

    def _cached_steps(
        self, features: Tensor, first_place: str
    ) -> Callable[[int, Sequence[Tensor]], Tensor]:
        condition = self.condition_proj(features)[:, None]  # [M, 1, D]

        def logits_of(step: int, classes: Sequence[Tensor]) -> Tensor:
            prefix = slice(0, step + 1)
            embedded = [
                embedding(index)[:, None].to(condition.dtype)
                for embedding, index in zip(self.token_embeddings, classes, strict=False)
            ]
            x = torch.cat([condition, *embedded], dim=1)  # [M, step + 1, D]
            x = x + self.channel_embed[:, prefix]
            conditions = condition + self.timesteps_embeddings[:, prefix]
            for block in self.channel_blocks:
                x = block.all_steps(x, conditions, self.channel_mask[prefix, prefix])
            x = self.channel_final(
                self.channel_norm(x), self.channel_final.adaLN_modulation(conditions)
            )
            return self.channel_heads[step](x[:, -1]).float()

        return logits_of


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Make models compute as the release does.

    Attention, dropout and linear layers are PyTorch's, the decoder returns all positions, and the
    head's loss takes all tokens at once.
    """
    decode = MaskedBackbone.decode

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, drop: float = 0.0
    ) -> Tensor:
        mask = None if mask is None else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, drop)

    def decode_all(
        self: MaskedBackbone, encoded: Tensor, known: Tensor, wanted: Tensor | None = None
    ) -> Tensor:
        z = decode(self, encoded, known)
        return z if wanted is None else gather_tokens(z, wanted)

    with (
        patch.multiple(layers, attend=attend, dropout=F.dropout),
        patch.object(MaskedBackbone, "decode", decode_all),
        patch.dict(fast.TRAINING_BUDGET, cpu=2**62, cuda=2**62),
        patch.object(fast, "MODULATION_BUDGET", 2**62),
        patch.object(fast, "can_pack", lambda dtype: False),
    ):
        yield


# --------------------------------------------------------------------------------------------------
# MAR's diffusion head (Li et al. 2024, section 3 and appendix): an MLP that denoises a token, given
# its feature.


def cosine_alphas(steps: int) -> Tensor:
    """Return alpha-bar of the cosine schedule (Nichol and Dhariwal 2021), float64 ``[steps]``."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)


class DiffusionBlock(nn.Module):
    """Residual MLP block with AdaLN; ``x`` and ``condition`` are ``[M, width]``."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = ada_ln(width, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))


class DiffusionHead(nn.Module):
    """Predict the noise in tokens ``[M, C]`` and its variance, given features ``[M, F]``."""

    def __init__(
        self,
        feature_dim: int,
        channels: int = 16,
        width: int = 1024,
        depth: int = 3,
        steps: int = 100,
    ):
        super().__init__()
        self.channels = channels
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(feature_dim, width)
        self.into = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(DiffusionBlock(width) for _ in range(depth))
        self.final = FinalLayer(width)
        self.out = nn.Linear(width, 2 * channels)
        # Sampling uses `steps` evenly spaced steps of the 1000 training steps.
        self.kept = torch.linspace(0, 999, steps).round().long()
        self.alphas = cosine_alphas(1000)[self.kept]

    def forward(self, x: Tensor, t: int, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise at training step ``t`` and its relative log-variance in [-1, 1].

        Both have shape ``[M, C]``.
        """
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=x.device) / 128)
        angles = (t * frequencies)[None]
        condition = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.condition(
            feature
        )
        x = self.into(x)
        for block in self.blocks:
            x = block(x, condition)
        return self.out(self.final(x, self.final.adaLN_modulation(condition))).chunk(2, dim=-1)

    @torch.no_grad()
    def sample(self, features: Tensor, guidance: float = 1.0) -> Tensor:
        """Sample tokens ``[M, C]``.

        Args:
            features: ``[M, F]``. With guidance ``[2M, F]``: conditional, then unconditional.
            guidance: guidance scale; 1 disables guidance.
        """
        guided = guidance != 1.0
        x = torch.randn(len(features) // (1 + guided), self.channels, device=features.device)
        alphas = self.alphas.tolist()
        for step in reversed(range(len(alphas))):
            noise, log_ratio = self(
                torch.cat([x, x]) if guided else x, int(self.kept[step]), features
            )
            if guided:
                conditional, unconditional = noise.chunk(2)
                noise = unconditional + guidance * (conditional - unconditional)
                log_ratio = log_ratio.chunk(2)[0]
            alpha, previous = alphas[step], alphas[step - 1] if step else 1.0
            beta = 1 - alpha / previous
            start = (x - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
            mean = math.sqrt(previous) * beta * start + math.sqrt(1 - beta) * (1 - previous) * x
            mean = mean / (1 - alpha)
            if not step:
                return mean
            min_log_variance = math.log(max(beta * (1 - previous) / (1 - alpha), 1e-20))
            weight = (log_ratio + 1) / 2
            variance = torch.exp(weight * math.log(beta) + (1 - weight) * min_log_variance)
            x = mean + variance.sqrt() * torch.randn_like(x)
        return x
