"""Processes, seeds, logging, precision, and the optimizer's parameter groups."""

import ctypes
import hashlib
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from util.devices import described, find_device, join_group, launched, make_deterministic
from util.errors import NotFinite, Preempted, UserError, told_by_main, where

log = logging.getLogger("tokenbridge")

# --------------------------------------------------------------------------------------------------------------------
# Processes. Everything below works alike with torchrun and without it.


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
PATIENCE, STEP_PATIENCE = timedelta(minutes=30), timedelta(minutes=5)


def _set_patience(limit: timedelta) -> None:
    if dist.is_initialized():
        newer = hasattr(dist, "set_timeout")
        dist.set_timeout(limit) if newer else dist.distributed_c10d._set_pg_timeout(limit)


@contextmanager
def patience(limit: timedelta) -> Iterator[None]:
    """Operations of all processes that start within the block wait ``limit`` for the slowest, not ``PATIENCE``."""
    _set_patience(limit)
    yield
    _set_patience(PATIENCE)


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


def from_main_process(value: Any) -> Any:
    """The main process's ``value`` (plain types), on all processes."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all_processes(value: Any) -> list:
    """Each process's ``value`` (plain types), in order, on all processes."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def end_all(error: str | UserError) -> NoReturn:
    """End all processes, each of which must call this, with a UserError that the main one alone prints."""
    error = UserError(error) if isinstance(error, str) else error
    raise error if is_main_process() else told_by_main(error)


def by_main_process(work: Callable[[], Any]) -> Any:
    """What ``work``, run by the main process alone, returns there (plain types): on all processes.

    Raises:
        UserError: ``work`` raised one; all processes end with it, and the main one alone prints it.
    """
    result, failed = None, None
    if is_main_process():
        try:
            result = work()
        except UserError as error:
            failed = error
    result, error = from_main_process((result, failed))
    if error is not None:
        raise failed or told_by_main(error)
    return result


def in_all_processes(work: Callable[[], Any]) -> Any:
    """What ``work``, run by every process, returns in this one.

    ``work`` must make the same collective calls in every process, also where it fails.

    Raises:
        UserError: ``work`` raised one in some process; all end with it, and the main one prints it with the hosts.
    """
    result, failed = None, None
    try:
        result = work()
    except UserError as error:
        failed = error
    answers = from_all_processes((socket.gethostname(), failed))
    problems = [error for _, error in answers if error is not None]
    if problems:
        hosts = ", ".join(sorted({host for host, error in answers if error is not None}))
        which = f" ({len(problems)} of {len(answers)} processes, on {hosts})" if len(answers) > 1 else ""
        kind = NotFinite if isinstance(problems[0], NotFinite) else UserError
        end_all(kind(f"{problems[0]}{which}"))
    return result


def check_same(values: Mapping[str, Any], advice: str) -> None:
    """Compares plain values over all processes.

    Raises:
        UserError: some differ, on all processes; the main one prints which, where, and ``advice``.
    """
    (_, here), *others = gathered = from_all_processes((socket.gethostname(), dict(values)))
    for rank, (host, there) in enumerate(others, start=1):
        for name in here:
            if there[name] != here[name]:
                differing = sum(values[name] != here[name] for _, values in gathered)
                end_all(
                    f"{name} is {here[name]} in process 0, but {there[name]} in process {rank} on {host} "
                    f"({differing} of {len(gathered)} processes differ); {advice}"
                )


def share(tensors: Iterable[Tensor]) -> None:
    """Overwrites ``tensors``, of equal shapes on all processes, with the main process's."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def checksum(tensors: Iterable[Tensor]) -> str:
    """Sixteen digits that tell tensors from those of which a single bit differs."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = [tensor.detach().flatten() for tensor in tensors]
    sums = torch.stack([values.view(integers[values.element_size()]).sum() for values in flat])
    return hashlib.sha256(str(sums.tolist()).encode()).hexdigest()[:16]


class Arriving:
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
            self.value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> Tensor:
        """The tensor on the host."""
        if self.event is not None:
            self.event.synchronize()
        elif self.work is not None:
            self.work.wait()
        return self.value


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and SIGINT, so that all processes can stop after the same step.

    A context manager: leaving it restores the signals' former handlers. A SIGINT more than :data:`SAME` seconds after
    the first signal kills at once. One that comes sooner is the same one: a terminal sends it to every process, and
    torchrun once more to those that it started.

    Args:
        device: on which processes tell each other, so that the run needs no other network than that of its gradients.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    SAME = 2.0

    def __init__(self, device: torch.device):
        self.heard: str | None = None
        self.device = device
        self.answer: Arriving | None = None
        # KeyboardInterrupt would wait for collectives and a checkpoint, as would any handler of Python's.
        self.kill_by_next = threading.Timer(self.SAME, lambda: ctypes.CDLL(None).signal(signal.SIGINT, signal.SIG_DFL))
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
        self.answer = Arriving(heard, dist.all_reduce(heard, async_op=True))
        return stop

    def check(self) -> None:
        """Wait for all processes, each of which must call this, and compare what they have heard.

        Raises:
            Preempted: one of them has had a signal, on all processes.
        """
        heard = [name for name in from_all_processes(self.heard) if name is not None]
        if heard:
            raise Preempted(f"by {heard[0]}")


def until_stopped(loader: DataLoader, stop_signals: StopSignals | None) -> Iterator:
    """Yield the batches of this process's ``loader``; all processes stop after the same one where there are signals.

    Raises:
        Preempted: see :meth:`StopSignals.check`.
    """
    fewest = 0 if stop_signals is None else min(from_all_processes(len(loader)))
    for number, batch in enumerate(loader):
        yield batch
        if stop_signals is not None and number < fewest:
            stop_signals.check()


def gather_shares(rows: Tensor, total: int) -> Tensor:
    """All ``total`` rows in order, from each process's rows, dealt by :class:`util.loader.RankSampler`."""
    world = get_world_size()
    if world == 1:
        return rows
    longest = -(-total // world)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(shares, padded)
    return torch.stack(shares, dim=1).flatten(0, 1)[:total]


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for later allocations; does nothing with other C libraries.

    By default each large CPU tensor is a new mapping, whose pages the kernel clears: half of a training step's time.
    """
    never_map, never_trim = (-4, 0), (-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for option in (never_map, never_trim):
            libc.mallopt(*option)


def start_log() -> None:
    """Sends the main process's log to standard error, and of others, by their number, what warns."""
    handler = logging.StreamHandler()  # made anew, since tests replace sys.stderr
    handler.setFormatter(logging.Formatter(f"{where()}%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO if is_main_process() else logging.WARNING)


def warn(message: str, *args: Any) -> None:
    """Logs a warning that every process has: the main one says it for all."""
    if is_main_process():
        log.warning(message, *args)


@contextmanager
def processes(device: str | None = None, deterministic: bool = False) -> Iterator[torch.device]:
    """Joins torchrun's process group, if there is one, and starts the log; yields this process's device.

    Args:
        device: ``"cuda"``, ``"cuda:1"``, ``"cpu"``; by default CUDA where there is one.
        deterministic: see :func:`util.devices.make_deterministic`.

    Raises:
        UserError: there is no such device; or processes have different ones.
    """
    if deterministic:
        make_deterministic()
    device, problem = find_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    elif not problem:
        torch.cuda.set_device(device)
    hosts = join_group(device, problem, timeout=PATIENCE) if launched() else 1
    if problem:
        raise UserError(problem)
    start_log()
    log.info("computing on %s", described(device, hosts))
    yield device
    # Not after an error: the others may wait in a collective operation, and this would wait for them. The launcher ends
    # them when this process ends.
    if launched():
        dist.destroy_process_group()


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """The main process's progress bar with rate and time left; redrawn every 20 s if standard error is no terminal.

    Use it in a ``with`` block, which ends its line before an error is printed.
    """
    interactive = sys.stderr.isatty()
    options = {"mininterval": 0.5 if interactive else 20.0, "dynamic_ncols": interactive, **options}
    return tqdm(iterable, disable=not is_main_process(), **options)


# --------------------------------------------------------------------------------------------------------------------
# Numbers.


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@lru_cache
def effective_precision(device_type: str, precision: str) -> str:
    """``precision``, but fp32 instead of bf16 on CPUs without bf16 instructions (AVX2 at most).

    There PyTorch multiplies bf16 matrices entry by entry, some 100 times more slowly than fp32 ones.
    """
    if precision == "bf16" and device_type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        log.info("this CPU has no bf16 instructions: bf16 runs as fp32, which is faster and more exact")
        return "fp32"
    return precision


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Autocast for a ``--precision`` of ``bf16``, ``fp16`` or ``fp32`` (none); see :func:`effective_precision`."""
    precision = effective_precision(device.type, precision)
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


def extremes(values: Tensor) -> Tensor:
    """Return the least and the greatest of ``values``, float64 ``[2]``: both are finite exactly if all values are."""
    return torch.stack(values.detach().aminmax()).double()


def check_finite(values: Tensor, stage: str, precision: str, flag: str = "--precision") -> None:
    """Check what a stage of the model computed; values on a device are waited for.

    Args:
        stage: its name, for the message.
        precision: ``bf16``, ``fp16`` or ``fp32``, which it computed in.
        flag: the flag that sets this precision.

    Raises:
        NotFinite: one of the values is NaN or infinite.
    """
    if values.isfinite().all():
        return
    advice = {
        "fp16": f"pass {flag} fp32 or bf16, which do not overflow",
        "bf16": f"pass {flag} fp32; if it stays, the weights are at fault",
        "fp32": "the weights are at fault, or what it was given",
    }
    raise NotFinite(f"{stage} computed NaN or infinity in {precision}: {advice[precision]}")


def add_weight_decay(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: first one-dimensional parameters and biases, without decay; then all others, with decay.

    Frozen parameters are left out. The order within a group is that of ``model.named_parameters()``.
    """
    spared, decayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (spared if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def matmul_flops(device: torch.device, precision: str) -> float:
    """Operations a second in a large matrix product, measured on this machine; utilization is relative to it."""
    dtype = PRECISIONS[effective_precision(device.type, precision)]
    largest = 8192 if device.type == "cuda" else 1536
    for size in (largest // 8, largest // 4, largest // 2, largest):
        a = torch.randn(size, size, device=device, dtype=dtype)
        best = math.inf
        for _ in range(4):  # the first warms up
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # waits until the device is done
            best = min(best, time.perf_counter() - start)
        if best > 0.05:  # long enough for the clock
            break
    return 2 * size**3 / best


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device``; from the host to CUDA through pinned memory.

    A plain ``x.to(device)`` waits until the device has done all that it was given before; this one does not.
    """
    if torch.device(device).type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def memory_in_use(device: torch.device) -> float:
    """Peak memory in GiB: of the device on CUDA, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
