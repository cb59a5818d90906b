"""The masked head, which predicts a token's channels in few steps (not in the paper)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.channel_head import FinalLayer, Head, ada_ln, modulate, sample_categorical
from models.layers import Mlp
from util.model_config import ModelConfig
from util.options import option

#: Steps of sampling where none are given.
DEFAULT_STEPS = 4
#: Which channels a step takes.
HEAD_ORDERS = ("random", "frequency", "confidence")


@dataclass(frozen=True)
class MaskedHeadOptions:
    """Sampling options of the masked head."""

    head_steps: int | None = option(
        None, "passes of the head per token, 1 to its channel steps; by default 4, or all if fewer"
    )
    head_order: str | None = option(
        None,
        "channels that a pass takes: random ones (by default), the next of --channel_order, or "
        "those that the head is surest of; with frequency, --evaluate_nll is exact, not a mean "
        "over orders",
        choices=HEAD_ORDERS,
    )


class MaskedBlock(nn.Module):
    """Pre-norm residual MLP, modulated by the condition (AdaLN)."""

    def __init__(self, dim: int, config: ModelConfig):
        super().__init__()
        self.norm = config.norm_layer(dim)
        self.mlp = Mlp(dim, config.mlp_ratio, config.proj_dropout)
        self.adaLN_modulation = ada_ln(dim, 3)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Apply the block to ``x [M, D]``, given its ``modulation [M, 3D]``."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))


class MaskedHead(Head):
    """p(unknown channels | known channels, z), with each unknown channel independent of the others.

    Each channel step has an embedding of every class and one of "unknown". Their sum over sqrt(S)
    and the projected feature make one vector, which passes through the blocks. The feature
    conditions each block, and one linear layer gives the logits of all steps. So a pass processes
    one vector per token, not S, and draws any number of channels. Drawn one at a time, channels
    have a joint distribution, as those of :class:`models.channel_head.ChannelHead` have. Drawn at
    once, they are independent.
    """

    Options: ClassVar[type] = MaskedHeadOptions
    likelihood_options = ("head_order",)
    #: Its blocks have 0.6 times the parameters of the channel head's. With these depths, the heads
    #: of the three published sizes have 0.92 times the parameters, the tiny one 1.55 times.
    sizes: ClassVar[dict[str, dict[str, int]]] = {
        "tokenbridge_tiny": {"channel_depth": 6},
        "tokenbridge_small": {"channel_depth": 6},
        "tokenbridge_base": {"channel_depth": 6},
        "tokenbridge_large": {"channel_depth": 6},
        "tokenbridge_huge": {"channel_depth": 9},
    }
    step_parameters = ("token_embeddings.", "channel_heads.")

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        dim, steps = self.dim, self.channel_steps
        self.sequence_length = 1
        self.sample_numbers, self.loss_numbers = 2 * steps, steps + 1
        self.condition_proj = nn.Linear(config.decoder_embed_dim, dim)
        self.token_embeddings = nn.Embedding(
            steps * (self.classes + 1), dim
        )  # each step's last row: unknown
        self.masked_blocks = nn.ModuleList(MaskedBlock(dim, config) for _ in range(self.depth))
        self.masked_final = FinalLayer(dim)
        self.channel_heads = nn.Linear(dim, steps * self.classes)

    def conditions(self, features: Tensor) -> list[Tensor]:
        """Project ``features [M, D]``; return the projection and the modulations of all blocks.

        They do not depend on the known channels, so that all passes for a token share them.

        Returns:
            projected features ``[M, D]``, modulations ``[M, 3D]`` of each block and ``[M, 2D]`` of
            the last norm.
        """
        projected = self.condition_proj(features)
        layers = (*self.masked_blocks, self.masked_final)
        return [projected, *(layer.adaLN_modulation(projected) for layer in layers)]

    def logits(self, conditions: list[Tensor], seen: Tensor) -> Tensor:
        """Return the logits ``[M, S, K]`` of all channel steps, given the known ones.

        Args:
            conditions: see :meth:`conditions`.
            seen: classes ``[M, S]`` in generation order, K where unknown.
        """
        projected, *modulations, last = conditions
        rows = seen + (self.classes + 1) * torch.arange(self.channel_steps, device=seen.device)
        channels = F.embedding_bag(rows, self.token_embeddings.weight, mode="sum")
        x = projected + channels * self.channel_steps**-0.5
        for block, modulation in zip(self.masked_blocks, modulations, strict=True):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, modulation, use_reentrant=False)
            else:
                x = block(x, modulation)
        x = self.masked_final(x, last)
        return self.channel_heads(x).unflatten(-1, (self.channel_steps, self.classes))

    # ----------------------------------------------------------------------------------------------
    # Training and likelihood.

    def given(self, targets: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Return the classes and the seen ones of them (K where unknown): ``[M, 2, S]``.

        The number of known channel steps of a token is uniform on 0 to S - 1, and every set of that
        size equally probable. The mean cross-entropy of the unknown ones is then an unbiased
        estimate of the mean over all orders of -log p / S, a bound on what is sampled in S steps in
        a random order.

        Args:
            targets: levels ``[M, C]`` in the latents' own channel order.
            uniform: numbers in [0, 1) that decide, ``[M, S + 1]``; drawn by default.
        """
        classes, steps = super().given(targets), self.channel_steps
        if uniform is None:
            uniform = torch.rand(len(classes), steps + 1, device=classes.device)
        rank = uniform[:, :steps].argsort(dim=1).argsort(dim=1)
        known = rank < (uniform[:, steps:] * steps).floor()
        return torch.stack([classes, torch.where(known, classes, self.classes)], dim=1)

    def summed_loss(self, features: Tensor, given: Tensor) -> Tensor:
        """Return S times the mean cross-entropy of a token's unknown steps, summed over tokens.

        Args:
            features: ``[M, D]``.
            given: output of :meth:`given`.
        """
        classes, seen = given.unbind(dim=1)
        logits = self.logits(self.conditions(features), seen).flatten(0, 1).float()
        losses = F.cross_entropy(logits, classes.flatten(), reduction="none").view_as(classes)
        unknown = seen == self.classes
        return self.channel_steps * (losses * unknown / unknown.sum(dim=1, keepdim=True)).sum()

    def forward(
        self, features: Tensor, targets: Tensor, order: Sequence[int] | None = None
    ) -> Tensor:
        """Return the teacher-forced logits ``[M, S, K]`` in generation order, by S passes.

        Args:
            features: ``[M, D]`` of the backbone, one row per token.
            targets: classes ``[M, S]`` in generation order; each step sees those before it in
                ``order`` only.
            order: a permutation of ``range(S)``; by default the generation order itself.
        """
        conditions, seen = self.conditions(features), torch.full_like(targets, self.classes)
        numbers = torch.arange(self.channel_steps, device=seen.device)
        logits = {}
        for step in range(self.channel_steps) if order is None else order:
            logits[step] = self.logits(conditions, seen)[:, step]
            seen = torch.where(numbers == step, targets, seen)
        return torch.stack([logits[step] for step in range(self.channel_steps)], dim=1)

    def log_likelihood(
        self, features: Tensor, targets: Tensor, order: Sequence[int] | None = None
    ) -> Tensor:
        """Return the log-probability ``[M]`` in nats of tokens sampled one channel per step.

        Args:
            features: ``[M, D]`` of the backbone, one row per token.
            targets: levels ``[M, C]`` in the latents' own channel order.
            order: see :meth:`forward`.
        """
        classes = super().given(targets)
        logits = self(features, classes, order).float()
        return -F.cross_entropy(logits.transpose(1, 2), classes, reduction="none").sum(dim=1)

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        *uniform: Tensor,
        head_order: str | None = MaskedHeadOptions.head_order,
    ) -> Tensor:
        """Return the mean cross-entropy per channel step; see :meth:`Head.loss`.

        Args:
            head_order: for held-out images; with ``"frequency"``, the exact value for one channel
                per step in the generation order, otherwise an unbiased estimate of the mean over
                all orders.
        """
        if head_order == "frequency":
            return -self.log_likelihood(features, targets).mean() / self.channel_steps
        return super().loss(features, targets, *uniform)

    # ----------------------------------------------------------------------------------------------
    # Sampling.

    def check_options(self, options: Any) -> None:
        """Raise ValueError if ``head_steps`` is not between 1 and the number of channel steps."""
        if options.head_steps is not None and not 1 <= options.head_steps <= self.channel_steps:
            raise ValueError(
                f"head_steps {options.head_steps}: choose 1 to {self.channel_steps}, "
                "the number of the head's channel steps"
            )

    def num_passes(self, head_steps: int | None) -> int:
        """Return the number of passes that sample a token."""
        return min(DEFAULT_STEPS, self.channel_steps) if head_steps is None else head_steps

    def draw(  # type: ignore[override]  # it names its options
        self,
        features: Tensor,
        temperature: float,
        uniform: Tensor,
        head_steps: int | None = MaskedHeadOptions.head_steps,
        head_order: str | None = MaskedHeadOptions.head_order,
    ) -> tuple[Tensor, Tensor]:
        """Draw all channels of M tokens in ``head_steps`` passes; see :meth:`Head.sample`.

        Args:
            uniform: ``[M, 2 S]``; the first half decides the classes, the second half a random
                order.
            head_steps: passes, 1 to S, which take equally many channels; by default
                :data:`DEFAULT_STEPS`, or S.
            head_order: which channels a pass takes: ``"random"`` ones, by default; the next of the
                generation order (``"frequency"``); or those of whose class the head is surest
                (``"confidence"``).
        """
        steps, passes = self.channel_steps, self.num_passes(head_steps)
        uniform, order_numbers = uniform.split(steps, dim=1)
        order = torch.arange(steps, device=uniform.device).expand_as(uniform)
        if head_order in (None, "random"):
            order = order_numbers.argsort(dim=1)
        conditions = self.conditions(features)
        log_probs = torch.zeros(len(features), device=features.device)
        seen = torch.full_like(order, self.classes)
        for first, last in pairwise(steps * i // passes for i in range(passes + 1)):
            logits = self.logits(conditions, seen).float()
            if head_order == "confidence":
                # By the distributions, not by draws: the numbers of later passes must stay uniform.
                sureness = logits.log_softmax(dim=-1).amax(dim=-1)
                sureness = sureness.masked_fill(seen < self.classes, -torch.inf)
                wanted = sureness.argsort(dim=1, descending=True, stable=True)[:, : last - first]
            else:
                wanted = order[:, first:last]
            logits = logits.gather(
                1, wanted[..., None].expand(-1, -1, self.classes)
            )  # [M, taken, K]
            numbers = uniform.gather(1, wanted).flatten()
            drawn = sample_categorical(logits.flatten(0, 1), temperature, numbers).view_as(wanted)
            drawn_log_probs = logits.log_softmax(dim=-1).gather(-1, drawn[..., None])
            log_probs = log_probs + drawn_log_probs.sum(dim=(1, 2))
            seen = seen.scatter(1, wanted, drawn)
        return self.to_levels(seen)[:, self.from_generation_order], log_probs

    # ----------------------------------------------------------------------------------------------
    # Cost.

    def flops(self, passes: int) -> float:
        """Count the operations of ``passes`` passes for one token."""
        mlps = sum(passes * block.mlp.flops(1) for block in self.masked_blocks)
        ada_ln_width = (3 * self.depth + 2) * self.dim
        ends = self.condition_proj.in_features + passes * self.channel_steps * self.classes
        return mlps + 2 * self.dim * (ada_ln_width + ends)

    def training_flops(self) -> float:
        """Count the operations of the forward pass for one token."""
        return self.flops(passes=1)

    def sampling_flops(self, head_steps: int | None = None, **options: Any) -> float:
        """Count the operations that sample one token in ``head_steps`` passes."""
        return self.flops(self.num_passes(head_steps))

    def elements_per_token(self) -> int:
        """Count the elements of a token's modulations, activations in a block, and logits."""
        return (3 * self.depth + 10) * self.dim + 3 * self.channel_steps * self.classes

    def compile_blocks(self) -> None:
        """Run the blocks compiled; see :func:`models.tokenbridge.TokenBridge.compile_blocks`."""
        super().compile_blocks()
        for block in self.masked_blocks:
            block.compile(dynamic=True)
