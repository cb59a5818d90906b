"""Errors for users (one line that says what is wrong and what to do), and exit statuses."""

import atexit
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any, NoReturn

import util.location  # noqa: F401, since almost every module imports this one

import torch.distributed as dist

from util import launcher


class UserError(Exception):
    """An error that the user can fix. Scripts print its one-line message and exit with status 2."""


class NotFinite(UserError):
    """A stage of the model computed NaN or infinity."""


class ReportedByRank0(UserError):
    """A user error on every rank, which rank 0 prints. The other ranks exit without a message."""


class NotFiniteReportedByRank0(NotFinite, ReportedByRank0):
    """A :class:`NotFinite` on every rank, which rank 0 prints."""


def reported_by_rank_0(error: UserError) -> ReportedByRank0:
    """Return the error for the other ranks to raise when rank 0 raises ``error``."""
    error_type = NotFiniteReportedByRank0 if isinstance(error, NotFinite) else ReportedByRank0
    return error_type(str(error))


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty."""
    return (str(error) or type(error).__name__).splitlines()[0]


def some(names: Sequence[str], limit: int = 4) -> str:
    """Return text with the first ``limit`` of ``names`` and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def one_line(error: BaseException) -> str:
    """Return one line that describes ``error``, also if a worker of a data loader raised it."""
    # The message of a worker's error contains the worker's traceback.
    worker_messages = re.findall(r"UserError: (.*)", str(error))
    if worker_messages:
        return worker_messages[-1]
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {reason(error)}"


def as_user_error(error: BaseException) -> UserError:
    """Return :func:`one_line` of ``error`` as a UserError that can be sent to other ranks."""
    return (NotFinite if isinstance(error, NotFinite) else UserError)(one_line(error))


def where() -> str:
    """Return the prefix of messages, which names the rank. It is empty on rank 0."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[rank {rank}] "


class Preempted(Exception):
    """A signal stopped the run, which has saved. Exit status 75 asks a scheduler to restart it."""


USER_ERROR_STATUS = 2
PREEMPTED_STATUS = 75  # EX_TEMPFAIL
INTERRUPTED_STATUS = 128 + signal.SIGINT  # the convention of shells


def lost_process(error: Exception) -> bool:
    """Return whether a collective operation raised ``error`` because another rank is missing."""
    signs = ("gloo", "NCCL", "Connection closed", "pair closure")
    lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return lost or isinstance(error, dist.DistError)


class LossyStream:
    """A text stream that drops text which cannot be written.

    Args:
        stream: the stream to write to.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write ``text`` if possible."""
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        with suppress(OSError):
            self.stream.flush()


@contextmanager
def lossy_stderr() -> Iterator[None]:
    """Ignore failed writes to standard error: a closed pipe or a full disk must not end a run."""
    stream = sys.stderr
    try:
        with redirect_stderr(LossyStream(stream)):
            yield
    finally:
        try:
            stream.flush()
        except OSError:
            # Python would flush again at its exit, fail, and replace the exit status by 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


#: How long other ranks wait until rank 0 has printed its message, if their end would end it, too.
SECONDS_FOR_RANK_0 = 3.0


def exit_at_once(status: int) -> NoReturn:
    """Write what is left to the standard streams, and end this process."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def leave(status: int) -> NoReturn:
    """Raise SystemExit; after that, Python does not destroy the process group of a failed run.

    That aborts (status 134) if a thread of the group is still at work. Other ranks than 0 first
    give rank 0 the time to print its message.
    """
    if dist.is_initialized():
        if launcher.ends_all_ranks() and os.environ["RANK"] != "0":
            time.sleep(SECONDS_FOR_RANK_0)
        atexit.register(exit_at_once, status)
    sys.exit(status)


@lossy_stderr()
def run(main: Callable[[], None]) -> None:
    """Run a script's ``main``, and turn its errors into exit statuses.

    :class:`UserError` gives status 2 and :class:`Preempted` 75; each is printed as one line.
    Ctrl-C gives 130, and the end of another rank 1. Other errors are raised.

    If torchrun restarts this process after status 2 or 75, the new process ends with the same
    message and status (:mod:`util.launcher`).
    """
    try:
        main()
    except ReportedByRank0:
        leave(USER_ERROR_STATUS)
    except UserError as error:
        message = one_line(error)
        launcher.note_end(USER_ERROR_STATUS, message)
        print(f"{where()}error: {message}", file=sys.stderr, flush=True)
        leave(USER_ERROR_STATUS)
    except Preempted as error:
        launcher.note_end(PREEMPTED_STATUS, str(error))
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        leave(PREEMPTED_STATUS)
    except KeyboardInterrupt:  # outside of training, which saves first
        print(f"{where()}interrupted", file=sys.stderr, flush=True)
        leave(INTERRUPTED_STATUS)
    except RuntimeError as error:
        if not lost_process(error):
            raise
        traceback.print_exc()
        print(
            f"{where()}error: another rank of this run has ended; its last messages say why",
            file=sys.stderr,
            flush=True,
        )
        # A normal exit would destroy the process group, which waits for the missing rank.
        exit_at_once(1)


def repeat_end(status: int, message: str, rank: int) -> NoReturn:
    """End this process, which torchrun has restarted, as the run ended before the restart.

    Rank 0 prints the message.

    Args:
        status, message: from :func:`util.launcher.end_before`.
    """
    if status == PREEMPTED_STATUS:
        raise SystemExit(status) if rank else Preempted(message)
    raise ReportedByRank0(message) if rank else UserError(message)
