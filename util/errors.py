"""Errors for the person at the keyboard: one line that says what was wrong and what to do."""

import os
import re
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. The message is one line; scripts print it and exit with status 2."""


class Preempted(Exception):
    """The run was asked to stop by a signal, and has saved: exit status 75 (EX_TEMPFAIL), start the command again."""


PREEMPTED_STATUS = 75


def run(main: Callable[[], None]) -> None:
    """Runs a script's ``main``; a :class:`UserError` becomes its one line on standard error and exit status 2.

    :class:`Preempted` likewise, with status 75.
    """
    try:
        main()
    except UserError as error:
        # One raised in a data loader's worker arrives wrapped in that process's traceback.
        wrapped = re.findall(r"UserError: (.*)", str(error))
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f"[process {rank}] "
        print(f"{where}error: {wrapped[-1] if wrapped else error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Preempted as error:
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        sys.exit(PREEMPTED_STATUS)
