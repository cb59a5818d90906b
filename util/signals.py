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
from util.errors import (
    Preempted,
)


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and SIGINT, so that all processes can stop after the same step.

    A context manager: leaving it restores the signals' former handlers. A SIGINT more than :data:`SAME` seconds after
    the first signal kills at once. One that comes sooner is the same one: a terminal sends it to every process, and
    torchrun once more to those that it started.

    Args:
        device: on which processes tell each other, so that the run needs no other network than that of its gradients.
    """

    NUMBERS = tuple(
        getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
    )
    SAME = 2.0

    def __init__(self, device: torch.device):
        self.heard: str | None = None
        self.device = device
        self.answer: distributed.HostCopy | None = None
        # KeyboardInterrupt would wait for collectives and a checkpoint, as would any handler of Python's.
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
        """Whether any process had a signal when all last exchanged; all processes must call this once a step."""
        if not dist.is_initialized():
            return self.heard is not None
        # Answered a step later: neither is the device waited for, nor another process.
        stop = self.answer is not None and bool(self.answer.read())
        heard = torch.full((), float(self.heard is not None), device=self.device)
        self.answer = distributed.HostCopy(heard, dist.all_reduce(heard, async_op=True))
        return stop

    def check(self) -> None:
        """Wait for all processes, each of which must call this, and compare what they have heard.

        Raises:
            Preempted: one of them has had a signal, on all processes.
        """
        heard = [name for name in distributed.gather_objects(self.heard) if name is not None]
        if heard:
            raise Preempted(f"by {heard[0]}")


def until_stopped(loader: DataLoader, stop_signals: StopSignals | None) -> Iterator:
    """Yield the batches of this process's ``loader``; all processes stop after the same one where there are signals.

    Raises:
        Preempted: see :meth:`StopSignals.check`.
    """
    fewest = 0 if stop_signals is None else min(distributed.gather_objects(len(loader)))
    for number, batch in enumerate(loader):
        yield batch
        if stop_signals is not None and number < fewest:
            stop_signals.check()
