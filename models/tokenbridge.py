"""TokenBridge: quantized latents learned by a masked backbone and a channel-autoregressive head (section 3)."""

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from models import sampling
from models.backbone import MaskedBackbone, gather_tokens
from models.channel_head import ChannelHead
from models.pretrained import HubModel
from models.quantizer import QUANTIZERS
from util.config import KL16_LATENT_FACTOR
from util.errors import UserError

#: KL-16's channels by share of low-frequency energy, highest first (section 3.2). Published checkpoints do not hold it.
KL16_CHANNEL_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)

#: What can be recomputed in the backward pass.
CHECKPOINTED = ("encoder", "decoder", "head")

#: Classes of a place of the head at most: joint vocabularies grow as levels^group.
MAX_CLASSES = 2**17


class TokenBridge(nn.Module, HubModel):
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
            ``range(vae_embed_dim * patch_size**2)``; by default KL-16's where there are 16, else their own order.
        head: ``"ar"``, or ``"parallel"`` for channels predicted independently (Table 2a).
        channels_per_group: consecutive channels of that order predicted jointly, as one of levels^group classes
            (Table 2d).
        quantizer: ``"gaussian"`` or ``"linear"`` (section 3.1).
        channel_mean, channel_std: of each latent channel, to calibrate the quantizer with in place of its bounds.

    Raises:
        ValueError: sizes that do not fit each other, an order that is not a permutation, groups that do not divide
            the channels or have too many classes.
    """

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
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__", "norm_layer")}
        if img_size % (vae_stride * patch_size):
            raise ValueError(
                f"img_size {img_size} is not a multiple of vae_stride x patch_size = {vae_stride * patch_size}"
            )
        if not 0 <= mask_ratio_min <= 1:
            raise ValueError(f"mask_ratio_min lies between 0 and 1, got {mask_ratio_min}")
        if head not in ("ar", "parallel"):
            raise ValueError(f'head is "ar" or "parallel", not {head!r}')
        self.patch_size, self.vae_embed_dim, self.class_num = patch_size, vae_embed_dim, class_num
        self.mask_ratio_min = mask_ratio_min
        self.grid_size = img_size // vae_stride // patch_size
        self.seq_len = self.grid_size**2
        self.token_dim = vae_embed_dim * patch_size**2
        self._set_channel_order(channel_order)
        self._set_groups(channels_per_group, quant_levels, channel_embed_dim, head == "ar")

        shared = {
            "mlp_ratio": mlp_ratio,
            "norm_layer": norm_layer,
            "attn_dropout": attn_dropout,
            "proj_dropout": proj_dropout,
        }
        parts = _checkpointed(grad_checkpointing)
        self.backbone = MaskedBackbone(
            token_dim=self.token_dim,
            seq_len=self.seq_len,
            class_num=class_num,
            buffer_size=buffer_size,
            encoder_embed_dim=encoder_embed_dim,
            encoder_depth=encoder_depth,
            encoder_num_heads=encoder_num_heads,
            decoder_embed_dim=decoder_embed_dim,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
            label_drop_prob=label_drop_prob,
            checkpointed=[part for part in parts if part != "head"],
            **shared,
        )
        self.head = ChannelHead(
            feature_dim=decoder_embed_dim,
            places=self.token_dim // channels_per_group,
            classes=quant_levels**channels_per_group,
            dim=channel_embed_dim,
            depth=channel_depth,
            heads=channel_heads,
            autoregressive=head == "ar",
            grad_checkpointing="head" in parts,
            **shared,
        )
        self._set_quantizer(quantizer, channel_mean, channel_std)
        self._published = {name.split(".", 1)[1]: name for name in nn.Module.state_dict(self)}
        self.register_state_dict_post_hook(_to_published)
        self.register_load_state_dict_pre_hook(_from_published)
        self.initialize_weights()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TokenBridge":
        """The model that ``config``, a model's own or a checkpoint's, describes; entries of other things are ignored.

        Raises:
            TypeError, ValueError: it describes none.
        """
        names = inspect.signature(cls).parameters
        return cls(**{name: value for name, value in config.items() if name in names})

    @staticmethod
    def published_config(weights: Any, path: str | Path) -> dict[str, Any]:
        """What the shapes of published weights, which do not describe themselves, tell of their model.

        Raises:
            UserError: they are of none of the :data:`MODELS`.
        """
        weights = weights if isinstance(weights, Mapping) else {}
        shapes = {name: list(value.shape) for name, value in weights.items() if isinstance(value, Tensor)}
        try:
            length = shapes["output_pos_embed"][1]
            kwargs = {
                "class_num": shapes["class_emb.weight"][0],
                "quant_levels": shapes["channel_heads.0.weight"][0],
                "buffer_size": shapes["encoder_pos_embed_learned"][1] - length,
                "img_size": 16 * math.isqrt(length),
            }
            for size, factory in MODELS.items():
                with torch.device("meta"):
                    model = factory(**kwargs)
                if all(shapes.get(name) == list(value.shape) for name, value in model.named_parameters()):
                    return {**model.config, "model": size, "latent_factor": KL16_LATENT_FACTOR}
        except (KeyError, IndexError, ValueError):
            pass
        raise UserError(f"{path} does not say of what model it is, and its weights are of no published one")

    def _set_channel_order(self, order: Sequence[int] | None) -> None:
        channels = self.token_dim
        if order is None:
            kl16 = self.vae_embed_dim == len(KL16_CHANNEL_ORDER) and self.patch_size == 1
            order = KL16_CHANNEL_ORDER if kl16 else range(channels)
        try:
            order = [operator.index(channel) for channel in order]
        except TypeError:
            order = []
        if sorted(order) != list(range(channels)):
            raise ValueError(f"channel_order must hold each of 0 to {channels - 1} once, got {order or 'no numbers'}")
        self.config["channel_order"] = order
        order = torch.tensor(order)
        self.register_buffer("generation_order", order, persistent=False)
        self.register_buffer("from_generation_order", order.argsort(), persistent=False)

    def _set_groups(self, size: int, levels: int, dim: int, autoregressive: bool) -> None:
        if size < 1 or self.token_dim % size:
            raise ValueError(f"groups of {size} do not divide the {self.token_dim} channels of a token")
        classes, places = levels**size, self.token_dim // size
        if classes > MAX_CLASSES:
            parameters = classes * dim * (places + (places - 1) * autoregressive)
            raise ValueError(
                f"{size} channels of {levels} levels have {classes:,} joint classes, {MAX_CLASSES:,} are the most: the "
                f"head would hold {parameters:,} parameters for them ({4 * parameters / 2**30:,.0f} GiB in fp32)"
            )
        self.channels_per_group = size
        self.register_buffer("group_weights", levels ** torch.arange(size - 1, -1, -1), persistent=False)

    def _set_quantizer(self, kind: str, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        if kind not in QUANTIZERS:
            raise ValueError(f"quantizer one of {list(QUANTIZERS)} is needed, not {kind!r}")
        spread = []
        for name, values in (("channel_mean", mean), ("channel_std", std)):
            if values is not None:
                values = self.config[name] = [float(value) for value in values]
                if len(values) != self.vae_embed_dim:
                    raise ValueError(f"{len(values)} values of {name} for {self.vae_embed_dim} channels")
                values = np.repeat(values, self.patch_size**2)  # a patch's entries of one channel lie side by side
            spread.append(values)
        c = self.config
        self.quantizer = QUANTIZERS[kind](c["quant_levels"], c["quant_min"], c["quant_max"], c["std_range"], *spread)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draws all weights anew: Xavier for layers, 0.02 for embeddings and free parameters, zero for AdaLN."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if "adaLN_modulation" in name:  # every block starts as the identity
                    nn.init.zeros_(module.weight)
        free = [parameter for part in (self.backbone, self.head) for parameter in part.parameters(recurse=False)]
        for parameter in [*free, self.class_emb.weight]:
            nn.init.normal_(parameter, std=0.02)

    # ----------------------------------------------------------------------------------------------------------------
    # Names. Published checkpoints are flat: their names are ours without the part (backbone, head, quantizer), and
    # their optimizer states list the free parameters of all parts before any layer's.

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by published name, in published order."""
        members = super().named_parameters("", recurse, remove_duplicate)
        published = [(name.split(".", 1)[1], parameter) for name, parameter in members]
        for name, parameter in sorted(published, key=lambda item: "." in item[0]):
            yield f"{prefix}.{name}" if prefix else name, parameter

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
        return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size)

    def unpatchify(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`patchify`."""
        p = self.patch_size
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=self.grid_size, p=p, q=p)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, L, C]`` to levels, in the latents' own channel order, and their values (Eq. 1, 4, 5)."""
        return self.quantizer(x)

    def to_classes(self, levels: Tensor) -> Tensor:
        """Levels ``[..., C]`` in generation order to the classes ``[..., C / group]`` of the head's places."""
        if self.channels_per_group == 1:
            return levels
        return (levels.unflatten(-1, (-1, self.channels_per_group)) * self.group_weights).sum(-1)

    def to_levels(self, classes: Tensor) -> Tensor:
        """The inverse of :meth:`to_classes`."""
        if self.channels_per_group == 1:
            return classes
        return (classes[..., None] // self.group_weights % self.quantizer.levels).flatten(-2)

    def check_labels(self, labels: Tensor) -> Tensor:
        """``labels`` themselves.

        Raises:
            ValueError: one of them, on the CPU, is outside the classes. Those on a device are not waited for.
        """
        if not labels.is_cuda and len(labels):
            lowest, highest = int(labels.min()), int(labels.max())
            if lowest < 0 or highest >= self.class_num:
                raise ValueError(
                    f"labels run from {lowest} to {highest}, "
                    f"but the model's classes from 0 to {self.class_num - 1} (class_num {self.class_num})"
                )
        return labels

    # ----------------------------------------------------------------------------------------------------------------
    # Training (section 3.3).

    def sample_orders(self, bsz: int) -> Tensor:
        """A random order of the positions for each sample, ``[B, L]``; the first ones are masked."""
        return sampling.random_orders(bsz, self.seq_len, self.device)

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

    def random_masking(self, x: Tensor, orders: Tensor) -> Tensor:
        """A mask ``[B, L]``, 1 where a token is masked, from ``orders [B, L]``; ``x`` gives the device."""
        mask = torch.zeros(orders.shape, device=x.device)
        return mask.scatter(1, orders[:, : self.draw_num_masked()].to(x.device), 1.0)

    @staticmethod
    def _split(mask: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of known and masked tokens, ``[B, L - n]`` and ``[B, n]``, ascending, from a mask ``[B, L]``."""
        counts = mask.sum(dim=1).long().tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"all samples of a batch need the same number of masked tokens, got {counts}")
        positions = mask.argsort(dim=1, stable=True)
        return positions.tensor_split([mask.shape[1] - counts[0]], dim=1)

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
        return self.head(features[masked], self.to_classes(channel_targets[masked]))

    def forward(self, latents: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats over masked tokens and all channels (or groups of channels).

        Args:
            latents: ``[B, C, h, w]``, scaled by the latent factor.
            labels: classes ``[B]``.
            mask: ``[B, L]``, 1 where a token is masked, the same number in each sample; drawn if not given.

        Raises:
            ValueError: latents of another shape, labels outside the classes, or uneven masks.
        """
        expected = (self.vae_embed_dim, self.grid_size * self.patch_size, self.grid_size * self.patch_size)
        if latents.shape[1:] != expected:
            raise ValueError(f"latents are {list(latents.shape[1:])} (C, h, w), the model's are {list(expected)}")
        indices, tokens = self.quantize(self.patchify(latents))  # [B, L, C] each
        if mask is None:
            orders, num_masked = self.sample_orders(len(latents)), self.draw_num_masked()
            masked, known = orders.tensor_split([num_masked], dim=1)
        else:
            known, masked = self._split(mask)
        features = self.backbone(tokens, known, self.class_emb(self.check_labels(labels)))  # [B, L, D]
        targets = gather_tokens(indices[..., self.generation_order], masked).flatten(0, 1)  # [M, C]
        targets = self.to_classes(targets)
        return self.head.loss(gather_tokens(features, masked).flatten(0, 1), targets)

    def training_flops(self, num_masked: float | None = None) -> float:
        """Floating-point operations of a training step for one image: three times those of the forward pass.

        Counted are the matrix products, 2 operations a multiply-add: in a block of width D on S places
        2 S (4 + 2 mlp_ratio) D^2 + 4 S^2 D, in the head 2 S 6 D^2 more for AdaLN, on ``num_masked`` sequences of C
        places (or groups). ``num_masked`` defaults to the expected number.
        """
        if num_masked is None:
            a = (self.mask_ratio_min - 1) / 0.25
            density = (math.exp(-a * a / 2) - 1) / math.sqrt(2 * math.pi)
            mean = density / (0.5 * math.erf(-a / math.sqrt(2))) if a else 0.0
            num_masked = self.seq_len * (1 + 0.25 * mean)

        return 3 * (self.backbone_flops(num_masked) + num_masked * self.token_flops())

    def _block_flops(self, depth: int, dim: int, places: float, extra: float = 0.0) -> float:
        return depth * (2 * places * (4 + 2 * self.config["mlp_ratio"] + extra) * dim**2 + 4 * places**2 * dim)

    def backbone_flops(self, num_masked: float) -> float:
        """Of the backbone's forward pass for one image, counted as in :meth:`training_flops`."""
        c, everything = self.config, self.config["buffer_size"] + self.seq_len
        enc, dec, known = c["encoder_embed_dim"], c["decoder_embed_dim"], everything - num_masked
        flops = self._block_flops(c["encoder_depth"], enc, known) + 2 * known * enc * dec
        flops += 2 * (self.seq_len - num_masked) * self.token_dim * enc
        return flops + self._block_flops(c["decoder_depth"], dec, everything)

    def token_flops(self) -> float:
        """Of the head's forward pass for one token, counted as in :meth:`training_flops`."""
        dim, places = self.head.dim, self.head.places
        flops = self._block_flops(self.head.depth, dim, places, extra=6) + 2 * self.config["decoder_embed_dim"] * dim
        return flops + 2 * places * (2 * dim**2 + dim * self.head.classes)

    def compile_blocks(self) -> None:
        """Has ``torch.compile`` fuse what lies between the blocks' matrix products, in training and in sampling.

        Blocks of a kind share one program, made for any number of tokens: each training step masks another one, each
        sampling step takes another one. To be called on the model's device; copies of the model are not compiled.
        """
        for block in (*self.backbone.encoder_blocks, *self.backbone.decoder_blocks):
            block.compile(dynamic=True)
        self.head.compile_blocks()

    # ----------------------------------------------------------------------------------------------------------------
    # Generation (section 3.3).

    sample_tokens = sampling.sample_tokens


def _checkpointed(asked: bool | Sequence[str]) -> Sequence[str]:
    parts = (CHECKPOINTED if asked else ()) if isinstance(asked, bool) else asked
    if not set(parts) <= set(CHECKPOINTED):
        raise ValueError(f"grad_checkpointing takes {', '.join(CHECKPOINTED)}, not {parts}")
    return parts


def _to_published(model: TokenBridge, state: dict, prefix: str, metadata: dict) -> None:
    names = sorted(model._published, key=lambda name: "." in name)
    for published, value in [(name, state.pop(prefix + model._published[name])) for name in names]:
        state[prefix + published] = value


def _from_published(model: TokenBridge, state: dict, prefix: str, *_) -> None:
    for published, ours in model._published.items():
        if prefix + published in state:
            state[prefix + ours] = state.pop(prefix + published)


# --------------------------------------------------------------------------------------------------------------------
# Sizes. Every argument of TokenBridge can be given to a factory, too.


def _size(width: int, depth: int, heads: int, head_width: int, head_depth: int, head_heads: int) -> dict[str, int]:
    return {
        "encoder_embed_dim": width,
        "encoder_depth": depth,
        "encoder_num_heads": heads,
        "decoder_embed_dim": width,
        "decoder_depth": depth,
        "decoder_num_heads": heads,
        "channel_embed_dim": head_width,
        "channel_depth": head_depth,
        "channel_heads": head_heads,
    }


def tokenbridge_tiny(**kwargs) -> TokenBridge:
    """A size for demonstrations and tests, not the paper's."""
    return TokenBridge(**{**_size(128, 2, 4, 128, 2, 4), **kwargs})


def tokenbridge_base(**kwargs) -> TokenBridge:
    """218M parameters."""
    return TokenBridge(**{**_size(768, 12, 12, 768, 4, 8), **kwargs})


def tokenbridge_large(**kwargs) -> TokenBridge:
    """487M parameters; FID 1.76 in the paper."""
    return TokenBridge(**{**_size(1024, 16, 16, 1024, 4, 8), **kwargs})


def tokenbridge_huge(**kwargs) -> TokenBridge:
    """910M parameters; FID 1.55 in the paper."""
    return TokenBridge(**{**_size(1280, 20, 16, 1024, 6, 8), **kwargs})


#: Values of ``--model``.
MODELS = {
    factory.__name__: factory for factory in (tokenbridge_tiny, tokenbridge_base, tokenbridge_large, tokenbridge_huge)
}

SIZES = {
    "tokenbridge_tiny": _size(128, 2, 4, 128, 2, 4),
    "tokenbridge_base": _size(768, 12, 12, 768, 4, 8),
    "tokenbridge_large": _size(1024, 16, 16, 1024, 4, 8),
    "tokenbridge_huge": _size(1280, 20, 16, 1024, 6, 8),
}
