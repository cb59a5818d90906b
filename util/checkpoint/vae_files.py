"""Files of tokenizers (VAEs): weights, constructor arguments and latent factor."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.checkpoint import safetensors_io
from util.checkpoint.files import HUB_CONFIG, HUB_NAME, config_beside, read_checkpoint
from util.checkpoint.load import matching
from util.checkpoint.tiny_files import (
    DIFFUSERS_LAYERS,
    from_diffusers,
    pair_of,
    read_pair,
    tiny_config,
)
from util.config import KL16_CONFIG, KL16_LATENT_FACTOR
from util.errors import UserError
from util.files import write_json, written_whole


def read_vae(path: str | Path) -> tuple[Mapping[str, Any], dict[str, Any], float]:
    """Weights, constructor arguments and latent factor of the tokenizer in ``path``; the latter two KL-16's by default.

    Raises:
        UserError: see :func:`read`; or the file holds no tokenizer.
    """
    path = Path(path)
    if pair := pair_of(path):
        weights = read_pair(pair)
        return weights, *tokenizer_config(tiny_config(weights, path), path)
    content = read_checkpoint(path)
    config = content.get("config", config_beside(path) or {})
    weights = content.get("model", content.get("state_dict", content))
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"{path} holds no tokenizer: expected its weights under 'model'")
    if "class_emb.weight" in weights:
        raise UserError(f"{path} is a TokenBridge, not a tokenizer: it goes with --resume")
    if any(str(name).startswith(DIFFUSERS_LAYERS) for name in weights):
        weights = from_diffusers(weights)
        config = tiny_config(weights, path, config)
    if any(str(name).startswith("vae.") for name in weights):
        raise UserError(
            f"{path} is what main_vae.py goes on from; the tokenizer is vae.ckpt, which it writes at its end"
        )
    return weights, *tokenizer_config(config, path)


def tokenizer_config(config: Any, path: str | Path) -> tuple[dict[str, Any], float]:
    """Constructor arguments and latent factor in ``config``, read from ``path``; those that it lacks are KL-16's.

    Raises:
        UserError: no tokenizer can have such a configuration.
    """
    stored = config if isinstance(config, Mapping) else {"vae": None}
    vae, latent_factor = stored.get("vae", {}), stored.get("latent_factor", KL16_LATENT_FACTOR)
    vae = {**KL16_CONFIG, **vae} if isinstance(vae, Mapping) else {}
    multipliers = vae.get("ch_mult")
    if not (
        isinstance(vae.get("embed_dim"), int)
        and isinstance(multipliers, list)
        and 1 <= len(multipliers) <= 16
        and all(isinstance(multiplier, int) for multiplier in multipliers)
        and isinstance(vae.get("deterministic", False), bool)
        and isinstance(latent_factor, float | int)
        and 0 < latent_factor < math.inf
    ):
        raise UserError(
            f"{path} describes no tokenizer that this code can build; it is damaged, or of another program"
        )
    return vae, float(latent_factor)


def save_vae(path: str | Path, vae: nn.Module, latent_factor: float) -> None:
    """Writes a tokenizer's weights, constructor arguments and latent factor, as :func:`read_vae` reads them."""
    with written_whole(path) as file:
        torch.save(
            {
                "model": vae.state_dict(),
                "config": {"vae": vae.config, "latent_factor": latent_factor},
            },
            file,
        )


def load_vae(vae: nn.Module, path: str | Path, weights: Mapping[str, Any] | None = None) -> None:
    """Load the weights in ``path``, or ``weights`` that were read from it, into a tokenizer.

    Raises:
        UserError: the file is missing or unreadable, or its weights do not fit.
    """
    weights = read_vae(path)[0] if weights is None else weights
    hint = "It holds another tokenizer; files without their own description are taken for KL-16"
    vae.load_state_dict(matching(weights, vae.state_dict(), path, hint))


def save_vae_folder(folder: str | Path, vae: nn.Module, latent_factor: float) -> None:
    """Write a tokenizer as ``model.safetensors`` and ``config.json``, for :func:`read_vae`.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    safetensors_io.write_tensors(Path(folder) / HUB_NAME, vae.state_dict())
    write_json(Path(folder) / HUB_CONFIG, {"vae": vae.config, "latent_factor": latent_factor})
