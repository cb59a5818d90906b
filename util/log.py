"""The log of a run, its warnings and progress bars."""

import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from util import distributed
from util.errors import (
    where,
)

log = logging.getLogger("tokenbridge")


def start_log() -> None:
    """Sends the main process's log to standard error, and of others, by their number, what warns."""
    handler = logging.StreamHandler()  # made anew, since tests replace sys.stderr
    handler.setFormatter(logging.Formatter(f"{where()}%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO if distributed.is_main_process() else logging.WARNING)


def warn(message: str, *args: Any) -> None:
    """Logs a warning that every process has: the main one says it for all."""
    if distributed.is_main_process():
        log.warning(message, *args)


def progress_bar(iterable: Iterable | None = None, **options) -> tqdm:
    """The main process's progress bar with rate and time left; redrawn every 20 s if standard error is no terminal.

    Use it in a ``with`` block, which ends its line before an error is printed.
    """
    interactive = sys.stderr.isatty()
    options = {"mininterval": 0.5 if interactive else 20.0, "dynamic_ncols": interactive, **options}
    return tqdm(iterable, disable=not distributed.is_main_process(), **options)
