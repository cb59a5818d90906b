"""Baselines of the benchmarks: the release's way of computing the same, and MAR's diffusion head."""

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

# --------------------------------------------------------------------------------------------------------------------
# The release's way.


def argmin_over_levels(quantizer: ScalarQuantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4 and 5 for latents of any shape, by comparing each with all K levels: an array of K times its size."""
    distance = (quantizer.normalize(x)[..., None] - quantizer.reconstruction_values).abs()
    indices = distance.argmin(dim=-1)
    return indices, quantizer.dequantize(indices)


class RecomputingHead(ChannelHead):
    """A channel head that keeps no keys and values: each step runs the steps before it again, 136 in all, not 16."""

    def _cached_steps(
        self, features: Tensor, first_place: str
    ) -> Callable[[int, Sequence[Tensor]], Tensor]:
        condition = self.condition_proj(features)[:, None]  # [M, 1, D]

        def logits_of(step: int, classes: Sequence[Tensor]) -> Tensor:
            upto = slice(0, step + 1)
            known = [
                embedding(c)[:, None]
                for embedding, c in zip(self.token_embeddings, classes, strict=False)
            ]
            x = torch.cat(
                [condition, *(each.to(condition.dtype) for each in known)], dim=1
            )  # [M, step + 1, D]
            x = x + self.channel_embed[:, upto]
            conditions = condition + self.timesteps_embeddings[:, upto]
            for block in self.channel_blocks:
                x = block.all_steps(x, conditions, self.channel_mask[upto, upto])
            x = self.channel_final(
                self.channel_norm(x), self.channel_final.adaLN_modulation(conditions)
            )
            return self.channel_heads[step](x[:, -1]).float()

        return logits_of


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Have models compute as the release does: PyTorch's attention and dropout, features of all positions, all tokens
    at once."""
    decode = MaskedBackbone.decode

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, drop: float = 0.0
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, None if mask is None else mask.to(q.dtype), drop
        )

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
    ):
        yield


# --------------------------------------------------------------------------------------------------------------------
# MAR's diffusion head (Li et al. 2024, section 3 and appendix): an MLP that denoises a token, given its feature.


def cosine_alphas(steps: int) -> Tensor:
    """Cumulative products of the cosine schedule (Nichol and Dhariwal 2021), float64 ``[steps]``."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)


class DiffusionBlock(nn.Module):
    """Residual MLP with AdaLN: ``x`` and ``condition`` are ``[M, width]``."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = ada_ln(width, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))


class DiffusionHead(nn.Module):
    """Predicts the noise in tokens ``[M, C]`` and its variance at a diffusion step, given their features ``[M, F]``."""

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
        # Sampling takes ``steps`` of the 1000 training steps, evenly spaced.
        self.kept = torch.linspace(0, 999, steps).round().long()
        self.alphas = cosine_alphas(1000)[self.kept]

    def forward(self, x: Tensor, t: int, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The noise at training step ``t``, and its log-variance from lowest (-1) to highest (1): ``[M, C]`` each."""
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
        """Draws tokens ``[M, C]`` from ``features [M, F]``; guidance takes ``[2M, F]``, the conditional ones first."""
        guided = guidance != 1.0
        x = torch.randn(len(features) // (1 + guided), self.channels, device=features.device)
        alphas = self.alphas.tolist()
        for step in reversed(range(len(alphas))):
            noise, ratio = self(torch.cat([x, x]) if guided else x, int(self.kept[step]), features)
            if guided:
                conditional, unconditional = noise.chunk(2)
                noise, ratio = (
                    unconditional + guidance * (conditional - unconditional),
                    ratio.chunk(2)[0],
                )
            alpha, before = alphas[step], alphas[step - 1] if step else 1.0
            beta = 1 - alpha / before
            start = (x - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
            mean = (math.sqrt(before) * beta * start + math.sqrt(1 - beta) * (1 - before) * x) / (
                1 - alpha
            )
            if not step:
                return mean
            smallest = math.log(max(beta * (1 - before) / (1 - alpha), 1e-20))
            share = (ratio + 1) / 2
            variance = torch.exp(share * math.log(beta) + (1 - share) * smallest)
            x = mean + variance.sqrt() * torch.randn_like(x)
        return x
