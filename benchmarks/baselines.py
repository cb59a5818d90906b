"""What TokenBridge is compared with: plain ways of doing the same, and MAR's diffusion head, written for this."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn

from models.backbone import gather_tokens
from models.channel_head import ChannelHead, sample_categorical
from models.quantizer import ScalarQuantizer
from models.sampling import SamplingOptions, initial_orders, sampling_plan
from models.tokenbridge import TokenBridge
from util.rng import ImageDraws

# --------------------------------------------------------------------------------------------------------------------
# The release's way.


def argmin_over_levels(quantizer: ScalarQuantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4 by comparing every value with every level: an array of levels times elements."""
    distance = (quantizer.normalize(x)[..., None] - quantizer.reconstruction_values).abs()
    indices = distance.argmin(dim=-1)
    return indices, quantizer.dequantize(indices)


@torch.no_grad()
def sample_recomputing(head: ChannelHead, features: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """The levels of :meth:`ChannelHead.sample` by running all steps before each step again: 136 instead of 16."""
    chosen = torch.zeros(len(features), head.channel_steps, dtype=torch.long, device=features.device)
    condition = head.condition_proj(features)[:, None]
    for step in range(head.channel_steps):
        upto = slice(0, step + 1)
        x = condition
        if step:
            known = [head.token_embeddings[i](chosen[:, i]) for i in range(step)]
            x = torch.cat([condition, torch.stack(known, dim=1).to(condition.dtype)], dim=1)
        x = x + head.channel_embed[:, upto]
        conditions = condition + head.timesteps_embeddings[:, upto]
        for block in head.channel_blocks:
            x = block.all_steps(x, conditions, head.channel_mask[upto, upto])
        x = head.channel_final(head.channel_norm(x), head.channel_final.adaLN_modulation(conditions))
        logits = head.channel_heads[step](x[:, -1]).float()
        chosen[:, step] = sample_categorical(logits, temperature, uniform[:, step])
    return head.to_levels(chosen)[:, head.from_generation_order]


@torch.no_grad()
def sample_tokens_plainly(model: TokenBridge, labels: Tensor, num_iter: int, cfg: float, temperature: float) -> Tensor:
    """:meth:`TokenBridge.sample_tokens` without a cache in the head; guidance in one batch, as in the release."""
    bsz = len(labels)
    orders = initial_orders("random", ImageDraws(bsz, model.device), model.seq_len)
    tokens = torch.zeros(bsz, model.seq_len, model.token_dim, device=model.device)
    classes = torch.cat([model.class_emb(labels), model.backbone.fake_latent.expand(bsz, -1)])
    for step in sampling_plan(SamplingOptions(num_iter, cfg), model.seq_len):
        known, wanted = orders[:, step.masked :], orders[:, step.left : step.masked]
        features = model.backbone(tokens.repeat(2, 1, 1), known.repeat(2, 1), classes)
        conditional, unconditional = features.chunk(2)
        features = unconditional + step.guidance * (conditional - unconditional)
        features = gather_tokens(features, wanted).flatten(0, 1)
        uniform = torch.rand(len(features), model.head.channel_steps, device=model.device)
        levels = sample_recomputing(model.head, features, temperature, uniform)
        new = model.quantizer.dequantize(levels).unflatten(0, (bsz, -1))
        tokens = tokens.scatter(1, wanted[..., None].expand(-1, -1, model.token_dim), new)
    return model.unpatchify(tokens)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Models that are built within the block stay plain, as in the release: PyTorch's attention and dropout, the loss
    in one part."""
    with patch("models.tokenbridge.speed_up"):
        yield


# --------------------------------------------------------------------------------------------------------------------
# MAR's diffusion head (Li et al. 2024, section 3 and appendix): a small MLP that denoises one token, given its feature.


def cosine_alphas(steps: int) -> Tensor:
    """Cumulative products of the cosine schedule (Nichol and Dhariwal 2021), float64 ``[steps]``."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)


class DiffusionBlock(nn.Module):
    """Residual MLP of one width, modulated by AdaLN."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class DiffusionHead(nn.Module):
    """Predicts noise and variance of a token ``[M, C]`` at a diffusion step, given its feature ``[M, F]``."""

    def __init__(self, feature_dim: int, channels: int = 16, width: int = 1024, depth: int = 3, steps: int = 100):
        super().__init__()
        self.channels = channels
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(feature_dim, width)
        self.into = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(DiffusionBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, 2 * channels)
        # Respaced: a share of 1000 training steps, evenly.
        self.kept = torch.linspace(0, 999, steps).round().long()
        self.alphas = cosine_alphas(1000)[self.kept]

    def forward(self, x: Tensor, t: int, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and the interpolation of its log-variance, ``[M, C]`` each, at training step ``t``."""
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=x.device) / 128)
        angles = (t * frequencies)[None]
        condition = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.condition(feature)
        x = self.into(x)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.out(self.norm(x) * (1 + scale) + shift).chunk(2, dim=-1)

    @torch.no_grad()
    def sample(self, features: Tensor, guidance: float = 1.0) -> Tensor:
        """Tokens ``[M, C]``; with guidance ``features`` holds conditional, then unconditional ones, ``[2M, F]``."""
        rows = len(features) // 2 if guidance != 1.0 else len(features)
        x = torch.randn(rows, self.channels, device=features.device)
        alphas = self.alphas.tolist()
        for step in reversed(range(len(alphas))):
            both = torch.cat([x, x]) if guidance != 1.0 else x
            noise, ratio = self(both, int(self.kept[step]), features)
            if guidance != 1.0:
                conditional, unconditional = noise.chunk(2)
                noise, ratio = unconditional + guidance * (conditional - unconditional), ratio.chunk(2)[0]
            alpha, before = alphas[step], alphas[step - 1] if step else 1.0
            beta = 1 - alpha / before
            start = (x - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
            mean = math.sqrt(before) * beta * start + math.sqrt(1 - beta) * (1 - before) * x
            mean = mean / (1 - alpha)
            if not step:
                return mean
            smallest = math.log(max(beta * (1 - before) / (1 - alpha), 1e-20))
            share = (ratio + 1) / 2
            variance = torch.exp(share * math.log(beta) + (1 - share) * smallest)
            x = mean + variance.sqrt() * torch.randn_like(x)
        return x
