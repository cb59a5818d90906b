"""Seeds, and shares of several processes."""

import math
import signal
import socket
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.conftest import ROOT, SHORT, TINY, scalars
from tests.processes import forked, in_processes
from util import distributed, errors
from util.checksums import checksum
from util.errors import ReportedByRank0, UserError
from util.process_group import process_group
from util.rng import seed_everything
from util.signals import StopSignals


def test_every_part_of_a_seed_counts():
    draws = set()
    for seeds in ((1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)):
        seed_everything(*seeds)
        draws.add(torch.rand(()).item())
    assert len(draws) == 4
    seed_everything(7)
    first = torch.rand(())
    torch.manual_seed(7)
    assert torch.rand(()) == first


def test_shares_come_back_in_order():
    # 11 rows over 3 processes, each holding rank, rank + 3, ...
    rows = torch.arange(22.0).view(11, 2)
    shares = [
        torch.cat([rows[rank::3], torch.zeros(4 - len(rows[rank::3]), 2)]) for rank in range(3)
    ]

    def all_gather(out, own):
        for place, share in zip(out, shares, strict=True):
            place.copy_(share)

    with (
        mock.patch("util.distributed.get_world_size", return_value=3),
        mock.patch("torch.distributed.all_gather", all_gather),
    ):
        assert torch.equal(distributed.gather_rows(rows[1::3], 11), rows)


def test_the_main_process_decides_for_all_and_its_error_ends_all():
    assert (
        in_processes(3, lambda rank: distributed.on_rank_0(lambda: f"from {rank}"))
        == ["from 0"] * 3
    )

    def fail(rank: int) -> None:
        def work() -> None:
            raise UserError(f"mend it {rank}")

        distributed.on_rank_0(work)

    answers = in_processes(3, fail)
    assert [str(answer) for answer in answers] == ["mend it 0"] * 3
    assert [type(answer) for answer in answers] == [
        UserError,
        ReportedByRank0,
        ReportedByRank0,
    ]  # which alone is printed


def test_an_error_of_any_process_ends_all_and_names_its_host():
    def work(rank: int, failing: int) -> int:
        socket.gethostname = lambda: f"host{rank}"

        def fail() -> int:
            if rank >= failing:
                raise UserError(f"mend it {rank}")
            return rank

        return distributed.on_all_ranks(fail)

    assert in_processes(3, lambda rank: work(rank, 3)) == [0, 1, 2]
    answers = in_processes(3, lambda rank: work(rank, 1))
    assert [str(answer) for answer in answers] == ["mend it 1 (2 of 3 ranks, on host1, host2)"] * 3
    assert [type(answer) for answer in answers] == [UserError, ReportedByRank0, ReportedByRank0]


@pytest.mark.parametrize(
    "together, statuses", [(distributed.on_all_ranks, [2, 1]), (distributed.on_rank_0, [1, 2])]
)
def test_an_unexpected_error_ends_all_too_with_its_traceback_where_it_happened(
    capfd, together, statuses
):
    failing = statuses.index(1)

    def work() -> None:
        if distributed.get_rank() == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def main() -> None:
        with process_group("cpu"):
            together(work)

    assert forked(2, lambda rank: errors.run(main))[1] == statuses
    said = capfd.readouterr().err
    assert said.count("Traceback") == 1
    assert ("error: OutOfMemoryError: CUDA out of memory (1 of 2 ranks" in said) == (failing == 1)


def test_values_that_differ_end_all_processes():
    assert (
        in_processes(
            3, lambda rank: distributed.check_equal({"--lr": 0.1, "--seed": 1}, "start alike")
        )
        == [None] * 3
    )
    answers = in_processes(
        3, lambda rank: distributed.check_equal({"--lr": 0.1, "--seed": rank // 2}, "start alike")
    )
    assert all("--seed is 0 on rank 0, but 1 on rank 2" in str(answer) for answer in answers)
    assert "1 of 3 ranks differ" in str(answers[0]) and str(answers[0]).endswith("start alike")
    assert [type(answer) for answer in answers] == [UserError, ReportedByRank0, ReportedByRank0]


def test_processes_stop_after_the_same_step_without_another_network(monkeypatch):
    monkeypatch.setattr(dist, "new_group", None)  # whose sockets a cluster may not have

    def train(rank: int) -> int:
        with StopSignals(torch.device("cpu")) as signals:
            for step in range(10):
                if rank == 1 and step == 4:
                    signal.raise_signal(signal.SIGUSR1)
                if signals.agreed():
                    return step

    assert in_processes(3, train) == [5] * 3  # the step after


#: Removes what only POSIX systems, or only Linux, have, and runs a script.
ELSEWHERE = """
import ctypes, os, runpy, signal, sys
import torch.utils.data, torch.distributed  # before anything is removed
for module, names in {
    signal: ("SIGUSR1", "SIGHUP", "pthread_sigmask", "sigwaitinfo"),
    os: ("sync", "fchmod", "sched_getaffinity"),
}.items():
    for name in names:
        delattr(module, name)
sys.modules["resource"] = None
library = ctypes.CDLL

def named(name, *args, **options):
    if name is None:
        raise TypeError("a name is needed")
    return library(name, *args, **options)

ctypes.CDLL = named
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_needs_nothing_that_only_linux_has(cached, tmp_path):
    flags = f"{TINY.replace('--num_workers 0', '--num_workers 1')} {SHORT} --epochs 1 --use_cached --device cpu"
    command = f"main_tokenbridge.py {flags} --cached_path {cached} --output_dir {tmp_path}/run"
    ended = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert math.isnan(scalars(tmp_path / "run", "speed/memory_gib").popitem()[1])
    assert (tmp_path / "run" / "checkpoint-last.pth").exists()


def test_a_checksum_tells_one_bit_and_what_changed_places():
    tensors = [torch.randn(5), torch.randn(2, 3).bfloat16(), torch.arange(4), torch.ones(2).bool()]
    sums = [checksum(tensors)]
    tensors[0].view(torch.int32)[3] ^= 1 << 31
    sums.append(checksum(tensors))
    tensors[2] += torch.tensor([0, 0, 1, 0])
    sums.append(checksum(tensors))
    same_kind = [torch.zeros(2), torch.ones(2)]
    sums += [checksum(same_kind), checksum(same_kind[::-1])]
    assert len(set(sums)) == 5 and all(len(each) == 16 for each in sums)
