"""Checkpoints: data that is read as data, checked against the model, and written whole."""

import argparse
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.errors import UserError
from util.files import written_whole
from util.misc import log

CHECKPOINT_NAME = "checkpoint-last.pth"

#: What the published VAE is, for files that say nothing of themselves.
KL16_CONFIG = {"embed_dim": 16, "ch_mult": [1, 1, 2, 2, 4]}
KL16_LATENT_FACTOR = 0.2325

# --------------------------------------------------------------------------------------------------------------------
# Reading.


def read(path: str | Path) -> dict[str, Any]:
    """The dictionary in a ``torch.save`` file, on the CPU, read as data (``weights_only=True``).

    Published files may hold the run's ``argparse.Namespace``: that one class is allowed by name.

    Raises:
        UserError: there is no such file, it is damaged, holds something else, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; check the path, or see the README for where to fetch it")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, only what is used is read; the format of old files does not allow it.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or holds more than data and was not loaded, since it could run code"
        ) from error
    except Exception as error:  # zip, tensor and unpickler errors have no common class
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); it is damaged or no checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint's dictionary")
    return content


def matching(
    weights: Mapping[str, Any], expected: Mapping[str, Tensor], path: str | Path, hint: str
) -> dict[str, Tensor]:
    """The entries of ``weights`` that ``expected`` names; others are named in the log and left out.

    Raises:
        UserError: an entry is missing or has another shape: all of them listed, ``hint`` says where to look.
    """
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    other = [
        f"{name} {list(getattr(weights[name], 'shape', ['no tensor']))} (expected {list(value.shape)})"
        for name, value in expected.items()
        if name in weights and getattr(weights[name], "shape", None) != value.shape
    ]

    def some(names: list[str]) -> str:
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    if missing or other:
        problems = [f"missing: {some(missing)}"] * bool(missing) + [f"of another shape: {some(other)}"] * bool(other)
        problems += [f"unexpected: {some(unexpected)}"] * bool(unexpected)
        raise UserError(f"{path} does not fit: {'; '.join(problems)}. {hint}")
    if unexpected:
        log.warning("%s: ignored %d entries that the model does not have: %s", path, len(unexpected), some(unexpected))
    return {name: weights[name] for name in expected}


# --------------------------------------------------------------------------------------------------------------------
# The tokenizer.


def read_vae(path: str | Path) -> tuple[Mapping[str, Any], dict[str, Any], float]:
    """Weights, constructor arguments and latent factor of the tokenizer in ``path``; without them, KL-16's.

    Raises:
        UserError: see :func:`read`; or the file holds no weights.
    """
    content = read(path)
    config = content.get("config", {})
    weights = content.get("model", content.get("state_dict", content))
    if not isinstance(weights, Mapping) or not isinstance(config, Mapping) or not weights:
        raise UserError(f"{path} holds no tokenizer: expected its weights under 'model'")
    return weights, {**KL16_CONFIG, **config.get("vae", {})}, float(config.get("latent_factor", KL16_LATENT_FACTOR))


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
}
#: What published checkpoints do not say of themselves.
PUBLISHED = {
    "vae_embed_dim": 16,
    "vae_stride": 16,
    "patch_size": 1,
    "quant_min": -5.0,
    "quant_max": 5.0,
    "std_range": 3.0,
    "latent_factor": KL16_LATENT_FACTOR,
}
SHAPE_HINT = "Check --model, --quant_bits, --class_num, --img_size, --patch_size and --buffer_size"


def older(path: Path) -> list[Path]:
    """The checkpoints that were kept when ``path`` took their place, the newest first."""
    kept = path.parent.glob(f"{path.stem}.*{path.suffix}")
    numbered = [(int(old.stem.rsplit(".", 1)[1]), old) for old in kept if old.stem.rsplit(".", 1)[1].isdigit()]
    return [old for _, old in sorted(numbered)]


def find(resume: str | Path) -> Path:
    """The checkpoint in folder ``resume``, or ``resume`` itself if it is a file.

    Raises:
        UserError: there is none.
    """
    path = Path(resume)
    path = path / CHECKPOINT_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no {CHECKPOINT_NAME} in {resume}; --resume takes the folder that holds it")
    return path


def read_newest_whole(path: Path) -> tuple[dict[str, Any], Path]:
    """The checkpoint at ``path`` or, with a warning, the newest one kept before it that can be read; and which.

    Raises:
        UserError: none of them can be read; the message is of ``path``.
    """
    try:
        return read(path), path
    except UserError as error:
        for old in older(path):
            try:
                content = read(old)
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
    differences = [
        f"{name} is {config[name]} there, {model.config[name]} here ({flag})"
        for name, flag in MEANING.items()
        if name in config and config[name] != model.config[name]
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
        f"{name} {value}, not {here[name]}" for name, value in PUBLISHED.items() if here[name] not in (value, None)
    ]
    if other:
        log.warning("%s does not describe itself; published models have %s", path, ", ".join(other))


def load_weights(model: nn.Module, content: Mapping[str, Any], path: str | Path, ema: bool) -> None:
    """Loads a checkpoint's EMA (or plain) weights into ``model``, and the quantizer's tables where it has them.

    Raises:
        UserError: it has none, or they do not fit.
    """
    key = "model_ema" if ema else "model"
    weights, plain = content.get(key), content.get("model")
    if not isinstance(weights, Mapping):
        raise UserError(f"{path} has no weights under '{key}'")
    expected = model.state_dict()
    if ema:  # averages are of learned entries only; the tables lie with the plain weights
        tables = set(expected) - {name for name, _ in model.named_parameters()}
        plain = plain if isinstance(plain, Mapping) else {}
        weights = {**weights, **{name: plain.get(name, expected[name]) for name in tables}}
    model.load_state_dict(matching(weights, expected, path, SHAPE_HINT))


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
