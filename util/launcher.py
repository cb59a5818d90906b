"""Notes for the processes that torchrun starts in the place of these ones (``--max_restarts``).

They lie in the launcher's own folder on each machine, which other launchers do not read. Without torchrun, and with a
torchrun that has no such folder, nothing is noted.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

END_NAME, SAVED_NAME = "end.json", "saved.json"


def restarts() -> int:
    """Return how often torchrun has restarted this machine's processes after one failed; 0 without torchrun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _folder() -> Path | None:
    """Return the launcher's folder: TORCHELASTIC_ERROR_FILE is ``<folder>/attempt_<n>/<local rank>/error.json``."""
    path = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return path.parents[2] if path.parent.parent.name == f"attempt_{restarts()}" else None


def _write(name: str, value: Any) -> None:
    if folder := _folder():
        with suppress(OSError):
            (folder / name).write_text(json.dumps(value))


def _read(name: str) -> Any:
    if folder := _folder():
        with suppress(OSError, ValueError):
            return json.loads((folder / name).read_text())
    return None


def note_end(status: int, message: str) -> None:
    """Note the exit status and message of a process that must not be tried again."""
    _write(f"attempt_{restarts()}/{END_NAME}", [status, message])


def end_before() -> tuple[int, str] | None:
    """Return what :func:`note_end` noted before the last restart.

    torchrun empties the folder of an attempt when it starts the attempt again because a machine has joined: such a
    restart continues the run.
    """
    return _read(f"attempt_{restarts() - 1}/{END_NAME}")


def note_saved(path: str | Path) -> None:
    """Note that the run has written its checkpoint ``path``."""
    _write(SAVED_NAME, str(path))


def saved_before() -> str | None:
    """Return the path that :func:`note_saved` noted on this machine."""
    return _read(SAVED_NAME)


def launched() -> bool:
    """Whether torchrun started this process, or what sets its variables."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
