"""What describes a model, and who decides each fact: a flag, the checkpoint, the tokenizer, or a default.

:data:`FACTS` is the table of all facts, :func:`resolve` applies it. Published checkpoints hold weights alone; the table
tells what they are taken for.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from util.args import add_quantizer_args, add_vae_arg
from util.errors import UserError
from util.log import log, warn

# --------------------------------------------------------------------------------------------------------------------
# The published tokenizer, KL-16: assumed for files that do not describe theirs.

KL16_CONFIG = {"embed_dim": 16, "ch_mult": [1, 1, 2, 2, 4]}
KL16_LATENT_FACTOR = 0.2325
#: KL-16's channels by share of low-frequency energy, highest first (section 3.2 of the paper).
KL16_CHANNEL_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)


class TokenizerInfo(NamedTuple):
    """What a tokenizer, or a cache of its moments, tells of itself."""

    config: Mapping[str, Any]  # arguments of the tokenizer; `embed_dim` and `ch_mult` at least
    latent_factor: float  # what its latents are multiplied by
    source: str | Path  # the tokenizer's file or the cache's folder, for messages
    sha256: str | None = (
        None  # of its weights (util.checksums.fingerprint); None for caches that store none
    )

    @property
    def stride(self) -> int:
        """Pixels that a latent position covers, each way."""
        return 2 ** (len(self.config["ch_mult"]) - 1)

    @property
    def is_kl16(self) -> bool:
        """Whether the latents are those of the published tokenizer."""
        same = all(self.config[name] == value for name, value in KL16_CONFIG.items())
        return same and self.same_factor(KL16_LATENT_FACTOR)

    def same_factor(self, latent_factor: float) -> bool:
        """Whether ``latent_factor`` is this tokenizer's, but for rounding."""
        return math.isclose(self.latent_factor, latent_factor, rel_tol=1e-6)

    def same_weights(self, sha256: str | None) -> bool:
        """Return whether ``sha256`` is that of this tokenizer's weights, or either is unknown."""
        return sha256 is None or self.sha256 is None or sha256 == self.sha256


# --------------------------------------------------------------------------------------------------------------------
# The table.

#: What a run does with the checkpoint that it starts from.
FRESH, RESUME, EVALUATE, FINETUNE = "fresh", "resume", "evaluate", "finetune"
ALWAYS = (RESUME, EVALUATE, FINETUNE)
SIZES_MAY_DIFFER = (EVALUATE, FINETUNE)


class Fact(NamedTuple):
    """A row of :data:`FACTS`."""

    name: str  # the entry of a checkpoint's `config`, and the argument of TokenBridge
    flags: str  # the flags that set it, the first one directly; empty if none does
    adopted_in: Sequence[
        str
    ] = ()  # uses of a checkpoint in which its value replaces a flag's default
    published: Any = None  # the value of published checkpoints, which store none; None where weights' shapes tell it
    unlike_published: str = (
        ""  # "refuse" or "warn" where a run uses such a checkpoint with another value
    )
    compared: bool = (
        True  # whether a run that resumes or evaluates a checkpoint must have its value
    )


FACTS = (
    #    name                  flags                   adopted           published             unlike_published
    Fact("model",              "--model",              SIZES_MAY_DIFFER),
    Fact("img_size",           "--img_size",           (EVALUATE,)),
    Fact("vae_stride",         "--vae_stride",         (),               16,                   "warn"),
    Fact("vae_embed_dim",      "--vae_embed_dim",      (),               16,                   "warn"),
    Fact("latent_factor",      "--vae_path",           (),               KL16_LATENT_FACTOR,   "warn"),
    Fact("patch_size",         "--patch_size",         (EVALUATE,),      1,                    "warn"),
    Fact("class_num",          "--class_num",          (EVALUATE,)),
    Fact("buffer_size",        "--buffer_size",        SIZES_MAY_DIFFER),
    Fact("quantizer",          "--quantizer",          ALWAYS,           "gaussian",           "refuse"),
    Fact("quant_levels",       "--quant_bits",         SIZES_MAY_DIFFER),
    Fact("quant_min",          "--quant_min",          SIZES_MAY_DIFFER, -5.0,                 "warn"),
    Fact("quant_max",          "--quant_max",          SIZES_MAY_DIFFER, 5.0,                  "warn"),
    Fact("std_range",          "",                     ALWAYS,           3.0,                  "warn"),
    Fact("channel_mean",       "--quant_calibrate",    ALWAYS),
    Fact("channel_std",        "--quant_calibrate",    ALWAYS),
    Fact("head",               "--head",               ALWAYS,           "ar",                 "refuse"),
    Fact("channels_per_group", "--channels_per_group", ALWAYS,           1,                    "refuse"),
    Fact("channel_order",      "--channel_order",      ALWAYS,           KL16_CHANNEL_ORDER,   "refuse"),
    Fact("channel_embed_dim",  "--head_dim, --model",  ALWAYS),
    Fact("channel_depth",      "--head_depth, --model", ALWAYS),
    Fact("channel_heads",      "--head_heads, --model", ALWAYS),
    # The run's own business, whatever the checkpoint was trained with.
    Fact("mask_ratio_min",     "--mask_ratio_min",     compared=False),
    Fact("label_drop_prob",    "--label_drop_prob",    compared=False),
    Fact("attn_dropout",       "--attn_dropout",       compared=False),
    Fact("proj_dropout",       "--proj_dropout",       compared=False),
    Fact("grad_checkpointing", "--grad_checkpointing", compared=False),
)  # fmt: skip


def add_model_args(
    parser: argparse.ArgumentParser,
    models: Sequence[str],
    quantizers: Sequence[str],
    checkpointed: Sequence[str],
) -> None:
    """Adds the model's flags, with the values of ``--model``, ``--quantizer`` and ``--checkpoint_blocks``."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", choices=models, default="tokenbridge_large", help="size of the transformer"
    )
    model.add_argument(
        "--img_size", type=int, default=256, help="height and width of the images in pixels"
    )
    add_vae_arg(model)
    told = "a file that tells its own wins"
    model.add_argument("--vae_embed_dim", type=int, default=16, help=f"latent channels; {told}")
    model.add_argument("--vae_stride", type=int, default=16, help=f"pixels a latent covers; {told}")
    model.add_argument(
        "--patch_size", type=int, default=1, help="latent positions a token covers, each way"
    )
    model.add_argument(
        "--buffer_size", type=int, default=64, help="positions that hold the class embedding"
    )
    model.add_argument("--class_num", type=int, default=1000, help="classes of the data")
    model.add_argument(
        "--attn_dropout", type=float, default=0.1, help="of attention weights, 0 to 1"
    )
    model.add_argument(
        "--proj_dropout", type=float, default=0.1, help="of the blocks' outputs, 0 to 1"
    )
    model.add_argument(
        "--label_drop_prob", type=float, default=0.1, help="for classifier-free guidance"
    )
    model.add_argument(
        "--mask_ratio_min", type=float, default=0.7, help="lower end of the mask ratios"
    )
    model.add_argument(
        "--grad_checkpointing", action="store_true", help="recompute blocks to save memory"
    )
    model.add_argument(
        "--checkpoint_blocks",
        nargs="+",
        choices=checkpointed,
        help="which of them --grad_checkpointing recomputes; by default all",
    )
    model.add_argument("--quant_bits", type=int, default=6, help="2^bits levels a channel")
    model.add_argument("--quant_min", type=float, default=-5.0, help="lower bound of the latents")
    model.add_argument("--quant_max", type=float, default=5.0, help="upper bound of the latents")
    # What follows is by default as in the checkpoint, if there is one, and else the paper's final configuration.
    add_quantizer_args(model, quantizers, default=None)
    text = "channels one after the other, independently, or in --head_steps steps (not the paper's)"
    model.add_argument("--head", choices=["ar", "parallel", "masked"], help=text)
    model.add_argument(
        "--channel_order",
        help="order of predictions: frequency (KL-16's), sequential, 8,1,10,..., or a file of tools.channel_order",
    )
    model.add_argument(
        "--channels_per_group", type=int, help="channels predicted jointly, levels^group classes"
    )
    model.add_argument("--head_dim", type=int, help="width of the head; by default the model's")
    model.add_argument("--head_depth", type=int, help="blocks of the head; by default the model's")
    model.add_argument(
        "--head_heads",
        type=int,
        help="attention heads of the head (the masked one has none); by default the model's",
    )


# --------------------------------------------------------------------------------------------------------------------
# Who decides.


@dataclass
class Start:
    """The checkpoint that a run starts from."""

    use: str = FRESH  # FRESH, RESUME, EVALUATE or FINETUNE
    content: dict[str, Any] = field(default_factory=dict)  # what the file holds
    path: Path | None = None  # the file; None for a fresh start
    #: The model's arguments and metadata; empty for published checkpoints that are resumed or evaluated.
    config: Mapping[str, Any] = field(default_factory=dict)


def resolve(
    args: argparse.Namespace,
    defaults: argparse.Namespace,
    sizes: Mapping[str, Mapping[str, int]],
    masked_sizes: Mapping[str, Mapping[str, int]],
    tokenizer: TokenizerInfo,
    start: Start,
) -> dict[str, Any]:
    """Every argument that builds the run's TokenBridge.

    In a fresh or fine-tuned run a typed flag decides; in one that resumes or evaluates a checkpoint it must agree with
    the checkpoint. A flag at its default, typed or not, gives way to the checkpoint where :data:`FACTS` says so; the
    flags that have a default are then set in ``args``, and logged. The tokenizer decides on its own sizes.

    Args:
        args: the flags as typed.
        defaults: the flags of an empty command line.
        sizes, masked_sizes: constructor arguments of each ``--model``, the latter with ``--head masked``.

    Raises:
        UserError: flags and checkpoint, or flags and tokenizer, do not go together; all differences are listed.
    """
    set_flags(args, defaults, sizes, start)
    follow_tokenizer(args, defaults, tokenizer)
    told = checkpoint_values(args, tokenizer, start)
    size = (masked_sizes if (args.head or told.get("head")) == "masked" else sizes)[args.model]
    # KL-16's order of channels is for KL-16's latents, and for those of a checkpoint that the run goes on with: if it
    # stores no order, it is taken for a published one.
    same_latents = tokenizer.is_kl16 or start.use in (RESUME, EVALUATE) or "channel_order" in told
    known_order = same_latents and (args.vae_embed_dim, args.patch_size) == (
        len(KL16_CHANNEL_ORDER),
        1,
    )
    config: dict[str, Any] = dict(size)
    for fact in FACTS[1:]:
        values = (
            typed_value(args, fact, known_order),
            told.get(fact.name),
            size.get(fact.name, fact.published),
        )
        config[fact.name] = next((value for value in values if value is not None), None)
    if config["channel_order"] is KL16_CHANNEL_ORDER and not known_order:
        config["channel_order"] = range(args.vae_embed_dim * args.patch_size**2)
    if isinstance(config["channel_order"], tuple | range):
        config["channel_order"] = list(config["channel_order"])
    if start.use in (RESUME, EVALUATE):
        here = {**config, "model": args.model, "latent_factor": tokenizer.latent_factor}
        check_config(start.config, here, start.path, calibrate=args.quant_calibrate)
        check_tokenizer(start.config, tokenizer, start.path)
    return {name: value for name, value in config.items() if name != "latent_factor"}


def set_flags(
    args: argparse.Namespace, defaults: argparse.Namespace, sizes: Mapping[str, Any], start: Start
) -> None:
    """Sets flags at their defaults to the checkpoint's values, where :data:`FACTS` says that these are adopted."""
    # A fine-tuned run that is restarted by its own command keeps what it adopted at first.
    uses = (start.use, FINETUNE) if start.use == RESUME and args.finetune else (start.use,)
    for fact in FACTS:
        flag, told = first_flag(fact), start.config.get(fact.name)
        if fact.name == "quant_levels" and isinstance(told, int):
            told = told.bit_length() - 1
        default = getattr(defaults, flag, None)
        open_flag = (
            default is not None
            and set(uses) & set(fact.adopted_in)
            and isinstance(told, type(default))
        )
        if (
            open_flag
            and getattr(args, flag) == default != told
            and (fact.name != "model" or told in sizes)
        ):
            setattr(args, flag, told)
            log.info("--%s %s, as the weights tell", flag, told)


def follow_tokenizer(
    args: argparse.Namespace, defaults: argparse.Namespace, tokenizer: TokenizerInfo
) -> None:
    """Sets ``--vae_embed_dim`` and ``--vae_stride`` to the tokenizer's.

    Raises:
        UserError: one of these flags was set to something else, or the image is no multiple of the stride.
    """
    for name, told in {
        "vae_embed_dim": tokenizer.config["embed_dim"],
        "vae_stride": tokenizer.stride,
    }.items():
        if getattr(args, name, told) not in (getattr(defaults, name, told), told):
            wrong = f"--{name} {getattr(args, name)}, but {tokenizer.source} has {told}"
            raise UserError(f"{wrong}; leave the flag out or pass {told}")
        setattr(args, name, told)
    check_stride(args.img_size, tokenizer.stride * getattr(args, "patch_size", 1))


def check_stride(img_size: int, stride: int) -> None:
    """Raises UserError unless ``stride`` divides the image size."""
    if img_size % stride:
        raise UserError(
            f"--img_size {img_size} is not a multiple of the tokenizer's stride, {stride}"
        )


def checkpoint_values(
    args: argparse.Namespace, tokenizer: TokenizerInfo, start: Start
) -> dict[str, Any]:
    """Arguments of the model that the run takes from its checkpoint where flags leave them open.

    In fine-tuning, the order of channels is taken only where a token has the same channels, the quantizer's calibration
    only for the same tokenizer, unless it is to be measured, and the number of the head's blocks only for such blocks.
    """
    stored = start.config
    told = {
        fact.name: stored[fact.name]
        for fact in FACTS
        if start.use in fact.adopted_in and fact.name in stored
    }
    if start.use != FINETUNE:
        return told
    sizes = {name: getattr(args, name) for name in ("vae_embed_dim", "patch_size")}
    same_channels = len(told.get("channel_order", ())) == args.vae_embed_dim * args.patch_size**2
    same_channels &= all(stored.get(name, size) == size for name, size in sizes.items())
    same_latents = same_channels and tokenizer.same_factor(
        stored.get("latent_factor", tokenizer.latent_factor)
    )
    same_latents &= tokenizer.same_weights(stored.get("vae_sha256"))
    unfit = [] if same_channels else ["channel_order"]
    there = told.get("head", "ar")
    if ((args.head or there) == "masked") != (there == "masked"):
        unfit.append("channel_depth")  # of blocks of another kind
    if args.quant_calibrate or not same_latents:
        unfit += ["channel_mean", "channel_std"]
    return {name: value for name, value in told.items() if name not in unfit}


def first_flag(fact: Fact) -> str:
    """The name that argparse stores the fact's own flag under."""
    return fact.flags.split(",")[0].lstrip("-")


def typed_value(args: argparse.Namespace, fact: Fact, known_order: bool) -> Any:
    """The value that the flags give ``fact``; None if they leave it open, or if no flag holds the value itself."""
    if fact.name == "channel_order":
        return None if args.channel_order is None else read_channel_order(args, known_order)
    if fact.name == "grad_checkpointing":
        return args.checkpoint_blocks or args.grad_checkpointing
    if fact.name in ("latent_factor", "std_range", "channel_mean", "channel_std"):
        return None
    value = getattr(args, first_flag(fact))
    return 2**value if fact.name == "quant_levels" else value


def read_channel_order(args: argparse.Namespace, known_order: bool) -> list[int]:
    """The order that ``--channel_order`` asks for.

    Raises:
        UserError: it is no permutation of a token's channels, or ``frequency`` for latents other than KL-16's.
    """
    text, channels = args.channel_order, args.vae_embed_dim * args.patch_size**2
    if text == "sequential":
        return list(range(channels))
    if text == "frequency":
        if not known_order:
            raise UserError(
                "--channel_order frequency is known for the published KL-16 tokenizer and --patch_size 1 only: measure "
                "this one's with tools.channel_order, and pass the file that it writes"
            )
        return list(KL16_CHANNEL_ORDER)
    try:
        order = (
            json.loads(Path(text).read_text())["order"]
            if text.endswith(".json")
            else text.split(",")
        )
        order = [int(channel) for channel in order]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--channel_order {text}: neither frequency, sequential, numbers between commas, nor a file of "
            f"tools.channel_order ({str(error) or type(error).__name__})"
        ) from error
    if sorted(order) != list(range(channels)):
        raise UserError(f"--channel_order {text}: it must hold each of 0 to {channels - 1} once")
    return order


# --------------------------------------------------------------------------------------------------------------------
# Comparing a checkpoint with the model at hand.


def check_config(
    stored: Mapping[str, Any],
    here: Mapping[str, Any],
    path: str | Path | None,
    calibrate: bool = False,
) -> None:
    """Compares a checkpoint with the model at hand; warns where a published one is used otherwise than published.

    Args:
        stored: the checkpoint's ``config``; empty for a published one.
        here: the model's ``config``, with ``latent_factor``.
        path: the checkpoint, for messages.
        calibrate: whether ``--quant_calibrate`` was passed.

    Raises:
        UserError: they differ; every difference is listed with both sides.
    """
    if not stored:
        other = ", ".join(
            f"{fact.name} {fact.published}, not {here[fact.name]}"
            for fact in FACTS
            if fact.unlike_published == "warn" and here.get(fact.name) not in (fact.published, None)
        )
        if other:
            warn("%s does not describe itself; published models have %s", path, other)
    # Checkpoints without these entries are older than the choice.
    same_channels = len(here["channel_order"]) == len(KL16_CHANNEL_ORDER)
    assumed = {fact.name: fact.published for fact in FACTS if fact.unlike_published == "refuse"}
    assumed["channel_order"] = list(KL16_CHANNEL_ORDER) if same_channels else here["channel_order"]
    told = assumed | dict(stored)
    differences = [
        f"{fact.name} is {told[fact.name]} there, {here[fact.name]} here ({fact.flags or 'no flag sets it'})"
        for fact in FACTS
        if fact.compared
        and fact.name in told
        and fact.name in here
        and differ(told[fact.name], here[fact.name])
    ]
    if calibrate and stored.get("channel_mean") is None:
        differences.append("without calibration there, with --quant_calibrate here")
    if differences:
        raise UserError(f"{path} was trained differently: {'; '.join(differences)}")


def check_tokenizer(
    stored: Mapping[str, Any], tokenizer: TokenizerInfo, path: str | Path | None
) -> None:
    """Raise UserError if the checkpoint ``path``, of config ``stored``, was trained with a tokenizer of other weights.

    Published and older checkpoints, and caches that store no hash of their tokenizer's weights, cannot be compared.
    """
    trained = stored.get("vae_sha256")
    if not tokenizer.same_weights(trained):
        raise UserError(
            f"{path} was trained with another tokenizer than {tokenizer.source}: the SHA-256 of their weights is "
            f"{str(trained)[:12]} there, {str(tokenizer.sha256)[:12]} here; name the tokenizer, or the cache, that it "
            "was trained with (--vae_path, --cached_path)"
        )


def differ(there: Any, here: Any) -> bool:
    """Whether two values of a fact differ, but for the rounding of numbers."""
    if isinstance(there, float) and isinstance(here, float):
        return abs(there - here) > 1e-6
    return there != here
