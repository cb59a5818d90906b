"""Checkpoints: data that is read as data, checked against the model, and written whole."""

import argparse
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.checkpoint import hub, safetensors_io
from util.config import KL16_CHANNEL_ORDER, KL16_CONFIG, KL16_LATENT_FACTOR
from util.errors import UserError, reason
from util.files import read_json, written_whole
from util.misc import log

CHECKPOINT_NAME = "checkpoint-last.pth"
SAFE_NAME = "checkpoint-last.safetensors"
#: A folder that ``save_pretrained`` wrote: weights, and beside them what they are of.
HUB_NAME, HUB_CONFIG = "model.safetensors", "config.json"
#: What a folder of a tokenizer may hold; the last is of diffusers.
VAE_NAMES = (HUB_NAME, "vae.ckpt", "kl16.ckpt", "diffusion_pytorch_model.safetensors")


# --------------------------------------------------------------------------------------------------------------------
# Reading.


def read(path: str | Path) -> dict[str, Any]:
    """The dictionary in a ``torch.save`` or safetensors file, on the CPU, read as data (``weights_only=True``).

    Published files may hold the run's ``argparse.Namespace``: that one class is allowed by name.

    Raises:
        UserError: there is no such file, it is damaged, holds something else, or would run code.
    """
    path = hub.local(path)
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}; check the path, or fetch the published one: python -m tools.download"
        )
    try:
        if path.suffix == safetensors_io.SUFFIX:
            content = safetensors_io.read(path)
            if not isinstance(content, dict):
                raise ValueError(f"a {type(content).__name__}, not a dictionary")
            return content
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, what is not used takes no memory; the format of old files allows neither that nor checksums.
            archive = zipfile.is_zipfile(path)
            if archive:
                compare_checksums(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or holds more than data and was not loaded, since it could run code"
        ) from error
    except Exception as error:  # zip, tensor and unpickler errors have no common class
        raise UserError(f"{path} cannot be read ({reason(error)}); it is damaged or no checkpoint") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint's dictionary")
    return content


def compare_checksums(path: Path) -> None:
    """Raises ValueError unless all records of the archive have the checksums they were written with.

    torch.load does not look at them.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its record {damaged} is wrong")


def located(path: str | Path | hub.Address, names: Sequence[str], **options) -> Path:
    """The first of ``names`` that is in folder ``path``, or ``path`` itself; fetched, with its config, from the Hub.

    Raises:
        UserError: the Hub does not have it, or cannot be reached.
    """
    if hub.is_address(path):
        found = hub.fetch(path, names, **options)
        if found.suffix == safetensors_io.SUFFIX:  # what describes itself may do without
            hub.fetch_beside(path, found, HUB_CONFIG, **options)
        return found
    path = Path(path)
    if not path.is_dir():
        return path
    return next((path / name for name in names if (path / name).is_file()), path / names[0])


def config_beside(path: Path) -> Any:
    """What ``config.json`` beside weights of another program's, or ``save_pretrained``'s, layout holds; else None.

    Raises:
        UserError: it is damaged.
    """
    beside = path.with_name(HUB_CONFIG)
    return read_json(beside) if path.suffix == safetensors_io.SUFFIX and beside.is_file() else None


# --------------------------------------------------------------------------------------------------------------------
# The tokenizer.


def read_vae(path: str | Path) -> tuple[Mapping[str, Any], dict[str, Any], float]:
    """Weights, constructor arguments and latent factor of the tokenizer in ``path``; without them, KL-16's.

    Raises:
        UserError: see :func:`read`; or the file holds no weights.
    """
    content = read(path)
    config = content.get("config", config_beside(Path(path)) or {})
    weights = content.get("model", content.get("state_dict", content))
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"{path} holds no tokenizer: expected its weights under 'model'")
    if "class_emb.weight" in weights:
        raise UserError(f"{path} is a TokenBridge, not a tokenizer: it goes with --resume")
    vae_config, latent_factor = tokenizer_of(config, path)
    return weights, vae_config, latent_factor


def tokenizer_of(config: Any, path: str | Path) -> tuple[dict[str, Any], float]:
    """Constructor arguments and latent factor that ``config``, read from ``path``, tells of a tokenizer; else KL-16's.

    Raises:
        UserError: it tells something that cannot be.
    """
    about = config if isinstance(config, Mapping) else {"vae": None}
    vae, latent_factor = about.get("vae", {}), about.get("latent_factor", KL16_LATENT_FACTOR)
    vae = {**KL16_CONFIG, **vae} if isinstance(vae, Mapping) else {}
    multipliers = vae.get("ch_mult")
    if not (
        isinstance(vae.get("embed_dim"), int)
        and isinstance(multipliers, list)
        and 1 <= len(multipliers) <= 16
        and all(isinstance(multiplier, int) for multiplier in multipliers)
        and isinstance(latent_factor, float | int)
        and 0 < latent_factor < math.inf
    ):
        raise UserError(f"{path} describes no tokenizer that this code can build; it is damaged, or of another program")
    return vae, float(latent_factor)


def save_vae(path: str | Path, vae: nn.Module, latent_factor: float) -> None:
    """Writes a tokenizer with what other scripts need to know of it."""
    with written_whole(path) as file:
        torch.save({"model": vae.state_dict(), "config": {"vae": vae.config, "latent_factor": latent_factor}}, file)


# --------------------------------------------------------------------------------------------------------------------
# TokenBridge.

#: Entries of ``config`` that must be the same for weights to mean the same, and the flags that set them.
MEANING = {
    "img_size": "--img_size",
    "vae_stride": "--vae_stride",
    "patch_size": "--patch_size",
    "vae_embed_dim": "--vae_embed_dim",
    "quant_levels": "--quant_bits",
    "quant_min": "--quant_min",
    "quant_max": "--quant_max",
    "class_num": "--class_num",
    "buffer_size": "--buffer_size",
    "head": "--head",
    "channels_per_group": "--channels_per_group",
    "channel_embed_dim": "--head_dim, --model",
    "channel_depth": "--head_depth, --model",
    "channel_heads": "--head_heads, --model",
    "channel_order": "--channel_order",
    "quantizer": "--quantizer",
}
#: Entries of ``config`` that a run takes over where its flags leave them open.
ADOPTED = (
    "head", "channels_per_group", "channel_embed_dim", "channel_depth", "channel_heads", "channel_order", "quantizer",
    "channel_mean", "channel_std", "std_range",
)  # fmt: skip
#: What published checkpoints do not say of themselves.
PUBLISHED = {
    "vae_embed_dim": 16,
    "vae_stride": 16,
    "patch_size": 1,
    "quant_min": -5.0,
    "quant_max": 5.0,
    "std_range": 3.0,
    "latent_factor": KL16_LATENT_FACTOR,
    "head": "ar",
    "channels_per_group": 1,
    "channel_order": list(KL16_CHANNEL_ORDER),
    "quantizer": "gaussian",
}
#: Of those, what weights do not fit otherwise, or would mean something else: differences are refused.
FIXED = ("head", "channels_per_group", "channel_order", "quantizer")


def older(path: Path) -> list[Path]:
    """The checkpoints that were kept when ``path`` took their place, the newest first."""
    kept = path.parent.glob(f"{path.stem}.*{path.suffix}")
    numbered = [(int(old.stem.rsplit(".", 1)[1]), old) for old in kept if old.stem.rsplit(".", 1)[1].isdigit()]
    return [old for _, old in sorted(numbered)]


def find(resume: str | Path | hub.Address, **options) -> Path:
    """The checkpoint in folder ``resume``, or ``resume`` itself if it is a file; either may be an address on the Hub.

    Args:
        options: see :func:`util.checkpoint.hub.fetch`.

    Raises:
        UserError: there is none.
    """
    path = located(resume, (CHECKPOINT_NAME, SAFE_NAME, HUB_NAME), **options)
    if not path.is_file():
        there = "in" if Path(resume).is_dir() else "at"
        raise UserError(f"no {CHECKPOINT_NAME} {there} {resume}; name the file, or the folder that holds it")
    return path


def plain(value: Any) -> bool:
    """Whether ``value`` is of the types that describe a model: numbers, strings, None, and lists of them."""
    return value is None or isinstance(value, int | float | str) or (isinstance(value, list) and all(map(plain, value)))


def read_run(path: str | Path) -> dict[str, Any]:
    """A TokenBridge's checkpoint: :func:`read`, with the types and ranges of its entries checked.

    Raises:
        UserError: see :func:`read`; or an entry cannot be what it should be.
    """
    return as_run(read(path), Path(path))


def as_run(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """:func:`read_run` of what :func:`read` gave."""
    if "config" not in content and (about := config_beside(path)):
        content |= {"config": about, "averaged": True}  # they were saved to be used
    if isinstance(content.get("config"), dict) and "vae" in content["config"]:
        raise UserError(f"{path} is a tokenizer, not a TokenBridge: it goes with --vae_path")
    steps = content.get("steps_per_epoch", 1)
    lowest = {"epoch": -1, "step": 0, "steps_per_epoch": 1, "world_size": 1}
    wrong = [
        name
        for name, least in lowest.items()
        if name in content and (type(content[name]) is not int or content[name] < least)
    ]
    if not wrong and content.get("step", 0) > steps:
        wrong.append("step")
    wrong += [name for name in ("optimizer", "scaler", "config") if not isinstance(content.get(name, {}), dict)]
    if "config" not in wrong:
        config = content.get("config", {})
        wrong += [f"config.{name}" for name, value in config.items() if not isinstance(name, str) or not plain(value)]
        if not isinstance(config.get("latent_factor", 1.0), float | int):
            wrong.append("config.latent_factor")
    if wrong:
        raise UserError(f"{path} is damaged, or of another program: it cannot have such entries as {', '.join(wrong)}")
    return content


def read_newest_whole(path: Path) -> tuple[dict[str, Any], Path]:
    """The checkpoint at ``path`` or, with a warning, the newest one kept before it that can be read; and which.

    Raises:
        UserError: none of them can be read; the message is of ``path``.
    """
    try:
        return read_run(path), path
    except UserError as error:
        for old in older(path):
            try:
                content = read_run(old)
            except UserError:
                continue
            log.warning("%s; continuing from the one before, %s", error, old)
            return content, old
        raise


def check_config(config: Mapping[str, Any], model: nn.Module, latent_factor: float | None, path: str | Path) -> None:
    """Compares what a checkpoint says of its model with the model at hand.

    Raises:
        UserError: they differ; both sides are named.
    """
    if not config:
        warn_if_not_published(model, latent_factor, path)
    # Files without these entries are of before there was a choice.
    same_channels = len(model.config["channel_order"]) == len(PUBLISHED["channel_order"])
    told = {name: PUBLISHED[name] for name in FIXED if name != "channel_order" or same_channels} | dict(config)
    differences = [
        f"{name} is {told[name]} there, {model.config[name]} here ({flag})"
        for name, flag in MEANING.items()
        if name in told and told[name] != model.config[name]
    ]
    if latent_factor is not None and abs(config.get("latent_factor", latent_factor) - latent_factor) > 1e-6:
        differences.append(
            f"latent_factor is {config['latent_factor']} there, {latent_factor} here (another tokenizer)"
        )
    if differences:
        raise UserError(f"{path} was trained differently: {'; '.join(differences)}")


def warn_if_not_published(model: nn.Module, latent_factor: float | None, path: str | Path) -> None:
    """Says where a file that tells nothing of itself, and so is taken for a published one, is used otherwise."""
    here = {**model.config, "latent_factor": latent_factor}
    other = [
        f"{name} {value}, not {here[name]}"
        for name, value in PUBLISHED.items()
        if name not in FIXED and here[name] not in (value, None)
    ]
    if other:
        log.warning("%s does not describe itself; published models have %s", path, ", ".join(other))


def save(path: str | Path, content: dict[str, Any], keep_last: int = 1) -> None:
    """Writes a checkpoint whole or not at all; ``keep_last - 1`` earlier ones stay beside it, numbered by age.

    At every moment ``path`` is a whole checkpoint, if there was one before.
    """
    path = Path(path)
    with written_whole(path) as file:
        torch.save(content, file)
        if path.exists() and keep_last > 1:
            names = [path, *(path.with_name(f"{path.stem}.{age}{path.suffix}") for age in range(1, keep_last))]
            for younger, elder in reversed(list(pairwise(names[1:]))):
                if younger.exists():
                    os.replace(younger, elder)
            names[1].unlink(missing_ok=True)
            try:
                os.link(path, names[1])  # a second name: the file is about to lose its first
            except OSError:  # not every file system has them
                shutil.copy2(path, names[1])
    for old in older(path)[keep_last - 1 :]:
        old.unlink()
