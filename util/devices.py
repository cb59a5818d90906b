"""Select and describe the device of a process, transfer tensors to it, and measure it."""

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
from util.log import counted
from util.precision import PRECISIONS, effective_precision

#: Linux reports the version of NVIDIA's driver in this file.
DRIVER = Path("/proc/driver/nvidia/version")


def find_device(requested: str | None) -> tuple[torch.device, str]:
    """Return the device of this process, and an error message, which is empty if it can be used.

    Args:
        requested: ``"cuda"``, ``"cuda:1"``, ``"mps"`` or ``"cpu"``. By default CUDA if there is a
            device, else the CPU. With torchrun, the ranks of a machine take one CUDA device each.
    """
    host = socket.gethostname()
    device_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(requested or ("cuda" if device_count else "cpu"))
    except RuntimeError:
        device = torch.device("meta")  # refused below
    if device.type == "cpu":
        return device, ""
    if device.type == "mps":
        return device, _mps_problem(host)
    if device.type != "cuda":
        known = "choose cuda, cuda:N, mps or cpu"
        return device, f"--device {requested}: there is no such device; {known}"
    index = int(os.environ["LOCAL_RANK"]) if launcher.launched() else device.index or 0
    device = torch.device("cuda", index)
    if device_count == 0:
        advice = "its driver may be too old (docs/training.md, Devices), or pass --device cpu"
        return device, f"--device cuda, but torch can use no CUDA device on {host}: {advice}"
    if index >= device_count:
        return device, f"there is no {device} on {host}, which has {device_count} CUDA devices"
    return device, ""


def _mps_problem(host: str) -> str:
    if launcher.launched():
        return "--device mps supports one process: start the script with python, not torchrun"
    if not torch.backends.mps.is_available():
        advice = "it needs an Apple GPU and macOS 14 or newer; or pass --device cpu"
        return f"--device mps, but torch can use no Apple GPU on {host}: {advice}"
    return ""


def describe_devices(device: torch.device, hosts: int) -> str:
    """Return one line with the run's device, ranks, machines, and versions of torch and driver."""
    if device.type == "cuda":
        count = torch.cuda.device_count()
        name = f"cuda ({torch.cuda.get_device_name(device)}, {count} on this machine)"
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{device.type} ({capability}, {torch.get_num_threads()} threads)"
    group = "one process"
    if dist.is_initialized():
        ranks = counted(dist.get_world_size(), "rank")
        group = f"{ranks} on {counted(hosts, 'machine')}, {dist.get_backend()}"
    versions = f"torch {torch.__version__}"
    if torch.version.cuda:
        versions += f", CUDA {torch.version.cuda}"
    match = re.search(r"\d+\.\d+[.\d]*", DRIVER.read_text()) if DRIVER.exists() else None
    if match:
        versions += f", NVIDIA driver {match[0]}"
    return f"{name}, {group}, {versions}"


def make_deterministic() -> None:
    """Make CUDA compute the same bits in every run. Call this before any other use of CUDA.

    torch then raises an error in operations that have no deterministic version. With
    ``warn_only=True`` the backward pass of attention would stay nondeterministic.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def c_library(function: str, *arguments: int) -> None:
    """Call a function of the C library of this process. Do nothing if the library lacks it."""
    with suppress(AttributeError, OSError, TypeError):  # TypeError: Windows
        getattr(ctypes.CDLL(None), function)(*arguments)


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory for later allocations. Do nothing with other C libraries.

    By default glibc maps new pages for each large CPU tensor, and the kernel has to clear them.
    That takes half the time of a training step.
    """
    m_mmap_max = -4
    m_trim_threshold = -1
    c_library("mallopt", m_mmap_max, 0)  # never map
    c_library("mallopt", m_trim_threshold, -1)  # never trim


def matmul_flops(device: torch.device, precision: str) -> float:
    """Measure the operations per second of a large matrix product.

    The utilization of a training run is relative to this rate.
    """
    dtype = PRECISIONS[effective_precision(device.type, precision)]
    largest = 8192 if device.type == "cuda" else 1536
    for size in (largest // 8, largest // 4, largest // 2, largest):
        a = torch.randn(size, size, device=device, dtype=dtype)
        seconds = math.inf
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # waits until the device is done
            seconds = min(seconds, time.perf_counter() - start)
        if seconds > 0.05:  # long enough to be measured exactly
            break
    return 2 * size**3 / seconds


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Return ``x`` on ``device``, without waiting for the device.

    From the CPU to CUDA it goes through pinned memory. A plain ``x.to(device)`` would wait until
    the device has finished all earlier work.
    """
    if torch.device(device).type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def memory_in_use(device: torch.device) -> float:
    """Return the peak memory in GiB: of the device on CUDA, of the process on the CPU.

    It is NaN on Windows. Apple GPUs do not record the peak: for them it is the memory that is
    allocated now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    try:
        import resource  # Windows has no such module
    except ModuleNotFoundError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
