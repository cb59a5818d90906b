"""The head (section 3.2, Eq. 6): one token's channels, one after the other; or, for comparison, all at once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import attend
from models.dropout import Dropout, with_fast_dropout
from models.graphs import Recordings

#: Elements of AdaLN modulations held at once in sampling; more tokens than that allows go through in turn.
MODULATION_BUDGET = 2**28
#: Elements of the sequence (tokens x places x width) that train at once, by device; see :class:`LossInParts`.
TRAINING_BUDGET = {"cpu": 2**22, "cuda": 2**25}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: a normalized ``x`` scaled around 1 and shifted."""
    return x * (1 + scale) + shift


def ada_ln(dim: int, parts: int) -> nn.Sequential:
    """SiLU and the Linear that gives ``parts`` modulations of width ``dim`` from a condition of width ``dim``."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


# --------------------------------------------------------------------------------------------------------------------
# Blocks.


class ChannelAttention(nn.Module):
    """Causal self-attention along the channels, with normalized queries and keys."""

    def __init__(self, dim: int, heads: int, norm_layer: Callable, attn_dropout: float, proj_dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = norm_layer(dim // heads)
        self.k_norm = norm_layer(dim // heads)
        self.attn_dropout = attn_dropout
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout(proj_dropout)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "m c (three h d) -> three m h c d", three=3, h=self.heads)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """All places at once, ``[M, C, D]``, each attending where the causal ``mask [C, C]`` is 0."""
        out = attend(*self._qkv(x), mask, self.attn_dropout if self.training else 0.0)
        return self.proj_drop(self.proj(rearrange(out, "m h c d -> m c (h d)")))

    def step(self, x: Tensor, cache: Tensor, place: int) -> Tensor:
        """One place ``[M, 1, D]``; its key and value join ``cache [2, M, H, C, d]``, which holds those before it."""
        q, k, v = self._qkv(x)
        cache[0, :, :, place : place + 1] = k
        cache[1, :, :, place : place + 1] = v
        out = attend(q, *cache[:, :, :, : place + 1])
        return self.proj(rearrange(out, "m h 1 d -> m 1 (h d)"))


class ChannelBlock(nn.Module):
    """Pre-norm transformer block whose norms and residuals are modulated by the place's condition (AdaLN)."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, norm_layer: Callable, attn_dropout: float, proj_dropout: float
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = ChannelAttention(dim, heads, norm_layer, attn_dropout, proj_dropout)
        self.norm2 = norm_layer(dim)
        self.mlp = with_fast_dropout(Mlp(dim, int(dim * mlp_ratio), drop=proj_dropout))
        self.adaLN_modulation = ada_ln(dim, 6)

    def forward(self, x: Tensor, modulation: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        """``x [M, N, D]`` and its ``modulation [M, N, 6D]``; ``attention`` is that of all places or of one step."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        x = x + gate_attn * attention(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def all_places(self, x: Tensor, conditions: Tensor, mask: Tensor) -> Tensor:
        """``x [M, C, D]`` under its ``conditions [M, C, D]`` and the causal ``mask [C, C]``."""
        return self(x, self.adaLN_modulation(conditions), lambda y: self.attn(y, mask))

    def __getstate__(self) -> dict:
        """Without what was compiled, which holds this block's own weights: copies have others."""
        return {k: v for k, v in super().__getstate__().items() if k not in ("all_places", "one_place")}

    def one_place(self, x: Tensor, modulation: Tensor, cache: Tensor, place: int) -> Tensor:
        """``x [M, 1, D]`` at ``place`` under ``modulation [M, 1, 6D]``; ``cache`` as in ``ChannelAttention.step``."""
        return self(x, modulation, lambda y: self.attn.step(y, cache, place))


class FinalLayer(nn.Module):
    """The last modulated norm, without gate; scale comes before shift here, as in the published weights."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = ada_ln(dim, 2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """``x [M, C, D]`` and its ``modulation [M, C, 2D]``."""
        scale, shift = modulation.chunk(2, dim=-1)
        return modulate(self.norm(x), shift, scale)


# --------------------------------------------------------------------------------------------------------------------
# The head.


class ChannelHead(nn.Module):
    """p(q | z) as a product over channels in generation order (Eq. 6), shared by all positions.

    The sequence for one token is the projected feature, then the embeddings of the channels already known; place i
    gives the logits of channel i. The feature also conditions every place through AdaLN. The parallel head (Table 2a)
    is the same network without knowledge of other channels: the projected feature at every place, and attention
    among all places.

    Args:
        feature_dim: width of the backbone's features.
        places: one for each channel, or group of channels (Table 2d): C.
        classes: of each place: levels K, or levels^group.
        dim, depth, heads: width, blocks, attention heads.
        autoregressive: False for the parallel head.

    Raises:
        ValueError: a width that the attention heads do not divide.
    """

    def __init__(
        self,
        feature_dim: int,
        places: int,
        classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        norm_layer: Callable[[int], nn.Module],
        attn_dropout: float,
        proj_dropout: float,
        grad_checkpointing: bool,
        autoregressive: bool = True,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"the head's width {dim} is not a multiple of its {heads} attention heads")
        self.places, self.classes, self.dim, self.depth = places, classes, dim, depth
        self.autoregressive, self.grad_checkpointing = autoregressive, grad_checkpointing
        self.channel_embed = nn.Parameter(torch.zeros(1, places, dim))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, places, dim))
        causal = torch.full((places, places), -torch.inf).triu(1)
        self.register_buffer("channel_mask", causal if autoregressive else None)
        self.condition_proj = nn.Linear(feature_dim, dim)
        known = places - 1 if autoregressive else 0
        self.token_embeddings = nn.ModuleList(nn.Embedding(classes, dim) for _ in range(known))
        self.channel_blocks = nn.ModuleList(
            ChannelBlock(dim, heads, mlp_ratio, norm_layer, attn_dropout, proj_dropout) for _ in range(depth)
        )
        self.channel_norm = norm_layer(dim)
        self.channel_final = FinalLayer(dim)
        self.channel_heads = nn.ModuleList(nn.Linear(dim, classes) for _ in range(places))
        #: Of sampling, on CUDA; see :meth:`compile_blocks`.
        self.recordings: Recordings | None = None

    def embed(self, targets: Tensor) -> Tensor:
        """Classes of all places but the last, from ``targets [M, C]``, each in its own embedding: ``[M, C-1, D]``."""
        known = targets[:, :-1]
        if not self.token_embeddings:
            return self.channel_embed.new_zeros(*known.shape, self.dim)
        table = torch.cat([embedding.weight for embedding in self.token_embeddings])  # [(C-1) K, D]
        return F.embedding(known + self.classes * torch.arange(self.places - 1, device=known.device), table)

    def classify(self, x: Tensor) -> Tensor:
        """Each place through its own linear layer, as one batched product: ``[M, C, D]`` to logits ``[M, C, K]``."""
        weight = torch.stack([head.weight for head in self.channel_heads])  # [C, K, D]
        bias = torch.stack([head.bias for head in self.channel_heads])  # [C, K]
        return torch.einsum("mcd,ckd->mck", x, weight) + bias

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Teacher-forced logits.

        Args:
            features: ``[M, F]``, one row a token.
            targets: classes ``[M, C]`` in generation order; place i sees those before i only, the parallel head none.

        Returns:
            logits ``[M, C, K]`` in generation order.
        """
        condition = self.condition_proj(features)[:, None]  # [M, 1, D]
        x = condition
        if self.autoregressive:
            x = torch.cat([condition, self.embed(targets).to(condition.dtype)], dim=1)
        x = x + self.channel_embed  # [M, C, D]
        conditions = condition + self.timesteps_embeddings  # [M, C, D]
        for block in self.channel_blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block.all_places, x, conditions, self.channel_mask, use_reentrant=False)
            else:
                x = block.all_places(x, conditions, self.channel_mask)
        return self.classify(self.channel_final(self.channel_norm(x), self.channel_final.adaLN_modulation(conditions)))

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of ``targets [M, C]`` given ``features [M, F]``, over tokens and places.

        In training, more tokens than :data:`TRAINING_BUDGET` allows go through in parts, each forward and backward.
        """
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        rows = max(1, TRAINING_BUDGET.get(features.device.type, 2**25) // (self.places * self.dim))
        # In fp16, gradients need the scale that the loss only gets later.
        fp16 = torch.is_autocast_enabled(features.device.type) and (
            torch.get_autocast_dtype(features.device.type) == torch.float16
        )
        if len(features) > rows and torch.is_grad_enabled() and (features.requires_grad or learned) and not fp16:
            return LossInParts.apply(self, rows, features, targets, *learned)
        return self._loss_sum(features, targets) / targets.numel()

    def _loss_sum(self, features: Tensor, targets: Tensor) -> Tensor:
        logits = self(features, targets)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

    @torch.no_grad()
    def sample(self, features: Tensor, choose: Callable[[Tensor, int], Tensor], first_place: str = "trained") -> Tensor:
        """Channels one after the other, with keys and values kept: C steps of one place each.

        Args:
            features: ``[M, F]``, one row a token.
            choose: takes the logits ``[M, K]`` (float32) of a place and its number, gives the classes ``[M]``.
            first_place: ``"trained"`` feeds place 0 as training does; ``"released"`` adds the place's AdaLN embedding
                to it, as the published sampler does.

        Returns:
            classes ``[M, C]`` in generation order.

        Raises:
            ValueError: another ``first_place``.
        """
        if not self.autoregressive:
            logits = self(features, features)  # targets are not looked at
            return torch.stack([choose(logits[:, place].float(), place) for place in range(self.places)], dim=1)
        if first_place not in ("trained", "released"):
            raise ValueError(f'first_place is "trained" or "released", not {first_place!r}')
        condition = self.condition_proj(features)[:, None]  # [M, 1, D]
        # The conditions of all places are known beforehand: one AdaLN product a block instead of one a place.
        conditions = condition + self.timesteps_embeddings  # [M, C, D]
        modulations = [block.adaLN_modulation(conditions) for block in self.channel_blocks]  # [M, C, 6D] each
        final_modulation = self.channel_final.adaLN_modulation(conditions)
        heads = self.channel_blocks[0].attn.heads if self.depth else 1
        cache = condition.new_empty(self.depth, 2, len(features), heads, self.places, self.dim // heads)

        x = conditions[:, :1] if first_place == "released" else condition
        chosen = []
        for place in range(self.places):
            here = slice(place, place + 1)
            x = x + self.channel_embed[:, here]
            for block, modulation, kept in zip(self.channel_blocks, modulations, cache, strict=True):
                x = block.one_place(x, modulation[:, here], kept, place)
            x = self.channel_final(self.channel_norm(x), final_modulation[:, here])
            chosen.append(choose(self.channel_heads[place](x)[:, 0].float(), place))
            if place + 1 < self.places:
                x = self.token_embeddings[place](chosen[-1])[:, None].to(condition.dtype)  # [M, 1, D]
        return torch.stack(chosen, dim=1)

    def compile_blocks(self) -> None:
        """Has ``torch.compile`` fuse the blocks; on CUDA, the sampling of few tokens becomes one launch."""
        for block in self.channel_blocks:
            block.all_places = torch.compile(block.all_places, dynamic=True)
            block.one_place = torch.compile(block.one_place, dynamic=True)
        if self.channel_embed.is_cuda:
            self.recordings = Recordings()

    def _apply(self, *args, **kwargs) -> "ChannelHead":
        if self.recordings is not None:
            self.recordings.kept.clear()  # weights may move, and recordings read them where they lay
        return super()._apply(*args, **kwargs)

    def rows_at_once(self) -> int:
        """Tokens whose modulations and logits fit :data:`MODULATION_BUDGET`."""
        logits = self.classes * (1 if self.autoregressive else self.places)
        return max(1, MODULATION_BUDGET // (self.places * self.dim * (6 * self.depth + 2) + logits))


class LossInParts(torch.autograd.Function):
    """The head's loss, part by part of the tokens, gradients included: activations of one part are held at a time.

    The head's activations are most of a training step's memory, 16 places for each token. Nothing is computed twice:
    gradients of features and weights are taken while a part's activations are there, and scaled when they are asked
    for.
    """

    @staticmethod
    def forward(ctx, head: ChannelHead, rows: int, features: Tensor, targets: Tensor, *learned: Tensor) -> Tensor:
        total = torch.zeros((), device=features.device)
        wanted = ctx.needs_input_grad[2]  # not if the backbone is frozen
        feature_grads, sums = [], []
        for z, part in zip(features.split(rows), targets.split(rows), strict=True):
            with torch.enable_grad():
                z = z.detach().requires_grad_(wanted)
                loss = head._loss_sum(z, part) / targets.numel()
                grads = list(torch.autograd.grad(loss, [*[z] * wanted, *learned], materialize_grads=True))
            total += loss.detach()
            if wanted:
                feature_grads.append(grads.pop(0))
            if not sums:
                sums = grads
            elif learned:
                torch._foreach_add_(sums, grads)
        ctx.save_for_backward(torch.cat(feature_grads) if wanted else None, *sums)
        return total

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        features, *learned = ctx.saved_tensors
        scaled = torch._foreach_mul(learned, scale) if learned else ()
        return None, None, None if features is None else features * scale, None, *scaled
