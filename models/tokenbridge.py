"""TokenBridge: quantized latents learned by a masked backbone and a channel-autoregressive head (section 3)."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from models import fast, sampling
from models.backbone import MaskedBackbone
from models.channel_head import ChannelHead, Head, checked_order
from models.layers import Block, gather_tokens
from models.masked_head import MaskedBlock, MaskedHead
from models.pretrained import PretrainedTokenBridge
from models.published import accept_published_names, default_channel_order
from models.quantizer import build_quantizer
from util.config import KL16_CHANNEL_ORDER  # noqa: F401, others import it from here
from util.devices import to_device

#: Parts whose blocks can be recomputed in the backward pass.
CHECKPOINTED = ("encoder", "decoder", "head")

# --------------------------------------------------------------------------------------------------------------------
# Sizes.


def _size(
    width: int, depth: int, heads: int, head_width: int, head_depth: int, head_heads: int
) -> dict[str, int]:
    """Constructor arguments of a model whose encoder and decoder have the same size."""
    backbone = {"embed_dim": width, "depth": depth, "num_heads": heads}
    head = {
        "channel_embed_dim": head_width,
        "channel_depth": head_depth,
        "channel_heads": head_heads,
    }
    return {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in backbone.items()
    } | head


SIZES = {
    "tokenbridge_tiny": _size(128, 2, 4, 128, 2, 4),
    "tokenbridge_base": _size(768, 12, 12, 768, 4, 8),
    "tokenbridge_large": _size(1024, 16, 16, 1024, 4, 8),
    "tokenbridge_huge": _size(1280, 20, 16, 1024, 6, 8),
}
#: With the masked head, whose blocks have 0.6 times the parameters: the head of the three larger ones has 0.92 times
#: the autoregressive one's, the smallest 1.55 times.
MASKED_DEPTHS = {
    "tokenbridge_tiny": 6,
    "tokenbridge_base": 6,
    "tokenbridge_large": 6,
    "tokenbridge_huge": 9,
}
MASKED_SIZES = {
    name: {**size, "channel_depth": MASKED_DEPTHS[name]} for name, size in SIZES.items()
}

# --------------------------------------------------------------------------------------------------------------------
# The model.


class TokenBridge(PretrainedTokenBridge):
    """Masked autoregressive generation over post-training-quantized latents.

    Args:
        img_size: height and width of the images in pixels.
        vae_stride: pixels a latent position covers, each way.
        patch_size: latent positions a token covers, each way.
        encoder_embed_dim, encoder_depth, encoder_num_heads: the backbone's encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the backbone's decoder.
        channel_embed_dim, channel_depth, channel_heads: the channel head.
        mlp_ratio: hidden width of every MLP over its width.
        norm_layer: makes a norm from a width.
        quant_levels: levels K of each channel, 2 to 740 at three deviations.
        vae_embed_dim: channels of the latents.
        mask_ratio_min: lower end of the drawn mask ratios.
        label_drop_prob: probability of training without the label.
        class_num: number of classes.
        attn_dropout, proj_dropout: dropout of attention weights and of projections, in backbone and head.
        buffer_size: positions in front of the tokens that hold the class embedding.
        grad_checkpointing: recompute blocks in the backward pass: all, or those of ``"encoder"``, ``"decoder"``,
            ``"head"``.
        quant_min, quant_max, std_range: see :class:`models.quantizer.ScalarQuantizer`.
        channel_order: the order in which the head predicts a token's channels, a permutation of
            ``range(vae_embed_dim * patch_size**2)``; by default KL-16's where there are 16 channels, else their own.
        head: ``"ar"``; ``"parallel"`` for channels predicted independently (Table 2a); or ``"masked"``
            (:class:`models.masked_head.MaskedHead`, not the paper's).
        channels_per_group: consecutive channels of that order predicted jointly, as one of levels^group classes
            (Table 2d).
        quantizer: ``"gaussian"`` or ``"linear"`` (section 3.1).
        channel_mean, channel_std: mean and deviation of each latent channel, which calibrate the quantizer in place of
            its bounds.

    Raises:
        ValueError: sizes that do not fit each other, an order that is not a permutation, groups that do not divide
            the channels or have too many classes.
    """

    #: Constructor arguments of each published size.
    SIZES = SIZES

    def __init__(
        self,
        img_size: int = 256,
        vae_stride: int = 16,
        patch_size: int = 1,
        encoder_embed_dim: int = 1024,
        encoder_depth: int = 16,
        encoder_num_heads: int = 16,
        decoder_embed_dim: int = 1024,
        decoder_depth: int = 16,
        decoder_num_heads: int = 16,
        channel_embed_dim: int = 256,
        channel_depth: int = 4,
        channel_heads: int = 8,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = partial(nn.LayerNorm, eps=1e-6),
        quant_levels: int = 32,
        vae_embed_dim: int = 16,
        mask_ratio_min: float = 0.7,
        label_drop_prob: float = 0.1,
        class_num: int = 1000,
        attn_dropout: float = 0.1,
        proj_dropout: float = 0.1,
        buffer_size: int = 64,
        grad_checkpointing: bool | Sequence[str] = False,
        quant_min: float = -5.0,
        quant_max: float = 5.0,
        std_range: float = 3.0,
        channel_order: Sequence[int] | None = None,
        head: str = "ar",
        channels_per_group: int = 1,
        quantizer: str = "gaussian",
        channel_mean: Sequence[float] | None = None,
        channel_std: Sequence[float] | None = None,
    ):
        super().__init__()
        #: Everything that rebuilds this model but ``norm_layer``: plain types, stored in checkpoints.
        self.config = {
            k: v for k, v in locals().items() if k not in ("self", "__class__", "norm_layer")
        }
        if img_size % (vae_stride * patch_size):
            stride = vae_stride * patch_size
            raise ValueError(
                f"img_size {img_size} is not a multiple of vae_stride x patch_size = {stride}"
            )
        if not 0 <= mask_ratio_min <= 1:
            raise ValueError(f"mask_ratio_min lies between 0 and 1, got {mask_ratio_min}")
        self.patch_size, self.vae_embed_dim, self.class_num = patch_size, vae_embed_dim, class_num
        self.mask_ratio_min = mask_ratio_min
        self.grid_size = img_size // vae_stride // patch_size
        self.seq_len = self.grid_size**2
        self.latent_shape = (vae_embed_dim, *[self.grid_size * patch_size] * 2)  # C, h, w
        self.token_dim = vae_embed_dim * patch_size**2
        order = (
            default_channel_order(vae_embed_dim, patch_size)
            if channel_order is None
            else channel_order
        )
        self.config["channel_order"] = checked_order(order, self.token_dim)
        for name in ("channel_mean", "channel_std"):
            if self.config[name] is not None:
                self.config[name] = [float(value) for value in self.config[name]]

        self.backbone = MaskedBackbone(self.config, self.token_dim, self.seq_len, norm_layer)
        self.head = (MaskedHead if head == "masked" else ChannelHead)(self.config, norm_layer)
        self.quantizer = build_quantizer(self.config)
        parts = CHECKPOINTED if grad_checkpointing is True else tuple(grad_checkpointing or ())
        if not set(parts) <= set(CHECKPOINTED):
            raise ValueError(
                f"grad_checkpointing takes {', '.join(CHECKPOINTED)}, not {grad_checkpointing}"
            )
        self.backbone.checkpointed, self.head.grad_checkpointing = parts, "head" in parts
        self.register_load_state_dict_pre_hook(accept_published_names)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draws all weights anew: Xavier for layers, 0.02 for embeddings and free parameters, zero for AdaLN."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if "adaLN_modulation" in name:  # every block starts as the identity
                    nn.init.zeros_(module.weight)
        free = [
            parameter
            for part in (self.backbone, self.head)
            for parameter in part.parameters(recurse=False)
        ]
        for parameter in [*free, self.class_emb.weight]:
            nn.init.normal_(parameter, std=0.02)

    @property
    def class_emb(self) -> nn.Embedding:
        """Labels to class embeddings ``[B, D]``."""
        return self.backbone.class_emb

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.fake_latent.device

    # ----------------------------------------------------------------------------------------------------------------
    # Tokens (section 3.1).

    def patchify(self, x: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` to tokens ``[B, L, C patch^2]``, row by row."""
        return rearrange(
            x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size
        )

    def unpatchify(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`patchify`."""
        p = self.patch_size
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=self.grid_size, p=p, q=p)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, L, C]`` to levels, in the latents' own channel order, and their values (Eq. 1, 4, 5)."""
        return self.quantizer(x)

    def check_labels(self, labels: Tensor) -> None:
        """Raises ValueError if labels on the CPU are outside the classes; labels on a device are not waited for."""
        if labels.device.type != "cpu" or not len(labels):
            return
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= self.class_num:
            raise ValueError(
                f"labels run from {lowest} to {highest}, "
                f"but the model's classes from 0 to {self.class_num - 1} (class_num {self.class_num})"
            )

    # ----------------------------------------------------------------------------------------------------------------
    # Training (section 3.3).

    def sample_orders(self, bsz: int) -> Tensor:
        """A random order of the positions for each sample, ``[B, L]``; the first ones are masked."""
        return torch.rand(bsz, self.seq_len, device=self.device).argsort(dim=1)

    def num_masked_at(self, quantile: float) -> int:
        """Masked tokens at a ``quantile`` in [0, 1] of the mask ratios: L times the ratio, rounded up.

        Ratios are normal(1, 0.25) truncated to [mask_ratio_min, 1].
        """
        low = ndtr((self.mask_ratio_min - 1) / 0.25)
        ratio = 1 + 0.25 * ndtri(low + (0.5 - low) * quantile)
        return math.ceil(self.seq_len * min(max(ratio, self.mask_ratio_min), 1.0))

    def draw_num_masked(self) -> int:
        """Masked tokens of a batch, drawn on the host: shapes follow from it."""
        return self.num_masked_at(torch.rand((), dtype=torch.float64).item())

    @staticmethod
    def _split(mask: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of known and masked tokens, ``[B, L - n]`` and ``[B, n]``, ascending, from a mask ``[B, L]``."""
        counts = mask.sum(dim=1).long().tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f"all samples of a batch need the same number of masked tokens, got {counts}"
            )
        positions = mask.argsort(dim=1, stable=True)
        known, masked = positions.tensor_split([mask.shape[1] - counts[0]], dim=1)
        return known, masked

    def forward(
        self, latents: Tensor, labels: Tensor, mask: Tensor | None = None, *uniform: Tensor
    ) -> Tensor:
        """Mean cross-entropy in nats over masked tokens and all channels (or groups of channels).

        Args:
            latents: ``[B, C, h, w]``, scaled by the latent factor.
            labels: classes ``[B]``.
            mask: ``[B, L]``, 1 where a token is masked, the same number in each sample; drawn if not given. It
                lies best on the host, which would else wait for the device to count them.
            uniform: for the masked head, numbers ``[B, L, S + 1]`` that decide which channels it is given at each
                position (:meth:`models.masked_head.MaskedHead.given`); drawn if not given.

        Raises:
            ValueError: latents of another shape, labels outside the classes, or uneven masks.
        """
        return self.head.loss(*self.masked_tokens(latents, labels, mask, *uniform))

    def masked_tokens(
        self, latents: Tensor, labels: Tensor, mask: Tensor | None, *others: Tensor
    ) -> list[Tensor]:
        """Features ``[M, D]``, levels ``[M, C]``, and ``others [B, L, ...]``, of masked tokens; see :meth:`forward`."""
        if latents.shape[1:] != self.latent_shape:
            raise ValueError(
                f"latents are {[*latents.shape[1:]]} (C, h, w), the model's are {[*self.latent_shape]}"
            )
        indices, tokens = self.quantize(self.patchify(latents))  # [B, L, C] each
        if mask is None:
            masked, known = self.sample_orders(len(latents)).tensor_split(
                [self.draw_num_masked()], dim=1
            )
        else:
            known, masked = (
                to_device(positions, latents.device) for positions in self._split(mask)
            )
        self.check_labels(labels)
        features = self.backbone(tokens, known, self.class_emb(labels))  # [B, L, D]
        return [gather_tokens(x, masked).flatten(0, 1) for x in (features, indices, *others)]

    def training_flops(self, num_masked: float | None = None) -> float:
        """Floating-point operations of a training step for one image: three times those of the forward pass.

        Matrix products alone are counted, 2 operations a multiply-add: a block of width D on N places takes
        2 N (4 + 2 mlp_ratio) D^2 + 4 N^2 D, one of the head 2 N 6 D^2 more for AdaLN, one of the masked head
        2 (2 mlp_ratio + 3) D^2. The head runs on ``num_masked`` tokens, by default the expected number.
        """
        if num_masked is None:
            a = (self.mask_ratio_min - 1) / 0.25
            density = (math.exp(-a * a / 2) - 1) / math.sqrt(2 * math.pi)
            num_masked = self.seq_len * (
                1 + 0.25 * (density / (0.5 * math.erf(-a / math.sqrt(2))) if a else 0.0)
            )
        return 3 * (self.backbone_flops(num_masked) + num_masked * self.token_flops())

    def _block_flops(self, depth: int, dim: int, places: float, extra: float = 0.0) -> float:
        return depth * (
            2 * places * (4 + 2 * self.config["mlp_ratio"] + extra) * dim**2 + 4 * places**2 * dim
        )

    def backbone_flops(self, num_masked: float) -> float:
        """Operations of the backbone's forward pass for one image, counted as in :meth:`training_flops`."""
        c, everything = self.config, self.config["buffer_size"] + self.seq_len
        enc, dec, known = c["encoder_embed_dim"], c["decoder_embed_dim"], everything - num_masked
        flops = self._block_flops(c["encoder_depth"], enc, known) + 2 * known * enc * dec
        flops += 2 * (self.seq_len - num_masked) * self.token_dim * enc
        return flops + self._block_flops(c["decoder_depth"], dec, everything)

    def token_flops(self, passes: int = 1) -> float:
        """Operations of the head for one token, counted as in :meth:`training_flops`.

        ``passes`` is the number of ``head_steps`` that a masked head takes.
        """
        head, dim, steps = self.head, self.head.dim, self.head.channel_steps
        if isinstance(head, MaskedHead):
            blocks = 2 * head.depth * (2 * self.config["mlp_ratio"] * passes + 3) * dim**2
        else:
            blocks = self._block_flops(head.depth, dim, steps, extra=6)
        ends = (
            self.config["decoder_embed_dim"] * dim
            + head.places * 2 * dim**2
            + passes * steps * dim * head.classes
        )
        return blocks + 2 * ends

    def compile_blocks(self) -> None:
        """See :func:`compile_blocks`."""
        compile_blocks(self)

    # ----------------------------------------------------------------------------------------------------------------
    # MAR's interface to the same parts, for callers: :meth:`forward` does the same on positions instead of masks.

    def random_masking(self, x: Tensor, orders: Tensor) -> Tensor:
        """A mask ``[B, L]``, 1 where a token is masked, from ``orders [B, L]``; ``x`` gives the device."""
        mask = torch.zeros(orders.shape, device=x.device)
        return mask.scatter(1, orders[:, : self.draw_num_masked()].to(x.device), 1.0)

    def forward_mae_encoder(self, x: Tensor, mask: Tensor, class_embedding: Tensor) -> Tensor:
        """Tokens ``[B, L, C]``, a mask ``[B, L]`` and class embeddings ``[B, D]`` to ``[B, buffer + known, D]``."""
        return self.backbone.encode(x, self._split(mask)[0], class_embedding)

    def forward_mae_decoder(self, x: Tensor, mask: Tensor) -> Tensor:
        """The encoder's output ``[B, buffer + known, D]`` and its mask to features z ``[B, L, D]``."""
        return self.backbone.decode(x, self._split(mask)[0])

    def forward_channel_ar(self, features: Tensor, channel_targets: Tensor, mask: Tensor) -> Tensor:
        """Teacher-forced logits of the masked tokens (Eq. 6).

        Args:
            features: ``[B, L, D]``.
            channel_targets: levels ``[B, L, C]`` in generation order.
            mask: ``[B, L]``, 1 where a token is masked.

        Returns:
            logits ``[masked, C, K]`` in generation order, rows by sample, then position; for groups of channels
            ``[masked, C / group, K^group]``.
        """
        masked = mask.bool()
        return self.head(features[masked], self.head.to_classes(channel_targets[masked]))

    # ----------------------------------------------------------------------------------------------------------------
    # Generation (section 3.3).

    @torch.no_grad()
    def sample_tokens(
        self,
        bsz: int,
        num_iter: int = 64,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        labels: Tensor | Sequence[int] | None = None,
        temperature: float = 1.0,
        orders: Tensor | None = None,
        first_place: str = "trained",
        seeds: Sequence[int] | None = None,
        order: str = "random",
        confidence_noise: float = 0.0,
        known_latents: Tensor | None = None,
        known_mask: Tensor | None = None,
        return_confidence: bool = False,
        on_step: sampling.OnStep | None = None,
        head_steps: int | None = None,
        head_order: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Latents ``[bsz, C, h, w]``, scaled by the latent factor, generated in ``num_iter`` steps, without dropout.

        Autocast is the caller's.

        Args:
            num_iter: steps; the number of tokens they take follows a cosine.
            cfg: guidance scale on features; at 1 the conditional pass runs alone.
            cfg_schedule: ``"linear"``, growing with the tokens known, or ``"constant"``.
            labels: classes ``[bsz]``, a list or a tensor; without them generation is unconditional.
            temperature: of every channel's distribution; 0 takes the most probable level.
            orders: ``[bsz, L]``, tokens are taken from the end; by default as ``order`` says.
            first_place: ``"trained"``, or ``"released"`` for the published sampler's input at the head's first step.
            seeds: one for each image, which then does not depend on the others in the batch.
            order: ``"random"``; ``"raster"``, row by row; or ``"confidence"``: each step samples all unknown tokens and
                takes those whose channels have the highest joint log-probability (section 4.3, Figure 8).
            confidence_noise: scale of the Gumbel noise added to that, falling linearly to 0 over the steps (MaskGIT).
            known_latents, known_mask: latents ``[bsz, C, h, w]`` and ``[bsz, L]``, true where their token is given and
                to be kept (quantized); any number of them in each image.
            return_confidence: also return ``[bsz, L]``, the joint log-probability in nats, at temperature 1, that each
                token had when it was taken; 0 for those given.
            on_step: see :data:`models.sampling.OnStep`.
            head_steps, head_order: of the masked head alone, see :meth:`models.masked_head.MaskedHead.sample`.

        Raises:
            ValueError: labels outside the classes, or arguments outside the ranges above.
        """
        of_head = first_place, head_steps, head_order
        how = sampling.SamplingOptions(
            num_iter, cfg, cfg_schedule, temperature, order, confidence_noise, *of_head
        )
        labels = None if labels is None else torch.as_tensor(labels)
        for name, value in {"labels": labels, "orders": orders, "seeds": seeds}.items():
            if value is not None and len(value) != bsz:
                raise ValueError(f"{len(value)} {name} for {bsz} images")
        if labels is not None:
            self.check_labels(labels)
        given = sampling.Given(
            labels, orders, seeds, *self._known_tokens(bsz, known_latents, known_mask)
        )
        training = self.training
        self.eval()
        with fast.weights_cast_once(self, self.device):
            parts = self.backbone, self.head, self.quantizer
            tokens, confidence = sampling.sample_tokens(*parts, bsz, given, how, on_step)
        self.train(training)
        latents = self.unpatchify(tokens)
        return (latents, confidence) if return_confidence else latents

    def _known_tokens(
        self, bsz: int, latents: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Values ``[B, L, C]`` of known latents, on the model's device, and their boolean mask ``[B, L]``."""
        if (latents is None) != (mask is None):
            raise ValueError("known_latents and known_mask go together")
        if latents is None or mask is None:
            return None, None
        given, expected = (
            [[*x.shape] for x in (latents, mask)],
            [[bsz, *self.latent_shape], [bsz, self.seq_len]],
        )
        if given != expected:
            shapes = "{} and {}, expected {} and {}".format(*given, *expected)
            raise ValueError(f"known_latents and known_mask are {shapes}")
        return self.quantize(self.patchify(to_device(latents, self.device)))[1], mask.bool()


# --------------------------------------------------------------------------------------------------------------------
# Compiling.


def compile_blocks(model: nn.Module) -> None:
    """Have ``torch.compile`` fuse what is between the matrix products of a model's or a head's blocks.

    Blocks of a kind share one program, made for any number of tokens: it differs in each step. Call this on the
    model's device: on CUDA, the head's sampling of few tokens becomes one launch, too.
    """
    # Otherwise DDP cuts the programs where its buckets end, to send gradients early. A block is short enough.
    torch._dynamo.config.optimize_ddp = False
    for module in model.modules():
        if isinstance(module, Block | MaskedBlock):
            module.compile(dynamic=True)
        elif isinstance(module, Head):
            module.compiled = True
            if module.condition_proj.weight.is_cuda:
                module.recordings = fast.Recordings()


# --------------------------------------------------------------------------------------------------------------------
# A factory for each size, which takes every argument of TokenBridge.


def _of_size(name: str, kwargs: dict[str, Any]) -> TokenBridge:
    sizes = MASKED_SIZES if kwargs.get("head") == "masked" else SIZES
    return TokenBridge(**{**sizes[name], **kwargs})


def tokenbridge_tiny(**kwargs) -> TokenBridge:
    """A size for demonstrations and tests, not the paper's."""
    return _of_size("tokenbridge_tiny", kwargs)


def tokenbridge_base(**kwargs) -> TokenBridge:
    """218M parameters."""
    return _of_size("tokenbridge_base", kwargs)


def tokenbridge_large(**kwargs) -> TokenBridge:
    """487M parameters; FID 1.76 in the paper."""
    return _of_size("tokenbridge_large", kwargs)


def tokenbridge_huge(**kwargs) -> TokenBridge:
    """910M parameters; FID 1.55 in the paper."""
    return _of_size("tokenbridge_huge", kwargs)


#: Values of ``--model``.
MODELS = {size: globals()[size] for size in SIZES}
