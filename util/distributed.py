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

from util.errors import UserError, as_user_error, told_by_main


def get_rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process writes the shared files and talks to the terminal."""
    return get_rank() == 0


def is_local_main_process() -> bool:
    """Whether this process is the first on its machine."""
    return not dist.is_initialized() or int(os.environ.get("LOCAL_RANK", 0)) == 0


# How long an operation of all processes waits for the slowest of them before it ends the run: usually, since the main
# process computes metrics and writes files meanwhile; and in a training step. A lost machine may show by nothing else.
TIMEOUT, STEP_TIMEOUT = timedelta(minutes=30), timedelta(minutes=5)


def _set_timeout(limit: timedelta) -> None:
    if dist.is_initialized():
        newer = hasattr(dist, "set_timeout")
        dist.set_timeout(limit) if newer else dist.distributed_c10d._set_pg_timeout(limit)


@contextmanager
def collective_timeout(limit: timedelta) -> Iterator[None]:
    """Operations of all processes that start within the block wait ``limit`` for the slowest, not ``PATIENCE``."""
    _set_timeout(limit)
    yield
    _set_timeout(TIMEOUT)


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of ``value`` over all processes."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / get_world_size()


def broadcast_object(value: Any) -> Any:
    """The main process's ``value`` (plain types), on all processes."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list:
    """Each process's ``value`` (plain types), in order, on all processes."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def raise_on_all_ranks(error: str | UserError) -> NoReturn:
    """End all processes, each of which must call this, with a UserError that the main one alone prints."""
    error = UserError(error) if isinstance(error, str) else error
    raise error if is_main_process() else told_by_main(error)


def on_rank_0(work: Callable[[], Any]) -> Any:
    """What ``work``, run by the main process alone, returns there (plain types): on all processes.

    Raises:
        UserError: ``work`` raised one; all processes end with it, and the main one alone prints it. So they end with
            any other error, too, which the main process raises as it is.
    """
    result, failed = None, None
    if is_main_process():
        try:
            result = work()
        except Exception as error:
            failed = error
    result, error = broadcast_object((result, failed and as_user_error(failed)))
    if error is not None:
        raise failed or told_by_main(error)
    return result


def on_all_ranks(work: Callable[[], Any]) -> Any:
    """What ``work``, run by every process, returns in this one.

    ``work`` must make the same collective calls in every process, also where it fails.

    Raises:
        UserError: ``work`` raised one in some process; all end with it, and the main one prints it with the hosts. So
            they end with any other error, too, which the process where it happened raises as it is.
    """
    result, failed = None, None
    try:
        result = work()
    except Exception as error:
        failed = error
    answers = gather_objects((socket.gethostname(), failed and as_user_error(failed)))
    if failed is not None and not isinstance(failed, UserError):
        raise failed
    problems = [error for _, error in answers if error is not None]
    if problems:
        hosts = ", ".join(sorted({host for host, error in answers if error is not None}))
        which = (
            f" ({len(problems)} of {len(answers)} processes, on {hosts})"
            if len(answers) > 1
            else ""
        )
        raise_on_all_ranks(type(problems[0])(f"{problems[0]}{which}"))
    return result


def check_equal(values: Mapping[str, Any], advice: str) -> None:
    """Compares plain values over all processes.

    Raises:
        UserError: some differ, on all processes; the main one prints which, where, and ``advice``.
    """
    (_, here), *others = gathered = gather_objects((socket.gethostname(), dict(values)))
    for rank, (host, there) in enumerate(others, start=1):
        for name in here:
            if there[name] != here[name]:
                differing = sum(values[name] != here[name] for _, values in gathered)
                raise_on_all_ranks(
                    f"{name} is {here[name]} in process 0, but {there[name]} in process {rank} on {host} "
                    f"({differing} of {len(gathered)} processes differ); {advice}"
                )


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrites ``tensors``, of equal shapes on all processes, with the main process's."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


class HostCopy:
    """A tensor on its way to the host: reading it waits for what computes it, not for what the device does later.

    Args:
        value: the tensor; on CUDA it is copied.
        work: an asynchronous operation that writes it.
    """

    def __init__(self, value: Tensor, work: dist.Work | None = None):
        self.value, self.work, self.event = value, work, None
        if value.is_cuda:
            if work is not None:
                work.wait()  # on CUDA, only later operations wait
            self.value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(
                value, non_blocking=True
            )
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> Tensor:
        """The tensor on the host."""
        if self.event is not None:
            self.event.synchronize()
        elif self.work is not None:
            self.work.wait()
        return self.value


def gather_async(values: Tensor) -> HostCopy:
    """Start to send each rank's ``values`` to all ranks, which all must call this; they arrive as ``[ranks, ...]``."""
    rows = values.new_zeros(get_world_size(), *values.shape)
    rows[get_rank()] = values
    return HostCopy(rows, dist.all_reduce(rows, async_op=True))


def gather_rows(rows: Tensor, total: int) -> Tensor:
    """All ``total`` rows in order, from each process's rows, dealt by :class:`util.data.loaders.RankSampler`."""
    world = get_world_size()
    if world == 1:
        return rows
    longest = -(-total // world)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(shares, padded)
    return torch.stack(shares, dim=1).flatten(0, 1)[:total]
