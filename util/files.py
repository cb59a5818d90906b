"""Files that are whole or not there: written beside their place, flushed to the disk, and renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from util.errors import UserError


@contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write that takes ``path``'s place only when the block ends without an error.

    Raises:
        UserError: the disk is full or the folder cannot be written; what was at ``path`` stays.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, whole or not at all."""
    with written_whole(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
