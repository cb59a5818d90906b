"""The paper's variants as commands: each trains, saves, resumes and samples."""

import json

import pytest
import torch
from PIL import Image

from models.vae import AutoencoderKL
from tests.conftest import SHORT, TINY, filled
from util.checkpoint.files import read_checkpoint
from util.checkpoint.vae_files import save_vae
from util.data.caches import CachedFolder

VARIANTS = {
    "parallel": ("--head parallel", {"head": "parallel"}),
    "masked": ("--head masked", {"head": "masked", "channel_depth": 6}),
    "masked pairs": (
        "--head masked --channels_per_group 2",
        {"head": "masked", "channels_per_group": 2},
    ),
    "sequential": ("--channel_order sequential", {"channel_order": list(range(8))}),
    "order": ("--channel_order 7,6,5,4,3,2,1,0", {"channel_order": list(range(7, -1, -1))}),
    "pairs": ("--channels_per_group 2", {"channels_per_group": 2}),
    "fours": (
        "--channels_per_group 4 --head parallel",
        {"channels_per_group": 4, "head": "parallel"},
    ),
    "small": (
        "--head_dim 64 --head_depth 1 --head_heads 2",
        {"channel_embed_dim": 64, "channel_depth": 1, "channel_heads": 2},
    ),
    "linear": ("--quantizer linear", {"quantizer": "linear"}),
    "calibrated": ("--quant_calibrate", {"quantizer": "gaussian"}),
    "patches": ("--patch_size 2 --quant_calibrate", {"patch_size": 2}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_saves_resumes_and_samples(run, cached, vae_path, tmp_path, name):
    flags, expected = VARIANTS[name]
    out = f"--output_dir {tmp_path}/run"
    train = f"{TINY} {SHORT} --use_cached --cached_path {cached} {out}"
    run("main_tokenbridge", f"{train} {flags} --epochs 1")
    content = read_checkpoint(tmp_path / "run" / "checkpoint-last.pth")
    assert {key: content["config"][key] for key in expected} == expected
    if "calibrate" in flags:
        cache = CachedFolder(cached, mirror=False)
        mean, logvar = torch.stack([moments for moments, _ in cache]).chunk(2, dim=1)
        assert content["config"]["channel_mean"] == pytest.approx(
            (0.5 * mean.mean(dim=(0, 2, 3))).tolist(), abs=0.15
        )
        deviation = 0.5 * (mean.var(dim=(0, 2, 3)) + logvar.exp().mean(dim=(0, 2, 3))).sqrt()
        assert content["config"]["channel_std"] == pytest.approx(deviation.tolist(), rel=0.2)
    # What the checkpoint tells need not be typed again; sizes of tokens must.
    patch = "--patch_size 2" if name == "patches" else ""
    run("main_tokenbridge", f"{train} {patch} --epochs 2 --resume {tmp_path}/run")
    assert read_checkpoint(tmp_path / "run" / "checkpoint-last.pth")["epoch"] == 1
    run(
        "main_tokenbridge",
        f"{TINY} {patch} --evaluate --resume {tmp_path}/run {out} --vae_path {vae_path} --num_images 4 --num_iter 3 "
        "--cfg 2 --no_metrics --order confidence --confidence_noise 1 --save_confidence",
    )
    for folder in ("samples", "samples-confidence"):
        assert len(list((tmp_path / "run" / folder).glob("*.png"))) == 4
        with Image.open(tmp_path / "run" / f"{folder}.png") as picture:
            assert min(picture.size) > 60
    settings = json.loads((tmp_path / "run" / "samples.json").read_text())["settings"]
    assert settings["order"] == "confidence" and settings["confidence_noise"] == 1


def test_another_variant_than_the_checkpoints_is_refused(run, refused, cached, trained, tmp_path):
    resume = (
        f"{TINY} {SHORT} --epochs 3 --use_cached --cached_path {cached} --output_dir {tmp_path}/x"
    )
    for flags, sides in {
        "--head parallel": "head is ar in the checkpoint, parallel in this run (--head)",
        "--channel_order 7,6,5,4,3,2,1,0": "channel_order is [0, 1, 2, 3, 4, 5, 6, 7] in the checkpoint, [7, 6, 5",
        "--channels_per_group 2": "channels_per_group is 1 in the checkpoint, 2 in this run",
        "--quantizer linear": "quantizer is gaussian in the checkpoint, linear in this run",
        "--head_dim 64": "channel_embed_dim is 128 in the checkpoint, 64 in this run (--head_dim",
        "--quant_calibrate": "the checkpoint is not calibrated, but --quant_calibrate is set",
    }.items():
        assert sides in refused("main_tokenbridge", f"{resume} --resume {trained} {flags}")
    run("main_tokenbridge", f"{TINY} {SHORT} --epochs 1 --use_cached --cached_path {cached} --channels_per_group 4 "
        f"--output_dir {tmp_path}/fours")  # fmt: skip
    fours = resume.replace("--quant_bits 3", "--quant_bits 6") + f" --resume {tmp_path}/fours"
    assert "quant_levels is 8 in the checkpoint, 64 in this run (--quant_bits)" in refused(
        "main_tokenbridge", fours
    )
    for flags, message in {
        "--seed -1": "--seed -1",
        "--num_workers -1": "--num_workers -1",
        "--channels_per_group 3": "groups of 3 do not divide",
        "--channels_per_group 8 --quant_bits 6": "joint classes",
        "--head_heads 7": "not a multiple",
        "--head_dim 0": "above zero",
    }.items():
        assert message in refused("main_tokenbridge", f"{resume} {flags}")


def test_only_the_published_tokenizer_has_its_order(run, images, tmp_path):
    vae = AutoencoderKL(16, (1, 1, 2), ch=8, num_res_blocks=1)
    save_vae(tmp_path / "vae.ckpt", filled(vae), 0.5)
    command = f"{TINY} {SHORT} --epochs 1 --vae_path {tmp_path}/vae.ckpt --data_path {images} --resume {tmp_path}/run"
    run("main_tokenbridge", f"{command} --output_dir {tmp_path}/run")
    content = read_checkpoint(tmp_path / "run" / "checkpoint-last.pth")
    assert content["config"]["channel_order"] == list(range(16))
    assert content["config"]["class_names"] == [f"class{label}" for label in range(4)]
