"""Log, warnings and progress bars of a run."""

import logging
import sys
from collections.abc import Callable, Iterable
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


class LineBar(tqdm):
    """A progress bar for files and pipes, where every state is a line of its own."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Return the function that writes a state."""

        def write(text: str) -> None:
            if text:
                print(text, file=file, flush=True)

        return write


def progress_bar(iterable: Iterable | None = None, **options) -> tqdm:
    """Return a progress bar with rate and remaining time, which only rank 0 shows.

    If standard error is no terminal, it writes a line every 20 s instead. Use it in a ``with``
    block: that ends the line of the bar before an error is printed.
    """
    disable = not distributed.is_main_process()
    if sys.stderr.isatty():
        return tqdm(iterable, disable=disable, mininterval=0.5, dynamic_ncols=True, **options)
    return LineBar(iterable, disable=disable, **{"mininterval": 20.0, **options})
