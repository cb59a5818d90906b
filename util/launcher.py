"""Notes that a process leaves for its successor after a restart by torchrun (``--max_restarts``).

They are files in the launcher's own folder on each machine, which other launchers do not read.
Without torchrun, or with a torchrun that has no such folder, nothing is written.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

END_NAME = "end.json"
SAVED_NAME = "saved.json"


def restarts() -> int:
    """Return how often torchrun has restarted this machine's processes; 0 without torchrun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _folder() -> Path | None:
    # The variable contains <folder>/attempt_<n>/<local rank>/error.json.
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
    """Write the exit status and message of a run that must not be restarted."""
    _write(f"attempt_{restarts()}/{END_NAME}", [status, message])


def end_before() -> tuple[int, str] | None:
    """Return the status and message that :func:`note_end` wrote before the last restart.

    When a machine joins, torchrun repeats an attempt and empties its folder. Such a restart
    continues the run.
    """
    return _read(f"attempt_{restarts() - 1}/{END_NAME}")


def note_saved(path: str | Path) -> None:
    """Write that the run has saved the checkpoint ``path``."""
    _write(SAVED_NAME, str(path))


def saved_before() -> str | None:
    """Return the path that :func:`note_saved` wrote on this machine; None without a note."""
    return _read(SAVED_NAME)


def launched() -> bool:
    """Return whether torchrun, or a launcher that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ends_all_ranks() -> bool:
    """Return whether torchrun started this process: it ends all ranks when the first one fails."""
    return "TORCHELASTIC_RUN_ID" in os.environ
