"""Write checkpoints during training: copy the state to host memory, and write it in a thread."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util import launcher
from util.checkpoint.files import Stamp, link_or_copy, save_checkpoint
from util.errors import reason
from util.log import log

#: Seconds before the first retry of a failed write. Each pause doubles, up to the second value.
PAUSE, LONGEST_PAUSE = 30.0, 600.0


def snapshot(value: Any, copies: dict[int, torch.UntypedStorage] | None = None) -> Any:
    """Return ``value`` with the tensors in its dictionaries and lists copied to host memory.

    Tensors that share memory share it in the copy, too. Copies of CUDA tensors are asynchronous, in
    the order of the current stream: synchronize the device before reading them.

    Args:
        copies: the copied storages by address, for recursive calls.
    """
    copies = {} if copies is None else copies
    if isinstance(value, dict):
        result = copy.copy(value)  # keeps the attributes of a state_dict
        result.update((name, snapshot(entry, copies)) for name, entry in value.items())
        return result
    if isinstance(value, list):
        return [snapshot(entry, copies) for entry in value]
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    if storage.data_ptr() not in copies:
        # A GPU copies to pinned memory at full bus speed. PyTorch caches this memory for the next
        # checkpoint.
        buffer = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.is_cuda)
        host = buffer.untyped_storage()
        copies[storage.data_ptr()] = host.copy_(storage, non_blocking=storage.is_cuda)
    host = copies[storage.data_ptr()]
    return torch.empty(0, dtype=value.dtype).set_(
        host, value.storage_offset(), value.size(), value.stride()
    )


class Saver:
    """Writes checkpoints one after another in a thread, with :func:`save_checkpoint`.

    A thread is sufficient: ``torch.save`` computes checksums and writes without Python's lock. The
    interpreter waits for the thread when it exits. If the process is killed, the previous
    checkpoint stays undamaged.

    A failed write is retried, after :data:`PAUSE` seconds at first, until it succeeds or a later
    checkpoint replaces it. So a disk that is full for a while does not end a run.

    The saver is a context manager: its exit waits, also after an error, until the last file is
    written.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._has_warned = False  # training has waited for the disk
        self._failing = False  # the last attempt failed
        self._wake = threading.Event()  # ends the pause before a retry
        self._replaced = False  # a later checkpoint replaces the one that is being written
        #: Stamp of the newest file known to be undamaged: read by the resumed run, or written last.
        self.whole: Stamp | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        try:
            self.finish()
        except Exception as save_error:
            if error is None:
                raise
            log.error("%s; the run ends because of another error", reason(save_error))

    def save(
        self,
        path: Path,
        content: dict[str, Any],
        keep_last: int,
        wanted: Callable[[], bool] = lambda: True,
        milestone: Path | None = None,
    ) -> None:
        """Start to write the current state of ``content``, after the previous file is finished.

        Args:
            path, keep_last: see :func:`util.checkpoint.files.save_checkpoint`.
            wanted: called in the thread; returns whether the file is written.
            milestone: a second name for the file, which later checkpoints do not replace.
        """
        if self._writing is not None:
            if not self._writing.done() and not self._failing and not self._has_warned:
                self._has_warned = True
                log.warning(
                    "the previous checkpoint is still being written: training waits for the disk; "
                    "raise --save_every_steps, unless this is the last checkpoint"
                )
            self._replaced = True
            self.finish()
        content = snapshot(content)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._wake.clear()
        self._failing = False
        self._replaced = False
        self._writing = self._thread.submit(
            self._write, path, content, keep_last, wanted, milestone
        )

    def _write(
        self,
        path: Path,
        content: dict[str, Any],
        keep_last: int,
        wanted: Callable[[], bool],
        milestone: Path | None,
    ) -> None:
        """Write a checkpoint, with retries, until it succeeds, is replaced or is not wanted."""
        pause = PAUSE
        while wanted():
            try:
                self.whole = save_checkpoint(path, content, keep_last, self.whole)
                if milestone is not None:
                    link_or_copy(path, milestone)
                launcher.note_saved(path)
                return
            except Exception as error:
                if self._wake.is_set() and not self._replaced:
                    raise
                self._failing = True
                log.warning(
                    "%s; training continues, and the checkpoint is retried in %d s",
                    reason(error),
                    pause,
                )
            self._wake.wait(pause)
            if self._replaced:
                return
            pause = min(2 * pause, LONGEST_PAUSE)

    def finish(self) -> None:
        """Wait until the last file is on disk; retry a failed write once, and raise its error."""
        writing = self._writing
        self._writing = None
        self._wake.set()
        if writing is not None:
            writing.result()
