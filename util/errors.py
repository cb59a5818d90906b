"""Errors for the person at the keyboard: one line that says what was wrong and what to do."""

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

import torch.distributed as dist


class UserError(Exception):
    """An error that the user can mend. Its message is one line; scripts print it and exit with status 2."""


class ToldByMain(UserError):
    """A user error that ends every process, which the main process prints for all."""


def reason(error: BaseException) -> str:
    """The first line of an error's message, or the error's type if the message is empty."""
    return (str(error) or type(error).__name__).splitlines()[0]


def some(names: Sequence[str], limit: int = 4) -> str:
    """Return the first ``limit`` of ``names``, and the number of the others, as text."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def where() -> str:
    """A prefix that names the process that prints a message; empty for the main one."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[process {rank}] "


class Preempted(Exception):
    """A signal asked the run to stop, and it has saved; exit status 75 tells a scheduler to start the command again."""


PREEMPTED_STATUS = 75  # EX_TEMPFAIL
INTERRUPTED_STATUS = 128 + signal.SIGINT  # as shells count it


def lost_process(error: RuntimeError) -> bool:
    """Whether ``error`` is what a collective operation raises when another process has ended or does not take part."""
    signs = ("gloo", "NCCL", "Connection closed", "pair closure")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def run(main: Callable[[], None]) -> None:
    """Runs a script's ``main``; a :class:`UserError` becomes its one line on standard error and exit status 2.

    :class:`Preempted` likewise, with status 75; Ctrl-C with status 130; the loss of another process with status 1.
    """
    try:
        main()
    except ToldByMain:
        sys.exit(2)
    except UserError as error:
        # An error of a data loader's worker holds that process's traceback.
        wrapped = re.findall(r"UserError: (.*)", str(error))
        print(f"{where()}error: {wrapped[-1] if wrapped else error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Preempted as error:
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        sys.exit(PREEMPTED_STATUS)
    except KeyboardInterrupt:  # outside of training, which saves first
        print(f"{where()}interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED_STATUS)
    except RuntimeError as error:
        if not lost_process(error):
            raise
        traceback.print_exc()
        print(f"{where()}error: another process of this run is gone; what it said last tells why", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # without taking down the process group, which would wait for the lost process
