"""Several ranks, forked from the test: they start at once, without importing, and inherit what the test has patched."""

import importlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkProcess as Process
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from util import errors
from util.errors import UserError


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def forked(world: int, work: Callable[[int], Any]) -> tuple[list[Any], list[int]]:
    """Run ``work(rank)`` in ``world`` processes with torchrun's variables; return their results and exit statuses.

    The result of a process that ended itself is None.
    """
    port, fork = free_port(), multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(world)]

    def start(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)  # the threads of the forked process do not exist here
        status = 0
        try:
            pipes[rank][1].send(work(rank))
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        os._exit(status)

    processes = [fork.Process(target=start, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
    finally:
        for process in processes:
            process.kill()
    answers = [
        pipe.recv() if pipe.poll() else None for pipe, _ in pipes
    ]  # small enough to lie in the pipe
    return answers, [process.exitcode for process in processes]


def in_processes(world: int, work: Callable[[int], Any]) -> list[Any]:
    """Run ``work(rank)`` on ``world`` ranks of a gloo group; return what each returns, or the UserError it raises."""

    def join(rank: int) -> Any:
        dist.init_process_group("gloo")
        try:
            return work(rank)
        except UserError as error:
            return type(error)(str(error))
        finally:
            dist.barrier()

    answers, statuses = forked(world, join)
    assert statuses == [0] * world
    return answers


def run_two(script: str, command: str, status: int = 0) -> None:
    """Run a script on two ranks, which must end with ``status``: ``run_two("main_cache", "--flag value")``."""
    main = importlib.import_module(script).main

    def start(rank: int) -> None:
        sys.argv = [f"{script}.py", *command.split(), "--device", "cpu"]
        errors.run(main)

    assert forked(2, start)[1] == [status] * 2


def start_script(script: str, command: str, stderr: Path) -> Process:
    """Start a script in a forked process with a session of its own, and its standard error in a file.

    It starts within milliseconds, since it imports nothing. Only a test of how Python itself starts or ends needs
    ``subprocess``.
    """
    main = importlib.import_module(script).main

    def start() -> None:
        os.setsid()
        torch.set_num_threads(1)  # the threads of the forked process do not exist here
        write_stderr_to(stderr)
        sys.argv = [f"{script}.py", *command.split(), "--device", "cpu"]
        errors.run(main)

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    return process


def write_stderr_to(path: Path) -> None:
    """Send what this process writes to standard error to a file."""
    sys.stderr = path.open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)


def attempt(monkeypatch, folder: Path, count: int) -> None:
    """Set the variables of torchrun's processes after ``count`` restarts; ``folder`` is the launcher's."""
    (folder / f"attempt_{count}").mkdir(exist_ok=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{folder}/attempt_{count}/0/error.json")
