"""Files written whole or not at all, folders shared by all processes, JSON and npz files read without running code."""

import hashlib
import json
import os
import re
import socket
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from util import distributed
from util.errors import UserError, reason


@contextmanager
def written_whole(path: str | Path, flush: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write; it replaces ``path`` when the block ends without an error, and is flushed to disk before.

    Args:
        flush: False for one of many files that :func:`flush_all` flushes together, before anything calls them complete.

    Raises:
        UserError: the disk is full or the folder cannot be written; ``path`` is as it was.
    """
    path = Path(path)
    name = (
        path.name
        if len(os.fsencode(path.name)) <= 200
        else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    )
    beside = path.with_name(f".{name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
            yield file
        # Opened by name, since safetensors replaces the file by one of its own, which nobody else may read.
        with open(beside, "r+b") as written:  # Windows flushes only what is open for writing
            if os.fstat(written.fileno()).st_mode != mode:
                os.chmod(beside, mode)
            if flush:
                os.fsync(written.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        # torch.save wraps the file system's error in a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
        if not isinstance(cause, OSError):
            raise
        what = cause.strerror or cause
        raise UserError(
            f"cannot write {path}: {what}; free space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink()


def flush_all() -> None:
    """Flush everything that was written to disk, where the system has a call for it (Windows has none)."""
    if hasattr(os, "sync"):
        os.sync()


def remove_parts(paths: Iterable[Path]) -> None:
    """Remove those of ``paths`` that :func:`written_whole` left unfinished because its process was killed."""
    for path in paths:
        if re.fullmatch(r"\..+\.\d+\.part", path.name):
            path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------------
# Folders that all processes share.

PATIENCE = (
    60.0  # seconds for which network file systems may show what was there before (NFS: acdirmax)
)


def wait_until(condition: Callable[[], bool]) -> bool:
    """Whether ``condition`` holds, asked again for up to :data:`PATIENCE` seconds until it does."""
    end = time.monotonic() + PATIENCE
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
    return holds


def check_shared(folder: str | Path) -> None:
    """Makes ``folder``, and makes sure that all processes see in it what the main one writes there.

    Raises:
        UserError: some do not, after :data:`PATIENCE` seconds, or it cannot be written; all processes end with it.
    """
    if distributed.get_world_size() == 1:
        return
    token = Path(folder) / distributed.broadcast_object(
        f".{socket.gethostname()}.{time.time_ns()}.part"
    )

    def write() -> None:
        with written_whole(token):
            pass

    def look() -> None:
        if not wait_until(token.exists):
            raise UserError(
                f"{folder} must be on a disk that all machines share: what the main process writes is missing"
            )

    distributed.on_rank_0(write)
    try:
        distributed.on_all_ranks(look)
    finally:
        if distributed.is_main_process():
            token.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------------
# JSON, paths and arrays.

LONGEST_NAME = 255  # bytes, on all usual file systems


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Writes ``value`` as JSON, whole or not at all."""
    with written_whole(path) as file:
        file.write((json.dumps(value, indent=indent) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; UserError if there is none or it is damaged."""
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise UserError(f"cannot read {path}: {what}") from error


def inside(folder: str | Path, name: str) -> Path:
    """The path of ``name``, a relative path, in ``folder``; UserError if it leads out of it, or is too long for one."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise UserError(f"the name {name!r} leads out of {folder}; nothing was written there")
    if longest := [part for part in parts.parts if len(os.fsencode(part)) > LONGEST_NAME]:
        raise UserError(
            f"{longest[0]!r} is longer than the {LONGEST_NAME} bytes of a file's name; rename the image"
        )
    return Path(folder) / parts


def read_arrays(
    path: str | Path, *names: str, optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz``, their checksums compared; no code of the file is run.

    Args:
        optional: names of further arrays, which the file may lack.

    Raises:
        UserError: there is no such file, it is damaged, or it lacks one of ``names``.
    """
    path, arrays = Path(path), {}
    if not path.is_file():
        raise UserError(f"no file at {path}; check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            there = archive.namelist()
            missing = [name for name in names if f"{name}.npy" not in there]
            names += tuple(name for name in optional if f"{name}.npy" in there)
            for name in names if not missing else ():
                with archive.open(f"{name}.npy") as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
                    if file.read(1):  # zipfile compares the checksum when it reaches the end
                        raise ValueError(f"{name} is longer than it says")
    except Exception as error:  # zip, header and array errors have no common class
        raise UserError(f"{path} is damaged or no .npz of arrays ({reason(error)})") from error
    if missing:
        raise UserError(f"{path} has no {' and '.join(missing)}")
    return arrays
