"""Checkpoints that are written while training goes on: a copy in host memory, and a thread that writes it."""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util import checkpoint
from util.misc import log


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
        host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.is_cuda).untyped_storage()
        copies[storage.data_ptr()] = host.copy_(storage, non_blocking=storage.is_cuda)
    host = copies[storage.data_ptr()]
    return torch.empty(0, dtype=value.dtype).set_(host, value.storage_offset(), value.size(), value.stride())


class Saver:
    """Writes one checkpoint after another as :func:`util.checkpoint.save` does, in a thread.

    A thread is enough: ``torch.save`` computes checksums and writes without Python's lock. The interpreter's end waits
    for it; a killed process leaves the file before, whole.

    A context manager: leaving it waits, also after an error, until the last file is there.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._waited = False

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_) -> None:
        self.finish()

    def save(self, path: Path, content: dict[str, Any], keep_last: int) -> None:
        """Starts to write ``content`` as it is now, once the file before is written.

        Raises:
            UserError: the file before could not be written.
        """
        if self._writing is not None and not self._writing.done() and not self._waited:
            self._waited = True
            log.warning(
                "a checkpoint is due, but the one before is still being written: training waits for the disk; "
                "if it is not the last, raise --save_every_steps"
            )
        self.finish()
        content = snapshot(content)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._writing = self._thread.submit(checkpoint.save, path, content, keep_last)

    def finish(self) -> None:
        """Waits until the last file is on disk; UserError if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
