"""Signals that ask a run to stop: all ranks stop after the same step."""

import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from util import distributed
from util.devices import c_library
from util.errors import Preempted


class StopSignals:
    """Records SIGTERM, SIGUSR1 and SIGINT, so that all ranks can stop after the same step.

    A context manager, which restores the former handlers at its end. A SIGINT more than
    :data:`SAME` seconds after the first signal kills the process at once. An earlier SIGINT is
    taken for the same one: a terminal sends it to every process, and torchrun sends it again to the
    processes that it started.

    Args:
        device: the ranks exchange the signals on it, by the same network as the gradients.

    Attributes:
        heard: the name of the last signal that this rank received.
    """

    NUMBERS = tuple(
        getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
    )
    SAME = 2.0

    def __init__(self, device: torch.device):
        self.heard: str | None = None
        self.device = device
        self.answer: distributed.HostCopy | None = None
        # Set the default handler in C: a Python handler, such as that of KeyboardInterrupt, would
        # run only after a collective operation or the write of a checkpoint has ended.
        self.kill_by_next = threading.Timer(
            self.SAME, lambda: c_library("signal", signal.SIGINT, signal.SIG_DFL)
        )
        self.kill_by_next.daemon = True

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self._hear) for number in self.NUMBERS}
        return self

    def __exit__(self, *_) -> None:
        self.kill_by_next.cancel()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if self.heard is None:
            self.kill_by_next.start()
        self.heard = signal.Signals(number).name

    def agreed(self) -> bool:
        """Return whether any rank had received a signal by the previous call.

        All ranks must call this once per step.
        """
        if not dist.is_initialized():
            return self.heard is not None
        # The result is read one step later, so that no rank waits for its device or another rank.
        stop = self.answer is not None and bool(self.answer.read())
        count = torch.full((), float(self.heard is not None), device=self.device)
        self.answer = distributed.HostCopy(count, dist.all_reduce(count, async_op=True))
        return stop

    def check(self) -> None:
        """Gather the signals of all ranks. All ranks must call this, and wait for each other.

        Raises:
            Preempted: a rank has received a signal. All ranks raise it.
        """
        names = [name for name in distributed.gather_objects(self.heard) if name is not None]
        if names:
            raise Preempted(f"by {names[0]}")


def until_stopped(loader: DataLoader, stop_signals: StopSignals | None) -> Iterator:
    """Yield the batches of this rank's ``loader``. After a signal all ranks stop at the same batch.

    Raises:
        Preempted: see :meth:`StopSignals.check`.
    """
    fewest = 0 if stop_signals is None else min(distributed.gather_objects(len(loader)))
    for number, batch in enumerate(loader):
        yield batch
        if stop_signals is not None and number < fewest:
            stop_signals.check()
