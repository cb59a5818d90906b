"""Log, warnings and progress bars of a run."""

import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from util import distributed
from util.errors import where

log = logging.getLogger("tokenbridge")


def start_log() -> None:
    """Send the log to standard error: everything from rank 0, only warnings from other ranks."""
    # A new handler, since tests replace sys.stderr
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{where()}%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO if distributed.is_main_process() else logging.WARNING)


def warn(message: str, *args: Any) -> None:
    """Log a warning that applies to all ranks. Only rank 0 prints it."""
    if distributed.is_main_process():
        log.warning(message, *args)


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, which gets an s unless the number is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a duration in a unit that people read easily."""
    for limit, unit, size in ((120, "seconds", 1), (7200, "minutes", 60), (172_800, "hours", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"


def progress_bar(iterable: Iterable | None = None, **options) -> tqdm:
    """Return a progress bar with rate and remaining time, which only rank 0 shows.

    It is redrawn every 20 s if standard error is no terminal. Use it in a ``with`` block: that ends
    the line of the bar before an error is printed.
    """
    interactive = sys.stderr.isatty()
    options = {"mininterval": 0.5 if interactive else 20.0, "dynamic_ncols": interactive, **options}
    return tqdm(iterable, disable=not distributed.is_main_process(), **options)
