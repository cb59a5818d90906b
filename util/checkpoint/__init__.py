"""Checkpoint files: read without running code, checked, and written whole or not at all."""

import argparse
import math
import os
import pickle
import re
import shutil
import socket
import time
import zipfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.checkpoint import hub, safetensors_io
from util.config import KL16_CONFIG, KL16_LATENT_FACTOR
from util.errors import UserError, reason
from util.files import read_json, written_whole
from util.misc import end_all, from_all_processes, is_local_main_process, log

CHECKPOINT_NAME, SAFE_NAME = "checkpoint-last.pth", "checkpoint-last.safetensors"
#: Weights, and the configuration of the model, in a folder that ``save_pretrained`` wrote.
HUB_NAME, HUB_CONFIG = "model.safetensors", "config.json"
#: Names of a TokenBridge's checkpoint in its folder, looked for in this order.
RUN_NAMES = (CHECKPOINT_NAME, SAFE_NAME, HUB_NAME)
#: Names of a tokenizer's weights in its folder, looked for in this order; the last is that of diffusers.
VAE_NAMES = (HUB_NAME, "vae.ckpt", "kl16.ckpt", "diffusion_pytorch_model.safetensors")
#: What DistributedDataParallel and torch.compile put before names, also within them.
WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")
LOOKS, PAUSE = 12, 5.0  # how often, and after how many seconds, a folder is looked at again: networks' disks lag

# --------------------------------------------------------------------------------------------------------------------
# Reading.


def read(path: str | Path, checksums: bool = True) -> dict[str, Any]:
    """The dictionary in a ``torch.save`` or safetensors file, on the CPU; no code of the file is run.

    Of classes only ``argparse.Namespace`` is allowed: published files hold the flags of their run.

    Args:
        checksums: False to read some numbers of a large file without reading all of its tensors.

    Raises:
        UserError: there is no such file, it is damaged, holds something else, or would run code.
    """
    path = hub.fetch(path) if hub.is_address(path) else Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; check it, or fetch the published one: python -m tools.download")
    try:
        if path.suffix == safetensors_io.SUFFIX:
            content = safetensors_io.read(path, checksums)
        else:
            # Entries that nobody uses take no memory if the file is mapped; the format of old files does not allow it.
            archive = zipfile.is_zipfile(path)
            if archive and checksums:  # torch.load does not compare checksums
                with zipfile.ZipFile(path) as file:
                    if damaged := file.testzip():
                        raise ValueError(f"the checksum of its record {damaged} is wrong")
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise not_loaded(path) from error
    except Exception as error:  # zip, tensor and unpickler errors have no common class
        raise UserError(f"{path} cannot be read ({reason(error)}); it is damaged or no checkpoint") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint's dictionary")
    for key in ("model", "model_ema", "state_dict"):
        if isinstance(content.get(key), dict):
            content[key] = without_wrappers(content[key], path)
    return without_wrappers(content, path)  # the file may hold nothing but weights


class Refused(UserError):
    """A file is whole, but holds more than data, and was not loaded."""


def not_loaded(path: Path) -> UserError:
    """Return the error for a file that ``weights_only`` refuses; it names the classes and functions in the file."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # damaged, or of the format before zip files
        names = []
    if not names:
        return UserError(f"{path} is damaged, or holds more than data and was not loaded, since it could run code")
    listed = ", ".join(sorted(names)[:4])
    if all(name.startswith("numpy.") for name in names):
        return Refused(
            f"{path} holds NumPy values ({listed}) and was not loaded, since these could run code: save it again with "
            "Python numbers and tensors in their place, such as int(epoch)"
        )
    return Refused(f"{path} holds more than data ({listed}) and was not loaded, since it could run code")


def without_wrappers(weights: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return ``weights`` without the :data:`WRAPPERS` in their names; log if there are any."""
    names = [WRAPPERS.sub(r"\1", name) if isinstance(name, str) else name for name in weights]
    if names == list(weights) or len(set(names)) < len(names):
        return weights
    log.info("%s: names are read without module. and _orig_mod., which wrapped models put into them", path)
    return dict(zip(names, weights.values(), strict=True))


def located(path: str | Path | hub.Address, names: Sequence[str], **options) -> Path:
    """The first of ``names`` that is in folder ``path``, or ``path`` itself if it is no folder.

    What lies on the Hub is fetched, together with its ``config.json``; ``options`` are those of
    :func:`util.checkpoint.hub.fetch`.

    Raises:
        UserError: the Hub does not have it, or cannot be reached.
    """
    if hub.is_address(path):
        found = hub.fetch(path, names, **options)
        if found.suffix == safetensors_io.SUFFIX:  # a .pth holds its own configuration
            hub.fetch_beside(path, found, HUB_CONFIG, **options)
        return found
    there = Path(str(path))
    if not there.is_dir():
        return there
    return next((there / name for name in names if (there / name).is_file()), there / names[0])


def config_beside(path: Path) -> Any:
    """The content of ``config.json`` beside a safetensors file; None without one, UserError if it is damaged."""
    beside = path.with_name(HUB_CONFIG)
    return read_json(beside) if path.suffix == safetensors_io.SUFFIX and beside.is_file() else None


# --------------------------------------------------------------------------------------------------------------------
# The tokenizer.


def read_vae(path: str | Path) -> tuple[Mapping[str, Any], dict[str, Any], float]:
    """Weights, constructor arguments and latent factor of the tokenizer in ``path``; the latter two KL-16's by default.

    Raises:
        UserError: see :func:`read`; or the file holds no tokenizer.
    """
    content = read(path)
    config = content.get("config", config_beside(Path(path)) or {})
    weights = content.get("model", content.get("state_dict", content))
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"{path} holds no tokenizer: expected its weights under 'model'")
    if "class_emb.weight" in weights:
        raise UserError(f"{path} is a TokenBridge, not a tokenizer: it goes with --resume")
    if any(str(name).startswith("vae.") for name in weights):
        raise UserError(
            f"{path} is what main_vae.py goes on from; the tokenizer is vae.ckpt, which it writes at its end"
        )
    return weights, *tokenizer_of(config, path)


def tokenizer_of(config: Any, path: str | Path) -> tuple[dict[str, Any], float]:
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
        and isinstance(latent_factor, float | int)
        and 0 < latent_factor < math.inf
    ):
        raise UserError(f"{path} describes no tokenizer that this code can build; it is damaged, or of another program")
    return vae, float(latent_factor)


def save_vae(path: str | Path, vae: nn.Module, latent_factor: float) -> None:
    """Writes a tokenizer's weights, constructor arguments and latent factor, as :func:`read_vae` reads them."""
    with written_whole(path) as file:
        torch.save({"model": vae.state_dict(), "config": {"vae": vae.config, "latent_factor": latent_factor}}, file)


# --------------------------------------------------------------------------------------------------------------------
# TokenBridge.


def older(path: Path) -> list[Path]:
    """The earlier checkpoints that :func:`save` kept beside ``path``, the newest first."""
    kept = {old.stem.rsplit(".", 1)[1]: old for old in path.parent.glob(f"{path.stem}.*{path.suffix}")}
    return [kept[age] for age in sorted(filter(str.isdigit, kept), key=int)]


def find(resume: str | Path | hub.Address, names: Sequence[str] = RUN_NAMES, **options) -> Path:
    """The checkpoint in folder ``resume``, or ``resume`` itself (see :func:`located`); UserError if there is none."""
    path = located(resume, names, **options)
    if not path.is_file():
        there = "in" if Path(str(resume)).is_dir() else "at"
        raise UserError(f"no {names[0]} {there} {resume}; name the file, or the folder that holds it")
    return path


def find_to_resume(resume: str | Path, output_dir: str | Path, names: Sequence[str] = RUN_NAMES) -> Path | None:
    """:func:`find`, or None where ``resume`` is the run's own folder and holds no checkpoint yet: a fresh start.

    If the newest checkpoint is missing but earlier ones are there, its path is returned for :func:`read_newest_whole`.
    """
    try:
        return find(resume, names)
    except UserError:
        if Path(resume).resolve() != Path(output_dir).resolve():
            raise
        if older(newest := Path(resume) / names[0]):
            return newest
        log.info("no %s in %s: starting afresh", names[0], resume)
        return None


def check_folder_is_free(output_dir: str | Path, resume: str, name: str) -> None:
    """Raises UserError if ``output_dir`` holds ``name``, another run's, and the run does not resume."""
    if not resume and (Path(output_dir) / name).exists():
        raise UserError(
            f"{output_dir} holds {name} of another run: name another --output_dir, or continue that run with "
            f"--resume {output_dir}"
        )


def progress(resume: str | Path, names: Sequence[str] = RUN_NAMES) -> tuple[int, float]:
    """Return the epoch of the newest readable checkpoint in ``resume``, and the share of the next one that is done.

    The result is (-2, 0.0) if there is none. Tensors are not read.
    """
    path = located(resume, names)
    for each in (path, *older(path)):
        try:
            content = read(each, checksums=False)
        except UserError:
            continue
        epoch, step, steps = (content.get(*entry) for entry in (("epoch", -1), ("step", 0), ("steps_per_epoch", 1)))
        if all(type(number) is int for number in (epoch, step, steps)) and steps > 0:
            return epoch, step / steps
    return -2, 0.0


def check_newest(resume: str | Path, names: Sequence[str] = RUN_NAMES) -> None:
    """Raise UserError, on all ranks, if another machine than that of rank 0 has a newer checkpoint.

    A run would otherwise continue from an older one, or start afresh, when rank 0 has moved to another machine. Epoch
    and step in the files decide, not their times: clocks of machines differ, and copies get new times.
    """
    for look in range(LOOKS):
        mine = progress(resume, names) if is_local_main_process() else (-2, 0.0)
        found = from_all_processes((mine, socket.gethostname()))
        newest, host = max(found)
        if newest == found[0][0]:
            return
        if look < LOOKS - 1:
            time.sleep(PAUSE)
    end_all(
        f"{host} holds a newer checkpoint in {resume} than {found[0][1]}, where process 0 runs: let process 0 run on "
        f"{host}, or put --output_dir and --resume on a disk that all machines share"
    )


def plain(value: Any) -> bool:
    """Whether ``value`` is a number, a string, None, or a list of such values."""
    return value is None or isinstance(value, int | float | str) or (isinstance(value, list) and all(map(plain, value)))


def read_run(path: str | Path) -> dict[str, Any]:
    """A TokenBridge's checkpoint: :func:`read`, with the types and ranges of its entries checked.

    Raises:
        UserError: see :func:`read`; or an entry has the wrong type or range.
    """
    return as_run(read(path), Path(path))


def as_run(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """:func:`read_run` for ``content`` that :func:`read` read from ``path``."""
    if "config" not in content and (stored := config_beside(path)):
        content |= {"config": stored, "averaged": True}  # save_pretrained writes the weights that sampling uses
    if isinstance(content.get("config"), dict) and "vae" in content["config"]:
        raise UserError(f"{path} is a tokenizer, not a TokenBridge: it goes with --vae_path")
    lowest = {"epoch": -1, "step": 0, "steps_per_epoch": 1, "world_size": 1, "average_steps": 0}
    numbers = {name: content[name] for name in lowest if name in content}
    wrong = [name for name, value in numbers.items() if type(value) is not int or value < lowest[name]]
    if not wrong and content.get("step", 0) > content.get("steps_per_epoch", 1):
        wrong.append("step")
    if type(content.get("ema_warmup", True)) is not bool:
        wrong.append("ema_warmup")
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
    """The checkpoint at ``path``, or with a warning the newest earlier one that is whole; and its file."""
    try:
        return read_run(path), path
    except Refused:
        raise
    except UserError as error:
        for old in older(path):
            try:
                content = read_run(old)
            except UserError:
                continue
            log.warning("%s; continuing from the one before, %s", error, old)
            return content, old
        raise


Stamp = tuple[int, ...]


def stamp(path: Path) -> Stamp | None:
    """Return what identifies the file at ``path`` even if it is renamed; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def save(path: str | Path, content: dict[str, Any], keep_last: int = 1, whole: Stamp | None = None) -> Stamp | None:
    """Write a checkpoint whole or not at all; ``keep_last - 1`` earlier ones stay beside it, numbered by age.

    Earlier checkpoints keep their names until the new one is flushed to disk. If there was a whole checkpoint, there is
    one at every moment.

    Args:
        whole: :func:`stamp` of the file that this run wrote or read last; see :func:`rotate`.

    Returns:
        the stamp of the new file.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    with written_whole(path) as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
        if keep_last > 1:
            rotate(path, keep_last, whole)
    for old in older(path)[keep_last - 1 :]:
        old.unlink()
    return stamp(path)


def rotate(path: Path, keep_last: int, whole: Stamp | None) -> None:
    """Give the checkpoint at ``path`` a second name, that of the first earlier one, and number these one higher.

    A damaged file never takes the place of a whole one: files newer than ``whole`` could not be read when the run
    resumed from it, and are not kept. If ``whole`` is not there, the file at ``path`` is kept if it can be read.
    """
    found = [path, *older(path)]
    stamps = [stamp(each) for each in found]
    damaged = found[: stamps.index(whole)] if whole in stamps else []
    if whole not in stamps:
        try:
            read(path)
        except UserError:
            damaged = [path]
    for each in damaged[1:]:
        each.unlink()
    if damaged or not path.exists():
        return
    second = path.with_name(f".{path.name}.{os.getpid()}.second.part")
    try:
        try:
            os.link(path, second)
        except OSError:  # not every file system has them
            shutil.copy2(path, second)
        names = [path.with_name(f"{path.stem}.{age}{path.suffix}") for age in range(1, keep_last)]
        for younger, elder in reversed(list(pairwise(names))):
            if younger.exists():
                os.replace(younger, elder)
        os.replace(second, names[0])
    finally:
        second.unlink(missing_ok=True)
