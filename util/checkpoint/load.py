"""Loads a checkpoint's content into a model, its optimizer and scaler, after comparing shapes, types and values."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.checkpoint.names import to_published
from util.errors import UserError, reason, some
from util.log import warn

SHAPE_HINT = "Check --model, --quant_bits, --class_num, --img_size, --patch_size and --buffer_size"


def dense(value: Any) -> bool:
    """Whether ``value`` is a tensor that is neither sparse, quantized nor without values (``meta``)."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
    )


def described(value: Any, other: Tensor) -> str:
    """For messages, the shape of a file's ``value``, and its type where that differs from ``other``'s."""
    if not dense(value):
        return (
            "no dense tensor"
            if isinstance(value, Tensor)
            else f"no tensor but {type(value).__name__}"
        )
    return str(list(value.shape)) + (f" {value.dtype}" if value.dtype != other.dtype else "")


def fits(value: Any, other: Tensor) -> bool:
    """Whether ``value`` has ``other``'s shape, and its type or one that float32 holds exactly."""
    if not dense(value):
        return False
    narrower = other.dtype == torch.float32 and value.dtype in (torch.float16, torch.bfloat16)
    return value.shape == other.shape and (value.dtype == other.dtype or narrower)


def matching(
    weights: Mapping[str, Any], expected: Mapping[str, Tensor], path: str | Path, hint: str
) -> dict[str, Tensor]:
    """The entries of ``weights`` that ``expected`` names; a warning lists the others.

    Raises:
        UserError: entries are missing, or their shape, type or values do not fit; it lists them, with ``hint``.
    """
    problems: dict[str, list[str]] = {
        "missing": [],
        "of another shape or type": [],
        "not finite": [],
    }
    for name, value in expected.items():
        if name not in weights:
            problems["missing"].append(name)
        elif not fits(found := weights[name], value):
            problem = f"{name} {described(found, value)} (expected {list(value.shape)})"
            problems["of another shape or type"].append(problem)
        elif not (
            found.isfinite() | ~value.isfinite().to(found.device)
        ).all():  # attention masks hold -inf
            problems["not finite"].append(name)
    unexpected = [str(name) for name in weights if name not in expected]

    if any(problems.values()):
        problems["unexpected"] = unexpected
        listed = "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
        raise UserError(f"{path} does not fit: {listed}. {hint}")
    if unexpected:
        warn(
            "%s: ignored %d entries that the model does not have: %s",
            path,
            len(unexpected),
            some(unexpected),
        )
    return {name: weights[name] for name in expected}


def warn_of_young_average(content: Mapping[str, Any], path: str | Path) -> None:
    """Warns of an average that is mostly of drawn weights: of a short run that did not warm it up."""
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    warmed_up = content.get("ema_warmup", "average_steps" in content)
    if warmed_up or not isinstance(args, dict) or not isinstance(args.get("ema_rate"), float):
        return
    steps = (content.get("epoch", -1) + 1) * content.get("steps_per_epoch", 0) + content.get(
        "step", 0
    )
    if 0 < steps < 3 / max(1 - args["ema_rate"], 1e-8):
        advice = "take the weights themselves (--no_ema, ema=False), or train on with --resume"
        warn(
            "%s: its average has seen %d steps only and is partly of random weights; %s",
            path,
            steps,
            advice,
        )


def load_weights(model: nn.Module, content: Mapping[str, Any], path: str | Path, ema: bool) -> None:
    """Loads averaged (``ema``) or plain weights, and the quantizer's tables; UserError if there are none that fit."""
    ema = (
        ema and content.get("averaged") is not True
    )  # a file of averages only has them under "model"
    key = "model_ema" if ema else "model"
    weights, plain = content.get(key), content.get("model")
    if not isinstance(weights, Mapping):
        hint = "; --no_ema takes those under 'model'" if ema and isinstance(plain, Mapping) else ""
        raise UserError(f"{path} has no weights under '{key}'{hint}")
    expected, weights = to_published(model.state_dict()), to_published(weights)
    if ema:  # only learned entries are averaged; tables are stored with the plain weights
        warn_of_young_average(content, path)
        tables = set(expected) - set(to_published(dict(model.named_parameters())))
        plain = to_published(plain) if isinstance(plain, Mapping) else {}
        weights = {**weights, **{name: plain.get(name, expected[name]) for name in tables}}
    try:
        model.load_state_dict(matching(weights, expected, path, SHAPE_HINT))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def load_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: str | Path
) -> None:
    """Loads an optimizer's moments, not its settings, such as rates; UserError if they are damaged or do not fit."""
    options = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    try:
        # Copies, since what was read may be mapped from a file that this run replaces.
        entries = {
            number: {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in entry.items()
            }
            for number, entry in state["state"].items()
        }
        # These settings decide on which device torch puts the counts of steps: this run's, not the file's.
        groups = [dict(group) for group in state["param_groups"]]
        for group, ours in zip(groups, options, strict=False):
            group |= {
                name: ours[name] for name in ("fused", "capturable", "foreach") if name in ours
            }
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        for number, parameter in enumerate(parameters):
            entry = entries.get(number, {})
            if entry and set(entry) != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError(f"entry {number} has {', '.join(map(str, entry))}")
            for name, value in entry.items():
                expected = torch.zeros(()) if name == "step" else parameter
                if not fits(
                    torch.as_tensor(value, dtype=torch.float32) if name == "step" else value,
                    expected,
                ):
                    raise ValueError(f"{name} of entry {number} is {described(value, expected)}")
                if not torch.as_tensor(value).isfinite().all():
                    raise ValueError(f"{name} of entry {number} is not finite")
    except Exception as error:  # torch checks little, so a damaged state may raise anything
        what = reason(error)
        raise UserError(
            f"{path}: its optimizer state is damaged, or of another model ({what})"
        ) from error
    for group, ours in zip(optimizer.param_groups, options, strict=True):
        group.update(ours)


def load_scaler(scaler: torch.amp.GradScaler, state: Mapping[str, Any], path: str | Path) -> None:
    """Loads the scale of fp16's gradients; raises UserError if its state is damaged."""
    numbers = [
        value
        for value in state.values()
        if isinstance(value, float | int) and 0 <= value < math.inf
    ]
    if set(state) != set(scaler.state_dict()) or len(numbers) < len(state) or not state["scale"]:
        raise UserError(f"{path}: the state of its gradient scaler is damaged")
    scaler.load_state_dict(dict(state))
