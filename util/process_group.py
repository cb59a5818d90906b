"""Start of a script: check the devices of all ranks, join the process group, watch for failures."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from util import distributed, launcher
from util.devices import describe_devices, find_device, keep_freed_memory, make_deterministic
from util.errors import (
    Preempted,
    ReportedByRank0,
    UserError,
    lost_process,
    one_line,
    repeat_end,
)
from util.log import log, start_log
from util.precision import exact_convolutions


def check_devices(
    store: dist.Store, rank: int, world: int, device: torch.device, problem: str
) -> int:
    """Compare the devices of all ranks before they join a group, and return the number of machines.

    In the process group, ranks with different backends would wait for each other for half an hour,
    as would all ranks if one ends before it joins. If the run ended with a user error or after a
    signal, and torchrun has restarted it, it ends again.

    Args:
        store: the launcher's store, which all ranks reach.
        device, problem: from :func:`find_device`.

    Raises:
        UserError: some ranks use CUDA and others the CPU, or a rank has a problem. All ranks raise
            it, and rank 0 prints it.
        Preempted: a signal ended the run before torchrun restarted it.
    """
    shared = dist.PrefixStore("devices", store)
    report = [device.type, socket.gethostname(), problem, launcher.end_before()]
    shared.set(str(rank), json.dumps(report))
    reports = [json.loads(shared.get(str(other))) for other in range(world)]
    if shared.add("have read", 1) == world:
        shared.set("all have read", "")

    problems = []
    first_kind, first_host, *_ = reports[0]
    for other, (kind, host, other_problem, _) in enumerate(reports):
        if other_problem:
            problems.append(other_problem)
        elif kind != first_kind:
            problems.append(
                f"rank 0 on {first_host} uses {first_kind} and rank {other} on {host} uses {kind}: "
                "pass --device cuda to see why a machine does not use CUDA, or --device cpu"
            )
    ends = [end for *_, end in reports if end]
    if problems or ends:
        # The launcher ends all processes when the first one ends, and rank 0 may hold the store.
        with suppress(dist.DistError):
            shared.wait(["all have read"])
        if ends:
            status, message = ends[0]
            repeat_end(status, message, rank)
        message = f"{problems[0]} ({len(problems)} of {world} ranks)"
        raise ReportedByRank0(message) if rank else UserError(message)
    return len({host for _, host, *_ in reports})


class Failures:
    """Ends this process when another rank has failed alone.

    Without it this process would wait for that rank in its next collective operation, until the
    timeout of half an hour: NCCL does not notice that a process has ended. (gloo does, and
    launchers may end all processes before.)

    Args:
        store: the launcher's store, which all ranks reach.
    """

    INTERVAL = 0.5  # seconds between two reads of the store
    GRACE = 10.0  # seconds in which a process may end by itself

    def __init__(self, store: dist.Store):
        self.store = dist.PrefixStore("failures", store)
        self.over = threading.Event()
        threading.Thread(target=self._watch, name="failures", daemon=True).start()

    def report(self, error: BaseException) -> None:
        """Report to the other ranks that this one ends with ``error``, and give them time to read.

        Nothing is reported if rank 0, which may hold the store, has already ended.
        """
        status = 2 if isinstance(error, UserError) else 1
        text = f"{one_line(error)} (rank {os.environ['RANK']} on {socket.gethostname()})"
        with suppress(RuntimeError):
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
    """Join torchrun's process group, nccl on CUDA and gloo otherwise.

    Args:
        device, problem: see :func:`check_devices`, which raises UserError.
        timeout: how long a collective operation waits for the slowest rank.

    Returns:
        the number of machines, and a watch for failures of other ranks.
    """
    store, rank, world = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # A single launcher may keep its store, with addresses of the processes before a restart.
        store = dist.PrefixStore(f"attempt {launcher.restarts()}", store)
    hosts = check_devices(store, rank, world, device, problem)
    options = {"store": store, "rank": rank, "world_size": world, "timeout": timeout}
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)
    return hosts, Failures(store)


@contextmanager
def process_group(
    device: str | None = None, deterministic: bool = False, precision: str | None = None
) -> Iterator[torch.device]:
    """Join torchrun's process group, if any, and start the log; yield the device of this process.

    Args:
        device: see :func:`util.devices.find_device`.
        deterministic: see :func:`util.devices.make_deterministic`.
        precision: ``--precision``. With ``"fp32"`` all convolutions are
            :func:`exact_convolutions`, also outside of :func:`autocast` and in backward passes.

    Raises:
        UserError: there is no such device, or ranks have different ones.
    """
    if deterministic:
        make_deterministic()
    found_device, problem = find_device(device)
    if found_device.type == "cpu":
        keep_freed_memory()
    elif found_device.type == "cuda" and not problem:
        torch.cuda.set_device(found_device)
    hosts = 1
    failures: Failures | None = None
    if launcher.launched():
        hosts, failures = join_group(found_device, problem, timeout=distributed.TIMEOUT)
    if problem:
        raise UserError(problem)
    start_log()
    log.info("computing on %s", describe_devices(found_device, hosts))
    try:
        with exact_convolutions() if precision == "fp32" else nullcontext():
            yield found_device
    except Exception as error:
        # The process group is not destroyed: that would wait for ranks that are waiting in a
        # collective operation. If another rank has ended, each rank notices that by itself.
        expected = isinstance(error, ReportedByRank0 | Preempted)
        if failures is not None and not expected and not lost_process(error):
            failures.report(error)
        raise
    finally:
        if failures is not None:
            failures.over.set()
    if launcher.launched():
        dist.destroy_process_group()
