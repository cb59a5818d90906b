"""Which device a process computes on: found, compared with those of other processes before they join, and told."""

import json
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from util import launcher
from util.errors import ToldByMain, UserError, one_line, repeat_end

DRIVER = Path("/proc/driver/nvidia/version")  # what Linux tells of NVIDIA's driver
CPUINFO = Path("/proc/cpuinfo")
#: How a CPU's instructions for products of bf16 and fp16 show: checks of torch.cpu, which has others in each version,
#: and flags of Linux (the last one ARM's).
INSTRUCTIONS = {
    "bf16": (("_is_avx512_bf16_supported", "_is_amx_tile_supported"), {"avx512_bf16", "amx_bf16", "bf16"}),
    "fp16": (("_is_amx_fp16_supported",), {"avx512_fp16", "amx_fp16", "asimdhp"}),
}


def launched() -> bool:
    """Whether torchrun started this process, or what sets its variables."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@cache
def cpu_multiplies(precision: str) -> bool:
    """Return whether this CPU has instructions for matrix products in ``precision``, ``"bf16"`` or ``"fp16"``.

    Without them PyTorch emulates such products, which takes longer than fp32. False if neither torch nor Linux reports
    any. The answer is not measured: all ranks of a run, and a run and its resumption, must get the same one.
    """
    checks, flags = INSTRUCTIONS[precision]
    known = [getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check)]
    listed = CPUINFO.read_text().split() if CPUINFO.exists() else []
    return any(known) or not flags.isdisjoint(listed)


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
        if launched():
            return device, "--device mps computes in one process: start the script with python, not torchrun"
        usable = torch.backends.mps.is_available()
        advice = "it needs an Apple GPU and macOS 14 or newer; or pass --device cpu"
        return device, "" if usable else f"--device mps, but torch can use no Apple GPU on {host}: {advice}"
    if device.type != "cuda":
        return device, f"--device {asked}: there is no such device; choose cuda, cuda:N, mps or cpu"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched() else device.index or 0)
    if there == 0:
        advice = "its driver may be too old (docs/training.md, Devices), or pass --device cpu"
        return device, f"--device cuda, but torch can use no CUDA device on {host}: {advice}"
    return device, "" if device.index < there else f"there is no {device} on {host}, which has {there} CUDA devices"


def check_devices(store: dist.Store, rank: int, world: int, device: torch.device, problem: str) -> int:
    """Compares the devices of all processes before they join; the number of machines.

    Processes of different backends, or one that ended before it joined, would let the others wait for half an hour.
    Processes whose run ended before with something to correct or with a signal, and that torchrun has started
    again, end again.

    Args:
        store: the launcher's, which all processes reach.
        device, problem: what :func:`find_device` found.

    Raises:
        UserError: some compute on CUDA and others on the CPU, or some have a problem; all end with it, and the main one
            prints it.
        Preempted: a signal ended the run before, and torchrun has started it again.
    """
    shared = dist.PrefixStore("devices", store)
    shared.set(str(rank), json.dumps([device.type, socket.gethostname(), problem, launcher.end_before()]))
    told = [json.loads(shared.get(str(other))) for other in range(world)]
    if shared.add("have read", 1) == world:
        shared.set("all have read", "")
    wrong, ends = [], [end for *_, end in told if end]
    for other, (kind, host, its_problem, _) in enumerate(told):
        if its_problem:
            wrong.append(its_problem)
        elif kind != told[0][0]:
            text = f"process 0 on {told[0][1]} computes on {told[0][0]}, process {other} on {host} on {kind}"
            wrong.append(f"{text}: pass --device cuda, which tells why a machine does not, or --device cpu")
    if wrong or ends:
        # The launcher ends all when the first one ends, and the main one may hold the store.
        with suppress(dist.DistError):
            shared.wait(["all have read"])
        if ends:
            status, ending = ends[0]
            repeat_end(status, ending, rank)
        message = f"{wrong[0]} ({len(wrong)} of {world} processes)"
        raise ToldByMain(message) if rank else UserError(message)
    return len({host for _, host, *_ in told})


class Failures:
    """Ends this process when another rank has failed alone.

    It would wait for that rank in its next collective operation, until the timeout of half an hour: NCCL does not
    notice that a process has ended. (gloo does, and launchers may end all processes before.)

    Args:
        store: the launcher's, which all processes reach.
    """

    INTERVAL = 0.5  # seconds between two looks at the store
    GRACE = 10.0  # seconds in which a process may end by itself

    def __init__(self, store: dist.Store):
        self.store, self.over = dist.PrefixStore("failures", store), threading.Event()
        threading.Thread(target=self._watch, name="failures", daemon=True).start()

    def report(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends with ``error``, and wait until they have looked."""
        status = 2 if isinstance(error, UserError) else 1
        text = f"{one_line(error)} (process {os.environ['RANK']} on {socket.gethostname()})"
        with suppress(RuntimeError):  # process 0 has ended, which may hold the store
            self.store.set("first", json.dumps([status, text]))
            time.sleep(2 * self.INTERVAL)

    def _watch(self) -> None:
        with suppress(RuntimeError):
            while not self.over.wait(self.INTERVAL):
                if self.store.check(["first"]):
                    status, text = json.loads(self.store.get("first"))
                    if self.over.wait(self.GRACE):
                        return
                    if os.environ["RANK"] == "0":
                        print(f"error: {text}", file=sys.stderr, flush=True)
                    os._exit(status)


def join_group(device: torch.device, problem: str, timeout: timedelta) -> tuple[int, Failures]:
    """Join torchrun's process group, nccl on CUDA and gloo on the CPU; return the number of machines, and a watch.

    Args:
        device, problem: see :func:`check_devices`, which raises UserError.
        timeout: how long an operation of all processes waits for the slowest.
    """
    store, rank, world = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # The one launcher may keep its store for restarted processes, with the addresses of the processes before them.
        store = dist.PrefixStore(f"attempt {launcher.restarts()}", store)
    hosts = check_devices(store, rank, world, device, problem)
    options = {"store": store, "rank": rank, "world_size": world, "timeout": timeout}
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)
    return hosts, Failures(store)


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
