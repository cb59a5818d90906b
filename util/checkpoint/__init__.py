"""Checkpoints: data that is read as data, checked against the model, and written whole."""

import argparse
import hashlib
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
from torch import Tensor, nn

from util import hub, safe
from util.errors import UserError, reason
from util.files import read_json, written_whole
from util.misc import log

CHECKPOINT_NAME = "checkpoint-last.pth"
SAFE_NAME = "checkpoint-last.safetensors"
#: A folder that ``save_pretrained`` wrote: weights, and beside them what they are of.
HUB_NAME, HUB_CONFIG = "model.safetensors", "config.json"
#: What a folder of a tokenizer may hold; the last is of diffusers.
VAE_NAMES = (HUB_NAME, "vae.ckpt", "kl16.ckpt", "diffusion_pytorch_model.safetensors")

#: What the published VAE is, for files that say nothing of themselves.
KL16_CONFIG = {"embed_dim": 16, "ch_mult": [1, 1, 2, 2, 4]}
KL16_LATENT_FACTOR = 0.2325

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
        raise UserError(f"no checkpoint at {path}; check the path, or fetch what is published: python -m util.download")
    try:
        if path.suffix == safe.SUFFIX:
            content = safe.read(path)
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


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights and buffers: what tells tokenizers of equal sizes apart."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(safe.tensor_bytes(value.detach().cpu()))
    return digest.hexdigest()


def dense(value: Any) -> bool:
    """Whether ``value`` is a tensor that holds all its values."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_quantized


def described(value: Any, other: Tensor) -> str:
    """Shape, and where it differs from ``other``'s the type, of what a file has in a tensor's place."""
    if not dense(value):
        return "no dense tensor" if isinstance(value, Tensor) else f"no tensor but {type(value).__name__}"
    return str(list(value.shape)) + (f" {value.dtype}" if value.dtype != other.dtype else "")


def fits(value: Any, other: Tensor) -> bool:
    """Whether ``value`` can take ``other``'s place: its shape, and its type or one that widens to it exactly."""
    if not dense(value):
        return False
    narrower = other.dtype == torch.float32 and value.dtype in (torch.float16, torch.bfloat16)
    return value.shape == other.shape and (value.dtype == other.dtype or narrower)


def matching(
    weights: Mapping[str, Any], expected: Mapping[str, Tensor], path: str | Path, hint: str
) -> dict[str, Tensor]:
    """The entries of ``weights`` that ``expected`` names; others are named in the log and left out.

    Raises:
        UserError: an entry is missing, has another shape or type, or holds values that are not finite: all of them
            listed, ``hint`` says where to look.
    """
    problems = {
        "missing": [name for name in expected if name not in weights],
        "of another shape or type": [
            f"{name} {described(weights[name], value)} (expected {list(value.shape)})"
            for name, value in expected.items()
            if name in weights and not fits(weights[name], value)
        ],
        "not finite": [
            name
            for name, value in expected.items()
            if name in weights
            and fits(weights[name], value)
            # Tables of masks are infinite where they should be.
            and not (weights[name].isfinite() | ~value.isfinite().to(weights[name].device)).all()
        ],
    }
    unexpected = [str(name) for name in weights if name not in expected]

    def some(names: list[str]) -> str:
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    if any(problems.values()):
        problems["unexpected"] = unexpected
        listed = "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
        raise UserError(f"{path} does not fit: {listed}. {hint}")
    if unexpected:
        log.warning("%s: ignored %d entries that the model does not have: %s", path, len(unexpected), some(unexpected))
    return {name: weights[name] for name in expected}


def located(path: str | Path | hub.Address, names: Sequence[str], **options) -> Path:
    """The first of ``names`` that is in folder ``path``, or ``path`` itself; fetched, with its config, from the Hub.

    Raises:
        UserError: the Hub does not have it, or cannot be reached.
    """
    if hub.is_address(path):
        found = hub.fetch(path, names, **options)
        if found.suffix == safe.SUFFIX:  # what describes itself may do without
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
    return read_json(beside) if path.suffix == safe.SUFFIX and beside.is_file() else None


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
    "channel_order": [8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5],
    "quantizer": "gaussian",
}
#: Of those, what weights do not fit otherwise, or would mean something else: differences are refused.
FIXED = ("head", "channels_per_group", "channel_order", "quantizer")
SHAPE_HINT = "Check --model, --quant_bits, --class_num, --img_size, --patch_size and --buffer_size"


def older(path: Path) -> list[Path]:
    """The checkpoints that were kept when ``path`` took their place, the newest first."""
    kept = path.parent.glob(f"{path.stem}.*{path.suffix}")
    numbered = [(int(old.stem.rsplit(".", 1)[1]), old) for old in kept if old.stem.rsplit(".", 1)[1].isdigit()]
    return [old for _, old in sorted(numbered)]


def find(resume: str | Path | hub.Address, **options) -> Path:
    """The checkpoint in folder ``resume``, or ``resume`` itself if it is a file; either may be an address on the Hub.

    Args:
        options: see :func:`util.hub.fetch`.

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


def load_weights(model: nn.Module, content: Mapping[str, Any], path: str | Path, ema: bool) -> None:
    """Loads a checkpoint's EMA (or plain) weights into ``model``, and the quantizer's tables where it has them.

    Raises:
        UserError: it has none, or they do not fit.
    """
    ema = ema and content.get("averaged") is not True  # a file of averages alone has them in the weights' place
    key = "model_ema" if ema else "model"
    weights, plain = content.get(key), content.get("model")
    if not isinstance(weights, Mapping):
        hint = "; --no_ema takes those that it has" if ema and isinstance(plain, Mapping) else ""
        raise UserError(f"{path} has no weights under '{key}'{hint}")
    expected = model.state_dict()
    if ema:  # averages are of learned entries only; the tables lie with the plain weights
        tables = set(expected) - {name for name, _ in model.named_parameters()}
        plain = plain if isinstance(plain, Mapping) else {}
        weights = {**weights, **{name: plain.get(name, expected[name]) for name in tables}}
    try:
        model.load_state_dict(matching(weights, expected, path, SHAPE_HINT))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: str | Path) -> None:
    """Loads an optimizer's moments; rates and other settings stay those of this run's flags.

    Raises:
        UserError: the state is damaged, or of another model.
    """
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    try:
        # Copies: what was read is mapped from a file that newer ones replace.
        entries = {
            number: {name: value.clone() if isinstance(value, Tensor) else value for name, value in entry.items()}
            for number, entry in state["state"].items()
        }
        # Where torch puts the counts of steps follows from how the optimizer works: as here, not as in the file.
        groups = [dict(group) for group in state["param_groups"]]
        for group, ours in zip(groups, options, strict=False):
            group |= {name: ours[name] for name in ("fused", "capturable", "foreach") if name in ours}
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            entry = entries.get(number, {})
            if entry and set(entry) != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError(f"entry {number} has {', '.join(map(str, entry))}")
            for name, value in entry.items():
                expected = torch.zeros(()) if name == "step" else parameter
                if not fits(torch.as_tensor(value, dtype=torch.float32) if name == "step" else value, expected):
                    raise ValueError(f"{name} of entry {number} is {described(value, expected)}")
                if not torch.as_tensor(value).isfinite().all():
                    raise ValueError(f"{name} of entry {number} is not finite")
    except Exception as error:  # torch looks at little of it, so what is wrong surfaces as almost anything
        what = reason(error)
        raise UserError(f"{path}: its optimizer state is damaged, or of another model ({what})") from error
    for group, ours in zip(optimizer.param_groups, options, strict=True):
        group.update(ours)


def load_scaler(scaler: torch.amp.GradScaler, state: Mapping[str, Any], path: str | Path) -> None:
    """Loads the scale of fp16's gradients.

    Raises:
        UserError: the state is damaged.
    """
    numbers = [value for value in state.values() if isinstance(value, float | int) and 0 <= value < math.inf]
    if set(state) != set(scaler.state_dict()) or len(numbers) < len(state) or not state["scale"]:
        raise UserError(f"{path}: the state of its gradient scaler is damaged")
    scaler.load_state_dict(dict(state))


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
