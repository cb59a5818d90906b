"""Start training from the weights of another run: keep, resize or reinitialize each parameter."""

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.checkpoint.load import dense, fits, warn_if_ema_is_untrained
from util.checkpoint.names import to_published
from util.errors import UserError, some
from util.log import log
from util.model_config import ENTRIES, KL16_CHANNEL_ORDER

#: Position embeddings, and whether positions of the class embedding precede those of the tokens.
POSITIONS = {
    "encoder_pos_embed_learned": True,
    "decoder_pos_embed_learned": True,
    "output_pos_embed": False,
}


def resized(positions: Tensor, buffer: int, new_buffer: int, side: int) -> Tensor:
    """Resize position embeddings ``[1, buffer + L, D]`` to ``[1, new_buffer + side^2, D]``.

    Embeddings of tokens are interpolated bicubically over their grid, those before them linearly.
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


def by_class(
    value: Any, parameter: Tensor, saved_classes: Any, classes: Sequence[str] | None, path: Path
) -> tuple[Any, int]:
    """Return the class embeddings to start from, and how many rows come from the checkpoint.

    Rows are matched by class name. Rows of new classes keep their initialization. If names are
    unknown, rows are matched by number, provided that the number of classes is the same. Both are
    logged.

    Args:
        value: embeddings in the checkpoint, which may hold anything.
        parameter: initialized embeddings of the model.
        saved_classes: class names in the checkpoint.
        classes: class names of the model; None if they are unknown.
        path: the checkpoint, for messages.
    """
    if (
        classes is None
        or not isinstance(saved_classes, list)
        or not dense(value)
        or len(saved_classes) != len(value)
    ):
        if not fits(value, parameter):
            return None, 0
        log.warning("%s stores no class names: class embeddings are matched by number", path)
        return value, len(value)
    row_of = {name: row for row, name in enumerate(saved_classes)}
    rows = {row: row_of[name] for row, name in enumerate(classes) if name in row_of}
    new = [name for name in classes if name not in row_of]
    text = "class embeddings: %d of %d kept, by the names of the classes; reinitialized: %s"
    log.info(text, len(rows), len(classes), some(new) or "none")
    if not rows or not fits(value[: len(rows)], parameter[: len(rows)]):
        return None, 0
    kept = value[[*rows.values()]].to(parameter.dtype)
    return parameter.index_put((torch.tensor([*rows]),), kept), len(rows)


def start_from(
    model: Any,
    content: Mapping[str, Any],
    config: Mapping[str, Any],
    path: Path,
    ema: bool,
    classes: Sequence[str] | None = None,
) -> dict[str, list[str]]:
    """Load the weights of a checkpoint that fit ``model``, and log what happens to the others.

    Args:
        model: a :class:`models.tokenbridge.TokenBridge`.
        content: the checkpoint, see :func:`util.checkpoint.runs.read_run`.
        config: configuration of its model.
        ema: whether to use the EMA, if there is one.
        classes: names of the model's classes; see :func:`by_class`.

    Returns:
        names of parameters: ``"kept"``, ``"partly kept"``, ``"resized"``, ``"reinitialized"``; and
        of ``"ignored"`` entries of the file, which the model does not have.

    Raises:
        UserError: the checkpoint has no weights, they are not finite, or none of its transformer
            blocks fit.
    """
    weights = content.get("model_ema" if ema and "model_ema" in content else "model")
    if not isinstance(weights, Mapping):
        raise UserError(f"{path} has no weights under 'model'")
    weights = to_published(weights)
    if ema and "model_ema" in content:
        warn_if_ema_is_untrained(content, path)
    learned: dict[str, Tensor] = to_published(dict(model.named_parameters()))
    order = model.config["channel_order"]
    # Files without an order were written before there was a choice
    only_order = KL16_CHANNEL_ORDER if len(order) == len(KL16_CHANNEL_ORDER) else sorted(order)
    same_order = list(config.get("channel_order", only_order)) == order
    # The number of positions of the class embedding follows from two shapes
    shapes = [
        getattr(weights.get(name), "shape", ())
        for name in ("encoder_pos_embed_learned", "output_pos_embed")
    ]
    buffer = shapes[0][1] - shapes[1][1] if all(len(shape) == 3 for shape in shapes) else 0
    step_parameters = model.head.step_parameters
    kinds = "kept", "partly kept", "resized", "reinitialized", "ignored"
    done: dict[str, list[str]] = {kind: [] for kind in kinds}
    values = 0  # number of values that are kept
    with torch.no_grad():
        for name, parameter in learned.items():
            value: Any = weights.get(name)
            kind, count = "kept", parameter.numel()
            if name == "class_emb.weight":
                value, rows = by_class(value, parameter, config.get("class_names"), classes, path)
                if rows < len(parameter):
                    kind, count = "partly kept", rows * parameter.shape[1]
            if (
                name in POSITIONS
                and isinstance(value, Tensor)
                and value.ndim == 3
                and value.shape != parameter.shape
            ):
                old, new = (buffer, model.config["buffer_size"]) if POSITIONS[name] else (0, 0)
                value, kind = resized(value, old, new, model.grid_size), "resized"
            if not fits(value, parameter) or (name.startswith(step_parameters) and not same_order):
                kind = "reinitialized"
            elif not value.isfinite().all():
                raise UserError(f"{path} is damaged: {name} holds values that are not finite")
            else:
                parameter.copy_(value)
                values += count if kind != "resized" else 0
            done[kind].append(name)
    everything = to_published(model.state_dict())
    done["ignored"] = [name for name in weights if name not in everything]
    if not any(name.startswith(("encoder_blocks.", "decoder_blocks.")) for name in done["kept"]):
        raise UserError(
            f"{path} is of another model: none of its transformer's weights fit. Check --model"
        )
    share = values / sum(parameter.numel() for parameter in learned.values())
    # Rounded down: 100.0% means all of them
    log.info("starting from %s: %.1f%% of the parameters kept", path, math.floor(1000 * share) / 10)
    for kind in kinds[1:]:
        if done[kind]:
            log.info("%s: %s", kind, ", ".join(grouped(done[kind])))
    differing = [
        f"{name} {config[name]} in the checkpoint, {model.config[name]} in this run"
        for name, rules in ENTRIES.items()
        if rules.compared and name in config and name in model.config
        if config[name] != model.config[name]
    ]
    if differing:
        log.info("trained differently: %s", "; ".join(differing))
    return done


def grouped(names: Sequence[str]) -> list[str]:
    """Return each name once, with a star for its first number: ``channel_heads.*.weight``."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in names))


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude parameters from training by patterns of published names (``*.bias``).

    Raises:
        UserError: a pattern matches no parameter, or all parameters are frozen.
    """
    learned = to_published(dict(model.named_parameters()))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in learned):
            raise UserError(
                f"--freeze {pattern} matches no parameter; choose from "
                f"{', '.join(grouped(list(learned)))}"
            )
    frozen = [name for name in learned if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if len(frozen) == len(learned):
        raise UserError("--freeze leaves no parameter to train")
    for name in frozen:
        learned[name].requires_grad_(False)
    if frozen:
        values = sum(learned[name].numel() for name in frozen)
        log.info(
            "frozen: %d of %d parameters, %.2fM values", len(frozen), len(learned), values / 1e6
        )
