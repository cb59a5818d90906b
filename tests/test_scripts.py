"""The commands as a user types them, on small images; and what they say when something is wrong."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import engine_tokenbridge
import main_cache
import main_tokenbridge
import main_vae
import reconstruction
from models import backbone
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL, DiagonalGaussianDistribution
from tests.conftest import ROOT, SHORT, TINY, processes_of
from tools import checkpoint as commands
from util import misc
from util.images import to_uint8
from util.loader import CachedFolder
from util.training_state import TrainingState


def load(folder) -> dict:
    return torch.load(folder / "checkpoint-last.pth", weights_only=True)


def torchrun(command: str, processes: int = 2) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *command.split()], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


# --------------------------------------------------------------------------------------------------------------------
# Flags.


def test_flags_have_the_releases_names_and_defaults():
    expected = {
        main_tokenbridge: {
            "model": "tokenbridge_large", "img_size": 256, "vae_path": "pretrained_models/vae/kl16.ckpt",
            "vae_embed_dim": 16, "vae_stride": 16, "patch_size": 1, "buffer_size": 64, "class_num": 1000,
            "attn_dropout": 0.1, "proj_dropout": 0.1, "label_drop_prob": 0.1, "mask_ratio_min": 0.7,
            "grad_checkpointing": False, "quant_bits": 6, "quant_min": -5.0, "quant_max": 5.0, "batch_size": 16,
            "epochs": 400, "lr": None, "blr": 1e-4, "min_lr": 0.0, "lr_schedule": "cosine", "warmup_epochs": 100,
            "weight_decay": 0.02, "grad_clip": 1.0, "ema_rate": 0.9999, "seed": 1, "start_epoch": 0,
            "save_last_freq": 5, "num_iter": 256, "num_images": 50000, "cfg": 1.0, "cfg_schedule": "linear",
            "temperature": 1.0, "eval_bsz": 64, "eval_freq": 40, "online_eval": False, "evaluate": False,
            "data_path": "./data/imagenet", "output_dir": "./output_dir", "resume": "", "use_cached": False,
            "cached_path": "", "num_workers": 10, "pin_mem": True, "device": None, "precision": "bf16",
        },
        main_cache: {
            "batch_size": 128, "img_size": 256, "vae_path": "pretrained_models/vae/kl16.ckpt", "vae_embed_dim": 16,
            "data_path": "./data/imagenet", "cached_path": "", "seed": 0, "num_workers": 10, "pin_mem": True,
        },
        reconstruction: {
            "vae_path": "pretrained_models/vae/kl16.ckpt", "image_dir": "./data/imagenet/train", "bits": 6,
            "output_dir": "quantization_results", "range": 5.0, "images_per_class": 50,
        },
        main_vae: {"img_size": 256, "vae_embed_dim": 16, "ch": 128, "ch_mult": [1, 1, 2, 2, 4]},
    }  # fmt: skip
    for script, defaults in expected.items():
        args = vars(script.get_args_parser().parse_args([]))
        assert {name: args[name] for name in defaults} == defaults
    assert not main_tokenbridge.get_args_parser().parse_args(["--no_pin_mem"]).pin_mem


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer, cache, reconstruction.


def test_a_tokenizer_is_trained_and_tells_its_latent_factor(run, images, tmp_path, caplog):
    caplog.set_level("INFO")
    run(
        "main_vae",
        f"--data_path {images} --img_size 16 --output_dir {tmp_path} --ch 8 --ch_mult 1 2 --num_res_blocks 1 "
        "--vae_embed_dim 4 --batch_size 8 --epochs 30 --lr 3e-3 --num_workers 0",
    )
    vae, latent_factor = AutoencoderKL.from_pretrained(tmp_path / "vae.ckpt")
    assert (vae.stride, vae.embed_dim) == (2, 4)
    assert f"latent factor {latent_factor:.4f}" in caplog.text
    events = EventAccumulator(str(tmp_path / "tokenizer_log")).Reload().Scalars("tokenizer/error")
    assert events[-1].value < 0.7 * events[0].value

    run(
        "main_cache",
        f"--img_size 16 --vae_path {tmp_path}/vae.ckpt --data_path {images} --cached_path {tmp_path}/cache "
        "--num_workers 0",
    )
    moments = torch.stack([moments for moments, _ in CachedFolder(tmp_path / "cache")])
    latents = DiagonalGaussianDistribution(moments).sample() * latent_factor
    assert latents.std().item() == pytest.approx(1, abs=0.1)


@torch.no_grad()
def test_the_cache_holds_both_views_of_every_image(images, vae_path, cached):
    names = sorted(str(path.relative_to(cached)) for path in cached.rglob("*.npz"))
    assert names == sorted(f"class{c}/{i}.png.npz" for c in range(4) for i in range(4))
    vae, factor = AutoencoderKL.from_pretrained(vae_path)
    from util.loader import image_transform, read_image

    image = image_transform(16)(read_image(str(images / "train" / "class2" / "3.png")))
    with np.load(cached / "class2" / "3.png.npz") as arrays:
        for name, view in {"moments": image, "moments_flip": image.flip(2)}.items():
            assert arrays[name].dtype == np.float32 and arrays[name].shape == (16, 4, 4)
            assert np.allclose(arrays[name], vae.encode(view[None]).parameters[0], atol=1e-4)
    about = json.loads((cached / "cache.json").read_text())
    assert (about["images"], about["img_size"], about["latent_factor"]) == (16, 16, factor)


def test_reconstruction_writes_figures_and_pictures(run, images, vae_path, tmp_path):
    common = f"--img_size 16 --vae_path {vae_path} --output_dir {tmp_path}/rec --images_per_class 3 --num_workers 0"
    results = {}
    for bits in (-1, 3, 6):
        run("reconstruction", f"{common} --image_dir {images} --bits {bits} --batch_size 5")
        folder = tmp_path / "rec" / f"quant_b{bits}_r5.0_n3"
        results[bits] = json.loads((folder / "results.json").read_text())
        for part in ("real", "recon"):
            assert sorted(os.listdir(folder / part)) == [f"{i:05d}.png" for i in range(12)]
        with Image.open(folder / "reconstruction.png") as picture:
            views = 2 if bits < 0 else 3
            assert picture.size == (views * (128 + 2) + 2, 8 * (128 + 2) + 2 + 16)
    assert results[-1]["latent_mse"] == 0 and "levels" not in results[-1]
    assert 0 < results[6]["latent_mse"] < results[3]["latent_mse"]
    assert results[6]["levels"] == 64 and max(results[6]["levels_used"]) <= 64
    # Neither the batch size nor naming train/ itself changes an image.
    run("reconstruction", f"{common} --image_dir {images}/train --bits 6 --batch_size 16 --range 5")
    again = json.loads((tmp_path / "rec" / "quant_b6_r5.0_n3" / "results.json").read_text())
    assert again["psnr_db"] == pytest.approx(results[6]["psnr_db"], abs=1e-3)


# --------------------------------------------------------------------------------------------------------------------
# Training and sampling.


def test_training_writes_a_whole_checkpoint_and_log(trained):
    content = load(trained)
    assert content["epoch"] == 1 and "scaler" not in content
    assert set(content["model_ema"]) == set(content["model"]) - {"channel_mask", "boundaries", "reconstruction_values"}
    assert content["config"]["latent_factor"] == 0.5 and content["config"]["vae_stride"] == 4
    assert [group["weight_decay"] for group in content["optimizer"]["param_groups"]] == [0.0, 0.02]
    assert not [name for name in os.listdir(trained) if name.endswith(".part")]
    log = EventAccumulator(str(trained)).Reload()
    tags = {"train/loss", "train/lr", "train/grad_norm", "speed/images_per_second", "speed/memory_gib"}
    assert tags | {"speed/model_flops_utilization"} <= set(log.Tags()["scalars"])
    assert [event.step for event in log.Scalars("train/loss")] == [4, 8]


def test_the_ema_starts_as_a_copy_and_follows(run, cached, tmp_path):
    common = f"{TINY} --warmup_epochs 0 --lr 1e-3 --lr_schedule constant --use_cached --cached_path {cached}"
    # One step: 16 images in one batch. At rate 1 the average never leaves the initial weights.
    states = {}
    for rate in ("1.0", "0.75"):
        run(
            "main_tokenbridge",
            f"{common} --batch_size 16 --epochs 1 --ema_rate {rate} --output_dir {tmp_path}/ema{rate}",
        )
        states[rate] = load(tmp_path / f"ema{rate}")
    initial, final = states["1.0"]["model_ema"], states["1.0"]["model"]
    assert not torch.equal(initial["mask_token"], final["mask_token"])
    for name, value in states["0.75"]["model_ema"].items():
        assert torch.allclose(value, 0.75 * initial[name] + 0.25 * final[name], atol=1e-6), name


def same_weights(a, b) -> bool:
    a, b = load(a), load(b)
    return a["epoch"] == b["epoch"] and all(
        torch.equal(value, b[key][name]) for key in ("model", "model_ema") for name, value in a[key].items()
    )


@pytest.mark.parametrize("data", ["cached, no workers", "cached, 2 workers", "images, 2 workers"])
def test_a_run_interrupted_anywhere_ends_as_one_never_interrupted(
    run, images, vae_path, cached, tmp_path, monkeypatch, data
):
    source = (
        f"--use_cached --cached_path {cached}" if "cached" in data else f"--data_path {images} --vae_path {vae_path}"
    )
    tiny = TINY.replace("--num_workers 0", f"--num_workers {2 * ('2' in data)}")
    tiny = tiny.replace("--batch_size 4", "--batch_size 2")
    common = f"{tiny} {source} --epochs 2 --warmup_epochs 1 --lr 1e-3 --accum_iter 2 --save_every_steps 3"
    run("main_tokenbridge", f"{common} --output_dir {tmp_path}/whole")  # 4 steps an epoch

    def stop_at(step: int) -> None:
        left = [step]

        def take_step(*args):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(TrainingState, "take_step", take_step)

    original = TrainingState.take_step
    for steps in (4, 3):  # into the second epoch, saved at step 3; from there past the save at step 6
        stop_at(steps)
        with pytest.raises(KeyboardInterrupt):
            run("main_tokenbridge", f"{common} --output_dir {tmp_path}/parts --resume {tmp_path}/parts")
    assert (load(tmp_path / "parts")["epoch"], load(tmp_path / "parts")["step"]) == (0, 2)
    monkeypatch.setattr(TrainingState, "take_step", original)
    run("main_tokenbridge", f"{common} --output_dir {tmp_path}/parts --resume {tmp_path}/parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def wait_for(path, process) -> None:
    while process.poll() is None and not path.exists():
        time.sleep(0.01)
    assert path.exists()


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_ends_a_run_after_its_step_and_saves(cached, tmp_path, name):
    tiny = TINY.replace("--num_workers 0", "--num_workers 2")
    common = f"main_tokenbridge.py {tiny} --use_cached --cached_path {cached} --lr 1e-3 --warmup_epochs 1 --epochs 100"
    command = [sys.executable, *f"{common} --save_last_freq 1 --output_dir {tmp_path}/run --device cpu".split()]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(tmp_path / "run" / "checkpoint-last.pth", process)
    os.killpg(process.pid, getattr(signal, name))  # to the loader's workers, too, as schedulers do
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75 and f"stopped: by {name}, saved after epoch" in said
    content = load(tmp_path / "run")
    assert 0 <= content["epoch"] < 99
    steps = {int(state["step"]) for state in content["optimizer"]["state"].values()}
    assert steps == {4 * (content["epoch"] + 1) + content["step"]}


def test_a_process_that_ends_amid_its_batches_ends_its_workers(tmp_path):
    (tmp_path / "ends.py").write_text(
        "import argparse, torch; from util.loader import make_loader\n"
        "args = argparse.Namespace(num_workers=2, batch_size=1, pin_mem=False)\n"
        "batches = iter(make_loader(torch.utils.data.TensorDataset(torch.zeros(9)), args, torch.device('cpu')))\n"
        "next(batches)\n"
        "raise RuntimeError('amid its batches')"
    )
    # Left alone, Python waits for the workers at its end: this would run into the time limit.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "ends.py"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "amid its batches" in ended.stderr


@pytest.mark.slow
def test_the_launcher_restarts_what_a_signal_to_one_process_stopped(cached, tmp_path):
    common = f"main_tokenbridge.py {TINY} --use_cached --cached_path {cached} --epochs 30 --lr 1e-3 --warmup_epochs 1"
    common += " --batch_size 2 --save_last_freq 3 --device cpu"
    assert torchrun(f"{common} --output_dir {tmp_path}/whole").returncode == 0
    # Otherwise the launcher hands the addresses of processes that are gone to those it starts.
    fresh_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    process = subprocess.Popen(
        [*launcher, *f"{common} --output_dir {tmp_path}/cut --resume {tmp_path}/cut".split()],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **fresh_store}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(tmp_path / "cut" / "checkpoint-last.pth", process)
    os.kill(processes_of(tmp_path / "cut")[-1], signal.SIGUSR1)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "SIGUSR1, saved after epoch" in said and "another process, saved after epoch" in said
    assert said.count("resumed from") == 1
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_steps_that_are_not_finite_are_left_out_and_written_down(
    run, refused, cached, tmp_path, monkeypatch, caplog, precision
):
    original, calls = engine_tokenbridge.backward, []

    def backward(state, *args):
        loss = original(state, *args)
        calls.append(loss)
        if len(calls) in (2, 5):
            next(state.model.parameters()).grad.fill_(torch.nan)
            loss = loss * torch.nan
        return loss

    monkeypatch.setattr(engine_tokenbridge, "backward", backward)
    common = f"{TINY} {SHORT} --use_cached --cached_path {cached} --epochs 2 --precision {precision}"
    run("main_tokenbridge", f"{common} --max_bad_steps 2 --output_dir {tmp_path}/allowed")
    content = load(tmp_path / "allowed")
    for key in ("model", "model_ema"):
        assert all(not value.isnan().any() for value in content[key].values())
    assert len(calls) == 8 and "1 of 2 allowed" in caplog.text and "2 of 2 allowed" in caplog.text
    if precision == "fp32":  # fp16's scaler may leave out others
        assert {int(state["step"]) for state in content["optimizer"]["state"].values()} == {6}
    rows = [json.loads(line) for line in (tmp_path / "allowed" / "bad_steps-rank0.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"], row["rank"]) for row in rows] == [(0, 1, 0), (1, 0, 0)]
    assert all(len(row["files"]) == 4 and Path(row["files"][0]).is_file() and row["lr"] >= 0 for row in rows)

    calls.clear()
    line = refused("main_tokenbridge", f"{common} --output_dir {tmp_path}/stopped")
    assert "epoch 0, step 1: not finite" in line and "bad_steps-rank0.jsonl" in line
    assert not (tmp_path / "stopped" / "checkpoint-last.pth").exists()


def test_the_files_of_a_step_are_those_the_loader_gave(cached):
    from util.loader import ShuffledRankSampler

    dataset = CachedFolder(cached)
    sampler = ShuffledRankSampler(dataset, 1, 0, shuffle=True, seed=1)
    sampler.start = 4
    dataset.samples = [(path, index) for index, (path, _) in enumerate(dataset.samples)]  # labels tell the item
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, sampler=sampler)
    labels = [label for _, labels in loader for label in labels.tolist()]
    expected = [dataset.samples[label][0] for label in labels[4:8]]
    assert engine_tokenbridge.files_of_step(loader, 1, 4) == expected


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, refused, cached, trained, tmp_path, caplog):
    common = f"{TINY} {SHORT} --use_cached --cached_path {cached}"
    assert sorted(path.name for path in trained.glob("*.pth")) == ["checkpoint-last.1.pth", "checkpoint-last.pth"]
    before = torch.load(trained / "checkpoint-last.1.pth", weights_only=True)
    assert (before["epoch"], load(trained)["epoch"]) == (0, 1)
    path = trained / "checkpoint-last.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    run("main_tokenbridge", f"{common} --epochs 3 --keep_last 3 --output_dir {trained} --resume {trained}")
    assert "continuing from the one before" in caplog.text and load(trained)["epoch"] == 2
    names = [f"checkpoint-last{age}.pth" for age in (".1", ".2", "")]
    assert sorted(path.name for path in trained.glob("*.pth")) == names
    for name in names:
        (trained / name).write_bytes(b"damaged")
    assert "checkpoint-last.pth" in refused("main_tokenbridge", f"{common} --output_dir {trained} --resume {trained}")


def test_a_runs_own_folder_may_hold_safetensors(run, cached, trained, caplog):
    caplog.set_level("INFO")
    commands.convert(trained / "checkpoint-last.pth", trained / "checkpoint-last.safetensors")
    (trained / "checkpoint-last.pth").unlink()
    common = f"{TINY} {SHORT} --epochs 3 --use_cached --cached_path {cached}"
    run("main_tokenbridge", f"{common} --output_dir {trained} --resume {trained}")
    assert "checkpoint-last.safetensors, continuing at epoch 2, step 0" in caplog.text
    assert load(trained)["epoch"] == 2


def test_another_number_of_steps_continues_at_the_same_place(run, cached, trained, tmp_path, caplog):
    content = load(trained)
    content |= {"epoch": 0, "step": 2, "world_size": 4}  # of 4 steps
    torch.save(content, trained / "checkpoint-last.pth")
    caplog.set_level("INFO")
    common = (
        f"{TINY.replace('--batch_size 4', '--batch_size 2')} {SHORT} --use_cached --cached_path {cached} --epochs 2"
    )
    run("main_tokenbridge", f"{common} --resume {trained} --output_dir {tmp_path}/more")
    assert "written by 4 processes with 4 steps an epoch, this run has 1 with 8" in caplog.text
    assert "continuing at epoch 1, step 4" in caplog.text


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_continues_from_a_released_checkpoint(run, cached, trained, tmp_path, precision):
    content = load(trained)
    for group in content["optimizer"]["param_groups"]:
        group["fused"] = None  # as the release's optimizer leaves it
    released = {name: content[name] for name in ("model", "model_ema", "optimizer", "epoch")}
    torch.save({**released, "args": argparse.Namespace(model="tokenbridge_large")}, trained / "checkpoint-last.pth")
    run(
        "main_tokenbridge",
        f"{TINY} {SHORT} --epochs 3 --use_cached --cached_path {cached} --precision {precision} "
        f"--resume {trained} --output_dir {tmp_path}/more",
    )
    more = load(tmp_path / "more")
    assert more["epoch"] == 2
    # fp16 may skip a first step whose gradients overflow.
    assert {int(state["step"]) for state in more["optimizer"]["state"].values()} <= set(range(9, 13))


def test_learning_rates_follow_the_flags(run, cached, tmp_path):
    common = f"{TINY} --use_cached --cached_path {cached} --save_last_freq 1 --output_dir {tmp_path}/run"
    cases = {
        # 8 images a step: blr x 8 / 256, at 3/4 of the first of two warm-up epochs.
        "--blr 0.32 --batch_size 4 --accum_iter 2 --warmup_epochs 2 --epochs 1": 0.01 * 0.5 / 2,
        "--lr 0.02 --warmup_epochs 0 --epochs 1 --min_lr 0.01": 0.01 + 0.01 * (1 + math.cos(math.pi * 0.75)) / 2,
        "--lr 0.02 --warmup_epochs 0 --epochs 2 --start_epoch 1 --lr_schedule constant": 0.02,
    }
    for flags, rate in cases.items():
        run("main_tokenbridge", f"{common} {flags}")
        assert load(tmp_path / "run")["optimizer"]["param_groups"][0]["lr"] == pytest.approx(rate), flags


def test_gradients_are_clipped(run, cached, tmp_path):
    common = f"{TINY} --use_cached --cached_path {cached} --batch_size 16 --epochs 1 --warmup_epochs 0 --lr 1e-3"
    norms = {}
    for clip in ("0", "0.01"):
        run("main_tokenbridge", f"{common} --grad_clip {clip} --output_dir {tmp_path}/{clip}")
        states = load(tmp_path / clip)["optimizer"]["state"].values()
        norms[clip] = math.sqrt(sum(state["exp_avg"].norm() ** 2 for state in states)) / 0.1  # of the only gradient
    assert norms["0.01"] == pytest.approx(0.01, rel=1e-2) and norms["0"] > 0.1


def test_accumulation_makes_one_step_of_several_batches(run, cached, tmp_path):
    common = f"{TINY} {SHORT} --epochs 1 --use_cached --cached_path {cached}"
    run("main_tokenbridge", f"{common} --accum_iter 2 --output_dir {tmp_path}/accumulated")
    assert {int(s["step"]) for s in load(tmp_path / "accumulated")["optimizer"]["state"].values()} == {2}


@pytest.mark.parametrize(
    "flags",
    [
        "--grad_checkpointing", "--precision fp16", "--precision fp32 --accum_iter 2",
        "--lr_schedule constant --epochs 2",
    ],
)  # fmt: skip
def test_uncached_training_and_other_flags(run, images, vae_path, tmp_path, trace, monkeypatch, flags):
    recomputed = []
    original = backbone.checkpoint
    monkeypatch.setattr(
        backbone, "checkpoint", lambda *args, **options: recomputed.append(1) or original(*args, **options)
    )
    run(
        "main_tokenbridge",
        f"{TINY} {SHORT} --epochs 1 --data_path {images} --vae_path {vae_path} --output_dir {tmp_path}/run {flags}",
    )
    content = load(tmp_path / "run")
    assert ("scaler" in content) == ("fp16" in flags)
    assert content["config"]["vae_embed_dim"] == 8 and content["config"]["latent_factor"] == 0.5
    # 16 images, 4 at once.
    epochs, parts = 1 + ("epochs 2" in flags), 1 + ("accum_iter 2" in flags)
    assert len(trace.batches) == 4 * epochs and len(trace.steps) == 4 * epochs / parts
    assert (content["epoch"], content["steps_per_epoch"]) == (epochs - 1, 4 / parts)
    precision = next((name for name in misc.PRECISIONS if name in flags), misc.effective_precision("cpu", "bf16"))
    assert {batch["autocast"] for batch in trace.batches} == {misc.PRECISIONS[precision]}
    assert bool(recomputed) == ("grad_checkpointing" in flags) == (content["config"]["grad_checkpointing"] is True)
    # Amid the warm-up, or after it at the peak.
    rate = 1e-3 if "constant" in flags else 1e-3 * (1 - parts / 4)
    assert content["optimizer"]["param_groups"][0]["lr"] == pytest.approx(rate)


def test_evaluation_writes_the_same_pictures_every_time(run, trained, vae_path, tmp_path):
    common = (
        f"{TINY} --vae_path {vae_path} --evaluate --no_metrics --resume {trained} --num_images 8 --num_iter 4 --cfg 2.0"
    )
    pictures = []
    for chunk, seed in ((8, 0), (3, 0), (8, 1)):
        out = tmp_path / f"eval{chunk}-{seed}"
        run("main_tokenbridge", f"{common} --eval_bsz {chunk} --gen_seed {seed} --output_dir {out} --precision fp32")
        assert sorted(os.listdir(out / "samples")) == [f"{i:05d}.png" for i in range(8)]
        pictures.append([np.array(Image.open(out / "samples" / f"{i:05d}.png"), dtype=int) for i in range(8)])
        with Image.open(out / "samples.png") as grid:
            assert grid.size == (8 * 66 + 2, 66 + 2)
    assert max(np.abs(a - b).max() for a, b in zip(pictures[0], pictures[1], strict=True)) <= 1
    assert any(np.abs(a - b).max() > 1 for a, b in zip(pictures[0], pictures[2], strict=True))
    # What is pictured: the average's samples of every class, two each, with their seeds and the flags.
    content = load(trained)
    model = TokenBridge.from_content(content, trained, ema=True)
    vae, factor = AutoencoderKL.from_pretrained(vae_path)
    labels, seeds = torch.arange(8) // 2, engine_tokenbridge.image_seeds(0, range(8))
    with torch.no_grad():
        latents = model.sample_tokens(8, 4, 2.0, labels=labels, seeds=seeds)
        expected = to_uint8(vae.decode(latents / factor)).permute(0, 2, 3, 1).numpy().astype(int)
    assert max(np.abs(a - b).max() for a, b in zip(pictures[0], expected, strict=True)) <= 1


def test_online_evaluation_samples_with_and_without_guidance(run, cached, vae_path, tmp_path, sampler):
    run(
        "main_tokenbridge",
        f"{TINY} {SHORT} --epochs 2 --use_cached --cached_path {cached} --vae_path {vae_path} "
        f"--output_dir {tmp_path}/run --online_eval --no_metrics --eval_freq 1 --num_images 4 --num_iter 2 --cfg 3.0",
    )
    folders = sorted(path.name for path in (tmp_path / "run" / "online_eval").iterdir() if path.is_dir())
    assert folders == [f"epoch000{epoch}-cfg{cfg}" for epoch in (0, 1) for cfg in (1, 3)]
    assert sampler.all("cfg") == [1, 3, 1, 3] and {call["num_iter"] for call in sampler.calls} == {2}
    assert all(call["labels"].tolist() == [0, 1, 2, 3] for call in sampler.calls)
    averages = [
        torch.load(tmp_path / "run" / f"checkpoint-last{age}.pth", weights_only=True)["model_ema"]["mask_token"]
        for age in (".1", "")
    ]
    for call, epoch in zip(sampler.calls, (0, 0, 1, 1), strict=True):
        assert torch.equal(call["mask_token"], averages[epoch])


# --------------------------------------------------------------------------------------------------------------------
# Several processes.


def test_two_processes_cache_and_train(run, images, vae_path, cached, tmp_path):
    small = (
        "--img_size 16 --ch 8 --ch_mult 1 2 --num_res_blocks 1 --batch_size 4 --epochs 1 --num_workers 0 --device cpu"
    )
    result = torchrun(f"main_vae.py {small} --data_path {images} --output_dir {tmp_path}/vae2")
    assert result.returncode == 0, result.stderr
    assert AutoencoderKL.from_pretrained(tmp_path / "vae2" / "vae.ckpt")[0].stride == 2
    # 16 images, 4 for each of two: one log, of two steps.
    assert len(list((tmp_path / "vae2" / "tokenizer_log").iterdir())) == 1
    log = EventAccumulator(str(tmp_path / "vae2" / "tokenizer_log")).Reload()
    assert [event.step for event in log.Scalars("tokenizer/error")] == [2]

    shared = f"--img_size 16 --num_workers 0 --data_path {images} --vae_path {vae_path}"
    result = torchrun(f"main_cache.py {shared} --cached_path {tmp_path}/cache2 --batch_size 3 --device cpu")
    assert result.returncode == 0, result.stderr
    for path in sorted(cached.rglob("*.npz")):
        with np.load(path) as one, np.load(tmp_path / "cache2" / path.relative_to(cached)) as two:
            assert all(np.allclose(one[name], two[name], atol=1e-5) for name in ("moments", "moments_flip"))
    assert len(list((tmp_path / "cache2").rglob("*.npz"))) == 16
    assert result.stderr.count("cached 16 images") == 1 and "0 were there, 16 are new, 0 replace" in result.stderr
    abouts = [json.loads((folder / "cache.json").read_text()) for folder in (cached, tmp_path / "cache2")]
    assert abouts[0] == abouts[1] and abouts[0]["complete"]

    train = f"main_tokenbridge.py {TINY} {SHORT} --epochs 1 --use_cached --cached_path {cached} --device cpu"
    result = torchrun(f"{train} --output_dir {tmp_path}/run2")
    assert result.returncode == 0, result.stderr
    content = load(tmp_path / "run2")
    assert {int(s["step"]) for s in content["optimizer"]["state"].values()} == {2}  # 16 images, 4 for each of two
    assert result.stderr.count("whole batch 8") == 1
    assert (content["world_size"], content["steps_per_epoch"], content["epoch"]) == (2, 2, 0)
    assert content["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-3 / 2)
    assert len(list((tmp_path / "run2").glob("events.*"))) == 1
    log = EventAccumulator(str(tmp_path / "run2")).Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [2]

    out = f"--vae_path {vae_path} --evaluate --no_metrics --num_images 8 --num_iter 3 --eval_bsz 3"
    out += f" --resume {tmp_path}/run2"
    result = torchrun(f"main_tokenbridge.py {TINY} {out} --output_dir {tmp_path}/eval2 --device cpu")
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(tmp_path / "eval2" / "samples")) == [f"{i:05d}.png" for i in range(8)]
    assert len({path.read_bytes() for path in (tmp_path / "eval2" / "samples").iterdir()}) == 8
    assert json.loads((tmp_path / "eval2" / "samples.json").read_text())["settings"]["num_images"] == 8


# --------------------------------------------------------------------------------------------------------------------
# Bad input: one line that says what to do, status 2, nothing left behind.


def test_missing_files_are_named(refused, images, vae_path, cached, trained, tmp_path):
    out = f"--output_dir {tmp_path}/new"
    cases = {
        f"{TINY} --use_cached --cached_path {tmp_path}/nowhere {out}": "no cache at",
        f"{TINY} --use_cached {out}": "--cached_path",
        f"{TINY} --data_path {tmp_path}/nowhere {out}": "no image folder at",
        f"{TINY} --data_path {images} --vae_path {tmp_path}/nowhere {out}": "no checkpoint at",
        f"{TINY} --evaluate --vae_path {vae_path} --num_images 4 {out}": "--evaluate needs --resume",
        f"{TINY} --evaluate --vae_path {vae_path} --num_images 4 --resume {tmp_path}/new {out}": "checkpoint-last.pth",
        f"{TINY} --use_cached --cached_path {cached} --resume {tmp_path}/elsewhere {out}": "checkpoint-last.pth",
    }
    for command, words in cases.items():
        assert words in refused("main_tokenbridge", command)
    assert not (tmp_path / "new").exists()
    assert "no image folder" in refused(
        "main_cache", f"--data_path {tmp_path}/no --vae_path {vae_path} --cached_path {tmp_path}/c"
    )
    assert "--cached_path" in refused("main_cache", f"--data_path {images} --vae_path {vae_path}")
    assert "no image folder" in refused("reconstruction", f"--image_dir {tmp_path}/no --vae_path {vae_path}")
    assert "no image folder" in refused("main_vae", f"--data_path {tmp_path}/no --output_dir {tmp_path}/new")
    assert not (tmp_path / "c").exists() and not (tmp_path / "new").exists()


def test_values_that_cannot_work_are_named(refused, images, vae_path, cached, trained, tmp_path):
    use = f"--use_cached --cached_path {cached} --output_dir {tmp_path}/new"
    evaluate = (
        f"--evaluate --no_metrics --resume {trained} --vae_path {vae_path} --output_dir {tmp_path}/new --num_images 8"
    )
    small = "--model tokenbridge_tiny --img_size 16 --buffer_size 4 --num_workers 0"
    cases = {
        f"{small} --class_num 5 {use}": "4 class folders, but class_num is 5",
        f"{TINY} {use} --img_size 32": "--img_size",
        f"{TINY} {use} --quant_bits 10": "1 to 9 bits",
        f"{TINY} {use} --quant_bits -1": "1 to 9 bits",
        f"{TINY} {use} --quant_min 5": "empty",
        f"{TINY} {use} --batch_size 64": "do not fill one step",
        f"{TINY} {use} --batch_size 0": "above zero",
        f"{TINY} {use} --grad_clip -1": "between 0",
        f"{TINY} {use} --ema_rate 1.5": "between 0 and 1",
        f"{TINY} {use} --vae_embed_dim 4": "has 8",
        f"{TINY} {use} --precision fp32 --lr 1e30 --warmup_epochs 0 --grad_clip 0 --epochs 3": "not finite",
        f"{TINY} {evaluate} --num_images 10": "cannot be shared evenly by 4 classes",
        f"{TINY} {evaluate} --temperature -1": "negative",
        f"{TINY} {evaluate} --quant_bits 4": "quant_levels is 8 there, 16 here (--quant_bits)",
        f"{small} --quant_bits 3 --class_num 2 {evaluate}": "class_num is 4 there, 2 here",
        f"--model tokenbridge_base {TINY.split('tiny', 1)[1]} {evaluate}": "does not fit",
    }
    for command, words in cases.items():
        assert words in refused("main_tokenbridge", command), command
    assert not (tmp_path / "new" / "checkpoint-last.pth").exists() and not (tmp_path / "new" / "samples").exists()
    for bits in (0, 10, -2):
        line = refused(
            "reconstruction", f"--bits {bits} --image_dir {images} --vae_path {vae_path} --output_dir {tmp_path}/r"
        )
        assert "1 to 9 bits" in line
    assert not (tmp_path / "r").exists()


def test_another_tokenizer_than_the_checkpoints_is_refused(refused, run, trained, vae_path, tmp_path):
    content = torch.load(vae_path, weights_only=True)
    content["config"]["latent_factor"] = 0.6
    torch.save(content, tmp_path / "other.ckpt")
    command = f"{TINY} --evaluate --no_metrics --resume {trained} --vae_path {tmp_path}/other.ckpt --num_images 4"
    assert "latent_factor is 0.5 there, 0.6 here" in refused("main_tokenbridge", command)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_and_caches_are_named(refused, images, vae_path, cached, tmp_path, workers):
    tiny = TINY.replace("--num_workers 0", f"--num_workers {workers}")
    (images / "train" / "class3" / "2.png").write_bytes(b"no image")
    (cached / "class1" / "0.png.npz").write_bytes(b"no cache")
    out = f"--output_dir {tmp_path}/new"
    assert "class3/2.png" in refused("main_tokenbridge", f"{tiny} --data_path {images} --vae_path {vae_path} {out}")
    assert "class1/0.png.npz" in refused("main_tokenbridge", f"{tiny} --use_cached --cached_path {cached} {out}")
    assert not (tmp_path / "new" / "checkpoint-last.pth").exists()
    new = f"--img_size 16 --num_workers {workers} --vae_path {vae_path} --data_path {images} --cached_path {tmp_path}/c"
    assert "class3/2.png" in refused("main_cache", new)
    line = refused("main_tokenbridge", f"{tiny} --use_cached --cached_path {tmp_path}/c {out}")
    assert "class folders" in line or "incomplete" in line or "holds no cached moments" in line


def test_the_shell_sees_one_line_and_a_status(tmp_path):
    command = [sys.executable, "main_tokenbridge.py", "--use_cached", "--cached_path", str(tmp_path / "no")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: no cache at") and result.stderr.count("\n") == 1
