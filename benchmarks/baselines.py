"""What TokenBridge is compared with: plain ways of doing the same, and MAR's diffusion head, written for this."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import channel_head, dropout
from models.backbone import MaskedBackbone, gather_tokens
from models.channel_head import ChannelHead
from models.quantizer import ScalarQuantizer
from models.sampling import Noise, initial_orders, sample_categorical, sampling_plan
from models.tokenbridge import TokenBridge

# --------------------------------------------------------------------------------------------------------------------
# The release's way.


def argmin_over_levels(quantizer: ScalarQuantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4 by comparing every value with every level: an array of levels times elements."""
    distance = (quantizer.normalize(x)[..., None] - quantizer.reconstruction_values).abs()
    indices = distance.argmin(dim=-1)
    return indices, quantizer.dequantize(indices)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, drop: float = 0.0) -> Tensor:
    """In place of :func:`models.channel_head.attend`: PyTorch's kernel, whatever the device."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)


@torch.no_grad()
def sample_recomputing(head: ChannelHead, features: Tensor, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The head's channels one after the other, running all places before each of them again: 136 instead of 16."""
    chosen = torch.zeros(len(features), head.places, dtype=torch.long, device=features.device)
    condition = head.condition_proj(features)[:, None]
    for place in range(head.places):
        upto = slice(0, place + 1)
        x = condition
        if place:
            known = [head.token_embeddings[i](chosen[:, i]) for i in range(place)]
            x = torch.cat([condition, torch.stack(known, dim=1).to(condition.dtype)], dim=1)
        x = x + head.channel_embed[:, upto]
        conditions = condition + head.timesteps_embeddings[:, upto]
        for block in head.channel_blocks:
            x = block.all_places(x, conditions, head.channel_mask[upto, upto])
        x = head.channel_final(head.channel_norm(x), head.channel_final.adaLN_modulation(conditions))
        chosen[:, place] = choose(head.channel_heads[place](x[:, -1]).float(), place)
    return chosen


@torch.no_grad()
def sample_tokens_plainly(model: TokenBridge, labels: Tensor, num_iter: int, cfg: float, temperature: float) -> Tensor:
    """:meth:`TokenBridge.sample_tokens` without a cache in the head; guidance in one batch, as in the release."""
    bsz = len(labels)
    noise = Noise(bsz, model.device, None)
    orders = initial_orders("random", noise, model.seq_len)
    tokens = torch.zeros(bsz, model.seq_len, model.token_dim, device=model.device)
    classes = torch.cat([model.class_emb(labels), model.backbone.fake_latent.expand(bsz, -1)])
    for step in sampling_plan(num_iter, model.seq_len, cfg, "linear"):
        known, wanted = orders[:, step.masked :], orders[:, step.left : step.masked]
        features = model.backbone(tokens.repeat(2, 1, 1), known.repeat(2, 1), classes)
        conditional, unconditional = features.chunk(2)
        features = unconditional + step.guidance * (conditional - unconditional)
        features = gather_tokens(features, wanted).flatten(0, 1)

        def choose(logits: Tensor, place: int) -> Tensor:
            return sample_categorical(logits, temperature, torch.rand(len(logits), device=logits.device))

        levels = sample_recomputing(model.head, features, choose)[:, model.from_generation_order]
        new = model.quantizer.dequantize(levels).unflatten(0, (bsz, -1))
        tokens = tokens.scatter(1, wanted[..., None].expand(-1, -1, model.token_dim), new)
    return model.unpatchify(tokens)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Within the block everything is as PyTorch has it, as in the release: attention, dropout, the loss in one part."""

    def run_fused(self: MaskedBackbone, part: str, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            block.attn.fused_attn = True
            x = block(x)
        return x

    plain = [
        (MaskedBackbone, "_run", run_fused),
        (channel_head, "attend", fused_attention),
        (channel_head, "TRAINING_BUDGET", {"cpu": 2**62, "cuda": 2**62}),
        (dropout, "dropout", F.dropout),
    ]
    ours = [getattr(where, name) for where, name, _ in plain]
    for where, name, value in plain:
        setattr(where, name, value)
    try:
        yield
    finally:
        for (where, name, _), value in zip(plain, ours, strict=True):
            setattr(where, name, value)


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
