"""Read and write tokenizer (VAE) files: weights, constructor arguments and latent factor."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.checkpoint.files import VAE_NAMES, config_beside, read_checkpoint, save_folder
from util.checkpoint.load import matching
from util.checkpoint.tiny_files import (
    DIFFUSERS_CLASS,
    DIFFUSERS_LAYERS,
    from_diffusers,
    locate_tokenizer,
    pair_of,
    read_pair,
    tiny_config,
)
from util.config import KL16_CONFIG, KL16_LATENT_FACTOR
from util.errors import UserError, reason, some
from util.files import written_whole


def find_vae(path: str | Path) -> Path:
    """Return the file of the tokenizer at ``path``: a file, a folder or an address on the Hub.

    Raises:
        UserError: the Hub does not have it, or the folder has several tokenizers, or weights of
            diffusers in another form than the one that can be read.
    """
    file = locate_tokenizer(path, VAE_NAMES)
    check_diffusers(file)
    return file


def read_vae(path: str | Path) -> tuple[Mapping[str, Any], dict[str, Any], float]:
    """Return the weights, constructor arguments and latent factor of a tokenizer file.

    Missing arguments and a missing latent factor are those of KL-16.

    Raises:
        UserError: see :func:`util.checkpoint.files.read_checkpoint`; or the file is not a
            tokenizer.
    """
    path = Path(path)
    if pair := pair_of(path):
        weights = read_pair(pair)
        return weights, *tokenizer_config(tiny_config(weights, path), path)
    content = read_checkpoint(path)
    config = content.get("config", config_beside(path) or {})
    weights = content.get("model", content.get("state_dict", content))
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"{path} is not a tokenizer: it has no weights under 'model'")
    if "class_emb.weight" in weights:
        raise UserError(f"{path} is a TokenBridge, not a tokenizer: pass it as --resume")
    if any(str(name).startswith(DIFFUSERS_LAYERS) for name in weights):
        weights = from_diffusers(weights)
        config = tiny_config(weights, path, config)
    if any(str(name).startswith("vae.") for name in weights):
        raise UserError(
            f"{path} is a training checkpoint of main_vae.py, not a tokenizer: use vae.ckpt, which "
            "main_vae.py writes at the end of the run"
        )
    return weights, *tokenizer_config(config, path)


def tokenizer_config(config: Any, path: str | Path) -> tuple[dict[str, Any], float]:
    """Return the constructor arguments and latent factor in ``config``, which ``path`` stores.

    Missing values are those of KL-16.

    Raises:
        UserError: a value has the wrong type or range.
    """
    stored = config if isinstance(config, Mapping) else {"vae": None}
    arguments = stored.get("vae", {})
    latent_factor = stored.get("latent_factor", KL16_LATENT_FACTOR)
    arguments = {**KL16_CONFIG, **arguments} if isinstance(arguments, Mapping) else {}
    multipliers = arguments.get("ch_mult")
    if not (
        isinstance(arguments.get("embed_dim"), int)
        and isinstance(multipliers, list)
        and 1 <= len(multipliers) <= 16
        and all(isinstance(multiplier, int) for multiplier in multipliers)
        and isinstance(arguments.get("deterministic", False), bool)
        and isinstance(latent_factor, float | int)
        and 0 < latent_factor < math.inf
    ):
        raise UserError(
            f"{path} does not describe a tokenizer that this code can build; it is damaged, or of "
            "another program"
        )
    return arguments, float(latent_factor)


def save_vae(path: str | Path, vae: nn.Module, latent_factor: float) -> None:
    """Write weights, constructor arguments and latent factor, in the format of :func:`read_vae`."""
    content = {
        "model": vae.state_dict(),
        "config": {"vae": vae.config, "latent_factor": latent_factor},
    }
    with written_whole(path) as file:
        torch.save(content, file)


def load_vae(vae: nn.Module, path: str | Path, weights: Mapping[str, Any] | None = None) -> None:
    """Load the weights of a tokenizer file into a tokenizer of the same sizes.

    Args:
        path: the file.
        weights: its weights, if they are already read.

    Raises:
        UserError: the file is missing or unreadable, or its weights do not fit.
    """
    weights = read_vae(path)[0] if weights is None else weights
    hint = "It is another tokenizer; a file without a configuration is read as KL-16"
    vae.load_state_dict(matching(weights, vae.state_dict(), path, hint))


def save_vae_folder(folder: str | Path, vae: nn.Module, latent_factor: float) -> None:
    """Write a tokenizer as ``model.safetensors`` and ``config.json``, for :func:`read_vae`.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    save_folder(folder, vae.state_dict(), {"vae": vae.config, "latent_factor": latent_factor})


# --------------------------------------------------------------------------------------------------
# Tokenizers of diffusers

#: The only weights of diffusers that are read.
DIFFUSERS_NAME = VAE_NAMES[-1]


def diffusers_class(file: Path) -> str | None:
    """Return the class in diffusers' ``config.json`` next to a tokenizer file; None without one."""
    config = config_beside(file)
    return config.get("_class_name") if isinstance(config, dict) else None


def is_diffusers(file: Path) -> bool:
    """Return whether a file is a tokenizer of diffusers, except tiny autoencoders.

    :func:`read_vae` reads tiny autoencoders without diffusers.
    """
    return diffusers_class(file) not in (None, DIFFUSERS_CLASS)


def check_diffusers(file: Path) -> None:
    """Raise UserError if the folder has weights of diffusers only in a form that is not read.

    Args:
        file: the file of the tokenizer, or the file name expected in its folder.
    """
    stem = Path(DIFFUSERS_NAME).stem
    if file.name == DIFFUSERS_NAME or (file.is_file() and not file.name.startswith(stem)):
        return
    if weights := sorted(path.name for path in file.parent.glob(f"{stem}*")):
        class_name = diffusers_class(file.with_name(DIFFUSERS_NAME)) or "AutoencoderKL"
        variant = ', variant="fp16"' if all(".fp16." in name for name in weights) else ""
        raise UserError(
            f"{file.parent} contains {some(weights)}; of diffusers' tokenizers only "
            f"{DIFFUSERS_NAME} is read: pass the folder if it has this file, or write it with "
            f'diffusers: {class_name}.from_pretrained("{file.parent}"{variant})'
            ".save_pretrained(another folder)"
        )


def read_diffusers(file: Path) -> nn.Module:
    """Return diffusers' ``AutoencoderKL`` with the weights in ``file``.

    Raises:
        UserError: diffusers is not installed; the weights or the ``config.json`` next to them are
            damaged or do not fit each other; or each latent channel has a scale of its own, which
            the quantizer does not support.
    """
    # diffusers would read DIFFUSERS_NAME instead of another file in the folder.
    if file.name != DIFFUSERS_NAME:
        raise UserError(
            f"{file}: of diffusers' tokenizers only {DIFFUSERS_NAME} is read; pass the folder"
        )
    try:
        from diffusers import AutoencoderKL  # an optional package
    except ModuleNotFoundError as error:
        raise UserError(
            f"{file} is a tokenizer of diffusers, which is not installed: pip install diffusers"
        ) from error
    try:
        vae, loaded = AutoencoderKL.from_pretrained(
            str(file.parent),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            torch_dtype=torch.float32,
        )
    except Exception as error:  # damaged files and impossible sizes fail in many ways
        raise UserError(f"diffusers cannot read {file} ({reason(error)})") from error
    problems = {
        "missing_keys": loaded.get("missing_keys"),
        "mismatched_keys": loaded.get("mismatched_keys"),
        "not finite": [
            name for name, value in vae.state_dict().items() if not value.isfinite().all()
        ],
    }
    problems = {kind: names for kind, names in problems.items() if names}
    if problems:
        raise UserError(f"{file} does not fit its config.json: {problems}")
    if vae.config.get("latents_mean") is not None or vae.config.get("latents_std") is not None:
        raise UserError(
            f"{file} scales each latent channel separately (latents_mean, latents_std), which is "
            "not supported"
        )
    return vae
