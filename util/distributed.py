"""Ranks and collective operations. Everything works with torchrun and without it."""

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from util.errors import UserError, as_user_error, reported_by_rank_0


def get_rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this is rank 0, which writes the shared files and prints messages."""
    return get_rank() == 0


def is_local_main_process() -> bool:
    """Return whether this process is the first one on its machine."""
    return not dist.is_initialized() or int(os.environ.get("LOCAL_RANK", 0)) == 0


#: A collective operation waits this long for the slowest rank, then the run ends. The limit is
#: long, since rank 0 computes metrics and writes files while the other ranks wait.
TIMEOUT = timedelta(minutes=30)
#: The limit in a training step. The loss of a machine may show in nothing but this timeout.
STEP_TIMEOUT = timedelta(minutes=5)


def _set_timeout(limit: timedelta) -> None:
    if dist.is_initialized():
        newer = hasattr(dist, "set_timeout")
        dist.set_timeout(limit) if newer else dist.distributed_c10d._set_pg_timeout(limit)


@contextmanager
def collective_timeout(limit: timedelta) -> Iterator[None]:
    """Set the timeout of collective operations to ``limit`` in the block, then to ``TIMEOUT``."""
    _set_timeout(limit)
    yield
    _set_timeout(TIMEOUT)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_mean(value: Tensor) -> Tensor:
    """Return the mean of ``value`` over all ranks."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / get_world_size()


def broadcast_object(value: Any) -> Any:
    """Return rank 0's ``value`` (plain types) on all ranks."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: Any) -> list:
    """Return each rank's ``value`` (plain types), by rank, on all ranks."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def raise_on_all_ranks(error: str | UserError) -> NoReturn:
    """End all ranks with a UserError that rank 0 prints. Every rank must call this."""
    error = UserError(error) if isinstance(error, str) else error
    raise error if is_main_process() else reported_by_rank_0(error)


def on_rank_0(work: Callable[[], Any]) -> Any:
    """Run ``work`` on rank 0, and return its result (plain types) on all ranks.

    Raises:
        UserError: ``work`` raised one. All ranks raise it, and rank 0 prints it. After any other
            error, rank 0 raises the original one.
    """
    result, original = None, None
    if is_main_process():
        try:
            result = work()
        except Exception as error:
            original = error
    result, error = broadcast_object((result, original and as_user_error(original)))
    if error is not None:
        raise original or reported_by_rank_0(error)
    return result


def on_all_ranks(work: Callable[[], Any]) -> Any:
    """Run ``work`` on every rank, and return this rank's result.

    ``work`` must make the same collective calls on every rank, also where it fails.

    Raises:
        UserError: ``work`` raised one on some rank. All ranks raise it, and rank 0 prints it with
            the names of the hosts. After any other error, the rank that failed raises the
            original one.
    """
    result, original = None, None
    try:
        result = work()
    except Exception as error:
        original = error
    outcomes = gather_objects((socket.gethostname(), original and as_user_error(original)))
    if original is not None and not isinstance(original, UserError):
        raise original
    failures = [(host, error) for host, error in outcomes if error is not None]
    if failures:
        _, first = failures[0]
        message = str(first)
        if len(outcomes) > 1:
            hosts = ", ".join(sorted({host for host, _ in failures}))
            message += f" ({len(failures)} of {len(outcomes)} ranks, on {hosts})"
        raise_on_all_ranks(type(first)(message))
    return result


def check_equal(values: Mapping[str, Any], advice: str) -> None:
    """Check that plain values are equal on all ranks.

    Raises:
        UserError: some differ. All ranks raise it, and rank 0 prints the name, the values, the
            host and ``advice``.
    """
    gathered = gather_objects((socket.gethostname(), dict(values)))
    expected = gathered[0][1]
    for rank, (host, found) in enumerate(gathered[1:], start=1):
        for name in expected:
            if found[name] != expected[name]:
                differing = sum(values[name] != expected[name] for _, values in gathered)
                raise_on_all_ranks(
                    f"{name} is {expected[name]} on rank 0, but {found[name]} on rank {rank} on "
                    f"{host} ({differing} of {len(gathered)} ranks differ); {advice}"
                )


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite ``tensors`` with those of rank 0. Their shapes must be equal on all ranks."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


class HostCopy:
    """Asynchronous device-to-host copy. :meth:`read` blocks only until this tensor is ready.

    Args:
        value: the tensor. On CUDA it is copied.
        work: an asynchronous operation that writes the tensor.
    """

    def __init__(self, value: Tensor, work: dist.Work | None = None):
        self.value = value
        self.work = work
        self.event: torch.cuda.Event | None = None
        if value.is_cuda:
            if work is not None:
                work.wait()  # on CUDA only later operations wait, not this process
            pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self.value = pinned.copy_(value, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> Tensor:
        """Return the tensor on the CPU, after waiting until it is ready."""
        if self.event is not None:
            self.event.synchronize()
        elif self.work is not None:
            self.work.wait()
        return self.value


def gather_async(values: Tensor) -> HostCopy:
    """Start to gather each rank's ``values`` as ``[ranks, ...]``. All ranks must call this."""
    rows = values.new_zeros(get_world_size(), *values.shape)
    rows[get_rank()] = values
    return HostCopy(rows, dist.all_reduce(rows, async_op=True))


def gather_rows(rows: Tensor, total: int) -> Tensor:
    """Return all ``total`` rows in order, on all ranks.

    Args:
        rows: the rows of this rank, which :class:`util.data.loaders.RankSampler` assigns.
        total: the number of rows over all ranks.
    """
    world = get_world_size()
    if world == 1:
        return rows
    longest = -(-total // world)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(shares, padded)
    return torch.stack(shares, dim=1).flatten(0, 1)[:total]
