"""The channel head (section 3.2, Eq. 6), which predicts a token's channels one after the other.

:class:`Head` is the interface of all heads. :data:`models.heads.HEADS` lists them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import fast, layers
from util.model_config import ModelConfig
from util.options import option, option_names

#: Maximum number of classes of a channel step (levels^group for a group of channels).
MAX_CLASSES = 2**17

# --------------------------------------------------------------------------------------------------
# Blocks. Shapes: M tokens, S channel steps (each predicts one channel or one group of channels), D
# width, H heads.


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale a normalized ``x`` around 1 and shift it (AdaLN)."""
    return x * (1 + scale) + shift


def ada_ln(dim: int, parts: int) -> nn.Sequential:
    """Return layers that map a condition ``[..., dim]`` to modulations ``[..., parts * dim]``."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class ChannelAttention(nn.Module):
    """Causal self-attention along the channel steps, with normalized queries and keys."""

    def __init__(self, dim: int, heads: int, config: ModelConfig):
        super().__init__()
        if dim % heads:
            raise ValueError(
                f"the head's width {dim} is not a multiple of its {heads} attention heads"
            )
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = config.norm_layer(dim // heads)
        self.k_norm = config.norm_layer(dim // heads)
        self.attn_dropout = config.attn_dropout
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = layers.Dropout(config.proj_dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values ``[M, H, S, D / H]`` of ``x [M, S, D]``."""
        q, k, v = rearrange(self.qkv(x), "m s (three h d) -> three m h s d", three=3, h=self.heads)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend among all steps of ``x [M, S, D]`` under a causal ``mask [S, S]``, or none."""
        drop = self.attn_dropout if self.training else 0.0
        out = layers.attend(*self.project(x), mask, drop)
        return self.proj_drop(self.proj(rearrange(out, "m h s d -> m s (h d)")))

    def one_step(self, x: Tensor, cache: Tensor, step: int) -> Tensor:
        """Attend from one step ``x [M, 1, D]`` to itself and the steps before it.

        Args:
            cache: keys and values ``[2, M, H, S, D / H]``; this step is added in place.
            step: number of the step.
        """
        q, k, v = self.project(x)
        cache[0, :, :, step : step + 1] = k
        cache[1, :, :, step : step + 1] = v
        out = layers.attend(q, *cache[:, :, :, : step + 1])
        return self.proj_drop(self.proj(rearrange(out, "m h 1 d -> m 1 (h d)")))


class ChannelBlock(nn.Module):
    """Pre-norm transformer block, modulated by the condition of each step (AdaLN)."""

    def __init__(self, dim: int, config: ModelConfig):
        super().__init__()
        self.norm1 = config.norm_layer(dim)
        self.attn = ChannelAttention(dim, config.channel_heads, config)
        self.norm2 = config.norm_layer(dim)
        self.mlp = layers.Mlp(dim, config.mlp_ratio, config.proj_dropout)
        self.adaLN_modulation = ada_ln(dim, 6)

    def forward(
        self, x: Tensor, modulation: Tensor, attention: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Apply the block to ``x [M, S, D]``.

        Args:
            modulation: ``[M, S, 6D]``.
            attention: attention among all steps, or from one step.
        """
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(
            6, dim=-1
        )
        x = x + gate_attn * attention(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def all_steps(self, x: Tensor, conditions: Tensor, mask: Tensor | None) -> Tensor:
        """Apply the block to all steps ``x [M, S, D]``, given their ``conditions [M, S, D]``."""
        return self(x, self.adaLN_modulation(conditions), lambda y: self.attn(y, mask))

    def one_step(self, x: Tensor, modulation: Tensor, cache: Tensor, step: int) -> Tensor:
        """Apply the block to one step ``x [M, 1, D]``, given its ``modulation [M, 1, 6D]``.

        See :meth:`ChannelAttention.one_step` for ``cache`` and ``step``.
        """
        return self(x, modulation, lambda y: self.attn.one_step(y, cache, step))

    def flops(self, steps: int) -> float:
        """Count the operations of the forward pass over ``steps`` channel steps of a token."""
        dim = self.attn.proj.in_features
        return layers.block_flops(dim, self.mlp, steps) + 2 * steps * 6 * dim**2  # with AdaLN


class FinalLayer(nn.Module):
    """Modulated norm before the logits; scale comes before shift, as in published weights."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = ada_ln(dim, 2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Normalize ``x [M, S, D]`` and modulate it by ``modulation [M, S, 2D]``."""
        scale, shift = modulation.chunk(2, dim=-1)
        return modulate(self.norm(x), shift, scale)


# --------------------------------------------------------------------------------------------------
# The interface of heads.


@dataclass(frozen=True)
class NoOptions:
    """Sampling options of a head that has none."""


class Head(nn.Module):
    """Base class of heads, which predict a token's C channels as the classes of S channel steps.

    A step is one channel, or one group of consecutive channels of the generation order as one of
    levels^group joint classes (Table 2d). :meth:`loss` and :meth:`sample` take and return levels in
    the latents' own channel order; inside, classes are in generation order.

    A head implements :meth:`summed_loss`, :meth:`draw`, :meth:`training_flops` and
    :meth:`elements_per_token`. It may replace the class attributes below, ``sample_numbers`` and
    ``loss_numbers``, and :meth:`given`, :meth:`loss`, :meth:`sampling_flops` and
    :meth:`check_options`.

    Args:
        config: arguments of :class:`models.tokenbridge.TokenBridge`.

    Raises:
        ValueError: groups that do not divide the channels or have too many classes.
    """

    #: Dataclass of the head's own sampling options, made with :func:`util.options.option`.
    Options: ClassVar[type] = NoOptions
    #: Names of those options that :meth:`loss` takes when held-out images are measured.
    likelihood_options: ClassVar[Sequence[str]] = ()
    #: Arguments of a model with this head that differ from :data:`models.tokenbridge.SIZES`, by
    #: model size.
    sizes: ClassVar[dict[str, dict[str, int]]] = {}
    #: Name prefixes of parameters that have a copy for each channel step.
    step_parameters: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig):
        super().__init__()
        group, channels, levels = config.channels_per_group, config.token_dim, config.quant_levels
        if group < 1 or channels % group:
            raise ValueError(f"groups of {group} do not divide the {channels} channels of a token")
        self.channels, self.channels_per_group, self.levels = channels, group, levels
        self.channel_steps, self.classes = channels // group, levels**group  # S, K
        self.dim, self.depth = config.channel_embed_dim, config.channel_depth
        if self.classes > MAX_CLASSES:
            weights = self.classes * self.dim * self.channel_steps
            raise ValueError(
                f"{group} channels of {levels} levels have {self.classes:,} joint classes, the "
                f"limit is {MAX_CLASSES:,}: the output layers would hold {weights:,} parameters "
                f"({4 * weights / 2**30:,.0f} GiB in fp32)"
            )
        #: Length of the sequence that the head processes for one token in training.
        self.sequence_length = self.channel_steps
        #: Uniform random numbers per token that :meth:`sample` and that :meth:`given` take.
        self.sample_numbers, self.loss_numbers = self.channel_steps, 0
        #: Recompute the blocks in the backward pass instead of keeping their activations.
        self.grad_checkpointing = "head" in config.recomputed
        #: Set by :meth:`compile_blocks`: whether blocks run compiled, and CUDA graphs that sample
        #: few tokens.
        self.compiled = False
        self.recordings: fast.Recordings | None = None
        order = torch.tensor(config.channel_order)
        weights = levels ** torch.arange(group - 1, -1, -1)
        self.register_buffer("generation_order", order, persistent=False)
        self.register_buffer("from_generation_order", order.argsort(), persistent=False)
        self.register_buffer("group_weights", weights, persistent=False)

    # ----------------------------------------------------------------------------------------------
    # Channels and classes.

    def to_classes(self, levels: Tensor) -> Tensor:
        """Map levels ``[..., C]`` in generation order to the classes ``[..., S]`` of the steps."""
        if self.channels_per_group == 1:
            return levels
        return (levels.unflatten(-1, (-1, self.channels_per_group)) * self.group_weights).sum(-1)

    def to_levels(self, classes: Tensor) -> Tensor:
        """Map classes ``[..., S]`` to levels ``[..., C]`` in generation order."""
        if self.channels_per_group == 1:
            return classes
        return (classes[..., None] // self.group_weights % self.levels).flatten(-2)

    # ----------------------------------------------------------------------------------------------
    # Training and likelihood.

    def loss(self, features: Tensor, targets: Tensor, *uniform: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats over tokens and channel steps.

        It is computed in parts that fit in memory.

        Args:
            features: ``[M, D]`` of the backbone, one row per token.
            targets: levels ``[M, C]`` in the latents' own channel order.
            uniform: numbers in [0, 1), ``[M, loss_numbers]``, of a head that takes some; drawn by
                default.
        """
        return fast.loss_in_parts(self, features, self.given(targets, *uniform))

    def given(self, targets: Tensor) -> Tensor:
        """Return the classes ``[M, S]`` of levels ``[M, C]``, for :meth:`summed_loss`."""
        return self.to_classes(targets[:, self.generation_order])

    def summed_loss(self, features: Tensor, given: Tensor) -> Tensor:
        """Return the cross-entropy in nats, summed over tokens and channel steps.

        Args:
            features: ``[M, D]``.
            given: output of :meth:`given` for these tokens.
        """
        raise NotImplementedError

    # ----------------------------------------------------------------------------------------------
    # Sampling.

    @classmethod
    def option_names(cls) -> list[str]:
        """Return the names of the head's own sampling options."""
        return option_names(cls.Options)

    def check_options(self, options: Any) -> None:
        """Raise ValueError for values of the head's own options that do not fit its sizes.

        Args:
            options: a :class:`models.sampling.SamplingOptions`, or parsed flags.
        """

    def draw(
        self, features: Tensor, temperature: float, uniform: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Draw all channels of M tokens in one go; see :meth:`sample`."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(
        self, features: Tensor, temperature: float, uniform: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Draw all channels of M tokens, in parts that fit in memory.

        On CUDA, a compiled head draws few tokens by one recorded launch.

        Args:
            features: ``[M, D]`` of the backbone, one row per token.
            temperature: of each distribution; 0 takes the most probable class.
            uniform: random numbers in [0, 1), ``[M, sample_numbers]``.
            options: the head's own, see its ``Options``.

        Returns:
            levels ``[M, C]`` in the latents' own channel order, and their joint log-probability
            ``[M]`` in nats at temperature 1.
        """

        def draw(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return self.draw(z, temperature, u, **options)

        rows = max(1, fast.MODULATION_BUDGET // self.elements_per_token())
        if self.recordings is not None and len(features) <= min(rows, fast.RECORDED_ROWS):
            return self.recordings(draw, features, uniform, key=(temperature, *options.values()))
        parts = [draw(z, u) for z, u in zip(features.split(rows), uniform.split(rows), strict=True)]
        levels, log_probs = zip(*parts, strict=True)
        return torch.cat(levels), torch.cat(log_probs)

    # ----------------------------------------------------------------------------------------------
    # Cost.

    def training_flops(self) -> float:
        """Count the operations of the forward pass for one token."""
        raise NotImplementedError

    def sampling_flops(self, **options: Any) -> float:
        """Count the operations that sample one token, given the head's own ``options``."""
        return self.training_flops()

    def elements_per_token(self) -> int:
        """Count the elements of a token's largest tensors in :meth:`draw`."""
        raise NotImplementedError

    def compile_blocks(self) -> None:
        """Run the blocks compiled; see :func:`models.tokenbridge.TokenBridge.compile_blocks`."""
        self.compiled = True
        if next(self.parameters()).is_cuda:
            self.recordings = fast.Recordings()

    def _apply(self, *args, **kwargs) -> "Head":
        if self.recordings is not None:
            self.recordings.kept.clear()  # recordings read weights at fixed addresses
        return super()._apply(*args, **kwargs)


# --------------------------------------------------------------------------------------------------
# The heads of the paper.

#: Inputs of the first channel step: as in training, or as the release samples.
FIRST_PLACES = ("trained", "released")


@dataclass(frozen=True)
class ChannelHeadOptions:
    """Sampling options of the autoregressive head."""

    first_place: str = option(
        "trained",
        "input of the first channel step: as in training, or as the release samples "
        "(the paper's results)",
        choices=FIRST_PLACES,
    )


class ChannelHead(Head):
    """p(q | z) as a product over channels (Eq. 6).

    The weights are the same at all positions of the image. The head predicts a token's C channels
    in S steps, in the generation order. The sequence for one token is the projected feature, then
    the embeddings of the classes already known; step i gives the logits of class i. The feature
    also conditions every step through AdaLN.
    """

    Options: ClassVar[type] = ChannelHeadOptions
    step_parameters = (
        "channel_embed",
        "timesteps_embeddings",
        "token_embeddings.",
        "channel_heads.",
    )
    #: Whether each step sees the classes of the steps before it.
    causal: ClassVar[bool] = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        dim, steps = self.dim, self.channel_steps
        self.channel_embed = nn.Parameter(torch.zeros(1, steps, dim))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, steps, dim))
        mask = torch.full((steps, steps), -torch.inf).triu(1)
        self.register_buffer("channel_mask", mask if self.causal else None)
        self.condition_proj = nn.Linear(config.decoder_embed_dim, dim)
        embedded = steps - 1 if self.causal else 0
        self.token_embeddings = nn.ModuleList(
            nn.Embedding(self.classes, dim) for _ in range(embedded)
        )
        self.channel_blocks = nn.ModuleList(ChannelBlock(dim, config) for _ in range(self.depth))
        self.channel_norm = config.norm_layer(dim)
        self.channel_final = FinalLayer(dim)
        self.channel_heads = nn.ModuleList(nn.Linear(dim, self.classes) for _ in range(steps))

    # ----------------------------------------------------------------------------------------------
    # Training.

    def program(self, method: Callable) -> Callable:
        """Return a method of :class:`ChannelBlock`, compiled if the head's blocks are."""
        return fast.compiled(method) if self.compiled else method

    def embed(self, targets: Tensor) -> Tensor:
        """Embed the classes of all steps but the last of ``targets [M, S]``: ``[M, S-1, D]``."""
        known = targets[:, :-1]
        if not self.token_embeddings:
            return self.channel_embed.new_zeros(*known.shape, self.dim)
        table = torch.cat([embedding.weight for embedding in self.token_embeddings])  # [(S-1) K, D]
        offsets = self.classes * torch.arange(self.channel_steps - 1, device=known.device)
        return F.embedding(known + offsets, table)

    def inputs(self, condition: Tensor, targets: Tensor | None) -> Tensor:
        """Return the sequence ``[M, S, D]``, or ``[M, 1, D]`` if all steps have the same input.

        Args:
            condition: projected feature ``[M, 1, D]``.
            targets: see :meth:`forward`.
        """
        assert targets is not None
        return torch.cat([condition, self.embed(targets).to(condition.dtype)], dim=1)

    def classify(self, x: Tensor) -> Tensor:
        """Map ``x [M, S, D]`` to logits ``[M, S, K]`` by a linear layer per step."""
        weight = torch.stack([head.weight for head in self.channel_heads])  # [S, K, D]
        bias = torch.stack([head.bias for head in self.channel_heads])  # [S, K]
        return torch.einsum("msd,skd->msk", x, weight) + bias

    def forward(self, features: Tensor, targets: Tensor | None) -> Tensor:
        """Return the teacher-forced logits ``[M, S, K]`` in generation order.

        Args:
            features: ``[M, D]`` of the backbone, one row per token.
            targets: classes ``[M, S]`` in generation order; step i sees those before i only.
        """
        condition = self.condition_proj(features)[:, None]  # [M, 1, D]
        x = self.inputs(condition, targets) + self.channel_embed  # [M, S, D]
        conditions = condition + self.timesteps_embeddings  # [M, S, D]
        all_steps = self.program(ChannelBlock.all_steps)
        for block in self.channel_blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    all_steps, block, x, conditions, self.channel_mask, use_reentrant=False
                )
            else:
                x = all_steps(block, x, conditions, self.channel_mask)
        modulation = self.channel_final.adaLN_modulation(conditions)
        return self.classify(self.channel_final(self.channel_norm(x), modulation))

    def summed_loss(self, features: Tensor, given: Tensor) -> Tensor:
        """Return the cross-entropy (Eq. 6) in nats, summed over tokens and channel steps.

        Args:
            features: ``[M, D]``.
            given: classes ``[M, S]`` in generation order.
        """
        logits = self(features, given).flatten(0, 1).float()
        return F.cross_entropy(logits, given.flatten(), reduction="sum")

    def training_flops(self) -> float:
        """Count the operations of the forward pass for one token."""
        blocks = sum(block.flops(self.channel_steps) for block in self.channel_blocks)
        ends = (
            self.condition_proj.in_features + 2 * self.channel_steps * self.dim
        )  # with the last AdaLN
        return blocks + 2 * self.dim * (ends + self.channel_steps * self.classes)

    # ----------------------------------------------------------------------------------------------
    # Sampling.

    def draw(  # type: ignore[override]  # it names its options
        self,
        features: Tensor,
        temperature: float,
        uniform: Tensor,
        first_place: str = ChannelHeadOptions.first_place,
    ) -> tuple[Tensor, Tensor]:
        """Draw the channels of M tokens one step after the other; see :meth:`Head.sample`.

        Args:
            first_place: ``"trained"`` feeds step 0 as training does; ``"released"`` adds the step's
                AdaLN embedding to its input, as the published sampler does.
        """
        next_logits = self._cached_steps(features, first_place)
        return self.draw_steps(next_logits, temperature, uniform)

    def draw_steps(
        self,
        next_logits: Callable[[int, Sequence[Tensor]], Tensor],
        temperature: float,
        uniform: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Draw the classes of all steps in turn; see :meth:`Head.sample`.

        Args:
            next_logits: returns the logits ``[M, K]`` of a step, given the classes ``[M]`` of those
                before it.
        """
        log_probs, classes = torch.zeros(len(uniform), device=uniform.device), []
        for step in range(self.channel_steps):
            logits = next_logits(step, classes)
            classes.append(sample_categorical(logits, temperature, uniform[:, step]))
            log_probs = log_probs + logits.log_softmax(dim=-1).gather(1, classes[-1][:, None])[:, 0]
        levels = self.to_levels(torch.stack(classes, dim=1))
        return levels[:, self.from_generation_order], log_probs

    def elements_per_token(self) -> int:
        """Count the elements of a token's modulations and of one step's logits."""
        return self.channel_steps * self.dim * (6 * self.depth + 2) + self.classes

    def _cached_steps(
        self, features: Tensor, first_place: str
    ) -> Callable[[int, Sequence[Tensor]], Tensor]:
        """Return ``next_logits`` for :meth:`draw_steps`, with a cache of keys and values.

        It must be called for all steps in turn.
        """
        condition = self.condition_proj(features)[:, None]  # [M, 1, D]
        # The conditions of all steps are known beforehand: one AdaLN product per block, not one per
        # step.
        conditions = condition + self.timesteps_embeddings  # [M, S, D]
        modulations = [
            block.adaLN_modulation(conditions) for block in self.channel_blocks
        ]  # [M, S, 6D]
        final_modulation = self.channel_final.adaLN_modulation(conditions)
        heads = self.channel_blocks[0].attn.heads if self.depth else 1
        one_step = self.program(ChannelBlock.one_step)
        cache_shape = 2, len(features), heads, self.channel_steps, self.dim // heads
        caches = condition.new_empty(self.depth, *cache_shape)

        def next_logits(step: int, classes: Sequence[Tensor]) -> Tensor:
            this_step = slice(step, step + 1)
            if step:
                x = self.token_embeddings[step - 1](classes[-1])[:, None].to(
                    condition.dtype
                )  # [M, 1, D]
            else:
                x = conditions[:, :1] if first_place == "released" else condition
            x = x + self.channel_embed[:, this_step]
            for block, modulation, cache in zip(
                self.channel_blocks, modulations, caches, strict=True
            ):
                x = one_step(block, x, modulation[:, this_step], cache, step)
            x = self.channel_final(self.channel_norm(x), final_modulation[:, this_step])
            return self.channel_heads[step](x)[:, 0].float()

        return next_logits


class ParallelHead(ChannelHead):
    """p(q | z) with independent channels (Table 2a).

    The network of :class:`ChannelHead` without knowledge of other channels: its input is the
    projected feature at every step, with attention among all steps.
    """

    Options: ClassVar[type] = NoOptions
    causal = False

    def inputs(self, condition: Tensor, targets: Tensor | None) -> Tensor:
        """Return the projected feature ``[M, 1, D]``, the input of every step."""
        return condition

    def draw(  # type: ignore[override]  # it has no options
        self, features: Tensor, temperature: float, uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw all channels of M tokens independently; see :meth:`Head.sample`."""
        logits = self(features, None).float()  # [M, S, K]
        return self.draw_steps(lambda step, _: logits[:, step], temperature, uniform)

    def elements_per_token(self) -> int:
        """Count the elements of a token's modulations and logits."""
        return self.channel_steps * (self.dim * (6 * self.depth + 2) + self.classes)


def sample_categorical(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Draw classes ``[M]`` from ``logits [M, K]``, given uniform random numbers ``[M]``.

    The distribution function is inverted at these numbers. Temperature 0 is the argmax; otherwise
    softmax(logits / temperature) is sampled.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    cdf = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    threshold = uniform[:, None] * cdf[:, -1:]  # the last sum may differ from 1 by rounding
    return torch.searchsorted(cdf, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
