"""Read and write checkpoint files: reading runs no code, writing leaves no partial file."""

import argparse
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from util.checkpoint import hub, safetensors_io
from util.errors import UserError, reason
from util.files import read_json, write_json, written_whole
from util.log import log

CHECKPOINT_NAME, SAFE_NAME = "checkpoint-last.pth", "checkpoint-last.safetensors"

#: The weights and the model configuration in a folder that ``save_pretrained`` wrote.
HUB_NAME, HUB_CONFIG = "model.safetensors", "config.json"

#: File names of a TokenBridge checkpoint in a folder, in search order.
RUN_NAMES = (CHECKPOINT_NAME, SAFE_NAME, HUB_NAME)

#: File names of a tokenizer's weights in a folder, in search order. The last is diffusers' name.
VAE_NAMES = (HUB_NAME, "vae.ckpt", "kl16.ckpt", "diffusion_pytorch_model.safetensors")

#: Name parts that DistributedDataParallel and torch.compile insert, at the start or within a name.
WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")


def read_checkpoint(path: str | Path, checksums: bool = True) -> dict[str, Any]:
    """Return the dictionary in a ``torch.save`` or safetensors file, with tensors on the CPU.

    No code from the file is run. The only class allowed is ``argparse.Namespace``, because
    published files contain the flags of their run.

    Args:
        checksums: False skips the checksums, to read a few numbers of a large file without reading
            all of its tensors.

    Raises:
        UserError: the file does not exist, is damaged, contains something else, or would run code.
    """
    path = hub.fetch(path) if hub.is_address(path) else Path(path)
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}; check the path, or download the published models: "
            "python -m tools.download"
        )
    try:
        if path.suffix == safetensors_io.SUFFIX:
            content = safetensors_io.read(path, checksums)
        else:
            # A mapped file takes no memory for unused entries. The format before zip files cannot
            # be mapped.
            is_zip = zipfile.is_zipfile(path)
            # torch.load does not compare checksums.
            if is_zip and checksums:
                with zipfile.ZipFile(path) as archive:
                    if damaged := archive.testzip():
                        raise ValueError(f"the checksum of its record {damaged} is wrong")
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise unpickling_error(path) from error
    except Exception as error:  # zip, tensor and unpickler errors have no common class
        raise UserError(
            f"{path} cannot be read ({reason(error)}); it is damaged or not a checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} contains a {type(content).__name__}, not the dictionary of a checkpoint"
        )
    for key in ("model", "model_ema", "state_dict"):
        if isinstance(content.get(key), dict):
            content[key] = without_wrappers(content[key], path)
    return without_wrappers(content, path)  # the file may contain only weights


class Refused(UserError):
    """An undamaged file was not loaded, because it contains more than data."""


def unpickling_error(path: Path) -> UserError:
    """Return the error for a file that ``weights_only`` refuses, with the names of its classes."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the file is damaged, or in the format before zip files
        names = []
    if not names:
        return UserError(
            f"{path} is damaged, or contains more than data and was not loaded, because it could "
            "run code"
        )
    listed = ", ".join(sorted(names)[:4])
    if all(name.startswith("numpy.") for name in names):
        return Refused(
            f"{path} contains NumPy values ({listed}) and was not loaded, because these could run "
            "code: save it again with Python numbers and tensors instead, such as int(epoch)"
        )
    return Refused(
        f"{path} contains more than data ({listed}) and was not loaded, because it could run code"
    )


def without_wrappers(weights: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return ``weights`` with :data:`WRAPPERS` removed from the names; log if a name changes."""
    names = [WRAPPERS.sub(r"\1", name) if isinstance(name, str) else name for name in weights]
    if names == list(weights) or len(set(names)) < len(names):
        return weights
    log.info(
        "%s: removed the prefixes module. and _orig_mod. of wrapped models from the names", path
    )
    return dict(zip(names, weights.values(), strict=True))


def locate(path: str | Path | hub.Address, names: Sequence[str], **options) -> Path:
    """Return the first of ``names`` that exists in folder ``path``; ``path`` if it is no folder.

    A file on the Hub is downloaded, together with its ``config.json``. ``options`` are those of
    :func:`util.checkpoint.hub.fetch`.

    Raises:
        UserError: the Hub does not have the file, or cannot be reached.
    """
    if hub.is_address(path):
        file = hub.fetch(path, names, **options)
        # A .pth contains its own configuration.
        if file.suffix == safetensors_io.SUFFIX:
            hub.fetch_beside(path, file, HUB_CONFIG, **options)
        return file
    folder = Path(str(path))
    if not folder.is_dir():
        return folder
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def config_beside(path: Path) -> Any:
    """Return the content of ``config.json`` next to a safetensors file; None if there is none.

    Raises:
        UserError: ``config.json`` is damaged.
    """
    config = path.with_name(HUB_CONFIG)
    return read_json(config) if path.suffix == safetensors_io.SUFFIX and config.is_file() else None


def save_folder(
    folder: str | Path, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> None:
    """Write ``config.json`` and ``model.safetensors``, the files of ``save_pretrained``.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    write_json(Path(folder) / HUB_CONFIG, config)
    safetensors_io.write_tensors(Path(folder) / HUB_NAME, weights)


def older_checkpoints(path: Path) -> list[Path]:
    """Return the earlier checkpoints that are kept next to ``path``, newest first."""
    files = {
        file.stem[len(path.stem) + 1 :]: file
        for file in path.parent.glob(f"{path.stem}.*{path.suffix}")
    }
    return [files[age] for age in sorted(filter(str.isdigit, files), key=int)]


Stamp = tuple[int, ...]


def file_stamp(path: Path) -> Stamp | None:
    """Return an identity of a file that survives renaming; None if there is no file at ``path``."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def epoch_path(path: Path, epoch: int) -> Path:
    """Return the name of the checkpoint of an epoch, which stays when ``path`` is replaced."""
    return path.with_name(f"{path.stem.removesuffix('-last')}-epoch{epoch:04d}{path.suffix}")


def link_or_copy(path: Path, target: Path) -> None:
    """Give a file a second name, completely or not at all; replaces ``target``."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        try:
            os.link(path, partial)
        except OSError:  # not every file system has hard links
            shutil.copy2(path, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(
    path: str | Path, content: dict[str, Any], keep_last: int = 1, whole: Stamp | None = None
) -> Stamp | None:
    """Write a checkpoint completely or not at all, and return the stamp of the new file.

    ``keep_last - 1`` earlier checkpoints stay next to it, numbered by age. They keep their names
    until the new checkpoint is flushed to disk. If an undamaged checkpoint existed before, one
    exists at every moment.

    Args:
        whole: :func:`file_stamp` of the file that this run wrote or read last; see
            :func:`rotate_checkpoints`.

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
    """Number all earlier checkpoints one higher, and give the checkpoint at ``path`` number 1.

    A damaged file never replaces an undamaged one. Files newer than ``whole`` could not be read
    when the run resumed, so they are deleted. If no file has the stamp ``whole``, the file at
    ``path`` is kept if it can be read.
    """
    files = [path, *older_checkpoints(path)]
    stamps = [file_stamp(file) for file in files]
    damaged = files[: stamps.index(whole)] if whole in stamps else []
    if whole not in stamps:
        try:
            read_checkpoint(path)
        except UserError:
            damaged = [path]
    for file in damaged[1:]:
        file.unlink()
    if damaged or not path.exists():
        return
    second = path.with_name(f".{path.name}.{os.getpid()}.second.part")
    try:
        link_or_copy(path, second)
        names = [path.with_name(f"{path.stem}.{age}{path.suffix}") for age in range(1, keep_last)]
        for newer, older in reversed(list(pairwise(names))):
            if newer.exists():
                os.replace(newer, older)
        os.replace(second, names[0])
    finally:
        second.unlink(missing_ok=True)
