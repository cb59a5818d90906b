"""Read and write tokenizer (VAE) files: weights, constructor arguments and latent factor."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.checkpoint.files import config_beside, read_checkpoint
from util.config import KL16_CONFIG, KL16_LATENT_FACTOR
from util.errors import UserError
from util.files import written_whole


def read_vae(path: str | Path) -> tuple[Mapping[str, Any], dict[str, Any], float]:
    """Return the weights, constructor arguments and latent factor of a tokenizer file.

    Missing arguments and a missing latent factor are those of KL-16.

    Raises:
        UserError: see :func:`util.checkpoint.files.read_checkpoint`; or the file is not a
            tokenizer.
    """
    content = read_checkpoint(path)
    config = content.get("config", config_beside(Path(path)) or {})
    weights = content.get("model", content.get("state_dict", content))
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"{path} is not a tokenizer: it has no weights under 'model'")
    if "class_emb.weight" in weights:
        raise UserError(f"{path} is a TokenBridge, not a tokenizer: pass it as --resume")
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
