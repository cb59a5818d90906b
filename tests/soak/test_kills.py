"""What a week on a cluster does to a run: processes killed at any moment, five times, or twenty in ``make soak``."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from demo.demo import write_digits
from models.vae import AutoencoderKL
from tests.conftest import ROOT, filled, processes_of
from util.checkpoint.runs import read_run
from util.checkpoint.vae_files import save_vae

KILLS = int(os.environ.get("KILLS", 5))
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(command: str) -> subprocess.Popen:
    """Two processes, in a session of their own."""
    return subprocess.Popen(
        [*LAUNCHER, *command.split()],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def steps_taken(path: Path) -> int:
    """Steps of a run until its last checkpoint, which must be whole."""
    if not path.exists():
        return 0
    content = read_run(path)
    return (content["epoch"] + 1) * content["steps_per_epoch"] + content["step"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    """Flags of a run on cached digits."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "data")
    save_vae(folder / "vae.ckpt", filled(AutoencoderKL(4, (1, 1, 2), ch=8, num_res_blocks=1)), 0.5)
    command = f"main_cache.py --img_size 16 --vae_path {folder}/vae.ckpt --data_path {folder}/data"
    command += f" --cached_path {folder}/cache --num_workers 0 --device cpu"
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True, capture_output=True)
    return (
        "main_tokenbridge.py --model tokenbridge_tiny --img_size 16 --class_num 10 --buffer_size 4 --quant_bits 4 "
        f"--num_workers 0 --device cpu --use_cached --cached_path {folder}/cache --lr 1e-3 --warmup_epochs 1 "
        "--batch_size 16 --epochs 2 --save_every_steps 2 --ema_rate 0.9"
    )


@pytest.mark.slow
def test_kills_leave_no_trace(digits, tmp_path):
    whole = start(f"{digits} --output_dir {tmp_path}/whole")
    assert whole.wait(timeout=600) == 0, whole.stderr.read()
    total = steps_taken(tmp_path / "whole" / "checkpoint-last.pth")

    draw, path = random.Random(0), tmp_path / "cut" / "checkpoint-last.pth"
    for moment in sorted(draw.randrange(total - 4) for _ in range(KILLS)):
        run = start(f"{digits} --output_dir {tmp_path}/cut --resume {tmp_path}/cut")
        while run.poll() is None and steps_taken(path) < moment:
            time.sleep(0.02)
        time.sleep(draw.random())
        assert run.poll() is None, run.stderr.read()
        # All at once, or one process alone, whose end the launcher and the other one have to notice.
        ranks = processes_of(tmp_path / "cut")
        if draw.random() < 0.5 and len(ranks) == 2:
            os.kill(draw.choice(ranks), signal.SIGKILL)
            assert run.wait(timeout=90) != 0
        else:
            os.killpg(run.pid, signal.SIGKILL)
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
            run.wait()
        run.stderr.close()
        steps_taken(path)  # whole
    last = start(f"{digits} --output_dir {tmp_path}/cut --resume {tmp_path}/cut")
    assert last.wait(timeout=600) == 0, last.stderr.read()

    ours, unkilled = (
        read_run(tmp_path / name / "checkpoint-last.pth") for name in ("cut", "whole")
    )
    for part in ("model", "model_ema"):
        assert all(torch.equal(value, unkilled[part][name]) for name, value in ours[part].items())
    for number, entry in ours["optimizer"]["state"].items():
        assert all(
            torch.equal(value, unkilled["optimizer"]["state"][number][name])
            for name, value in entry.items()
        )
    assert not list((tmp_path / "cut").glob(".*.part"))


@pytest.mark.slow
def test_the_death_of_one_process_ends_the_others_and_is_in_the_log(digits, tmp_path):
    run = start(f"{digits} --epochs 100 --output_dir {tmp_path}/run")
    while run.poll() is None and steps_taken(tmp_path / "run" / "checkpoint-last.pth") < 2:
        time.sleep(0.1)
    first, second = processes_of(tmp_path / "run")
    os.kill(second, signal.SIGKILL)
    _, said = run.communicate(timeout=90)
    assert run.returncode != 0 and not Path(f"/proc/{first}").exists()
    assert "error: another rank of this run has ended" in said  # what the one that is left says
    assert "Signal 9 (SIGKILL)" in said  # what the launcher says
