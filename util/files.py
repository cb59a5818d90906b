"""Files that are written whole or not at all, and JSON and npz files that are read without running code."""

import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from util.errors import UserError, reason


@contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write; it replaces ``path`` when the block ends without an error, and is flushed to disk before.

    Raises:
        UserError: the disk is full or the folder cannot be written; ``path`` is as it was.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
            yield file
        # Opened by name, since safetensors replaces the file by one of its own, which nobody else may read.
        with open(beside, "rb") as written:
            if os.fstat(written.fileno()).st_mode != mode:
                os.fchmod(written.fileno(), mode)
            os.fsync(written.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        # torch.save wraps the file system's error in a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
        if not isinstance(cause, OSError):
            raise
        what = cause.strerror or cause
        raise UserError(f"cannot write {path}: {what}; free space or choose another folder") from error
    finally:
        with suppress(OSError):
            beside.unlink()


def remove_parts(paths: Iterable[Path]) -> None:
    """Removes those of ``paths`` that :func:`written_whole` left unfinished because its process was killed."""
    for path in paths:
        if path.name.startswith(".") and path.name.endswith(".part"):
            path.unlink(missing_ok=True)


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
    """The path of ``name``, a relative path, in ``folder``; UserError if it leads out of ``folder``."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise UserError(f"the name {name!r} leads out of {folder}; nothing was written there")
    return Path(folder) / parts


def read_arrays(path: str | Path, *names: str) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz``, their checksums compared; no code of the file is run.

    Raises:
        UserError: there is no such file, it is damaged, or it lacks one of ``names``.
    """
    path, arrays = Path(path), {}
    if not path.is_file():
        raise UserError(f"no file at {path}; check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            missing = [name for name in names if f"{name}.npy" not in archive.namelist()]
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
