"""Processes, seeds, logging, precision, and the optimizer's parameter groups."""

import ctypes
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import warnings
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

from util.devices import cpu_multiplies, described, find_device, join_group, launched, make_deterministic
from util.errors import NotFinite, Preempted, ToldByMain, UserError, as_user_error, lost_process, told_by_main, where
from util.published_names import to_published

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
        UserError: ``work`` raised one; all processes end with it, and the main one alone prints it. So they end with
            any other error, too, which the main process raises as it is.
    """
    result, failed = None, None
    if is_main_process():
        try:
            result = work()
        except Exception as error:
            failed = error
    result, error = from_main_process((result, failed and as_user_error(failed)))
    if error is not None:
        raise failed or told_by_main(error)
    return result


def in_all_processes(work: Callable[[], Any]) -> Any:
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
    answers = from_all_processes((socket.gethostname(), failed and as_user_error(failed)))
    if failed is not None and not isinstance(failed, UserError):
        raise failed
    problems = [error for _, error in answers if error is not None]
    if problems:
        hosts = ", ".join(sorted({host for host, error in answers if error is not None}))
        which = f" ({len(problems)} of {len(answers)} processes, on {hosts})" if len(answers) > 1 else ""
        end_all(type(problems[0])(f"{problems[0]}{which}"))
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


def bit_sum(tensors: Iterable[Tensor]) -> Tensor:
    """Return a checksum of the tensors' bits as one int64 on their device, without waiting for the device."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = [tensor.detach().flatten() for tensor in tensors]
    sums = torch.stack([values.view(integers[values.element_size()]).sum() for values in flat])
    # Each tensor has a large odd factor of its own, modulo 2^64: changes in two tensors do not cancel out.
    factors = torch.arange(1, len(sums) + 1, device=sums.device) * -7046029254386353131 | 1
    return (sums * factors).sum()


def checksum(tensors: Iterable[Tensor]) -> str:
    """Return :func:`bit_sum` as 16 hex digits."""
    return f"{bit_sum(tensors).item() % 2**64:016x}"


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


def arriving_from_all(values: Tensor) -> Arriving:
    """Start to send each rank's ``values`` to all ranks, which all must call this; they arrive as ``[ranks, ...]``."""
    rows = values.new_zeros(get_world_size(), *values.shape)
    rows[get_rank()] = values
    return Arriving(rows, dist.all_reduce(rows, async_op=True))


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and SIGINT, so that all processes can stop after the same step.

    A context manager: leaving it restores the signals' former handlers. A SIGINT more than :data:`SAME` seconds after
    the first signal kills at once. One that comes sooner is the same one: a terminal sends it to every process, and
    torchrun once more to those that it started.

    Args:
        device: on which processes tell each other, so that the run needs no other network than that of its gradients.
    """

    NUMBERS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
    SAME = 2.0

    def __init__(self, device: torch.device):
        self.heard: str | None = None
        self.device = device
        self.answer: Arriving | None = None
        # KeyboardInterrupt would wait for collectives and a checkpoint, as would any handler of Python's.
        self.kill_by_next = threading.Timer(self.SAME, lambda: c_library("signal", signal.SIGINT, signal.SIG_DFL))
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


def c_library(function: str, *arguments: int) -> None:
    """Call a function of the C library that this process is linked with; do nothing where it has none of that name."""
    with suppress(AttributeError, OSError, TypeError):  # a TypeError on Windows
        getattr(ctypes.CDLL(None), function)(*arguments)


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for later allocations; does nothing with other C libraries.

    By default each large CPU tensor is a new mapping, whose pages the kernel clears: half of a training step's time.
    """
    never_map, never_trim = (-4, 0), (-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    for option in (never_map, never_trim):
        c_library("mallopt", *option)


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
def processes(
    device: str | None = None, deterministic: bool = False, precision: str | None = None
) -> Iterator[torch.device]:
    """Joins torchrun's process group, if there is one, and starts the log; yields this process's device.

    Args:
        device: see :func:`util.devices.find_device`.
        deterministic: see :func:`util.devices.make_deterministic`.
        precision: ``--precision``; with ``"fp32"`` all convolutions are :func:`exact_convolutions`, outside of
            :func:`autocast` and in backward passes, too.

    Raises:
        UserError: there is no such device; or processes have different ones.
    """
    if deterministic:
        make_deterministic()
    device, problem = find_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda" and not problem:
        torch.cuda.set_device(device)
    hosts, failures = join_group(device, problem, timeout=PATIENCE) if launched() else (1, None)
    if problem:
        raise UserError(problem)
    start_log()
    log.info("computing on %s", described(device, hosts))
    try:
        with exact_convolutions() if precision == "fp32" else nullcontext():
            yield device
    except Exception as error:
        # The process group stays: others may wait in a collective operation, and to leave it would wait for them.
        # Where another process is gone, each finds that out by itself: to report it would only delay the last line.
        if failures is not None and not isinstance(error, ToldByMain | Preempted) and not lost_process(error):
            failures.report(error)
        raise
    finally:
        if failures is not None:
            failures.over.set()
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
NO_FLOAT64 = {"mps"}  # types of devices
# Of torch's two interfaces to TF32, the older one exists in all versions, and sets the newer one, too; both must not be
# mixed. Some versions call it deprecated.
warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")


@lru_cache
def effective_precision(device_type: str, precision: str) -> str:
    """Return ``precision``, but fp32 instead of bf16 on CPUs without bf16 instructions.

    There PyTorch emulates bf16 products: with AVX-512 at a fifth of the rate of fp32, with less at a hundredth.
    """
    if device_type != "cpu" or precision == "fp32" or cpu_multiplies(precision):
        return precision
    if precision == "bf16":
        log.info("this CPU has no bf16 instructions: bf16 runs as fp32, which is faster and more exact")
        return "fp32"
    warn("this CPU has no fp16 instructions, PyTorch emulates them: --precision fp32 is faster")
    return precision


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Within the block, compute float32 convolutions on CUDA in float32.

    PyTorch's default is TF32, whose mantissa has 10 bits. (Matrix products are in float32 by default.)
    """
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Autocast for a ``--precision``: of ``bf16`` or ``fp16``; ``fp32`` means none, and :func:`exact_convolutions`.

    See :func:`effective_precision`.
    """
    precision = effective_precision(device.type, precision)
    if precision == "fp32":
        return exact_convolutions() if device.type == "cuda" else nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


def double(x: Tensor) -> Tensor:
    """Return ``x`` in float64: on its device, or on the CPU if the device is an Apple GPU, which has no float64."""
    return (x.cpu() if x.device.type in NO_FLOAT64 else x).double()


def extremes(values: Tensor) -> Tensor:
    """Return the least and the greatest of ``values``, float64 ``[2]``: both are finite exactly if all values are."""
    return double(torch.stack(values.detach().aminmax()))


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
    """Return optimizer groups: one-dimensional parameters and biases without decay, then all others with decay.

    Frozen parameters are left out. Within a group, the order is that of published optimizer states.
    """
    spared, decayed = [], []
    for name, parameter in to_published(dict(model.named_parameters())).items():
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
    """Return the peak memory in GiB: of the device on CUDA, of the process on the CPU (NaN on Windows).

    On Apple GPUs, which do not record the peak, it is the memory that is allocated now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
