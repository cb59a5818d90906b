"""Checkpoints that are written while training goes on: a copy in host memory, and a thread that writes it."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util import launcher
from util.checkpoint.files import Stamp, save_checkpoint
from util.errors import reason
from util.log import log

#: Seconds until a file that could not be written is tried again, at first, and at most: each pause doubles.
PAUSE, LONGEST_PAUSE = 30.0, 600.0


def snapshot(value: Any, copies: dict[int, torch.UntypedStorage] | None = None) -> Any:
    """``value`` with all tensors in its dictionaries and lists copied into host memory; what shared memory still does.

    Copies of CUDA tensors are whole once the device is synchronized, and hold what its current stream leads up to.
    """
    copies = {} if copies is None else copies
    if isinstance(value, dict):
        result = copy.copy(value)  # the dictionary of a model's weights has attributes of its own
        result.update((name, snapshot(entry, copies)) for name, entry in value.items())
        return result
    if isinstance(value, list):
        return [snapshot(entry, copies) for entry in value]
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    if storage.data_ptr() not in copies:
        # A GPU sends to pinned memory at the speed of its bus; PyTorch keeps that memory for the next checkpoint.
        host = torch.empty(
            storage.nbytes(), dtype=torch.uint8, pin_memory=storage.is_cuda
        ).untyped_storage()
        copies[storage.data_ptr()] = host.copy_(storage, non_blocking=storage.is_cuda)
    host = copies[storage.data_ptr()]
    return torch.empty(0, dtype=value.dtype).set_(
        host, value.storage_offset(), value.size(), value.stride()
    )


class Saver:
    """Writes one checkpoint after another as :func:`util.checkpoint.files.save_checkpoint` does, in a thread.

    A thread is enough: ``torch.save`` computes checksums and writes without Python's lock. The interpreter's end waits
    for it; a killed process leaves the file before, whole.

    A file that cannot be written is tried again, after :data:`PAUSE` seconds at first, until it is written or a later
    checkpoint takes its place: a disk that is full for a while does not end a run.

    A context manager: leaving it waits, also after an error, until the last file is there.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._waited = False
        self._failing = False  # the last attempt has failed
        self._wake, self._replaced = threading.Event(), False
        #: The stamp of the newest file known to be whole: the one that the run was resumed from, or wrote last.
        self.whole: Stamp | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        try:
            self.finish()
        except Exception as failed:
            if error is None:
                raise
            log.error("%s; the run ends for another reason", reason(failed))

    def save(
        self,
        path: Path,
        content: dict[str, Any],
        keep_last: int,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Start to write ``content`` as it is now, once the file before is written or given up.

        Args:
            wanted: decides in the thread whether the file is written.
        """
        if self._writing is not None:
            if not self._writing.done() and not self._failing and not self._waited:
                self._waited = True
                log.warning(
                    "a checkpoint is due, but the one before is still being written: training waits for the disk; "
                    "if it is not the last, raise --save_every_steps"
                )
            self._replaced = True
            self.finish()
        content = snapshot(content)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._wake.clear()
        self._failing = self._replaced = False
        self._writing = self._thread.submit(self._write, path, content, keep_last, wanted)

    def _write(
        self, path: Path, content: dict[str, Any], keep_last: int, wanted: Callable[[], bool]
    ) -> None:
        pause = PAUSE
        while wanted():
            try:
                self.whole = save_checkpoint(path, content, keep_last, self.whole)
                launcher.note_saved(path)
                return
            except Exception as error:
                if self._wake.is_set() and not self._replaced:
                    raise
                self._failing = True
                log.warning(
                    "%s; training goes on, the checkpoint is tried again in %d s",
                    reason(error),
                    pause,
                )
            self._wake.wait(pause)
            if self._replaced:
                return
            pause = min(2 * pause, LONGEST_PAUSE)

    def finish(self) -> None:
        """Wait until the last file is on disk, trying at once if it could not be written; its error if that fails."""
        writing, self._writing = self._writing, None
        self._wake.set()
        if writing is not None:
            writing.result()
