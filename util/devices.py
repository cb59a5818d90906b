"""Which device a process computes on: found, compared with those of other processes before they join, and told."""

import ctypes
import math
import os
import re
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from util import launcher
from util.precision import PRECISIONS, effective_precision

DRIVER = Path("/proc/driver/nvidia/version")  # what Linux tells of NVIDIA's driver


def find_device(asked: str | None) -> tuple[torch.device, str]:
    """This process's device, and why it cannot be used, which is empty if it can.

    Args:
        asked: ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"cpu"``; by default CUDA where there is one, else the CPU. Of a
            machine's CUDA devices torchrun's processes take one each.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    host = socket.gethostname()
    try:
        device = torch.device(asked or ("cuda" if there else "cpu"))
    except RuntimeError:  # a word that torch does not know
        device = torch.device("meta")
    if device.type == "cpu":
        return device, ""
    if device.type == "mps":
        if launcher.launched():
            return (
                device,
                "--device mps computes in one process: start the script with python, not torchrun",
            )
        usable = torch.backends.mps.is_available()
        advice = "it needs an Apple GPU and macOS 14 or newer; or pass --device cpu"
        return (
            device,
            "" if usable else f"--device mps, but torch can use no Apple GPU on {host}: {advice}",
        )
    if device.type != "cuda":
        return device, f"--device {asked}: there is no such device; choose cuda, cuda:N, mps or cpu"
    device = torch.device(
        "cuda", int(os.environ["LOCAL_RANK"]) if launcher.launched() else device.index or 0
    )
    if there == 0:
        advice = "its driver may be too old (docs/training.md, Devices), or pass --device cpu"
        return device, f"--device cuda, but torch can use no CUDA device on {host}: {advice}"
    return (
        device,
        ""
        if device.index < there
        else f"there is no {device} on {host}, which has {there} CUDA devices",
    )


def described(device: torch.device, hosts: int) -> str:
    """What the run computes with: devices, processes, machines, and versions of what may be too old."""
    if device.type == "cuda":
        what = f"cuda ({torch.cuda.get_device_name(device)}, {torch.cuda.device_count()} on this machine)"
    else:
        what = f"{device.type} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
    group = "one process"
    if dist.is_initialized():
        group = f"{dist.get_world_size()} processes on {hosts} machines, {dist.get_backend()}"
    driver = re.search(r"\d+\.\d+[.\d]*", DRIVER.read_text()) if DRIVER.exists() else None
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, NVIDIA driver {driver and driver[0]}"
    return f"{what}, {group}, {versions}"


def make_deterministic() -> None:
    """Has CUDA compute the same bits in every run; torch refuses operations that cannot. To be called before all else.

    It is not enough that torch warns: attention's backward pass would then stay as it is.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


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
