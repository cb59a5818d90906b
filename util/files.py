"""Atomic file writes, checks of shared folders, and safe reading of JSON and npz files."""

import hashlib
import json
import os
import re
import socket
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from util import distributed
from util.errors import UserError, reason


@contextmanager
def written_whole(path: str | Path, flush: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that replaces ``path`` atomically when the block ends without an error.

    Args:
        flush: flush the file to disk before it replaces ``path``. Pass False for one of many files
            that :func:`flush_all` flushes together.

    Raises:
        UserError: the disk is full or the folder cannot be written. ``path`` is unchanged.
    """
    path = Path(path)
    name = path.name
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    part = path.with_name(f".{name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
            yield file
        # Opened again by name: safetensors replaces the file by its own, which only the owner may
        # read. Windows flushes only files that are open for writing.
        with open(part, "r+b") as written:
            if os.fstat(written.fileno()).st_mode != mode:
                os.chmod(part, mode)
            if flush:
                os.fsync(written.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        # torch.save wraps the file system's error in a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"cannot write {path}: {cause.strerror or cause}; free space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


def flush_all() -> None:
    """Flush all written files to disk. Do nothing on Windows, which has no call for it."""
    if hasattr(os, "sync"):
        os.sync()


class FileWriter:
    """Writes files in threads, while their successors are computed; a context manager.

    The exit waits for all files, but only :meth:`wait` and :meth:`finish` report errors.

    Args:
        threads: files that are written at the same time.
    """

    def __init__(self, threads: int = 4):
        self._pool = ThreadPoolExecutor(threads, "writer")
        self._writing: list[Future[None]] = []

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()

    def submit(self, write: Callable[..., None], *arguments: Any) -> None:
        """Start to write a file, by calling ``write(*arguments)``."""
        self._writing.append(self._pool.submit(write, *arguments))

    def wait(self) -> None:
        """Wait until all files are written. Raise the error of the first one that failed."""
        writing, self._writing = self._writing, []
        for file in writing:
            file.result()

    def finish(self) -> None:
        """Wait until all files are on disk; see :meth:`wait`."""
        if self._writing:
            self.wait()
            flush_all()


def remove_parts(paths: Iterable[Path]) -> None:
    """Remove unfinished files of :func:`written_whole` whose process was killed from ``paths``."""
    for path in paths:
        if re.fullmatch(r"\..+\.\d+\.part", path.name):
            path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Folders that all ranks share

#: Network file systems may show an old state of a folder for this many seconds (NFS: acdirmax).
PATIENCE = 60.0


def wait_until(condition: Callable[[], bool]) -> bool:
    """Wait up to :data:`PATIENCE` seconds for ``condition``, and return whether it holds."""
    end = time.monotonic() + PATIENCE
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
    return holds


def check_shared(folder: str | Path) -> None:
    """Create ``folder``, and check that all ranks see the files that rank 0 writes to it.

    Raises:
        UserError: some rank does not see them after :data:`PATIENCE` seconds, or the folder cannot
            be written. All ranks raise it.
    """
    if distributed.get_world_size() == 1:
        return
    token_name = distributed.broadcast_object(f".{socket.gethostname()}.{time.time_ns()}.part")
    token = Path(folder) / token_name

    def write_token() -> None:
        with written_whole(token):
            pass

    def check_token() -> None:
        if not wait_until(token.exists):
            raise UserError(
                f"{folder} must be on a disk that all machines share: a file that rank 0 has "
                "written is missing"
            )

    distributed.on_rank_0(write_token)
    try:
        distributed.on_all_ranks(check_token)
    finally:
        if distributed.is_main_process():
            token.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# JSON, paths and arrays

LONGEST_NAME = 255  # bytes, on all common file systems


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write ``value`` as JSON, atomically."""
    with written_whole(path) as file:
        file.write((json.dumps(value, indent=indent) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise UserError(f"cannot read {path}: {problem}") from error


def inside(folder: str | Path, name: str) -> Path:
    """Return the path of the relative path ``name`` in ``folder``.

    Raises:
        UserError: the name leads out of the folder, or a part of it is too long for a file name.
    """
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise UserError(f"the name {name!r} leads out of {folder}; nothing was written")
    for part in relative.parts:
        if len(os.fsencode(part)) > LONGEST_NAME:
            raise UserError(
                f"{part!r} is longer than the {LONGEST_NAME} bytes of a file name; rename the image"
            )
    return Path(folder) / relative


def read_arrays(
    path: str | Path, *names: str, optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Return arrays of an ``.npz`` by name. Their checksums are compared; no pickle is loaded.

    Args:
        names: arrays that the file must contain.
        optional: arrays that the file may lack.

    Raises:
        UserError: there is no such file, it is damaged, or it lacks one of ``names``.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    if not path.is_file():
        raise UserError(f"no file at {path}; check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            missing = [name for name in names if f"{name}.npy" not in members]
            names += tuple(name for name in optional if f"{name}.npy" in members)
            for name in names if not missing else ():
                with archive.open(f"{name}.npy") as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
                    if file.read(1):  # zipfile compares the checksum at the end of the file
                        raise ValueError(f"{name} has more bytes than its header says")
    except Exception as error:  # zip, header and array errors have no common class
        raise UserError(f"{path} is damaged or no .npz of arrays ({reason(error)})") from error
    if missing:
        raise UserError(f"{path} has no {' and '.join(missing)}")
    return arrays
