"""The baselines compute the same results as the models, and every benchmark runs."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.baselines import DiffusionHead, RecomputingHead, argmin_over_levels, plain_kernels
from benchmarks.loader import write_cache
from models.quantizer import GaussianQuantizer
from tests.conftest import NO_DROPOUT, batch, small
from tests.processes import start_script
from tests.test_docs import program, refusal


@torch.no_grad()
@pytest.mark.parametrize("head", ["ar", "pairs", "patches"])
def test_recomputing_head_samples_the_same(head):
    plain = small(head).head
    features, uniform = torch.randn(9, 32), torch.rand(9, plain.channel_steps)
    plain.__class__ = RecomputingHead
    with plain_kernels():
        recomputed = plain.sample(features, 1.0, uniform)[0]
    assert torch.equal(recomputed, small(head).head.sample(features, 1.0, uniform)[0])


def test_argmin_over_levels_equals_the_quantizer():
    quantizer, x = GaussianQuantizer(64), 3 * torch.randn(4, 256, 16)
    assert all(
        torch.equal(a, b)
        for a, b in zip(argmin_over_levels(quantizer, x), quantizer(x), strict=True)
    )


def test_plain_kernels_give_the_same_loss():
    model = small("ar", **NO_DROPOUT).train()
    inputs = batch(model)
    with plain_kernels():
        expected = model(*inputs).item()
    assert model(*inputs).item() == pytest.approx(expected, abs=1e-4)


def test_diffusion_head_samples_the_data():
    # If the noise estimate is exact for data of a single value, sampling returns that value.
    head = DiffusionHead(8, channels=3, width=16, depth=1)
    value = torch.tensor([0.5, -1.0, 2.0])

    def exact(x, t, feature):
        alpha = head.alphas[head.kept == t].item()
        return (x - alpha**0.5 * value) / (1 - alpha) ** 0.5, torch.zeros_like(x)

    head.forward = exact
    for features, guidance in ((torch.randn(5, 8), 1.0), (torch.randn(10, 8), 3.0)):
        assert torch.allclose(head.sample(features, guidance), value.expand(5, -1), atol=1e-3)


def run(benchmark: str, flags: str, log: Path) -> None:
    """Run a benchmark on the CPU in a process of its own, since it changes global settings."""
    process = start_script(benchmark, flags, log)
    process.join()
    assert process.exitcode == 0, log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("quantizer", ""),
        ("head_speed", "--model tokenbridge_tiny --tokens 2 --precision fp32"),
        ("sampling", "--model tokenbridge_tiny --num_iter 2 --ways release bf16"),
        ("training", "--model tokenbridge_tiny --ways release bf16"),
        ("tokenizer", "--img_size 32 --precision fp32"),
        ("loader", "--images 40 --workers 0"),
        ("ranks", "--batch 2 --steps 40"),
    ],
)
def test_benchmarks_run(name, flags, tmp_path, monkeypatch):
    monkeypatch.undo()  # measures how fast the machine is
    path = tmp_path / "results.json"
    run(f"benchmarks.{name}", f"--repeats 1 --json {path} {flags}", tmp_path / "log")
    content = json.loads(path.read_text())
    assert content["benchmark"] == name and content["machine"]["matmul_tflops"]["fp32"] > 0
    assert all(row.get("median_s", row.get("images_per_s")) > 0 for row in content["rows"])


@pytest.mark.slow
def test_curves_run(tmp_path):
    write_cache(tmp_path / "cache", 128, side=1)  # one token per image
    flags = f"--cached_path {tmp_path}/cache --epochs 2 --seeds 2 --json {tmp_path}/curves.json"
    run("benchmarks.curves", flags, tmp_path / "log")
    rows = json.loads((tmp_path / "curves.json").read_text())["rows"]
    assert [row["seed"] for row in rows] == [1, 2, 1, 1, 1, 1] and (
        tmp_path / "curves.png"
    ).exists()
    assert sum(row["difference_from_mean"] for row in rows[:2]) == pytest.approx(0, abs=1e-6)
    ends = [row["loss_at_end"] for row in rows]
    # Hardly trained: the loss is still close to that of 32 uniform levels.
    assert min(ends) > 1 and max(ends) < 1.3 * math.log(32)


def test_the_gpu_commands_run_until_the_time_is_over(monkeypatch, capsys, refused):
    clock, started = iter(range(0, 10_000, 100)), []
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))

    def run(words, env, timeout, check):
        started.append((words[1:], env.get("PYTORCH_CUDA_ALLOC_CONF")))
        if len(started) == 2:
            raise gpu.subprocess.TimeoutExpired(words, timeout)
        return gpu.subprocess.CompletedProcess(words, len(started) == 3)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    outcomes = gpu.run_all(15)
    assert [outcome.split(" after")[0] for outcome in outcomes.values()] == [
        "done", "stopped", "failed with status True", *["not started"] * 5,
    ]  # fmt: skip
    assert started[0][1] == "expandable_segments:True" and started[1][1] is None
    for name in gpu.COMMANDS:
        if name != "tests":
            assert refusal(program(gpu.command_of(name)), capsys) == "", name
    assert "cuda" in refused("benchmarks.gpu", "").lower()
