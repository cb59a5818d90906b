"""Devices: found, compared before processes join, told in the log; bits that are the same in every run."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.processes import forked
from util import devices, misc
from util.errors import ToldByMain, UserError


@pytest.mark.parametrize(
    "flag, cuda_devices, said",
    [
        (None, (3, 0, 3), "on cuda, process 1 on {host} on cpu: pass --device cuda, which tells why"),
        ("cuda", (3, 0, 3), "--device cuda, but torch can use no CUDA device on {host}: "),
        ("cuda", (2, 2, 2), "there is no cuda:2 on {host}, which has 2 CUDA devices"),
    ],
    ids=["by default", "one has none", "more processes than devices"],
)
def test_processes_that_cannot_compute_alike_end_at_once_with_one_line(capfd, monkeypatch, flag, cuda_devices, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_devices[int(os.environ["RANK"])] > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_devices[int(os.environ["RANK"])])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("socket.gethostname", lambda: f"node{os.environ['RANK']}")

    def start(rank: int) -> str:
        try:
            with misc.processes(flag):
                pass
        except UserError as error:
            return type(error), str(error)

    answers, statuses = forked(3, start)
    assert statuses == [0] * 3 and [kind for kind, _ in answers] == [UserError, ToldByMain, ToldByMain]
    host = "node2" if "cuda:2" in said else "node1"
    assert said.format(host=host) in answers[0][1] and answers[0][1].endswith("(1 of 3 processes)")


def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.find_device("cuda:1") == (torch.device("cuda:1"), "")
    with pytest.raises(UserError, match=r"no cuda:2 on .*, which has 2 CUDA devices"), misc.processes("cuda:2"):
        pass


def test_a_machine_that_came_back_joins_others_that_were_restarted():
    def start(rank: int) -> int:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(rank)  # each launcher counts its own
        with misc.processes("cpu"):
            return misc.get_world_size()

    assert forked(2, start)[0] == [2, 2]


def test_a_process_on_cuda_joins_with_its_device(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, 0, 1)]))
    with mock.patch.object(dist, "init_process_group") as join:
        assert devices.join_group(torch.device("cuda:3"), "", timeout=misc.timedelta(minutes=1)) == 1
    assert join.call_args.args == ("nccl",) and join.call_args.kwargs["device_id"] == torch.device("cuda:3")


def test_the_log_tells_device_and_processes_and_what_others_warn_of(capfd):
    def start(rank: int) -> None:
        with misc.processes("cpu"):
            misc.log.info("said by %d", rank)
            misc.log.warning("warned by %d", rank)
            misc.warn("known to all")

    assert forked(2, start)[1] == [0, 0]
    said = sorted(capfd.readouterr().err.splitlines())
    assert len(said) == 5
    assert said[0] == "[process 1] warned by 1"
    assert said[1].startswith("computing on cpu (") and "2 processes on 1 machines, gloo" in said[1]
    assert f"torch {torch.__version__}, CUDA {torch.version.cuda}, NVIDIA driver " in said[1]
    assert said[2:] == ["known to all", "said by 0", "warned by 0"]


def test_the_log_tells_a_gpu_and_its_driver(monkeypatch, tmp_path):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\nGCC\n")
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    said = devices.described(torch.device("cuda:0"), hosts=1)
    assert said.startswith("cuda (NVIDIA A100-SXM4-80GB, 8 on this machine), one process, torch ")
    assert said.endswith(", NVIDIA driver 535.104.05")


def test_deterministic_runs_have_torch_refuse_what_is_not():
    def start(rank: int) -> tuple:
        with misc.processes("cpu", deterministic=True):
            return torch.get_deterministic_debug_mode(), os.environ["CUBLAS_WORKSPACE_CONFIG"]

    assert forked(1, start)[0] == [(2, ":4096:8")]  # 1 would warn, and leave attention's backward pass as it is


@pytest.mark.skipif(
    not (torch.backends.cuda.is_built() and hasattr(torch._C, "_ensureCUDADeviceGuardSet")),
    reason="torch's CUDA wheel is needed (no GPU is), whose fake tensors do without a driver (not 2.6's)",
)
def test_stop_flag_and_checksums_are_exchanged_on_cuda_without_waiting_for_the_device(monkeypatch):
    said = []
    event = mock.Mock(record=lambda: said.append("recorded"), synchronize=lambda: said.append("waited for"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)

    def all_reduce(flag, async_op):
        assert flag.is_cuda and async_op
        return mock.Mock(wait=lambda: said.append("reduced"))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)

    def ask(rank: int) -> list[str]:
        with FakeTensorMode():  # where looking at a number is an error; its devices stay, hence another process
            signals = misc.StopSignals(torch.device("cuda"))
            assert not signals.agreed() and said == ["reduced", "recorded"]
            assert not signals.answer.read().is_cuda
        return said

    assert forked(1, ask) == ([["reduced", "recorded", "waited for"]], [0])

    def compare(rank: int) -> list[str]:  # as the weights of ranks at a save
        with FakeTensorMode():
            weights = torch.ones(3, device="cuda"), torch.ones(2, 2, dtype=torch.bfloat16, device="cuda")
            sums = misc.arriving_from_all(torch.stack([misc.bit_sum(weights)]))
            assert said == ["reduced", "recorded"] and not sums.read().is_cuda
        return said

    monkeypatch.setattr(misc, "get_world_size", lambda: 2)
    monkeypatch.setattr(misc, "get_rank", lambda: 1)
    assert forked(1, compare) == ([["reduced", "recorded", "waited for"]], [0])
