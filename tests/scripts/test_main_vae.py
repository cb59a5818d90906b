"""What main_vae.py trains, alone and in two processes."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.vae import AutoencoderKL, DiagonalGaussianDistribution
from tests.conftest import scalars, two_processes
from util.loader import CachedFolder


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


SMALL_VAE = "--img_size 16 --ch 8 --ch_mult 1 2 --num_res_blocks 1 --vae_embed_dim 4 --num_workers 0 --precision fp32"


def test_the_tokenizer_sees_every_epoch_in_its_own_order_and_follows_its_flags(run, images, tmp_path, trace):
    common = f"{SMALL_VAE} --device cpu --data_path {images} --batch_size 8 --output_dir {tmp_path}"
    orders, finals = {}, {}
    for name, flags in {
        "one": "--epochs 2 --no_mirror --lr 1e-3 --min_lr 1e-4 --warmup_epochs 0",
        "two": "--epochs 1 --no_mirror --seed 7 --lr_schedule constant --lr 2e-3 --warmup_epochs 0",
        "kl": "--epochs 2 --no_mirror --lr 1e-3 --min_lr 1e-4 --warmup_epochs 0 --kl_weight 1e4",
        "mirrored": "--epochs 2",
    }.items():
        trace.clear()
        run("main_vae", f"{common}/{name} {flags}")
        orders[name] = [row.numpy().tobytes() for batch in trace.images for row in batch]
        finals[name] = {tag: scalars(tmp_path / name / "tokenizer_log", f"tokenizer/{tag}") for tag in ("kl", "lr")}
    one, two = orders["one"], orders["two"]
    assert len({tuple(one[:16]), tuple(one[16:32]), tuple(two[:16])}) == 3
    assert len(set(one)) == 16 < len(set(orders["mirrored"]))
    assert finals["one"]["lr"][4] == pytest.approx(1e-4 + 9e-4 * (1 + math.cos(math.pi * 0.75)) / 2)
    assert finals["two"]["lr"] == pytest.approx({2: 2e-3})
    assert finals["kl"]["kl"][4] < 0.98 * finals["one"]["kl"][4]


@pytest.mark.slow
def test_two_processes_train_one_tokenizer(images, tmp_path):
    flags = f"{SMALL_VAE} --data_path {images} --output_dir {tmp_path}/vae --batch_size 4 --epochs 2 --no_mirror"
    traces, said, statuses = two_processes(tmp_path, "main_vae", flags)
    assert statuses == [0, 0], said
    rows = [[row.numpy().tobytes() for batch in trace["images"] for row in batch] for trace in traces]
    assert len({*rows[0][:8], *rows[1][:8]}) == 16
    assert len(traces[0]["steps"]) == 4 and torch.equal(traces[0]["steps"][-1], traces[1]["steps"][-1])
    assert traces[0]["saved"] and not traces[1]["saved"]
