"""A channel head of few steps, not the paper's: channels that are known go in, all unknown ones come out at once."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.channel_head import FinalLayer, Head, ada_ln, modulate, sample_categorical
from models.layers import Mlp

#: Steps of sampling where none are given.
DEFAULT_STEPS = 4


class MaskedBlock(nn.Module):
    """Pre-norm residual MLP, modulated by the condition (AdaLN)."""

    def __init__(self, dim: int, mlp_ratio: float, norm_layer: Callable, proj_dropout: float):
        super().__init__()
        self.norm = norm_layer(dim)
        self.mlp = Mlp(dim, mlp_ratio, proj_dropout)
        self.adaLN_modulation = ada_ln(dim, 3)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """``x [M, D]`` under its ``modulation [M, 3D]``."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))


class MaskedHead(Head):
    """p(unknown channels | known channels, z), each unknown one on its own, whichever are known.

    Each channel step has an embedding of every class and one of "unknown". Their sum over sqrt(S) and the projected
    feature make one vector, which passes through the blocks; the feature conditions each of them, and one linear layer
    gives the logits of all steps. A token so costs one place a pass, not S, and a pass draws any number of channels.
    Drawn one at a time, they have a joint distribution, as those of :class:`models.channel_head.ChannelHead` have;
    drawn at once, they are as independent as the parallel head's.

    Args:
        config: see :class:`models.channel_head.Head`.
        norm_layer: makes a norm from a width.
    """

    sampling_options = ("head_steps", "head_order")

    def __init__(self, config: Mapping[str, Any], norm_layer: Callable[[int], nn.Module]):
        super().__init__(config)
        self.places, self.numbers = 1, 2 * self.channel_steps
        steps, options = (
            self.channel_steps,
            (config["mlp_ratio"], norm_layer, config["proj_dropout"]),
        )
        self.condition_proj = nn.Linear(config["decoder_embed_dim"], self.dim)
        self.token_embeddings = nn.Embedding(
            steps * (self.classes + 1), self.dim
        )  # the last of a step: unknown
        self.masked_blocks = nn.ModuleList(
            MaskedBlock(self.dim, *options) for _ in range(self.depth)
        )
        self.masked_final = FinalLayer(self.dim)
        self.channel_heads = nn.Linear(self.dim, steps * self.classes)

    def conditions(self, features: Tensor) -> list[Tensor]:
        """Features ``[M, D]`` projected, then modulations of each block ``[M, 3D]`` and of the last norm ``[M, 2D]``.

        They depend on the feature alone, not on the known channels, so that a token's passes share them.
        """
        projected = self.condition_proj(features)
        layers = (*self.masked_blocks, self.masked_final)
        return [projected, *(layer.adaLN_modulation(projected) for layer in layers)]

    def logits(self, conditions: list[Tensor], seen: Tensor) -> Tensor:
        """Logits ``[M, S, K]`` of all channel steps; those of an unknown one depend on the known ones alone.

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

    # ----------------------------------------------------------------------------------------------------------------
    # Training, and likelihood.

    def given(self, targets: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Classes, and those of them that are seen: ``[M, 2, S]``, K where a class is unknown.

        The number of known channel steps of a token is uniform on 0 to S - 1, and every set of that size equally
        probable. The mean cross-entropy of the unknown ones is then an unbiased estimate of the mean over all orders of
        -log p / S, a bound on what is sampled in S steps in a random order.

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
        """The sum over tokens of S times the mean cross-entropy of unknown steps, from features and :meth:`given`."""
        classes, seen = given.unbind(dim=1)
        logits = self.logits(self.conditions(features), seen).flatten(0, 1).float()
        losses = F.cross_entropy(logits, classes.flatten(), reduction="none").view_as(classes)
        unknown = seen == self.classes
        return self.channel_steps * (losses * unknown / unknown.sum(dim=1, keepdim=True)).sum()

    def forward(
        self, features: Tensor, targets: Tensor, order: Sequence[int] | None = None
    ) -> Tensor:
        """Teacher-forced logits ``[M, S, K]`` in generation order, of a pass for each channel step.

        Args:
            features: ``[M, D]`` of the backbone, one row a token.
            targets: classes ``[M, S]`` in generation order; each step sees those before it in ``order`` only.
            order: a permutation of ``range(S)``; by default the generation order itself.
        """
        conditions, seen = self.conditions(features), torch.full_like(targets, self.classes)
        logits = {}
        for step in range(self.channel_steps) if order is None else order:
            logits[step] = self.logits(conditions, seen)[:, step]
            seen = torch.where(
                torch.arange(self.channel_steps, device=seen.device) == step, targets, seen
            )
        return torch.stack([logits[step] for step in range(self.channel_steps)], dim=1)

    def log_likelihood(
        self, features: Tensor, targets: Tensor, order: Sequence[int] | None = None
    ) -> Tensor:
        """Exact log-probability ``[M]`` in nats of tokens whose channels are sampled one a step in ``order``.

        Args:
            features: ``[M, D]`` of the backbone, one row a token.
            targets: levels ``[M, C]`` in the latents' own channel order.
            order: see :meth:`forward`.
        """
        classes = super().given(targets)
        logits = self(features, classes, order).float()
        return -F.cross_entropy(logits.transpose(1, 2), classes, reduction="none").sum(dim=1)

    # ----------------------------------------------------------------------------------------------------------------
    # Sampling.

    def draw(
        self,
        features: Tensor,
        temperature: float,
        uniform: Tensor,
        head_steps: int | None = None,
        head_order: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw all channels of M tokens at once; see :meth:`models.channel_head.Head.sample`.

        Args:
            uniform: ``[M, 2 S]``, which decide the classes, then a random order.
            head_steps: passes, 1 to S, which take equally many channels; by default :data:`DEFAULT_STEPS`, or S.
            head_order: which a pass takes: ``"random"`` ones, by default; the next of the generation order
                (``"frequency"``); or those of whose class the head is surest (``"confidence"``).
        """
        steps = self.channel_steps
        passes = min(DEFAULT_STEPS, steps) if head_steps is None else head_steps
        uniform, places = uniform.split(steps, dim=1)
        order = torch.arange(steps, device=uniform.device).expand_as(uniform)
        if head_order in (None, "random"):
            order = places.argsort(dim=1)
        conditions, log_probs = (
            self.conditions(features),
            torch.zeros(len(features), device=features.device),
        )
        seen = torch.full_like(order, self.classes)
        for first, last in pairwise(steps * i // passes for i in range(passes + 1)):
            logits = self.logits(conditions, seen).float()
            if head_order == "confidence":
                # By distributions, not by what would be drawn: numbers left for later passes must stay uniform.
                sure = (
                    logits.log_softmax(dim=-1)
                    .amax(dim=-1)
                    .masked_fill(seen < self.classes, -torch.inf)
                )
                wanted = sure.argsort(dim=1, descending=True, stable=True)[:, : last - first]
            else:
                wanted = order[:, first:last]
            logits = logits.gather(
                1, wanted[..., None].expand(-1, -1, self.classes)
            )  # [M, taken, K]
            drawn = sample_categorical(
                logits.flatten(0, 1), temperature, uniform.gather(1, wanted).flatten()
            )
            drawn = drawn.view_as(wanted)
            log_probs = log_probs + logits.log_softmax(dim=-1).gather(-1, drawn[..., None]).sum(
                dim=(1, 2)
            )
            seen = seen.scatter(1, wanted, drawn)
        return self.to_levels(seen)[:, self.from_generation_order], log_probs

    def elements_per_token(self) -> int:
        """Count the elements of a token's modulations, of its activations in a block, and of its logits."""
        return (3 * self.depth + 10) * self.dim + 3 * self.channel_steps * self.classes
