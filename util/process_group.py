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
from util.devices import (
    described,
    find_device,
    keep_freed_memory,
    make_deterministic,
)
from util.errors import (
    Preempted,
    ToldByMain,
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
    shared.set(
        str(rank), json.dumps([device.type, socket.gethostname(), problem, launcher.end_before()])
    )
    told = [json.loads(shared.get(str(other))) for other in range(world)]
    if shared.add("have read", 1) == world:
        shared.set("all have read", "")
    wrong, ends = [], [end for *_, end in told if end]
    for other, (kind, host, its_problem, _) in enumerate(told):
        if its_problem:
            wrong.append(its_problem)
        elif kind != told[0][0]:
            text = f"process 0 on {told[0][1]} computes on {told[0][0]}, process {other} on {host} on {kind}"
            wrong.append(
                f"{text}: pass --device cuda, which tells why a machine does not, or --device cpu"
            )
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


@contextmanager
def process_group(
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
    hosts, failures = (
        join_group(device, problem, timeout=distributed.TIMEOUT)
        if launcher.launched()
        else (1, None)
    )
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
        if (
            failures is not None
            and not isinstance(error, ToldByMain | Preempted)
            and not lost_process(error)
        ):
            failures.report(error)
        raise
    finally:
        if failures is not None:
            failures.over.set()
    if launcher.launched():
        dist.destroy_process_group()
