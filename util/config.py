"""Resolve a run's model configuration from flags, checkpoint, tokenizer and defaults.

:func:`resolve` applies the rules that :mod:`util.model_config` states for each entry. Published
checkpoints hold weights alone; those rules also say which values are assumed for them.
"""

import argparse
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from util.args import is_typed
from util.errors import UserError
from util.log import log, warn
from util.model_config import (
    ENTRIES,
    EVALUATE,
    FINETUNE,
    FRESH,
    KL16_CHANNEL_ORDER,
    KL16_CONFIG,
    KL16_LATENT_FACTOR,
    MODEL_ENTRIES,
    RESUME,
    Metadata,
    ModelConfig,
)
from util.options import field_of

#: Returns the arguments of a model of a size and a head: ``sizes_of(args.model, head)``.
SizesOf = Callable[[str, str], Mapping[str, int]]

# --------------------------------------------------------------------------------------------------
# The tokenizer.


class TokenizerInfo(NamedTuple):
    """Description of a tokenizer, or of a cache of its moments."""

    #: Arguments of the tokenizer: `embed_dim`, `ch_mult`, and `deterministic` without a variance.
    config: Mapping[str, Any]
    latent_factor: float  # factor that scales its latents
    source: str | Path  # the tokenizer's file or the cache's folder, for messages
    sha256: str | None = None  # hash of its weights; None for caches that store none

    @property
    def stride(self) -> int:
        """Pixels per latent position, each way."""
        return 2 ** (len(self.config["ch_mult"]) - 1)

    @property
    def deterministic(self) -> bool:
        """Whether the latents have no variance, so that moments are only means."""
        return self.config.get("deterministic", False)

    def moments_shape(self, img_size: int) -> tuple[int, int, int]:
        """Return the shape of the moments of an image of ``img_size`` pixels each way."""
        channels, side = self.config["embed_dim"], img_size // self.stride
        return (channels if self.deterministic else 2 * channels), side, side

    @property
    def is_kl16(self) -> bool:
        """Whether the latents are those of the published tokenizer."""
        same = all(self.config[name] == value for name, value in KL16_CONFIG.items())
        return same and self.same_factor(KL16_LATENT_FACTOR)

    def same_factor(self, latent_factor: float) -> bool:
        """Return whether ``latent_factor`` is this tokenizer's, up to rounding."""
        return math.isclose(self.latent_factor, latent_factor, rel_tol=1e-6)

    def same_weights(self, sha256: str | None) -> bool:
        """Return whether ``sha256`` is that of this tokenizer's weights, or either is unknown."""
        return sha256 is None or self.sha256 is None or sha256 == self.sha256


# --------------------------------------------------------------------------------------------------
# What decides each entry.


@dataclass
class Start:
    """The checkpoint that a run starts from."""

    use: str = FRESH  # FRESH, RESUME, EVALUATE or FINETUNE
    content: dict[str, Any] = field(default_factory=dict)  # content of the file
    path: Path | None = None  # the file; None for a fresh start
    #: The ``config`` in the file; empty for published checkpoints that are resumed or evaluated.
    config: Mapping[str, Any] = field(default_factory=dict)


def resolve(
    args: argparse.Namespace,
    defaults: argparse.Namespace,
    models: Collection[str],
    sizes_of: SizesOf,
    tokenizer: TokenizerInfo,
    start: Start,
) -> dict[str, Any]:
    """Return all arguments of the run's TokenBridge.

    In a fresh or fine-tuned run, a typed flag decides. In a run that resumes or evaluates a
    checkpoint, typed flags must agree with the checkpoint. A flag that is not typed gives way to
    the checkpoint for entries that are adopted (``adopted_in``); these flags are then set in
    ``args`` and logged. The tokenizer decides its own sizes.

    Args:
        args: parsed flags.
        defaults: flags of an empty command line.
        models: values of ``--model``.
        sizes_of: see :data:`SizesOf`.

    Raises:
        UserError: flags contradict the checkpoint or the tokenizer; all differences are listed.
    """
    set_flags(args, defaults, models, start)
    follow_tokenizer(args, defaults, tokenizer)
    adopted = adopted_values(args, sizes_of, tokenizer, start)
    sizes = sizes_of(args.model, args.head or adopted.get("head", ModelConfig.head))
    # KL-16's order of channels is for KL-16's latents, and for those of a checkpoint that the run
    # resumes or evaluates: if it stores no order, it is taken for a published one.
    same_latents = tokenizer.is_kl16 or start.use in (RESUME, EVALUATE)
    same_latents |= "channel_order" in adopted
    same_channels = (args.vae_embed_dim, args.patch_size) == (len(KL16_CHANNEL_ORDER), 1)
    known_order = same_latents and same_channels
    config = {name: getattr(ModelConfig, name) for name in MODEL_ENTRIES}  # the defaults
    channels = args.vae_embed_dim * args.patch_size**2
    config["channel_order"] = list(KL16_CHANNEL_ORDER if known_order else range(channels))
    typed = {name: typed_value(args, name, known_order) for name in MODEL_ENTRIES}
    for values in (sizes, adopted, typed):  # later ones override
        config |= {
            name: value
            for name, value in values.items()
            if name in MODEL_ENTRIES and value is not None
        }
    if start.use in (RESUME, EVALUATE):
        of_run = {**config, "model": args.model, "latent_factor": tokenizer.latent_factor}
        check_config(start.config, of_run, start.path, calibrate=args.quant_calibrate)
        check_tokenizer(start.config, tokenizer, start.path)
    return config


def set_flags(
    args: argparse.Namespace, defaults: argparse.Namespace, models: Collection[str], start: Start
) -> None:
    """Set flags at their defaults to the checkpoint's values, for entries that are adopted."""
    # A fine-tuned run that is restarted by its own command keeps what it adopted at first.
    uses = {start.use, FINETUNE} if start.use == RESUME and args.finetune else {start.use}
    for config in (Metadata, ModelConfig):
        for each in fields(config):
            flag, rules = each.metadata["flag"].lstrip("-"), each.metadata["entry"]
            default, value = getattr(defaults, flag, None), start.config.get(each.name)
            if (
                default is None
                or not uses & set(rules.adopted_in)
                or not isinstance(value, type(default))
            ):
                continue
            value = rules.to_flag(value)
            known = each.name != "model" or value in models
            if not is_typed(args, defaults, flag) and default != value and known:
                setattr(args, flag, value)
                log.info("--%s %s, from the checkpoint", flag, value)


def follow_tokenizer(
    args: argparse.Namespace, defaults: argparse.Namespace, tokenizer: TokenizerInfo
) -> None:
    """Set ``--vae_embed_dim`` and ``--vae_stride`` to the values of the tokenizer.

    Raises:
        UserError: one of these flags was set to another value, or the image is no multiple of the
            stride.
    """
    sizes = {"vae_embed_dim": tokenizer.config["embed_dim"], "vae_stride": tokenizer.stride}
    for name, value in sizes.items():
        if is_typed(args, defaults, name) and getattr(args, name) != value:
            wrong = f"--{name} {getattr(args, name)}, but {tokenizer.source} has {value}"
            raise UserError(f"{wrong}; remove the flag or pass {value}")
        setattr(args, name, value)
    check_stride(args.img_size, tokenizer.stride * getattr(args, "patch_size", 1))


def check_stride(img_size: int, stride: int) -> None:
    """Raise UserError unless ``stride`` divides the image size."""
    if img_size % stride:
        raise UserError(
            f"--img_size {img_size} is not a multiple of the tokenizer's stride, {stride}"
        )


def adopted_values(
    args: argparse.Namespace, sizes_of: SizesOf, tokenizer: TokenizerInfo, start: Start
) -> dict[str, Any]:
    """Return the entries that the run takes from its checkpoint unless a flag sets them.

    In fine-tuning, some are taken only if they still fit: the order of channels if a token has the
    same channels; the quantizer's calibration if the tokenizer is the same and it is not measured
    again; the number of the head's blocks if both heads have the same number by default.
    """
    stored = start.config
    adopted = {
        name: stored[name]
        for name, rules in ENTRIES.items()
        if start.use in rules.adopted_in and name in stored
    }
    if start.use != FINETUNE:
        return adopted
    sizes = {name: getattr(args, name) for name in ("vae_embed_dim", "patch_size")}
    same_channels = len(adopted.get("channel_order", ())) == args.vae_embed_dim * args.patch_size**2
    same_channels &= all(stored.get(name, size) == size for name, size in sizes.items())
    stored_factor = stored.get("latent_factor", tokenizer.latent_factor)
    same_latents = same_channels and tokenizer.same_factor(stored_factor)
    same_latents &= tokenizer.same_weights(stored.get("vae_sha256"))
    unfit = [] if same_channels else ["channel_order"]
    head = adopted.get("head", ModelConfig.head)
    depths = {sizes_of(args.model, each)["channel_depth"] for each in (head, args.head or head)}
    if len(depths) > 1:
        unfit.append("channel_depth")
    if args.quant_calibrate or not same_latents:
        unfit += ["channel_mean", "channel_std"]
    return {name: value for name, value in adopted.items() if name not in unfit}


def typed_value(args: argparse.Namespace, name: str, known_order: bool) -> Any:
    """Return the value that the flags give an entry of the model; None if they leave it open."""
    if name == "channel_order":
        return None if args.channel_order is None else read_channel_order(args, known_order)
    if name == "grad_checkpointing":
        return args.checkpoint_blocks or args.grad_checkpointing
    flag = field_of(ModelConfig, name).metadata["flag"].lstrip("-")
    value = getattr(args, flag) if flag else None
    return None if value is None else MODEL_ENTRIES[name].from_flag(value)


def read_channel_order(args: argparse.Namespace, known_order: bool) -> list[int]:
    """Return the order that ``--channel_order`` sets.

    Raises:
        UserError: it is no permutation of a token's channels, or ``frequency`` for latents other
            than KL-16's.
    """
    text, channels = args.channel_order, args.vae_embed_dim * args.patch_size**2
    if text == "sequential":
        return list(range(channels))
    if text == "frequency":
        if not known_order:
            raise UserError(
                "--channel_order frequency is known for the published KL-16 tokenizer and "
                "--patch_size 1 only: measure this one's with tools.channel_order, and pass the "
                "file that it writes"
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
            f"--channel_order {text}: neither frequency, sequential, numbers between commas, nor a "
            f"file of tools.channel_order ({str(error) or type(error).__name__})"
        ) from error
    if sorted(order) != list(range(channels)):
        raise UserError(f"--channel_order {text}: it must hold each of 0 to {channels - 1} once")
    return order


# --------------------------------------------------------------------------------------------------
# Comparing a checkpoint with the model of the run.


def check_config(
    stored: Mapping[str, Any],
    of_run: Mapping[str, Any],
    path: str | Path | None,
    calibrate: bool = False,
) -> None:
    """Check that a run's model is that of its checkpoint.

    Warn if a published checkpoint is used differently than published.

    Args:
        stored: the checkpoint's ``config``; empty for a published one.
        of_run: the ``config`` of the run's model, with ``latent_factor``.
        path: the checkpoint, for messages.
        calibrate: whether ``--quant_calibrate`` was passed.

    Raises:
        UserError: they differ; every difference is listed with both values.
    """
    if not stored:
        unlike = ", ".join(
            f"{name} {rules.published}, not {of_run[name]}"
            for name, rules in ENTRIES.items()
            if rules.unlike_published == "warn" and of_run.get(name) not in (rules.published, None)
        )
        if unlike:
            warn("%s stores no config; published models have %s", path, unlike)
    # Checkpoints without these entries were written before there was a choice.
    assumed = {
        n: rules.published for n, rules in ENTRIES.items() if rules.unlike_published == "refuse"
    }
    same_channels = len(of_run["channel_order"]) == len(KL16_CHANNEL_ORDER)
    assumed["channel_order"] = (
        list(KL16_CHANNEL_ORDER) if same_channels else of_run["channel_order"]
    )
    expected = assumed | dict(stored)
    differences = [
        f"{name} is {expected[name]} in the checkpoint, {of_run[name]} in this run "
        f"({rules.flags or 'no flag sets it'})"
        for name, rules in ENTRIES.items()
        if rules.compared
        and name in expected
        and name in of_run
        and differ(expected[name], of_run[name])
    ]
    if calibrate and stored.get("channel_mean") is None:
        differences.append("the checkpoint is not calibrated, but --quant_calibrate is set")
    if differences:
        raise UserError(f"{path} was trained differently: {'; '.join(differences)}")


def check_tokenizer(
    stored: Mapping[str, Any], tokenizer: TokenizerInfo, path: str | Path | None
) -> None:
    """Raise UserError if a checkpoint was trained with a tokenizer of other weights.

    Published and older checkpoints, and caches without the hash of their tokenizer, cannot be
    compared.

    Args:
        stored: the checkpoint's ``config``.
        tokenizer: the tokenizer of the run.
        path: the checkpoint, for messages.
    """
    trained, current = stored.get("vae_sha256"), tokenizer.sha256
    if not tokenizer.same_weights(trained):
        raise UserError(
            f"{path} was trained with another tokenizer than {tokenizer.source}: the SHA-256 of "
            f"the weights is {str(trained)[:12]} in the checkpoint, {str(current)[:12]} in "
            "this run; name the tokenizer, or the cache, that it was trained with (--vae_path, "
            "--cached_path)"
        )


def differ(stored: Any, of_run: Any) -> bool:
    """Return whether two values of an entry differ by more than the rounding of numbers."""
    if isinstance(stored, float) and isinstance(of_run, float):
        return abs(stored - of_run) > 1e-6
    return stored != of_run
