"""Starting from the weights of another run: what fits is kept, positions are resized, the rest is drawn anew."""

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.checkpoint.load import fits
from util.config import FACTS, KL16_CHANNEL_ORDER
from util.errors import UserError
from util.misc import log

#: Position embeddings, and whether positions of the class embedding come before those of the tokens.
POSITIONS = {"encoder_pos_embed_learned": True, "decoder_pos_embed_learned": True, "output_pos_embed": False}
#: What belongs to one place of the head, and so to the channel that is predicted there.
PLACES = ("channel_embed", "timesteps_embeddings", "token_embeddings.", "channel_heads.")


def resized(positions: Tensor, buffer: int, new_buffer: int, side: int) -> Tensor:
    """Position embeddings ``[1, buffer + L, D]`` for a grid of ``side x side`` tokens: ``[1, new_buffer + side^2, D]``.

    Those of tokens are interpolated bicubically over the grid, those before them linearly.
    """
    before, tokens = positions.float().tensor_split([buffer], dim=1)
    old = math.isqrt(tokens.shape[1])
    if old != side:
        grid = tokens.transpose(1, 2).unflatten(2, (old, old))  # [1, D, old, old]
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        tokens = grid.flatten(2).transpose(1, 2)
    if buffer != new_buffer:
        before = F.interpolate(before.transpose(1, 2), new_buffer, mode="linear").transpose(1, 2)
    return torch.cat([before, tokens], dim=1)


def start_from(
    model: nn.Module, content: Mapping[str, Any], config: Mapping[str, Any], path: Path, ema: bool
) -> dict[str, list[str]]:
    """Gives ``model`` the weights of a checkpoint as far as they fit, and says in the log what was done with the rest.

    Args:
        content: the checkpoint, see :func:`util.checkpoint.read_run`.
        config: of its model.
        ema: its averages, if it has them, and not the weights themselves.

    Returns:
        names of parameters, under ``"kept"``, ``"resized"`` and ``"drawn anew"``; under ``"left out"`` those of the
        file that the model does not have.

    Raises:
        UserError: it has no weights, they are not finite, or none of a transformer's fit: it is of another size.
    """
    weights = content.get("model_ema" if ema and "model_ema" in content else "model")
    if not isinstance(weights, Mapping):
        raise UserError(f"{path} has no weights under 'model'")
    learned = dict(model.named_parameters())
    here = model.config["channel_order"]
    # Files that do not tell are of before there was a choice.
    there = config.get("channel_order", KL16_CHANNEL_ORDER if len(here) == 16 else sorted(here))
    buffer = buffer_of(weights)
    done: dict[str, list[str]] = {"kept": [], "resized": [], "drawn anew": [], "left out": []}
    with torch.no_grad():
        for name, parameter in learned.items():
            value = weights.get(name)
            if name in POSITIONS and isinstance(value, Tensor) and value.ndim == 3 and value.shape != parameter.shape:
                buffers = (buffer, model.config["buffer_size"]) if POSITIONS[name] else (0, 0)
                value = resized(value, *buffers, model.grid_size)
                kind = "resized"
            else:
                kind = "kept"
            if not fits(value, parameter) or (name.startswith(PLACES) and list(there) != here):
                kind = "drawn anew"
            elif not value.isfinite().all():
                raise UserError(f"{path} is damaged: {name} holds values that are not finite")
            else:
                parameter.copy_(value)
            done[kind].append(name)
    everything = model.state_dict()
    done["left out"] = [name for name in weights if name not in everything]
    if not any(name.startswith(("encoder_blocks.", "decoder_blocks.")) for name in done["kept"]):
        raise UserError(f"{path} is of another model: none of its transformer's weights fit. Check --model")
    share = sum(learned[name].numel() for name in done["kept"]) / sum(each.numel() for each in learned.values())
    log.info("starting from %s: %.1f%% of the parameters kept", path, 100 * share)
    for kind in ("resized", "drawn anew", "left out"):
        if done[kind]:
            log.info("%s: %s", kind, ", ".join(grouped(done[kind])))
    differing = [
        f"{fact.name} {config[fact.name]}, here {model.config[fact.name]}"
        for fact in FACTS
        if fact.compared and fact.name in config and fact.name in model.config
        if config[fact.name] != model.config[fact.name]
    ]
    if differing:
        log.info("trained there with %s", "; ".join(differing))
    return done


def buffer_of(weights: Mapping[str, Any]) -> int:
    """Positions of the class embedding, by the shapes of position embeddings."""
    shapes = [getattr(weights.get(name), "shape", ()) for name in ("encoder_pos_embed_learned", "output_pos_embed")]
    return shapes[0][1] - shapes[1][1] if all(len(shape) == 3 for shape in shapes) else 0


def grouped(names: Sequence[str]) -> list[str]:
    """Names with their first number as a star, each once: ``channel_heads.*.weight``."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in names))


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Has the parameters whose names match one of ``patterns`` stay as they are: ``encoder_blocks.*``, ``*.bias``.

    Raises:
        UserError: a pattern matches none, or all parameters are frozen.
    """
    learned = dict(model.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in learned if fnmatchcase(name, pattern)]
        if not matched:
            raise UserError(f"--freeze {pattern} matches no parameter; there are {', '.join(grouped(list(learned)))}")
        frozen.update(matched)
    if len(frozen) == len(learned):
        raise UserError("--freeze leaves no parameter to train")
    for name in frozen:
        learned[name].requires_grad_(False)
    if frozen:
        values = sum(learned[name].numel() for name in frozen)
        log.info("frozen: %d of %d parameters, %.2fM values", len(frozen), len(learned), values / 1e6)
