"""Load the content of a checkpoint into a model, an optimizer and a scaler, after checking it."""

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
    """Return whether ``value`` is a tensor with values that is neither sparse nor quantized."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
    )


def describe_entry(value: Any, expected: Tensor) -> str:
    """Return the shape of ``value``, and its type if it differs from the expected one, as text."""
    if not isinstance(value, Tensor):
        return f"not a tensor but {type(value).__name__}"
    if not dense(value):
        return "not a dense tensor"
    return str(list(value.shape)) + (f" {value.dtype}" if value.dtype != expected.dtype else "")


def fits(value: Any, expected: Tensor) -> bool:
    """Return whether ``value`` has the expected shape, and the expected type or a narrower one.

    float16 and bfloat16 are narrower than float32.
    """
    if not dense(value):
        return False
    narrower = expected.dtype == torch.float32 and value.dtype in (torch.float16, torch.bfloat16)
    return value.shape == expected.shape and (value.dtype == expected.dtype or narrower)


def matching(
    weights: Mapping[str, Any], expected: Mapping[str, Tensor], path: str | Path, hint: str
) -> dict[str, Tensor]:
    """Return the entries of ``weights`` that ``expected`` names; warn about all others.

    Raises:
        UserError: entries are missing, or have another shape or type, or are not finite. The
            message lists them, and ends with ``hint``.
    """
    missing: list[str] = []
    misfits: list[str] = []
    not_finite: list[str] = []
    for name, value in expected.items():
        if name not in weights:
            missing.append(name)
            continue
        entry = weights[name]
        if not fits(entry, value):
            misfits.append(f"{name} {describe_entry(entry, value)} (expected {list(value.shape)})")
        # Attention masks contain -inf.
        elif not (entry.isfinite() | ~value.isfinite().to(entry.device)).all():
            not_finite.append(name)
    unexpected = [str(name) for name in weights if name not in expected]

    if missing or misfits or not_finite:
        problems = {
            "missing": missing,
            "of another shape or type": misfits,
            "not finite": not_finite,
            "unexpected": unexpected,
        }
        listed = "; ".join(f"{kind}: {some(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{path} does not fit: {listed}. {hint}")
    if unexpected:
        warn(
            "%s: ignored %d entries that the model does not have: %s",
            path,
            len(unexpected),
            some(unexpected),
        )
    return {name: weights[name] for name in expected}


def warn_if_ema_is_untrained(content: Mapping[str, Any], path: str | Path) -> None:
    """Warn if the EMA still contains the initial weights: after a short run without EMA warmup."""
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    warmed_up = content.get("ema_warmup", "average_steps" in content)
    if warmed_up or not isinstance(args, dict) or not isinstance(args.get("ema_rate"), float):
        return
    finished_epochs = content.get("epoch", -1) + 1
    steps = finished_epochs * content.get("steps_per_epoch", 0) + content.get("step", 0)
    if 0 < steps < 3 / max(1 - args["ema_rate"], 1e-8):
        warn(
            "%s: its EMA covers only %d steps and still contains the initial weights; use the "
            "plain weights (--no_ema, ema=False), or train longer with --resume",
            path,
            steps,
        )


def load_weights(model: nn.Module, content: Mapping[str, Any], path: str | Path, ema: bool) -> None:
    """Load the EMA (``ema``) or the plain weights, and the quantizer's tables, into ``model``.

    Raises:
        UserError: the checkpoint has no such weights, or they do not fit.
    """
    # A file that holds only the EMA stores it under "model".
    ema = ema and content.get("averaged") is not True
    key = "model_ema" if ema else "model"
    weights, plain = content.get(key), content.get("model")
    if not isinstance(weights, Mapping):
        has_plain = ema and isinstance(plain, Mapping)
        hint = "; --no_ema uses the weights under 'model'" if has_plain else ""
        raise UserError(f"{path} has no weights under '{key}'{hint}")
    expected = to_published(model.state_dict())
    weights = to_published(weights)
    if ema:
        warn_if_ema_is_untrained(content, path)
        # The EMA covers learned entries only. The tables are stored with the plain weights.
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
    """Load the optimizer state, but not settings such as learning rates.

    Raises:
        UserError: the state is damaged or does not fit.
    """
    settings = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    try:
        # Copies, because the tensors may be mapped from a file that this run replaces.
        entries = {
            number: {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in entry.items()
            }
            for number, entry in state["state"].items()
        }
        # These settings determine the device of the step counts: use this run's, not the file's.
        groups = [dict(group) for group in state["param_groups"]]
        for group, own in zip(groups, settings, strict=False):
            group |= {name: own[name] for name in ("fused", "capturable", "foreach") if name in own}
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        for number, parameter in enumerate(parameters):
            check_optimizer_entry(entries.get(number, {}), number, parameter)
    except Exception as error:  # torch checks little, so a damaged state may raise anything
        raise UserError(
            f"{path}: its optimizer state is damaged, or belongs to another model ({reason(error)})"
        ) from error
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def check_optimizer_entry(entry: Mapping[str, Any], number: int, parameter: Tensor) -> None:
    """Raise ValueError unless AdamW's state of one parameter is empty, or complete and finite."""
    if entry and set(entry) != {"step", "exp_avg", "exp_avg_sq"}:
        raise ValueError(f"entry {number} has {', '.join(map(str, entry))}")
    for name, value in entry.items():
        expected = torch.zeros(()) if name == "step" else parameter
        tensor = torch.as_tensor(value, dtype=torch.float32) if name == "step" else value
        if not fits(tensor, expected):
            raise ValueError(f"{name} of entry {number} is {describe_entry(value, expected)}")
        if not torch.as_tensor(value).isfinite().all():
            raise ValueError(f"{name} of entry {number} is not finite")


def load_scaler(scaler: torch.amp.GradScaler, state: Mapping[str, Any], path: str | Path) -> None:
    """Load the state of the fp16 gradient scaler; UserError if it is damaged."""
    numbers = [
        value
        for value in state.values()
        if isinstance(value, float | int) and 0 <= value < math.inf
    ]
    if set(state) != set(scaler.state_dict()) or len(numbers) < len(state) or not state["scale"]:
        raise UserError(f"{path}: the state of its gradient scaler is damaged")
    scaler.load_state_dict(dict(state))
