"""Errors for the person at the keyboard: one line that says what was wrong and what to do."""

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any, NoReturn

import torch.distributed as dist

from util import launcher


class UserError(Exception):
    """An error that the user can mend. Its message is one line; scripts print it and exit with status 2."""


class NotFinite(UserError):
    """A stage of the model computed NaN or infinity."""


class ToldByMain(UserError):
    """A user error that ends every process, which the main process prints for all."""


class NotFiniteToldByMain(NotFinite, ToldByMain):
    """A :class:`NotFinite` of every process, which the main process prints for all."""


def told_by_main(error: UserError) -> ToldByMain:
    """Return the error that other processes raise where the main process raises, and prints, ``error``."""
    return (NotFiniteToldByMain if isinstance(error, NotFinite) else ToldByMain)(str(error))


def reason(error: BaseException) -> str:
    """The first line of an error's message, or the error's type if the message is empty."""
    return (str(error) or type(error).__name__).splitlines()[0]


def some(names: Sequence[str], limit: int = 4) -> str:
    """Return the first ``limit`` of ``names``, and the number of the others, as text."""
    return ", ".join(names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )


def one_line(error: BaseException) -> str:
    """Return one line that says what ``error`` is, also if a data loader's worker raised it."""
    wrapped = re.findall(r"UserError: (.*)", str(error))  # it then holds that process's traceback
    if wrapped or isinstance(error, UserError):
        return wrapped[-1] if wrapped else str(error)
    return f"{type(error).__name__}: {reason(error)}"


def as_user_error(error: BaseException) -> UserError:
    """Return :func:`one_line` of ``error`` as a UserError that other processes can be sent."""
    return (NotFinite if isinstance(error, NotFinite) else UserError)(one_line(error))


def where() -> str:
    """A prefix that names the process that prints a message; empty for the main one."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[process {rank}] "


class Preempted(Exception):
    """A signal asked the run to stop, and it has saved; exit status 75 tells a scheduler to start the command again."""


USER_ERROR_STATUS = 2
PREEMPTED_STATUS = 75  # EX_TEMPFAIL
INTERRUPTED_STATUS = 128 + signal.SIGINT  # as shells count it


def lost_process(error: Exception) -> bool:
    """Whether ``error`` is what a collective operation raises when another process has ended or does not take part."""
    signs = ("gloo", "NCCL", "Connection closed", "pair closure")
    lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return lost or isinstance(error, dist.DistError)


class LossyStream:
    """A text stream that drops what cannot be written.

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
    """Drop what cannot be written to standard error: a closed pipe or a full disk must not end a run."""
    stream = sys.stderr
    try:
        with redirect_stderr(LossyStream(stream)):
            yield
    finally:
        try:
            stream.flush()
        except OSError:  # Python would try again when it exits, and replace the exit status by 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@lossy_stderr()
def run(main: Callable[[], None]) -> None:
    """Run a script's ``main``; a :class:`UserError` becomes its one line on standard error and exit status 2.

    :class:`Preempted` likewise, with status 75; Ctrl-C with status 130; the loss of another process with status 1.
    torchrun's restarts of this process end with the same line and status 2 or 75 (:mod:`util.launcher`).
    """
    try:
        main()
    except ToldByMain:
        sys.exit(USER_ERROR_STATUS)
    except UserError as error:
        message = one_line(error)
        launcher.note_end(USER_ERROR_STATUS, message)
        print(f"{where()}error: {message}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_STATUS)
    except Preempted as error:
        launcher.note_end(PREEMPTED_STATUS, str(error))
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        sys.exit(PREEMPTED_STATUS)
    except KeyboardInterrupt:  # outside of training, which saves first
        print(f"{where()}interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED_STATUS)
    except RuntimeError as error:
        if not lost_process(error):
            raise
        traceback.print_exc()
        print(
            f"{where()}error: another process of this run is gone; what it said last tells why",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(1)  # without taking down the process group, which would wait for the lost process


def repeat_end(status: int, message: str, rank: int) -> NoReturn:
    """End this process, restarted by torchrun, as its run has ended before; rank 0 prints the message.

    Args:
        status, message: from :func:`util.launcher.end_before`.
    """
    if status == PREEMPTED_STATUS:
        raise SystemExit(status) if rank else Preempted(message)
    raise ToldByMain(message) if rank else UserError(message)
