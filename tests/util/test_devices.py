"""Devices: found, compared before processes join, told in the log; bits that are the same in every run."""

import os
import threading
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.processes import forked
from util import devices, distributed, errors, precision
from util import process_group as groups
from util.checksums import bit_sum
from util.errors import ReportedByRank0, UserError
from util.log import log, warn
from util.precision import PRECISIONS, autocast, effective_precision
from util.process_group import process_group
from util.signals import StopSignals


@pytest.mark.parametrize(
    "flag, cuda_devices, said",
    [
        (
            None,
            (3, 0, 3),
            "cuda and rank 1 on {host} uses cpu: pass --device cuda to see why",
        ),
        ("cuda", (3, 0, 3), "--device cuda, but torch can use no CUDA device on {host}: "),
        ("cuda", (2, 2, 2), "there is no cuda:2 on {host}, which has 2 CUDA devices"),
    ],
    ids=["by default", "one has none", "more processes than devices"],
)
def test_processes_that_cannot_compute_alike_end_at_once_with_one_line(
    capfd, monkeypatch, flag, cuda_devices, said
):
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: cuda_devices[int(os.environ["RANK"])] > 0
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_devices[int(os.environ["RANK"])])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("socket.gethostname", lambda: f"node{os.environ['RANK']}")

    def start(rank: int) -> str:
        try:
            with process_group(flag):
                pass
        except UserError as error:
            return type(error), str(error)

    answers, statuses = forked(3, start)
    assert statuses == [0] * 3 and [kind for kind, _ in answers] == [
        UserError,
        ReportedByRank0,
        ReportedByRank0,
    ]
    host = "node2" if "cuda:2" in said else "node1"
    assert said.format(host=host) in answers[0][1] and answers[0][1].endswith("(1 of 3 ranks)")


def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.find_device("cuda:1") == (torch.device("cuda:1"), "")
    with (
        pytest.raises(UserError, match=r"no cuda:2 on .*, which has 2 CUDA devices"),
        process_group("cuda:2"),
    ):
        pass


@pytest.mark.parametrize(
    "asked, said",
    [
        ("gpu", "--device gpu: there is no such device; choose cuda, cuda:N, mps or cpu"),
        ("cuda:x", "--device cuda:x: there is no such device"),
        ("xpu", "--device xpu: there is no such device"),
        ("meta", "--device meta: there is no such device"),
        ("mps", "--device mps, but torch can use no Apple GPU on "),
    ],
)
def test_devices_that_are_not_there_are_refused_in_one_line(refused, asked, said):
    for script, flags in (("main_metrics", "--images ."), ("benchmarks.tokenizer", "")):
        assert said in refused(script, f"{flags} --device {asked}")


def test_an_apple_gpu_is_taken_when_it_is_asked_for_by_one_process(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.find_device("mps") == (torch.device("mps"), "")
    assert devices.find_device(None) == (torch.device("cpu"), "")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in devices.find_device("mps")[1]


# --------------------------------------------------------------------------------------------------------------------
# Precision on the CPU.

CASCADE_LAKE = "flags\t\t: fpu avx2 avx512f avx512bw avx512_vnni\n"


@pytest.mark.parametrize(
    "cpuinfo, checks, bf16, fp16",
    [
        (CASCADE_LAKE, {}, False, False),
        (CASCADE_LAKE.replace("_vnni", "_bf16"), {}, True, False),
        ("flags : amx_bf16 avx512_bf16 avx512_fp16 amx_tile\n", {}, True, True),
        ("Features : fp asimd asimdhp bf16 i8mm\n", {}, True, True),
        ("Features : fp asimd asimdhp\n", {}, False, True),
        (None, {"_is_avx512_bf16_supported": True}, True, False),
        (None, {"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": True}, True, False),
        (None, {"_is_amx_fp16_supported": True}, False, True),
        (None, {}, False, False),
    ],
)
def test_instructions_are_read_from_torch_or_linux_and_unknown_means_none(
    monkeypatch, tmp_path, cpuinfo, checks, bf16, fp16
):
    for check in [check for names, _ in precision.INSTRUCTIONS.values() for check in names]:
        monkeypatch.delattr(torch.cpu, check, raising=False)
    for check, answer in checks.items():
        monkeypatch.setattr(torch.cpu, check, lambda answer=answer: answer, raising=False)
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert [precision.cpu_multiplies.__wrapped__(name) for name in ("bf16", "fp16")] == [
        bf16,
        fp16,
    ]


def test_bf16_that_would_be_emulated_is_fp32_and_fp16_is_warned_of(instructions, caplog):
    with caplog.at_level("INFO", logger="tokenbridge"):
        instructions()
        assert [effective_precision("cpu", name) for name in PRECISIONS] == ["fp32", "fp32", "fp16"]
        assert effective_precision("cuda", "bf16") == effective_precision("mps", "bf16") == "bf16"
        with autocast(torch.device("cpu"), "bf16"):
            assert not torch.is_autocast_enabled("cpu")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "no bf16" in caplog.messages[0] and "no fp16" in caplog.messages[1]
    instructions("bf16", "fp16")
    with autocast(torch.device("cpu"), "bf16"):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled(
            "cpu"
        )


def test_files_name_the_precision_that_a_run_computed_in(
    run, images, vae_path, tmp_path, instructions
):
    instructions()
    command = f"--img_size 16 --vae_path {vae_path} --data_path {images} --num_workers 0 --precision bf16 --device cpu"
    run("main_cache", f"{command} --cached_path {tmp_path}/cache")
    assert '"precision": "fp32"' in (tmp_path / "cache" / "cache.json").read_text()


# --------------------------------------------------------------------------------------------------------------------
# Convolutions on CUDA, whose flag is there without CUDA, too.


def allowed() -> bool:
    return torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision, tf32", [("fp32", False), ("bf16", True), (None, True)])
def test_convolutions_of_a_run_in_fp32_are_in_float32(precision, tf32):
    with process_group("cpu", precision=precision):
        assert allowed() == tf32
    assert allowed()


def test_so_are_those_of_autocast_in_fp32_and_after_an_error_the_flag_is_as_it_was():
    with pytest.raises(ZeroDivisionError), autocast(torch.device("cuda"), "fp32"):
        assert not allowed()
        raise ZeroDivisionError
    assert allowed()
    with autocast(torch.device("cpu"), "bf16"):
        assert allowed()


# --------------------------------------------------------------------------------------------------------------------
# Processes.


def test_a_machine_that_came_back_joins_others_that_were_restarted():
    def start(rank: int) -> int:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(rank)  # each launcher counts its own
        with process_group("cpu"):
            return distributed.get_world_size()

    assert forked(2, start)[0] == [2, 2]


def test_a_process_on_cuda_joins_with_its_device(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, 0, 1)]))
    with mock.patch.object(dist, "init_process_group") as join:
        hosts, failures = groups.join_group(
            torch.device("cuda:3"), "", timeout=timedelta(minutes=1)
        )
    failures.over.set()
    assert hosts == 1
    assert join.call_args.args == ("nccl",) and join.call_args.kwargs["device_id"] == torch.device(
        "cuda:3"
    )


def test_the_log_tells_device_and_processes_and_what_others_warn_of(capfd):
    def start(rank: int) -> None:
        with process_group("cpu"):
            log.info("said by %d", rank)
            log.warning("warned by %d", rank)
            warn("known to all")

    assert forked(2, start)[1] == [0, 0]
    said = sorted(capfd.readouterr().err.splitlines())
    assert len(said) == 5
    assert said[0] == "[rank 1] warned by 1"
    assert said[1].startswith("computing on cpu (") and "2 ranks on 1 machine, gloo" in said[1]
    assert f", torch {torch.__version__}" in said[1] and "None" not in said[1]
    assert said[2:] == ["known to all", "said by 0", "warned by 0"]


def test_the_log_tells_a_gpu_and_its_driver(monkeypatch, tmp_path):
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\nGCC\n"
    )
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    said = devices.describe_devices(torch.device("cuda:0"), hosts=1)
    assert said.startswith("cuda (NVIDIA A100-SXM4-80GB, 8 on this machine), one process, torch ")
    assert said.endswith(", NVIDIA driver 535.104.05")


def test_deterministic_runs_have_torch_refuse_what_is_not():
    def start(rank: int) -> tuple:
        with process_group("cpu", deterministic=True):
            return torch.get_deterministic_debug_mode(), os.environ["CUBLAS_WORKSPACE_CONFIG"]

    assert forked(1, start)[0] == [
        (2, ":4096:8")
    ]  # 1 would warn, and leave attention's backward pass as it is


@pytest.mark.parametrize(
    "error, status", [(UserError("mend it"), 2), (ZeroDivisionError("bug"), 1)]
)
def test_a_process_that_fails_alone_ends_one_that_would_not_notice(
    monkeypatch, capfd, error, status
):
    monkeypatch.setattr(groups.Failures, "INTERVAL", 0.1)
    monkeypatch.setattr(groups.Failures, "GRACE", 0.5)
    monkeypatch.setattr("socket.gethostname", lambda: f"node{os.environ['RANK']}")

    def main() -> None:
        with process_group("cpu"):
            if distributed.get_rank() == 1:
                raise error
            threading.Event().wait(100)  # as in a collective operation of NCCL

    assert forked(2, lambda rank: errors.run(main))[1] == [status, status]
    said = capfd.readouterr().err
    assert said.count("\nerror: ") == 1 and f"{errors.one_line(error)} (rank 1 on node1)" in said


@pytest.mark.skipif(
    not (torch.backends.cuda.is_built() and hasattr(torch._C, "_ensureCUDADeviceGuardSet")),
    reason="torch's CUDA wheel is needed (no GPU is), whose fake tensors do without a driver (not 2.6's)",
)
def test_stop_flag_and_checksums_are_exchanged_on_cuda_without_waiting_for_the_device(monkeypatch):
    said = []
    event = mock.Mock(
        record=lambda: said.append("recorded"), synchronize=lambda: said.append("waited for")
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)

    def all_reduce(flag, async_op):
        assert flag.is_cuda and async_op
        return mock.Mock(wait=lambda: said.append("reduced"))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)

    def ask(rank: int) -> list[str]:
        with (
            FakeTensorMode()
        ):  # where looking at a number is an error; its devices stay, hence another process
            signals = StopSignals(torch.device("cuda"))
            assert not signals.agreed() and said == ["reduced", "recorded"]
            assert not signals.answer.read().is_cuda
        return said

    assert forked(1, ask) == ([["reduced", "recorded", "waited for"]], [0])

    def compare(rank: int) -> list[str]:  # as the weights of ranks at a save
        with FakeTensorMode():
            weights = (
                torch.ones(3, device="cuda"),
                torch.ones(2, 2, dtype=torch.bfloat16, device="cuda"),
            )
            sums = distributed.gather_async(torch.stack([bit_sum(weights)]))
            assert said == ["reduced", "recorded"] and not sums.read().is_cuda
        return said

    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    assert forked(1, compare) == ([["reduced", "recorded", "waited for"]], [0])
