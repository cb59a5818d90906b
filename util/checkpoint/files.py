"""Checkpoint files: read without running code, written whole or not at all."""

import argparse
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from util.checkpoint import hub, safetensors_io
from util.errors import UserError, reason
from util.files import read_json, written_whole
from util.log import log

CHECKPOINT_NAME, SAFE_NAME = "checkpoint-last.pth", "checkpoint-last.safetensors"


#: Weights, and the configuration of the model, in a folder that ``save_pretrained`` wrote.
HUB_NAME, HUB_CONFIG = "model.safetensors", "config.json"


#: Names of a TokenBridge's checkpoint in its folder, looked for in this order.
RUN_NAMES = (CHECKPOINT_NAME, SAFE_NAME, HUB_NAME)


#: Names of a tokenizer's weights in its folder, looked for in this order; the last is that of diffusers.
VAE_NAMES = (HUB_NAME, "vae.ckpt", "kl16.ckpt", "diffusion_pytorch_model.safetensors")


#: What DistributedDataParallel and torch.compile put before names, also within them.
WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")


def read_checkpoint(path: str | Path, checksums: bool = True) -> dict[str, Any]:
    """The dictionary in a ``torch.save`` or safetensors file, on the CPU; no code of the file is run.

    Of classes only ``argparse.Namespace`` is allowed: published files hold the flags of their run.

    Args:
        checksums: False to read some numbers of a large file without reading all of its tensors.

    Raises:
        UserError: there is no such file, it is damaged, holds something else, or would run code.
    """
    path = hub.fetch(path) if hub.is_address(path) else Path(path)
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}; check it, or fetch the published one: python -m tools.download"
        )
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
        raise UserError(
            f"{path} cannot be read ({reason(error)}); it is damaged or no checkpoint"
        ) from error
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
        return UserError(
            f"{path} is damaged, or holds more than data and was not loaded, since it could run code"
        )
    listed = ", ".join(sorted(names)[:4])
    if all(name.startswith("numpy.") for name in names):
        return Refused(
            f"{path} holds NumPy values ({listed}) and was not loaded, since these could run code: save it again with "
            "Python numbers and tensors in their place, such as int(epoch)"
        )
    return Refused(
        f"{path} holds more than data ({listed}) and was not loaded, since it could run code"
    )


def without_wrappers(weights: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return ``weights`` without the :data:`WRAPPERS` in their names; log if there are any."""
    names = [WRAPPERS.sub(r"\1", name) if isinstance(name, str) else name for name in weights]
    if names == list(weights) or len(set(names)) < len(names):
        return weights
    log.info(
        "%s: names are read without module. and _orig_mod., which wrapped models put into them",
        path,
    )
    return dict(zip(names, weights.values(), strict=True))


def locate(path: str | Path | hub.Address, names: Sequence[str], **options) -> Path:
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


def older_checkpoints(path: Path) -> list[Path]:
    """The earlier checkpoints that :func:`save` kept beside ``path``, the newest first."""
    kept = {
        old.stem.rsplit(".", 1)[1]: old for old in path.parent.glob(f"{path.stem}.*{path.suffix}")
    }
    return [kept[age] for age in sorted(filter(str.isdigit, kept), key=int)]


Stamp = tuple[int, ...]


def file_stamp(path: Path) -> Stamp | None:
    """Return what identifies the file at ``path`` even if it is renamed; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def save_checkpoint(
    path: str | Path, content: dict[str, Any], keep_last: int = 1, whole: Stamp | None = None
) -> Stamp | None:
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
            rotate_checkpoints(path, keep_last, whole)
    for old in older_checkpoints(path)[keep_last - 1 :]:
        old.unlink()
    return file_stamp(path)


def rotate_checkpoints(path: Path, keep_last: int, whole: Stamp | None) -> None:
    """Give the checkpoint at ``path`` a second name, that of the first earlier one, and number these one higher.

    A damaged file never takes the place of a whole one: files newer than ``whole`` could not be read when the run
    resumed from it, and are not kept. If ``whole`` is not there, the file at ``path`` is kept if it can be read.
    """
    found = [path, *older_checkpoints(path)]
    stamps = [file_stamp(each) for each in found]
    damaged = found[: stamps.index(whole)] if whole in stamps else []
    if whole not in stamps:
        try:
            read_checkpoint(path)
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
