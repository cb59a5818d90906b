"""The configuration of a model: meaning, default, flag and rules of each entry.

These follow from :class:`ModelConfig`: the arguments of :class:`models.tokenbridge.TokenBridge`,
the model's flags of main_tokenbridge.py, the entries of ``config`` in a checkpoint, and what
happens where a run and its checkpoint differ (:mod:`util.config`).
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from torch import nn

#: The published tokenizer, KL-16; assumed if a file stores no tokenizer metadata.
KL16_CONFIG = {"embed_dim": 16, "ch_mult": [1, 1, 2, 2, 4]}
KL16_LATENT_FACTOR = 0.2325
#: What all tiny autoencoders store: stride 8, and latents without a variance.
TINY_CONFIG = {"ch_mult": [1, 1, 1, 1], "deterministic": True}
#: KL-16's channels by share of low-frequency energy, highest first (section 3.2 of the paper).
KL16_CHANNEL_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)

#: How a run uses its initial checkpoint; FRESH means that there is none.
FRESH, RESUME, EVALUATE, FINETUNE = "fresh", "resume", "evaluate", "finetune"
EVERY_USE = (RESUME, EVALUATE, FINETUNE)
EXCEPT_RESUME = (EVALUATE, FINETUNE)

#: Parts of a model whose blocks can be recomputed in the backward pass.
CHECKPOINTED = ("encoder", "decoder", "head")


# --------------------------------------------------------------------------------------------------
# Rules of an entry.


def same(value: Any) -> Any:
    """Return ``value``."""
    return value


@dataclass(frozen=True)
class Entry:
    """Rules of one entry of a checkpoint's ``config``."""

    #: Flags that set the entry, for messages.
    flags: str = ""
    #: Uses (RESUME, EVALUATE, FINETUNE) in which the checkpoint's value applies if the flag is
    #: omitted.
    adopted_in: Sequence[str] = ()
    #: Value assumed for published checkpoints, which do not store it; None if it varies between
    #: them or does not matter.
    published: Any = None
    #: Action if a run uses a published checkpoint with another value: "refuse", "warn", or "" if a
    #: mismatch of shapes already raises an error.
    unlike_published: str = ""
    #: Convert the value of the entry to that of its flag, and back.
    to_flag: Callable[[Any], Any] = same
    from_flag: Callable[[Any], Any] = same

    @property
    def compared(self) -> bool:
        """Whether a run that resumes or evaluates a checkpoint must have the checkpoint's value."""
        return bool(self.adopted_in) or self.published is not None


def entry(value: Any, text: str, flag: str = "", *, set_by: str = "", **rules: Any) -> Any:
    """Return a dataclass field with its flag (:func:`util.options.option`) and its :class:`Entry`.

    The default of the flag is the published value, or ``value`` if that is None. Flags of entries
    that every use adopts default to None: the checkpoint's value applies, or ``value`` without a
    checkpoint.

    Args:
        value: default of the field.
        text: meaning of the entry; help of its flag.
        flag: the flag that holds its value; none by default.
        set_by: other flags that change it.
        rules: arguments of :class:`Entry`.
    """
    flags = ", ".join(name for name in (flag, set_by) if name)
    rule = Entry(flags=flags, **rules)
    default = rule.to_flag(value if rule.published is None else rule.published)
    if rule.adopted_in == EVERY_USE:
        default = None
    argument = {"help": text, "default": default}
    return field(default=value, metadata={"flag": flag, "argument": argument, "entry": rule})


# --------------------------------------------------------------------------------------------------
# The entries.


@dataclass
class ModelConfig:
    """Arguments of :class:`models.tokenbridge.TokenBridge`, in their order.

    Raises:
        ValueError: sizes that do not fit each other, or an order that is not a permutation.
    """

    # fmt: off
    img_size: int = entry(
        256, "height and width of the images in pixels", "--img_size", adopted_in=(EVALUATE,),
    )
    vae_stride: int = entry(
        16, "pixels per latent position, each way; a tokenizer that stores its own overrides this",
        "--vae_stride", published=16, unlike_published="warn",
    )
    patch_size: int = entry(
        1, "latent positions per token, each way", "--patch_size",
        adopted_in=(EVALUATE,), published=1, unlike_published="warn",
    )
    encoder_embed_dim: int = entry(1024, "width of the encoder", set_by="--model")
    encoder_depth: int = entry(16, "blocks of the encoder", set_by="--model")
    encoder_num_heads: int = entry(16, "attention heads of the encoder", set_by="--model")
    decoder_embed_dim: int = entry(1024, "width of the decoder", set_by="--model")
    decoder_depth: int = entry(16, "blocks of the decoder", set_by="--model")
    decoder_num_heads: int = entry(16, "attention heads of the decoder", set_by="--model")
    channel_embed_dim: int = entry(
        256, "width of the head; by default that of --model",
        "--head_dim", set_by="--model", adopted_in=EVERY_USE,
    )
    channel_depth: int = entry(
        4, "blocks of the head; by default that of --model",
        "--head_depth", set_by="--model", adopted_in=EVERY_USE,
    )
    channel_heads: int = entry(
        8, "attention heads of the head, if it has attention; by default that of --model",
        "--head_heads", set_by="--model", adopted_in=EVERY_USE,
    )
    mlp_ratio: float = entry(4.0, "hidden width of every MLP, as a multiple of its width")
    norm_layer: Callable[[int], nn.Module] = entry(  # noqa: RUF009, the default is immutable
        partial(nn.LayerNorm, eps=1e-6), "function that makes a norm of a width; not stored",
    )
    quant_levels: int = entry(
        32, "2^bits levels per channel", "--quant_bits",
        to_flag=lambda levels: levels.bit_length() - 1, from_flag=lambda bits: 2**bits,
        adopted_in=EXCEPT_RESUME, published=64,
    )
    vae_embed_dim: int = entry(
        16, "channels of the latents; a tokenizer that stores its own overrides this",
        "--vae_embed_dim", published=16, unlike_published="warn",
    )
    mask_ratio_min: float = entry(
        0.7, "lower end of the mask ratios in training, 0 to 1", "--mask_ratio_min",
    )
    label_drop_prob: float = entry(
        0.1, "probability of training without the label, for guidance", "--label_drop_prob",
    )
    class_num: int = entry(1000, "number of classes", "--class_num", adopted_in=(EVALUATE,))
    attn_dropout: float = entry(0.1, "dropout of attention weights, 0 to 1", "--attn_dropout")
    proj_dropout: float = entry(0.1, "dropout of projections and MLPs, 0 to 1", "--proj_dropout")
    buffer_size: int = entry(
        64, "positions in front of the tokens, each with the class embedding",
        "--buffer_size", adopted_in=EXCEPT_RESUME,
    )
    grad_checkpointing: bool | Sequence[str] = entry(
        False, "recompute blocks in the backward pass to save memory", "--grad_checkpointing",
    )
    quant_min: float = entry(
        -5.0, "lower bound of the quantizer", "--quant_min",
        adopted_in=EXCEPT_RESUME, published=-5.0, unlike_published="warn",
    )
    quant_max: float = entry(
        5.0, "upper bound of the quantizer", "--quant_max",
        adopted_in=EXCEPT_RESUME, published=5.0, unlike_published="warn",
    )
    std_range: float = entry(
        3.0, "half-width of the quantizer's normalized range, in standard deviations",
        adopted_in=EVERY_USE, published=3.0, unlike_published="warn",
    )
    channel_order: Sequence[int] | None = entry(
        None, "order in which the head predicts channels: frequency (KL-16's), sequential, "
        "8,1,10,..., or a file of tools.channel_order; by default KL-16's for its latents",
        "--channel_order",
        adopted_in=EVERY_USE, published=KL16_CHANNEL_ORDER, unlike_published="refuse",
    )
    head: str = entry(
        "ar", "how channels are predicted: one after the other (ar, the paper's), or as "
        "docs/variants.md describes",
        "--head", adopted_in=EVERY_USE, published="ar", unlike_published="refuse",
    )
    channels_per_group: int = entry(
        1, "channels predicted jointly, as one of levels^group classes (Table 2d)",
        "--channels_per_group", adopted_in=EVERY_USE, published=1, unlike_published="refuse",
    )
    quantizer: str = entry(
        "gaussian", "levels of equal probability under a normal, or at equal distances",
        "--quantizer", adopted_in=EVERY_USE, published="gaussian", unlike_published="refuse",
    )
    channel_mean: Sequence[float] | None = entry(
        None, "mean of each latent channel; with channel_std, it sets the quantizer's bounds",
        set_by="--quant_calibrate", adopted_in=EVERY_USE,
    )
    channel_std: Sequence[float] | None = entry(
        None, "standard deviation of each latent channel",
        set_by="--quant_calibrate", adopted_in=EVERY_USE,
    )
    balanced_masks: bool = entry(
        False, "mask half of a batch by a quantile u of the mask ratios, the other by 1 - u, so "
        "that all ranks have almost equal work",
        "--balanced_masks",
    )
    # fmt: on

    def __post_init__(self) -> None:
        stride = self.vae_stride * self.patch_size
        if self.img_size % stride:
            raise ValueError(
                f"img_size {self.img_size} is not a multiple of vae_stride x patch_size = {stride}"
            )
        if not 0 <= self.mask_ratio_min <= 1:
            raise ValueError(f"mask_ratio_min lies between 0 and 1, got {self.mask_ratio_min}")
        if not set(self.recomputed) <= set(CHECKPOINTED):
            parts = ", ".join(CHECKPOINTED)
            raise ValueError(f"grad_checkpointing takes {parts}, not {self.grad_checkpointing}")
        order = self.channel_order
        if order is None:
            order = default_channel_order(self.vae_embed_dim, self.patch_size)
        self.channel_order = checked_order(order, self.token_dim)
        if self.channel_mean is not None:
            self.channel_mean = [float(value) for value in self.channel_mean]
        if self.channel_std is not None:
            self.channel_std = [float(value) for value in self.channel_std]

    @classmethod
    def from_stored(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Return the configuration in a checkpoint's ``config``, without its metadata."""
        return cls(**{name: value for name, value in config.items() if name in MODEL_ENTRIES})

    def stored(self) -> dict[str, Any]:
        """Return what a checkpoint stores: every argument but ``norm_layer``, as plain types."""
        return {name: getattr(self, name) for name in MODEL_ENTRIES}

    @property
    def grid_size(self) -> int:
        """Tokens per row and column of an image."""
        return self.img_size // self.vae_stride // self.patch_size

    @property
    def seq_len(self) -> int:
        """Tokens L of an image."""
        return self.grid_size**2

    @property
    def token_dim(self) -> int:
        """Channels C of a token."""
        return self.vae_embed_dim * self.patch_size**2

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Parts of :data:`CHECKPOINTED` whose blocks are recomputed in the backward pass."""
        if self.grad_checkpointing is True:
            return CHECKPOINTED
        return tuple(self.grad_checkpointing or ())


@dataclass
class Metadata:
    """Entries of a checkpoint's ``config`` that describe a model and are no arguments of it."""

    # fmt: off
    model: str = entry(
        "tokenbridge_large", "size of the model", "--model", adopted_in=EXCEPT_RESUME,
    )
    latent_factor: float = entry(
        KL16_LATENT_FACTOR, "factor that scales the tokenizer's latents",
        set_by="--vae_path", published=KL16_LATENT_FACTOR, unlike_published="warn",
    )
    class_names: Sequence[str] | None = entry(
        None, "names of the classes, in the order of their labels",
    )
    vae_sha256: str | None = entry(None, "SHA-256 of the tokenizer's weights")
    # fmt: on


def entries(config: type) -> dict[str, Entry]:
    """Return the rules of the fields of a dataclass by their names."""
    return {each.name: each.metadata["entry"] for each in fields(config)}


#: Rules of the model's arguments that checkpoints store, and of everything in their ``config``.
MODEL_ENTRIES = {
    name: rules for name, rules in entries(ModelConfig).items() if name != "norm_layer"
}
ENTRIES = {**entries(Metadata), **MODEL_ENTRIES}

# --------------------------------------------------------------------------------------------------
# The order of channels.


def default_channel_order(vae_embed_dim: int, patch_size: int) -> list[int]:
    """Return the generation order of a token's channels where none is given.

    It is KL-16's if a token has the 16 channels of one latent position, else 0, 1, ...
    """
    if vae_embed_dim == len(KL16_CHANNEL_ORDER) and patch_size == 1:
        return list(KL16_CHANNEL_ORDER)
    return list(range(vae_embed_dim * patch_size**2))


def checked_order(order: Sequence[int], channels: int) -> list[int]:
    """Return ``order`` as a list of integers.

    Raises:
        ValueError: it is not a permutation of ``range(channels)``.
    """
    try:
        order = [operator.index(channel) for channel in order]
    except TypeError:
        order = []
    if sorted(order) != list(range(channels)):
        raise ValueError(
            f"channel_order must hold each of 0 to {channels - 1} once, got {order or 'no numbers'}"
        )
    return order
