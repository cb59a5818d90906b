"""Processes, seeds, logging, precision, and the optimizer's parameter groups."""

import ctypes
import logging
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from util.errors import UserError

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


class StopSignals:
    """Hears SIGTERM, SIGUSR1 and SIGINT, and has all processes agree on the step after which to stop.

    A context manager: signals mean what they did before once it is left. A second SIGINT interrupts at once.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self):
        self.heard: str | None = None
        # Asked on the CPU and answered a step later: the device is not waited for.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.answer, self.pending = torch.zeros(()), None

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self._hear) for number in self.NUMBERS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        self.heard = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """Whether any process had heard a signal when all were last asked; each asks once a step."""
        if self.group is None:
            return self.heard is not None
        if self.pending is not None:
            self.pending.wait()
        stop = bool(self.answer)
        self.answer = torch.tensor(float(self.heard is not None))
        self.pending = dist.all_reduce(self.answer, group=self.group, async_op=True)
        return stop


def gather_shares(rows: Tensor, total: int) -> Tensor:
    """All ``total`` rows in order, from each process's own: those ``rank, rank + world_size, ...`` (:class:`Share`)."""
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
    """Has the C library keep what is freed for what is allocated next, on the CPU (glibc; elsewhere nothing happens).

    By default every large tensor is a fresh mapping, whose pages the kernel has to find and clear: half of a training
    step's time on the CPU.
    """
    never_map, never_trim = (-4, 0), (-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for option in (never_map, never_trim):
            libc.mallopt(*option)


def start_log() -> None:
    """Has the main process say on standard error what it does."""
    log.handlers = [logging.StreamHandler()]  # to the standard error of now
    log.setLevel(logging.INFO if is_main_process() else logging.CRITICAL)


@contextmanager
def processes(device: str | None = None) -> Iterator[torch.device]:
    """Joins torchrun's process group, if there is one (nccl on CUDA, gloo on the CPU), and gives this process's device.

    Args:
        device: ``"cuda"``, ``"cuda:1"``, ``"cpu"``; by default CUDA where there is one.

    Raises:
        UserError: CUDA is asked for and not there.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but this machine has no CUDA device that torch can use; pass --device cpu")
    if device.type == "cpu":
        keep_freed_memory()
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched else device.index or 0)
        torch.cuda.set_device(device)
    if launched:
        # Others wait while the main process computes metrics and writes checkpoints, longer than NCCL's ten minutes.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    start_log()
    yield device
    # After an error the others may wait in a collective, and taking the group down would wait for them: the launcher
    # ends them when this process ends.
    if launched:
        dist.destroy_process_group()


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A progress bar with rate and time left, on the main process; seldom redrawn where nobody watches.

    Used in a ``with`` block, so that an error's line starts on a line of its own.
    """
    interactive = sys.stderr.isatty()
    options = {"mininterval": 0.5 if interactive else 20.0, "dynamic_ncols": interactive, **options}
    return tqdm(iterable, disable=not is_main_process(), **options)


# --------------------------------------------------------------------------------------------------------------------
# Numbers.


def seed_everything(*seeds: int) -> None:
    """Seeds torch's generators from one or more numbers (seed, rank, epoch)."""
    import numpy as np

    state = np.random.SeedSequence(seeds).generate_state(1, dtype=np.uint64)[0] if len(seeds) > 1 else seeds[0]
    torch.manual_seed(int(state) % 2**63)


class NumberedDraws:
    """Random numbers for numbered images: each image's follow from ``seed`` and its number alone.

    So results depend neither on the batch size nor on the number of processes.
    """

    def __init__(self, seed: int, numbers: Iterable[int]):
        self.generators = [torch.Generator().manual_seed((2**20 * seed + number) % 2**63) for number in numbers]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal ``[N, *shape]`` on the CPU."""
        return torch.stack([torch.randn(*shape, generator=generator) for generator in self.generators])

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform in [0, 1), ``[N, *shape]``, on the CPU."""
        return torch.stack([torch.rand(*shape, generator=generator) for generator in self.generators])


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@lru_cache
def effective_precision(device_type: str, precision: str) -> str:
    """``precision``, or fp32 where bf16 would only cost: on CPUs without its instructions (AVX2 at most).

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


def add_weight_decay(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: first the one-dimensional parameters and biases, spared, then all others, decayed.

    Frozen parameters are left out. The order within a group is that of ``model.named_parameters()``.
    """
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim != 1 and not name.endswith(".bias")].append(parameter)
    return [{"params": groups[False], "weight_decay": 0.0}, {"params": groups[True], "weight_decay": weight_decay}]


def matmul_flops(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product here and now: what utilization is measured against."""
    import time

    dtype = PRECISIONS[effective_precision(device.type, precision)]
    largest = 8192 if device.type == "cuda" else 1536
    size, best = largest // 8, 0.0
    while size <= largest and best < 0.05:  # large enough to be measured, small enough not to be waited for
        a = torch.randn(size, size, device=device, dtype=dtype)
        best = math.inf
        for _ in range(4):  # the first warms up
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            a @ a
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
        size *= 2
    return 2 * (size // 2) ** 3 / best


def memory_in_use(device: torch.device) -> float:
    """Peak memory in GiB: of the device on CUDA, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --------------------------------------------------------------------------------------------------------------------
# Sizes that a file tells and a flag may tell too.


def check_told(name: str, typed: int, default: int, told: int, source: str) -> int:
    """``told``, what a file says of itself; the flag ``--name`` need not repeat it.

    Raises:
        UserError: the flag was set to something else.
    """
    if typed not in (default, told):
        raise UserError(f"--{name} {typed}, but {source} has {told}; leave the flag out or pass {told}")
    return told


def check_stride(img_size: int, stride: int) -> None:
    """Raises UserError unless the tokenizer's stride divides the image size."""
    if img_size % stride:
        raise UserError(f"--img_size {img_size} is not a multiple of the tokenizer's stride, {stride}")
