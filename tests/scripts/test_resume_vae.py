"""main_vae.py taken up again: interrupted, stopped by a signal, in two processes; the bits are an unbroken run's."""

import os
import signal
import time

import pytest
import torch

from engine_tokenbridge import Trainer
from models.vae_losses import VAELosses
from tests.conftest import load, same
from tests.processes import start_script
from tests.scripts.test_main_vae import SMALL_VAE
from util import distributed

#: 4 steps an epoch of 16 images.
STEPS = f"{SMALL_VAE} --batch_size 4 --warmup_epochs 1 --lr 1e-3 --ema_rate 0.9"
ADVERSARY = "--disc_weight 0.5 --disc_start 2"


def same_runs(a, b) -> bool:
    """Whether two runs left equal states and equal tokenizers."""
    names = "model", "model_ema", "optimizer", "epoch", "step"
    states = [{name: load(folder, "vae-last.pth")[name] for name in names} for folder in (a, b)]
    return same(*states) and same(load(a, "vae.ckpt"), load(b, "vae.ckpt"))


@pytest.mark.parametrize(
    "flags",
    [
        "--accum_iter 2 --batch_size 2",
        f"{ADVERSARY} --num_workers 2",
        "--precision bf16 --no_ema_warmup",
    ],
)
def test_a_run_interrupted_anywhere_ends_as_one_never_interrupted(
    run, images, tmp_path, monkeypatch, flags
):
    command = f"{STEPS} {flags} --data_path {images} --epochs 2 --save_every_steps 3 --output_dir {tmp_path}"
    run("main_vae", f"{command}/whole")
    original = Trainer.clip_and_step
    for steps in (
        4,
        3,
    ):  # into the second epoch, saved at step 3; from there past the save at step 6
        left = [steps]

        def take_step(*args, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(Trainer, "clip_and_step", take_step)
        with pytest.raises(SystemExit):
            run("main_vae", f"{command}/parts --resume {tmp_path}/parts")
    assert not (tmp_path / "parts" / "vae.ckpt").exists()
    content = load(tmp_path / "parts", "vae-last.pth")
    assert (content["epoch"], content["step"]) == (0, 2)
    monkeypatch.setattr(Trainer, "clip_and_step", original)
    run("main_vae", f"{command}/parts --resume {tmp_path}/parts")
    assert same_runs(tmp_path / "whole", tmp_path / "parts")
    run("main_vae", f"{command}/parts --resume {tmp_path}/parts")  # nothing is left to train
    assert same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_to_one_of_two_processes_stops_both_and_they_go_on_exactly(
    run_two, images, tmp_path, monkeypatch
):
    flags = f"{STEPS} {ADVERSARY} --batch_size 2 --data_path {images} --epochs 2 --output_dir {tmp_path}"
    run_two("main_vae", f"{flags}/whole")
    forward, calls = VAELosses.forward, []

    def signalled(*args):
        calls.append(args)
        if distributed.get_rank() == 1 and len(calls) == 3:
            signal.raise_signal(signal.SIGUSR1)
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(VAELosses, "forward", signalled)
        run_two("main_vae", f"{flags}/parts --resume {tmp_path}/parts", status=75)
    assert not (tmp_path / "parts" / "vae.ckpt").exists()
    assert load(tmp_path / "parts", "vae-last.pth")["epoch"] == 0
    run_two("main_vae", f"{flags}/parts --resume {tmp_path}/parts")
    assert same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_ends_a_run_after_its_step_and_saves(images, tmp_path):
    flags = (
        f"{STEPS} --data_path {images} --epochs 1000 --save_last_freq 1 --output_dir {tmp_path}/run"
    )
    process = start_script(
        "main_vae", flags.replace("--num_workers 0", "--num_workers 1"), tmp_path / "log"
    )
    while process.is_alive() and not (tmp_path / "run" / "vae-last.pth").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)  # to the loader's workers, too, as schedulers do
    process.join()
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 75 and "stopped: by SIGTERM, saved at epoch" in said
    assert f"--resume {tmp_path}/run" in said and "Traceback" not in said
    content = load(tmp_path / "run", "vae-last.pth")
    steps = {int(state["step"]) for state in content["optimizer"]["state"].values()}
    assert steps == {4 * (content["epoch"] + 1) + content["step"]}


def test_a_run_goes_on_with_the_tokenizer_that_it_has_only(run, refused, images, tmp_path):
    command = f"{STEPS} --data_path {images} --epochs 1 --output_dir {tmp_path}/run"
    run("main_vae", command)
    new = f"{command.replace('/run', '/new')} --resume"
    line = refused("main_vae", f"{new} {tmp_path}/run --vae_embed_dim 8 --disc_weight 1")
    assert "embed_dim is 4 in the checkpoint, 8 in this run" in line
    assert "discriminator is False in the checkpoint, True in this run" in line
    assert "no vae-last.pth" in refused("main_vae", f"{new} {tmp_path}/nowhere")
    torch.save({"model": {}, "config": {"encoder_depth": 1}}, tmp_path / "checkpoint-last.pth")
    assert "not of the run" in refused("main_vae", f"{new} {tmp_path}/checkpoint-last.pth")
    path = tmp_path / "run" / "vae-last.pth"
    line = refused(
        "main_cache",
        f"--data_path {images} --vae_path {path} --cached_path {tmp_path}/cache --img_size 16",
    )
    assert "use vae.ckpt" in line
    path.write_bytes(path.read_bytes()[:-1000])
    assert "vae-last.pth" in refused("main_vae", f"{new} {tmp_path}/run")
