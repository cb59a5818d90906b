"""TokenBridge: a masked backbone and a channel head over quantized latents (section 3)."""

import math
from collections.abc import Sequence
from functools import wraps
from typing import Any

import models.location  # noqa: F401, before packages of the same names

import torch
from einops import rearrange
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from models import fast, sampling
from models.backbone import MaskedBackbone
from models.heads import HEADS, build_head
from models.layers import gather_tokens
from models.pretrained import PretrainedTokenBridge
from models.published import accept_published_names
from models.quantizer import build_quantizer
from models.sampling import SamplingOptions
from util.devices import to_device
from util.model_config import (
    KL16_CHANNEL_ORDER,  # noqa: F401, imported from here by users of the release
    MODEL_ENTRIES,
    ModelConfig,
)

# --------------------------------------------------------------------------------------------------
# Sizes.


def _size(
    width: int, depth: int, heads: int, head_width: int, head_depth: int, head_heads: int
) -> dict[str, int]:
    """Return constructor arguments of a model whose encoder and decoder have equal size."""
    backbone = {"embed_dim": width, "depth": depth, "num_heads": heads}
    head = {
        "channel_embed_dim": head_width,
        "channel_depth": head_depth,
        "channel_heads": head_heads,
    }
    parts = ("encoder", "decoder")
    return {f"{part}_{name}": value for part in parts for name, value in backbone.items()} | head


#: Constructor arguments of each size with the paper's head.
SIZES = {
    "tokenbridge_tiny": _size(128, 2, 4, 128, 2, 4),
    "tokenbridge_small": _size(256, 4, 8, 256, 3, 4),
    "tokenbridge_base": _size(768, 12, 12, 768, 4, 8),
    "tokenbridge_large": _size(1024, 16, 16, 1024, 4, 8),
    "tokenbridge_huge": _size(1280, 20, 16, 1024, 6, 8),
}


def sizes_of(model: str, head: str) -> dict[str, int]:
    """Return constructor arguments of a size of :data:`SIZES` with a head.

    An unknown head is ignored here; the model's constructor raises the error.
    """
    kind = HEADS.get(head) if isinstance(head, str) else None
    return SIZES[model] | (kind.sizes.get(model, {}) if kind else {})


def draw_quantile() -> float:
    """Draw a number in [0, 1) from PyTorch's generator of the CPU."""
    return torch.rand((), dtype=torch.float64).item()


# --------------------------------------------------------------------------------------------------
# The model.


class TokenBridge(PretrainedTokenBridge):
    """Masked autoregressive generation over post-training-quantized latents.

    The arguments, their defaults and meaning are the fields of
    :class:`util.model_config.ModelConfig`.

    Raises:
        ValueError: sizes that do not fit each other, an order that is not a permutation, groups
            that do not divide the channels or have too many classes.
    """

    #: Arguments of each size.
    SIZES = SIZES

    @wraps(ModelConfig.__init__)
    def __init__(self, *values: Any, **arguments: Any) -> None:
        super().__init__()
        config = ModelConfig(*values, **arguments)
        #: Arguments that rebuild this model, all but ``norm_layer``: plain types, stored in
        #: checkpoints.
        self.config = config.stored()
        self.patch_size, self.vae_embed_dim = config.patch_size, config.vae_embed_dim
        self.class_num, self.mask_ratio_min = config.class_num, config.mask_ratio_min
        self.balanced_masks = config.balanced_masks
        self.grid_size, self.seq_len = config.grid_size, config.seq_len
        self.token_dim = config.token_dim
        side = self.grid_size * self.patch_size
        self.latent_shape = (self.vae_embed_dim, side, side)  # C, h, w
        self.backbone = MaskedBackbone(config)
        self.head = build_head(config)
        self.quantizer = build_quantizer(config)
        self.register_load_state_dict_pre_hook(accept_published_names)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialize weights.

        Linear layers: Xavier, zero bias. AdaLN: zero. Free parameters and class embedding: normal
        with std 0.02. Norms and the head's token embeddings keep PyTorch's initialization.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if "adaLN_modulation" in name:  # every block starts as the identity
                    nn.init.zeros_(module.weight)
        for part in (self.backbone, self.head):
            for parameter in part.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.class_emb.weight, std=0.02)

    @property
    def class_emb(self) -> nn.Embedding:
        """Embedding of the classes: maps labels ``[B]`` to ``[B, D]``."""
        return self.backbone.class_emb

    def sampling_flops(self, options: SamplingOptions) -> float:
        """Count the operations that sample one image, as :meth:`training_flops` counts them."""
        plan = sampling.sampling_plan(options, self.seq_len)
        backbone = sum((1 + step.both_halves) * self.backbone.flops(step.masked) for step in plan)
        by_confidence = options.order == "confidence"  # samples all unknown tokens in every step
        tokens = sum(step.masked - (0 if by_confidence else step.left) for step in plan)
        head_options = {name: getattr(options, name) for name in self.head.option_names()}
        return backbone + tokens * self.head.sampling_flops(**head_options)

    @property
    def uniform_loss(self) -> float:
        """Loss of guessing all classes of a channel step with equal probability, in nats."""
        return math.log(self.head.classes)

    @torch.no_grad()
    def frequency_loss(self, latents: Tensor) -> float | None:
        """Return the loss of guessing each channel's levels by their frequencies, in nats.

        Only a lower loss has learned anything from the class or from other tokens and channels.

        Args:
            latents: scaled latents ``[B, C, h, w]`` whose levels are counted.

        Returns:
            an estimate, too low by about (levels - 1) / (2 B h w); None if that exceeds 0.05.
        """
        if self.quantizer.levels > 0.1 * latents[:, 0].numel():
            return None
        levels = self.quantize(self.patchify(to_device(latents, self.device)))[0]
        counts = torch.stack(
            [
                torch.bincount(channel, minlength=self.quantizer.levels)
                for channel in levels.flatten(0, 1).T.cpu()
            ]
        )
        entropies = torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1)
        return entropies.mean().item() * self.head.channels_per_group

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.backbone.fake_latent.device

    # ----------------------------------------------------------------------------------------------
    # Tokens (section 3.1).

    def patchify(self, x: Tensor) -> Tensor:
        """Split latents ``[B, C, h, w]`` into tokens ``[B, L, C patch^2]``, row by row."""
        return rearrange(
            x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size
        )

    def unpatchify(self, x: Tensor) -> Tensor:
        """Join tokens to latents (inverse of :meth:`patchify`)."""
        p = self.patch_size
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=self.grid_size, p=p, q=p)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return levels and values of tokens ``[B, L, C]`` in their channel order (Eq. 1, 4, 5)."""
        return self.quantizer(x)

    def check_labels(self, labels: Tensor) -> None:
        """Raise ValueError if labels are no integers or, on the CPU, outside the classes."""
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels are integers, not {labels.dtype}")
        # Labels on an accelerator are not checked: that would force a synchronization.
        if labels.device.type != "cpu" or not len(labels):
            return
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= self.class_num:
            raise ValueError(
                f"labels run from {lowest} to {highest}, "
                f"but the model's classes from 0 to {self.class_num - 1} "
                f"(class_num {self.class_num})"
            )

    # ----------------------------------------------------------------------------------------------
    # Training (section 3.3).

    def sample_orders(self, bsz: int) -> Tensor:
        """Return random orders of positions ``[B, L]``. Training masks the first ones.

        Sampling takes tokens from the end of an order, so the first ones are masked longest.
        """
        return torch.rand(bsz, self.seq_len, device=self.device).argsort(dim=1)

    def num_masked_at(self, quantile: float) -> int:
        """Return ceil(L x ratio), the number of masked tokens at a quantile of the mask ratios.

        Ratios follow normal(1, 0.25), truncated to [mask_ratio_min, 1].

        Args:
            quantile: in [0, 1].
        """
        low = ndtr((self.mask_ratio_min - 1) / 0.25)
        ratio = 1 + 0.25 * ndtri(low + (0.5 - low) * quantile)
        return math.ceil(self.seq_len * min(max(ratio, self.mask_ratio_min), 1.0))

    def draw_num_masked(self) -> int:
        """Draw the number of masked tokens of a batch, on the CPU, since shapes follow from it."""
        return self.num_masked_at(draw_quantile())

    def balanced_loss(self, latents: Tensor, labels: Tensor, *uniform: Tensor) -> Tensor:
        """Return :meth:`forward` with masks at opposite quantiles in the two halves of the batch.

        Each image has the same distribution of masks as without, while a batch's work is almost
        that of the mean number of masked tokens. Otherwise all ranks wait for the one that drew the
        largest number. MAR and the release draw one number per batch.
        """
        quantile, half = draw_quantile(), -(-len(latents) // 2)
        loss = latents.new_zeros(())
        for rows, part in ((slice(half), quantile), (slice(half, None), 1 - quantile)):
            others = [numbers[rows] for numbers in uniform]
            tokens = self.masked_tokens(
                latents[rows], labels[rows], self.num_masked_at(part), *others
            )
            loss = loss + self.head.loss(*tokens) * (len(labels[rows]) / len(labels))
        return loss

    @staticmethod
    def _split(mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions of known ``[B, L - n]`` and masked ``[B, n]`` tokens."""
        counts = mask.sum(dim=1).long().tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f"all samples of a batch need the same number of masked tokens, got {counts}"
            )
        positions = mask.argsort(dim=1, stable=True)
        known, masked = positions.tensor_split([mask.shape[1] - counts[0]], dim=1)
        return known, masked

    def forward(
        self,
        latents: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        *uniform: Tensor,
        **options: Any,
    ) -> Tensor:
        """Return the mean cross-entropy in nats over masked tokens and channels (or groups).

        Args:
            latents: ``[B, C, h, w]``, scaled by the latent factor.
            labels: classes ``[B]``.
            mask: ``[B, L]``, 1 where a token is masked, the same number in each sample; drawn by
                default. Pass it on the CPU: counting a CUDA mask forces a synchronization.
            uniform: numbers in [0, 1), ``[B, L, head.loss_numbers]``, of a head whose loss takes
                some; drawn by default.
            options: those of ``head.likelihood_options``, for held-out images.

        Raises:
            ValueError: latents of another shape, labels outside the classes, or uneven masks.
        """
        if mask is None and self.balanced_masks and self.training and len(latents) > 1:
            return self.balanced_loss(latents, labels, *uniform)
        return self.head.loss(*self.masked_tokens(latents, labels, mask, *uniform), **options)

    def masked_tokens(
        self, latents: Tensor, labels: Tensor, mask: Tensor | int | None, *others: Tensor
    ) -> list[Tensor]:
        """Draw the mask unless given; return features, levels and ``others`` of masked tokens.

        Features are ``[M, D]``, levels ``[M, C]``.

        Args:
            latents, labels: see :meth:`forward`.
            mask: see :meth:`forward`; or the number of masked tokens of each sample.
            others: ``[B, L, ...]``.
        """
        if latents.shape[1:] != self.latent_shape:
            shapes = [*latents.shape[1:]], [*self.latent_shape]
            raise ValueError("latents are {} (C, h, w), the model's are {}".format(*shapes))
        if len(labels) != len(latents):
            raise ValueError(f"{len(labels)} labels for {len(latents)} latents")
        indices, tokens = self.quantize(self.patchify(latents))  # [B, L, C] each
        if mask is None or isinstance(mask, int):
            orders = self.sample_orders(len(latents))
            count = self.draw_num_masked() if mask is None else mask
            masked, known = orders.tensor_split([count], dim=1)
        else:
            known, masked = (to_device(part, latents.device) for part in self._split(mask))
        self.check_labels(labels)
        features = self.backbone(tokens, known, self.class_emb(labels))  # [B, L, D]
        return [gather_tokens(x, masked).flatten(0, 1) for x in (features, indices, *others)]

    def expected_masked(self) -> float:
        """Return the mean number of masked tokens in training."""
        a = (self.mask_ratio_min - 1) / 0.25
        density = (math.exp(-a * a / 2) - 1) / math.sqrt(2 * math.pi)
        mean = density / (0.5 * math.erf(-a / math.sqrt(2))) if a else 0.0
        return self.seq_len * (1 + 0.25 * mean)

    def training_flops(self, num_masked: float | None = None) -> float:
        """Count the operations of a training step for one image.

        They are three times those of the forward pass. Only matrix products count, with 2
        operations per multiply-add.

        Args:
            num_masked: tokens that the head runs on; by default the expected number.
        """
        num_masked = self.expected_masked() if num_masked is None else num_masked
        return 3 * (self.backbone.flops(num_masked) + num_masked * self.head.training_flops())

    def compile_blocks(self) -> None:
        """Have ``torch.compile`` fuse the operations between the matrix products of all blocks.

        Blocks of a kind share one program, made for any number of tokens, since that differs in
        each step. Call this on the model's device: on CUDA, the head also samples few tokens by one
        launch.
        """
        # Otherwise DDP splits the programs at its gradient buckets, to send gradients early. A
        # block is short enough.
        torch._dynamo.config.optimize_ddp = False
        for block in (*self.backbone.encoder_blocks, *self.backbone.decoder_blocks):
            block.compile(dynamic=True)
        self.head.compile_blocks()

    # ----------------------------------------------------------------------------------------------
    # MAR's interface to the same parts, by masks; :meth:`forward` works with positions instead.

    def random_masking(self, x: Tensor, orders: Tensor) -> Tensor:
        """Draw a mask ``[B, L]``, 1 at the first of ``orders [B, L]``, on the device of ``x``.

        Training does not call this; it draws the mask in :meth:`masked_tokens`.
        """
        mask = torch.zeros(orders.shape, device=x.device)
        masked = orders[:, : self.draw_num_masked()].to(x.device)
        return mask.scatter(1, masked, 1.0)

    def forward_mae_encoder(self, x: Tensor, mask: Tensor, class_embedding: Tensor) -> Tensor:
        """Encode the class and the known tokens of ``x [B, L, C]``: ``[B, buffer + known, D]``."""
        return self.backbone.encode(x, self._split(mask)[0], class_embedding)

    def forward_mae_decoder(self, x: Tensor, mask: Tensor) -> Tensor:
        """Decode the encoder's output ``x [B, buffer + known, D]``: features z ``[B, L, D]``."""
        return self.backbone.decode(x, self._split(mask)[0])

    def forward_channel_ar(self, features: Tensor, channel_targets: Tensor, mask: Tensor) -> Tensor:
        """Return the teacher-forced logits of the masked tokens (Eq. 6).

        Args:
            features: ``[B, L, D]``.
            channel_targets: levels ``[B, L, C]`` in generation order.
            mask: ``[B, L]``, 1 where a token is masked.

        Returns:
            logits ``[masked, C, K]`` in generation order, rows by sample, then position; for groups
            of channels ``[masked, S, K]``, K = levels^group.
        """
        masked = mask.bool()
        return self.head(features[masked], self.head.to_classes(channel_targets[masked]))

    # ----------------------------------------------------------------------------------------------
    # Generation (section 3.3).

    @torch.no_grad()
    def sample_tokens(
        self,
        bsz: int,
        num_iter: int = SamplingOptions.num_iter,
        cfg: float = SamplingOptions.cfg,
        cfg_schedule: str = SamplingOptions.cfg_schedule,
        labels: Tensor | Sequence[int] | None = None,
        temperature: float = SamplingOptions.temperature,
        *,
        orders: Tensor | None = None,
        seeds: Sequence[int] | None = None,
        known_latents: Tensor | None = None,
        known_mask: Tensor | None = None,
        return_confidence: bool = False,
        on_step: sampling.OnStep | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Generate latents ``[bsz, C, h, w]``, scaled by the latent factor, without dropout.

        Autocast is up to the caller.

        Args:
            num_iter: steps; the number of tokens they take follows ``step_schedule``.
            cfg: guidance scale on features; at 1 the conditional pass runs alone.
            cfg_schedule: ``"linear"``, growing with the tokens known, or ``"constant"``.
            labels: classes ``[bsz]``, a list or a tensor; without them generation is unconditional.
            temperature: of every channel's distribution; 0 takes the most probable level.
            orders: ``[bsz, L]``, tokens are taken from the end; by default as ``order`` says.
            seeds: one per image, which then does not depend on the others in the batch.
            known_latents, known_mask: latents ``[bsz, C, h, w]`` and ``[bsz, L]``, true where their
                token is kept (quantized); any number of them in each image.
            return_confidence: also return ``[bsz, L]``, the joint log-probability in nats, at
                temperature 1, that each token had when it was taken; 0 for known ones.
            on_step: see :data:`models.sampling.OnStep`.
            options: other fields of :class:`models.sampling.SamplingOptions`: ``order``,
                ``confidence_noise``, ``step_schedule``, ``cfg_interval``, ``cfg_reuse``, and those
                of the head, such as ``first_place``, ``head_steps``, ``head_order``.

        Raises:
            ValueError: labels outside the classes, or options outside their ranges.
            TypeError: an unknown option.
        """
        for name in options.keys() - SamplingOptions.__dataclass_fields__:
            hint = "; pass on_step instead" if name == "progress" else ""
            raise TypeError(f"sample_tokens has no argument {name}{hint}")
        how = SamplingOptions(
            num_iter=num_iter,
            cfg=cfg,
            cfg_schedule=cfg_schedule,
            temperature=temperature,
            **options,
        )
        labels = None if labels is None else torch.as_tensor(labels)
        for name, value in {"labels": labels, "orders": orders, "seeds": seeds}.items():
            if value is not None and len(value) != bsz:
                raise ValueError(f"{len(value)} {name} for {bsz} images")
        if labels is not None:
            self.check_labels(labels)
        known = self._known_tokens(bsz, known_latents, known_mask)
        given = sampling.Given(labels, orders, seeds, *known)
        training = self.training
        self.eval()
        with fast.prepared_weights(self, self.device, self.head.compiled):
            parts = self.backbone, self.head, self.quantizer
            tokens, confidence = sampling.sample_tokens(*parts, bsz, given, how, on_step)
        self.train(training)
        latents = self.unpatchify(tokens)
        return (latents, confidence) if return_confidence else latents

    def _known_tokens(
        self, bsz: int, latents: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return values ``[B, L, C]`` of known latents, and their boolean mask ``[B, L]``."""
        if (latents is None) != (mask is None):
            raise ValueError("known_latents and known_mask go together")
        if latents is None or mask is None:
            return None, None
        shapes = [[*x.shape] for x in (latents, mask)]
        expected = [[bsz, *self.latent_shape], [bsz, self.seq_len]]
        if shapes != expected:
            text = "known_latents and known_mask are {} and {}, expected {} and {}"
            raise ValueError(text.format(*shapes, *expected))
        return self.quantize(self.patchify(to_device(latents, self.device)))[1], mask.bool()


# --------------------------------------------------------------------------------------------------
# A factory for each size, which takes every argument of TokenBridge.


def _of_size(model: str, arguments: dict[str, Any], **defaults: Any) -> TokenBridge:
    sizes = sizes_of(model, arguments.get("head", ModelConfig.head))
    return TokenBridge(**{**sizes, **defaults, **arguments})


#: Levels of the published models; the default of the class is 32.
PUBLISHED_LEVELS = MODEL_ENTRIES["quant_levels"].published


def tokenbridge_tiny(**arguments: Any) -> TokenBridge:
    """Build a small model for demonstrations and tests, not in the paper."""
    return _of_size("tokenbridge_tiny", arguments)


def tokenbridge_small(**arguments: Any) -> TokenBridge:
    """Build a model that a CPU can train on natural images, not in the paper."""
    return _of_size("tokenbridge_small", arguments)


def tokenbridge_base(**arguments: Any) -> TokenBridge:
    """Build the base model: by default the published one, 218.02M parameters."""
    return _of_size("tokenbridge_base", arguments, quant_levels=PUBLISHED_LEVELS)


def tokenbridge_large(**arguments: Any) -> TokenBridge:
    """Build the large model: by default the published one, 486.89M parameters (FID 1.76)."""
    return _of_size("tokenbridge_large", arguments, quant_levels=PUBLISHED_LEVELS)


def tokenbridge_huge(**arguments: Any) -> TokenBridge:
    """Build the huge model: by default the published one, 910.04M parameters (FID 1.55)."""
    return _of_size("tokenbridge_huge", arguments, quant_levels=PUBLISHED_LEVELS)


#: Values of ``--model``.
MODELS = {size: globals()[size] for size in SIZES}
