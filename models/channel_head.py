"""The channel head (section 3.2, Eq. 6): predicts a token's channels one after the other, or all at once.

:class:`Head` is what it shares with :class:`models.masked_head.MaskedHead`.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import fast, layers

#: Most classes that one step of the head may predict: the joint classes of a group of channels number levels^group.
MAX_CLASSES = 2**17

# --------------------------------------------------------------------------------------------------------------------
# Blocks. Shapes: M tokens, S channel steps (each predicts one channel or one group of channels), D width, H heads.


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: a normalized ``x`` scaled around 1 and shifted."""
    return x * (1 + scale) + shift


def ada_ln(dim: int, parts: int) -> nn.Sequential:
    """SiLU and the Linear that gives ``parts`` modulations of width ``dim`` from a condition of width ``dim``."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class ChannelAttention(nn.Module):
    """Causal self-attention along the channel steps, with normalized queries and keys."""

    def __init__(
        self, dim: int, heads: int, norm_layer: Callable, attn_dropout: float, proj_dropout: float
    ):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = norm_layer(dim // heads)
        self.k_norm = norm_layer(dim // heads)
        self.attn_dropout = attn_dropout
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = layers.Dropout(proj_dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[M, H, S, D / H]`` of ``x [M, S, D]``."""
        q, k, v = rearrange(self.qkv(x), "m s (three h d) -> three m h s d", three=3, h=self.heads)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """All steps at once, ``[M, S, D]``, under the causal ``mask [S, S]``, 0 or -inf; None: no mask."""
        out = layers.attend(*self.project(x), mask, self.attn_dropout if self.training else 0.0)
        return self.proj_drop(self.proj(rearrange(out, "m h s d -> m s (h d)")))

    def one_step(self, x: Tensor, cache: Tensor, step: int) -> Tensor:
        """One step ``[M, 1, D]``; its key and value join those before it in ``cache [2, M, H, S, D / H]``."""
        q, k, v = self.project(x)
        cache[0, :, :, step : step + 1] = k
        cache[1, :, :, step : step + 1] = v
        out = layers.attend(q, *cache[:, :, :, : step + 1])
        return self.proj_drop(self.proj(rearrange(out, "m h 1 d -> m 1 (h d)")))


class ChannelBlock(nn.Module):
    """Pre-norm transformer block whose norms and residuals are modulated by the step's condition (AdaLN)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        norm_layer: Callable,
        attn_dropout: float,
        proj_dropout: float,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = ChannelAttention(dim, heads, norm_layer, attn_dropout, proj_dropout)
        self.norm2 = norm_layer(dim)
        self.mlp = layers.Mlp(dim, mlp_ratio, proj_dropout)
        self.adaLN_modulation = ada_ln(dim, 6)

    def forward(
        self, x: Tensor, modulation: Tensor, attention: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``x [M, S, D]`` under its ``modulation [M, S, 6D]``, with the ``attention`` of all steps or of one."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(
            6, dim=-1
        )
        x = x + gate_attn * attention(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def all_steps(self, x: Tensor, conditions: Tensor, mask: Tensor | None) -> Tensor:
        """``x [M, S, D]`` under its ``conditions [M, S, D]`` and the causal ``mask [S, S]``."""
        return self(x, self.adaLN_modulation(conditions), lambda y: self.attn(y, mask))

    def one_step(self, x: Tensor, modulation: Tensor, cache: Tensor, step: int) -> Tensor:
        """``x [M, 1, D]`` of one step under its ``modulation [M, 1, 6D]``; its attention adds to the ``cache``."""
        return self(x, modulation, lambda y: self.attn.one_step(y, cache, step))


class FinalLayer(nn.Module):
    """The last modulated norm, without gate; scale comes before shift here, as in the published weights."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = ada_ln(dim, 2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """``x [M, S, D]`` and its ``modulation [M, S, 2D]``."""
        scale, shift = modulation.chunk(2, dim=-1)
        return modulate(self.norm(x), shift, scale)


# --------------------------------------------------------------------------------------------------------------------
# The head.


class Head(nn.Module):
    """What all heads have: a token's C channels as the classes of S channel steps, and the loss over them.

    Each computes ``summed_loss``, the cross-entropy in nats summed over tokens and channel steps, from features and
    what :meth:`given` gives; draws tokens by ``draw``; and counts ``elements_per_token``, those that ``draw`` keeps.

    A step is one channel, or one group of consecutive channels of the generation order as one of levels^group joint
    classes (Table 2d). ``loss`` and ``sample`` speak the latents' own channel order; ``forward`` speaks classes in
    generation order.

    Args:
        config: arguments of :class:`models.tokenbridge.TokenBridge`, its ``channel_order`` given.

    Raises:
        ValueError: a head of another kind, a width that its attention heads do not divide, groups that do not divide
            the channels or have too many classes.
    """

    #: Those of :class:`models.sampling.SamplingOptions` that ``sample`` takes.
    sampling_options: Sequence[str] = ()

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        check_head(config)
        group = config["channels_per_group"]
        self.channels, self.channels_per_group = len(config["channel_order"]), group  # C
        self.levels = config["quant_levels"]
        self.channel_steps, self.classes = self.channels // group, self.levels**group  # S, K
        self.dim, self.depth = config["channel_embed_dim"], config["channel_depth"]
        #: Places of a token's sequence in training, and uniform numbers that ``sample`` takes for a token.
        self.places = self.numbers = self.channel_steps
        #: Recompute the blocks in the backward pass instead of keeping their activations.
        self.grad_checkpointing = False
        #: Set by :meth:`models.tokenbridge.TokenBridge.compile_blocks`: whether blocks run compiled, and on CUDA the
        #: recorded launches by which few tokens are sampled.
        self.compiled = False
        self.recordings: fast.Recordings | None = None
        order = torch.tensor(config["channel_order"])
        self.register_buffer("generation_order", order, persistent=False)
        self.register_buffer("from_generation_order", order.argsort(), persistent=False)
        self.register_buffer(
            "group_weights", self.levels ** torch.arange(group - 1, -1, -1), persistent=False
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Channels and classes.

    def to_classes(self, levels: Tensor) -> Tensor:
        """Levels ``[..., C]`` in generation order to the classes ``[..., S]`` of the channel steps."""
        if self.channels_per_group == 1:
            return levels
        return (levels.unflatten(-1, (-1, self.channels_per_group)) * self.group_weights).sum(-1)

    def to_levels(self, classes: Tensor) -> Tensor:
        """Classes ``[..., S]`` to levels ``[..., C]`` in generation order: the inverse of :meth:`to_classes`."""
        if self.channels_per_group == 1:
            return classes
        return (classes[..., None] // self.group_weights % self.levels).flatten(-2)

    # ----------------------------------------------------------------------------------------------------------------
    # Training.

    def loss(self, features: Tensor, targets: Tensor, *uniform: Tensor) -> Tensor:
        """Mean cross-entropy in nats over tokens and channel steps, in parts that fit in memory.

        Args:
            features: ``[M, D]`` of the backbone, one row a token.
            targets: levels ``[M, C]`` in the latents' own channel order.
            uniform: see :meth:`models.masked_head.MaskedHead.given`.
        """
        return fast.loss_in_parts(self, features, self.given(targets, *uniform))

    def given(self, targets: Tensor) -> Tensor:
        """What ``summed_loss`` takes beside the features: a row for each of the ``targets [M, C]``, their classes."""
        return self.to_classes(targets[:, self.generation_order])

    # ----------------------------------------------------------------------------------------------------------------
    # Sampling.

    @torch.no_grad()
    def sample(
        self, features: Tensor, temperature: float, uniform: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Draw all channels of M tokens: in parts that fit in memory, few at once by a recorded launch.

        Args:
            features: ``[M, D]`` of the backbone, one row per token.
            temperature: of each distribution; 0 takes the most probable class.
            uniform: random numbers in [0, 1), :attr:`numbers` per token: ``[M, numbers]``.
            options: those of :attr:`sampling_options`, see the head's ``draw``.

        Returns:
            levels ``[M, C]`` in the latents' own channel order, and their joint log-probability ``[M]`` in nats at
            temperature 1.
        """

        def draw(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return self.draw(z, temperature, u, **options)

        rows = max(1, fast.MODULATION_BUDGET // self.elements_per_token())
        if self.recordings is not None and len(features) <= min(rows, fast.RECORDED_ROWS):
            return self.recordings(draw, features, uniform, key=(temperature, *options.values()))
        parts = [draw(z, u) for z, u in zip(features.split(rows), uniform.split(rows), strict=True)]
        levels, log_probs = zip(*parts, strict=True)
        return torch.cat(levels), torch.cat(log_probs)

    def _apply(self, *args, **kwargs) -> "Head":
        if self.recordings is not None:
            self.recordings.kept.clear()  # weights may move, and recordings read them where they were
        return super()._apply(*args, **kwargs)


class ChannelHead(Head):
    """p(q | z) as a product over channels (Eq. 6), with the same weights at all positions of the image.

    The head predicts a token's C channels in S steps, in the generation order. The sequence for one token is the
    projected feature, then the embeddings of the classes already known; step i gives the logits of class i. The feature
    also conditions every step through AdaLN. The parallel head (Table 2a) is the same network without knowledge of
    other channels: the projected feature at every step, and attention among all steps.

    Args:
        config: see :class:`Head`.
        norm_layer: makes a norm from a width.
    """

    def __init__(self, config: Mapping[str, Any], norm_layer: Callable[[int], nn.Module]):
        super().__init__(config)
        dim, heads, self.autoregressive = self.dim, config["channel_heads"], config["head"] == "ar"
        self.sampling_options = ("first_place",) if self.autoregressive else ()
        self.channel_embed = nn.Parameter(torch.zeros(1, self.channel_steps, dim))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, self.channel_steps, dim))
        causal = torch.full((self.channel_steps, self.channel_steps), -torch.inf).triu(1)
        self.register_buffer("channel_mask", causal if self.autoregressive else None)
        self.condition_proj = nn.Linear(config["decoder_embed_dim"], dim)
        known = self.channel_steps - 1 if self.autoregressive else 0
        self.token_embeddings = nn.ModuleList(nn.Embedding(self.classes, dim) for _ in range(known))
        options = config["mlp_ratio"], norm_layer, config["attn_dropout"], config["proj_dropout"]
        self.channel_blocks = nn.ModuleList(
            ChannelBlock(dim, heads, *options) for _ in range(self.depth)
        )
        self.channel_norm = norm_layer(dim)
        self.channel_final = FinalLayer(dim)
        self.channel_heads = nn.ModuleList(
            nn.Linear(dim, self.classes) for _ in range(self.channel_steps)
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Training.

    def program(self, method: Callable) -> Callable:
        """Return a method of :class:`ChannelBlock`, compiled if the head's blocks are."""
        return fast.compiled(method) if self.compiled else method

    def embed(self, targets: Tensor) -> Tensor:
        """Classes of all steps but the last, from ``targets [M, S]``, each in its own embedding: ``[M, S-1, D]``."""
        known = targets[:, :-1]
        if not self.token_embeddings:
            return self.channel_embed.new_zeros(*known.shape, self.dim)
        table = torch.cat([embedding.weight for embedding in self.token_embeddings])  # [(S-1) K, D]
        return F.embedding(
            known + self.classes * torch.arange(self.channel_steps - 1, device=known.device), table
        )

    def classify(self, x: Tensor) -> Tensor:
        """Each step through its own linear layer, as one batched product: ``[M, S, D]`` to logits ``[M, S, K]``."""
        weight = torch.stack([head.weight for head in self.channel_heads])  # [S, K, D]
        bias = torch.stack([head.bias for head in self.channel_heads])  # [S, K]
        return torch.einsum("msd,skd->msk", x, weight) + bias

    def forward(self, features: Tensor, targets: Tensor | None) -> Tensor:
        """Teacher-forced logits ``[M, S, K]`` in generation order.

        Args:
            features: ``[M, D]`` of the backbone, one row a token.
            targets: classes ``[M, S]`` in generation order; step i sees those before i only, the parallel head none.
        """
        condition = self.condition_proj(features)[:, None]  # [M, 1, D]
        x = condition
        if self.autoregressive:
            x = torch.cat([condition, self.embed(targets).to(condition.dtype)], dim=1)
        x = x + self.channel_embed  # [M, S, D]
        conditions = condition + self.timesteps_embeddings  # [M, S, D]
        all_steps = self.program(ChannelBlock.all_steps)
        for block in self.channel_blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    all_steps, block, x, conditions, self.channel_mask, use_reentrant=False
                )
            else:
                x = all_steps(block, x, conditions, self.channel_mask)
        return self.classify(
            self.channel_final(
                self.channel_norm(x), self.channel_final.adaLN_modulation(conditions)
            )
        )

    def summed_loss(self, features: Tensor, given: Tensor) -> Tensor:
        """Cross-entropy in nats summed over tokens and channel steps (Eq. 6), of ``features [M, D]`` and classes."""
        return F.cross_entropy(
            self(features, given).flatten(0, 1).float(), given.flatten(), reduction="sum"
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Sampling.

    def draw(
        self, features: Tensor, temperature: float, uniform: Tensor, first_place: str = "trained"
    ) -> tuple[Tensor, Tensor]:
        """Draw all channels of M tokens at once; see :meth:`Head.sample`.

        Args:
            first_place: of the autoregressive head: ``"trained"`` feeds step 0 as training does; ``"released"`` adds
                the step's AdaLN embedding to its input, as the published sampler does.
        """
        if self.autoregressive:
            next_logits = self._cached_steps(features, first_place)
        else:
            all_logits = self(features, None).float()  # [M, S, K]
        log_probs, classes = torch.zeros(len(features), device=features.device), []
        for step in range(self.channel_steps):
            logits = next_logits(step, classes) if self.autoregressive else all_logits[:, step]
            classes.append(sample_categorical(logits, temperature, uniform[:, step]))
            log_probs = log_probs + logits.log_softmax(dim=-1).gather(1, classes[-1][:, None])[:, 0]
        return self.to_levels(torch.stack(classes, dim=1))[:, self.from_generation_order], log_probs

    def elements_per_token(self) -> int:
        """Count the elements of a token's modulations and logits in :meth:`draw`."""
        logits = self.classes * (1 if self.autoregressive else self.channel_steps)
        return self.channel_steps * self.dim * (6 * self.depth + 2) + logits

    def _cached_steps(
        self, features: Tensor, first_place: str
    ) -> Callable[[int, Sequence[Tensor]], Tensor]:
        """A function that gives the logits ``[M, K]`` of a step from the classes ``[M]`` of the steps before it.

        It must be called for all steps in turn: it keeps the keys and values of those before.
        """
        condition = self.condition_proj(features)[:, None]  # [M, 1, D]
        # The conditions of all steps are known beforehand: one AdaLN product a block instead of one a step.
        conditions = condition + self.timesteps_embeddings  # [M, S, D]
        modulations = [
            block.adaLN_modulation(conditions) for block in self.channel_blocks
        ]  # [M, S, 6D] each
        final_modulation = self.channel_final.adaLN_modulation(conditions)
        heads = self.channel_blocks[0].attn.heads if self.depth else 1
        one_step = self.program(ChannelBlock.one_step)
        cache = condition.new_empty(
            self.depth, 2, len(features), heads, self.channel_steps, self.dim // heads
        )

        def logits_of(step: int, classes: Sequence[Tensor]) -> Tensor:
            here = slice(step, step + 1)
            if step:
                x = self.token_embeddings[step - 1](classes[-1])[:, None].to(
                    condition.dtype
                )  # [M, 1, D]
            else:
                x = conditions[:, :1] if first_place == "released" else condition
            x = x + self.channel_embed[:, here]
            for block, modulation, kept in zip(
                self.channel_blocks, modulations, cache, strict=True
            ):
                x = one_step(block, x, modulation[:, here], kept, step)
            x = self.channel_final(self.channel_norm(x), final_modulation[:, here])
            return self.channel_heads[step](x)[:, 0].float()

        return logits_of


def sample_categorical(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Classes ``[M]`` from ``logits [M, K]`` by inverting the distribution function at ``uniform [M]``.

    Temperature 0 is the argmax; otherwise softmax(logits / temperature) is sampled.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    cdf = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    threshold = uniform[:, None] * cdf[:, -1:]  # rounding may leave the sum beside 1
    return torch.searchsorted(cdf, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


# --------------------------------------------------------------------------------------------------------------------
# Checks of the configuration.


def checked_order(order: Sequence[int], channels: int) -> list[int]:
    """``order`` as a list of numbers; raises ValueError unless it is a permutation of ``range(channels)``."""
    try:
        order = [operator.index(channel) for channel in order]
    except TypeError:
        order = []
    if sorted(order) != list(range(channels)):
        raise ValueError(
            f"channel_order must hold each of 0 to {channels - 1} once, got {order or 'no numbers'}"
        )
    return order


def check_head(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a ``config`` that describes no head."""
    kind, size, channels = (
        config["head"],
        config["channels_per_group"],
        len(config["channel_order"]),
    )
    levels, dim, heads = (
        config["quant_levels"],
        config["channel_embed_dim"],
        config["channel_heads"],
    )
    if kind not in ("ar", "parallel", "masked"):
        raise ValueError(f'head is "ar", "parallel" or "masked", not {kind!r}')
    if size < 1 or channels % size:
        raise ValueError(f"groups of {size} do not divide the {channels} channels of a token")
    classes, steps = levels**size, channels // size
    if classes > MAX_CLASSES:
        embeddings = {"ar": steps - 1, "parallel": 0, "masked": steps}[kind]
        parameters = classes * dim * (steps + embeddings)
        raise ValueError(
            f"{size} channels of {levels} levels have {classes:,} joint classes, {MAX_CLASSES:,} are the most: the "
            f"head would hold {parameters:,} parameters for them ({4 * parameters / 2**30:,.0f} GiB in fp32)"
        )
    if kind != "masked" and dim % heads:
        raise ValueError(f"the head's width {dim} is not a multiple of its {heads} attention heads")
