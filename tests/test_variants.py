"""The paper's variants as commands: orders of channels, heads, groups, quantizers, calibration, and the figures."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tests.conftest import SHORT, SMALL, TINY, filled
from tools import channel_order
from util import checkpoint
from util.config import check_config
from util.errors import UserError
from util.loader import CachedFolder

# --------------------------------------------------------------------------------------------------------------------
# The order of channels.


def maps_with_share(shares: list[float], images: int = 40, side: int = 16) -> torch.Tensor:
    """Maps ``[N, C, side, side]`` whose expected energy lies by ``shares`` inside the low frequencies."""
    low = channel_order.low_frequencies(side, side, 0.5)
    low[0, 0] = False
    high = ~low
    high[0, 0] = False
    spectrum = torch.fft.fft2(torch.randn(images, len(shares), side, side))
    for channel, share in enumerate(shares):
        spectrum[:, channel] *= low * math.sqrt(share / low.sum()) + high * math.sqrt((1 - share) / high.sum())
    return torch.fft.ifft2(spectrum).real


def test_energy_shares_are_those_the_maps_were_made_with():
    shares = [0.1, 0.9, 0.5, 0.7, 0.3]
    maps = maps_with_share(shares)
    maps[:, 0] += 1000  # an offset that all images share is nothing
    low = channel_order.low_frequencies(16, 16, 0.5)
    measured = channel_order.low_shares(channel_order.energies(maps, low), len(maps))
    assert torch.allclose(measured, torch.tensor(shares).double(), atol=0.05)
    assert channel_order.frequency_order(measured) == [1, 3, 2, 4, 0]
    # What differs from image to image is.
    maps[:, 0] += 50 * torch.randn(len(maps), 1, 1)
    assert channel_order.low_shares(channel_order.energies(maps, low), len(maps))[0] > 0.99


def write_moments(root, maps: torch.Tensor, metadata: dict) -> None:
    moments = torch.cat([maps, torch.full_like(maps, -10.0)], dim=1).float().numpy()
    for number, each in enumerate(moments):
        path = root / str(number % 4) / f"{number}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, moments=each, moments_flip=each[..., ::-1])
    (root / "cache.json").write_text(json.dumps({"images": len(maps), "complete": True, **metadata}))


def test_the_order_is_measured_drawn_and_trained_with(run, refused, tmp_path):
    shares = [0.1, 0.8, 0.5, 0.3]
    vae = {"embed_dim": 4, "ch_mult": [1, 1, 2]}
    write_moments(tmp_path / "cache", maps_with_share(shares), {"vae": vae, "latent_factor": 0.5, "img_size": 64})
    cache = f"--cached_path {tmp_path}/cache --num_workers 0"
    run("tools.channel_order", f"{cache} --output_dir {tmp_path}/order")
    written = json.loads((tmp_path / "order" / "channel_order.json").read_text())
    assert written["order"] == [1, 2, 3, 0] and written["images"] == 40
    assert written["shares"] == pytest.approx(shares, abs=0.06)
    with Image.open(tmp_path / "order" / "channel_order.png") as picture:
        assert min(picture.size) > 100

    tiny = TINY.replace("--img_size 16", "--img_size 64") + f" {SHORT} --epochs 1 --use_cached {cache}"
    by_file = f"--channel_order {tmp_path}/order/channel_order.json"
    run("main_tokenbridge", f"{tiny} --output_dir {tmp_path}/run {by_file}")
    assert checkpoint.read(tmp_path / "run" / "checkpoint-last.pth")["config"]["channel_order"] == [1, 2, 3, 0]
    assert "neither frequency" in refused("main_tokenbridge", f"{tiny} --output_dir {tmp_path}/x --channel_order best")
    assert "0 to 3 once" in refused("main_tokenbridge", f"{tiny} --output_dir {tmp_path}/x --channel_order 0,1,2,2")
    line = refused("main_tokenbridge", f"{tiny} --output_dir {tmp_path}/x --channel_order frequency")
    assert "tools.channel_order" in line

    run("tools.channel_order", f"{cache} --output_dir {tmp_path}/patches --patch_size 2")
    assert sorted(json.loads((tmp_path / "patches" / "channel_order.json").read_text())["order"]) == list(range(16))
    assert "too few" in refused("tools.channel_order", f"{cache} --patch_size 8")
    assert "--cached_path" in refused("tools.channel_order", "--num_workers 0")


def test_only_the_published_tokenizer_has_its_order(run, images, tmp_path):
    vae = AutoencoderKL(16, (1, 1, 2), ch=8, num_res_blocks=1)
    checkpoint.save_vae(tmp_path / "vae.ckpt", filled(vae), 0.5)
    command = f"{TINY} {SHORT} --epochs 1 --vae_path {tmp_path}/vae.ckpt --data_path {images} --resume {tmp_path}/run"
    run("main_tokenbridge", f"{command} --output_dir {tmp_path}/run")
    content = checkpoint.read(tmp_path / "run" / "checkpoint-last.pth")
    assert content["config"]["channel_order"] == list(range(16))
    assert content["config"]["class_names"] == [f"class{label}" for label in range(4)]


# --------------------------------------------------------------------------------------------------------------------
# As commands.

VARIANTS = {
    "parallel": ("--head parallel", {"head": "parallel"}),
    "sequential": ("--channel_order sequential", {"channel_order": list(range(8))}),
    "order": ("--channel_order 7,6,5,4,3,2,1,0", {"channel_order": list(range(7, -1, -1))}),
    "pairs": ("--channels_per_group 2", {"channels_per_group": 2}),
    "fours": ("--channels_per_group 4 --head parallel", {"channels_per_group": 4, "head": "parallel"}),
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
    content = checkpoint.read(tmp_path / "run" / "checkpoint-last.pth")
    assert {key: content["config"][key] for key in expected} == expected
    if "calibrate" in flags:
        cache = CachedFolder(cached, mirror=False)
        mean, logvar = torch.stack([moments for moments, _ in cache]).chunk(2, dim=1)
        assert content["config"]["channel_mean"] == pytest.approx((0.5 * mean.mean(dim=(0, 2, 3))).tolist(), abs=0.15)
        deviation = 0.5 * (mean.var(dim=(0, 2, 3)) + logvar.exp().mean(dim=(0, 2, 3))).sqrt()
        assert content["config"]["channel_std"] == pytest.approx(deviation.tolist(), rel=0.2)
    # What the checkpoint tells need not be typed again; sizes of tokens must.
    patch = "--patch_size 2" if name == "patches" else ""
    run("main_tokenbridge", f"{train} {patch} --epochs 2 --resume {tmp_path}/run")
    assert checkpoint.read(tmp_path / "run" / "checkpoint-last.pth")["epoch"] == 1
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
    resume = f"{TINY} {SHORT} --epochs 3 --use_cached --cached_path {cached} --output_dir {tmp_path}/x"
    for flags, sides in {
        "--head parallel": "head is ar there, parallel here (--head)",
        "--channel_order 7,6,5,4,3,2,1,0": "channel_order is [0, 1, 2, 3, 4, 5, 6, 7] there, [7, 6, 5, 4, 3, 2, 1, 0]",
        "--channels_per_group 2": "channels_per_group is 1 there, 2 here",
        "--quantizer linear": "quantizer is gaussian there, linear here",
        "--head_dim 64": "channel_embed_dim is 128 there, 64 here (--head_dim",
        "--quant_calibrate": "without calibration there, with --quant_calibrate here",
    }.items():
        assert sides in refused("main_tokenbridge", f"{resume} --resume {trained} {flags}")
    run("main_tokenbridge", f"{TINY} {SHORT} --epochs 1 --use_cached --cached_path {cached} --channels_per_group 4 "
        f"--output_dir {tmp_path}/fours")  # fmt: skip
    fours = resume.replace("--quant_bits 3", "--quant_bits 6") + f" --resume {tmp_path}/fours"
    assert "quant_levels is 8 there, 64 here (--quant_bits)" in refused("main_tokenbridge", fours)
    for flags, message in {
        "--seed -1": "--seed -1",
        "--num_workers -1": "--num_workers -1",
        "--channels_per_group 3": "groups of 3 do not divide",
        "--channels_per_group 8 --quant_bits 6": "joint classes",
        "--head_heads 7": "not a multiple",
        "--head_dim 0": "above zero",
    }.items():
        assert message in refused("main_tokenbridge", f"{resume} {flags}")


def test_a_published_checkpoint_is_what_it_is(small_model):
    parallel = TokenBridge(**SMALL, head="parallel")
    with pytest.raises(UserError, match="head is ar there, parallel here"):
        check_config({}, {**parallel.config, "latent_factor": 0.2325}, "published.pth")
    with pytest.raises(UserError, match="channel_order is"):
        check_config(
            {}, {**TokenBridge(**SMALL, channel_order=range(16)).config, "latent_factor": 0.2325}, "published.pth"
        )
    check_config({}, {**small_model.config, "latent_factor": 0.2325}, "published.pth")


def test_reconstruction_with_other_quantizers(run, refused, images, vae_path, tmp_path):
    common = f"--img_size 16 --num_workers 0 --vae_path {vae_path} --image_dir {images} --no_metrics"
    errors = {}
    for flags in ("", "--quantizer linear", "--quant_calibrate"):
        run("reconstruction", f"{common} --output_dir {tmp_path}/out {flags}")
    for path in (tmp_path / "out").glob("*/results.json"):
        errors[path.parent.name] = json.loads(path.read_text())["latent_mse"]
    assert set(errors) == {"quant_b6_r5.0_n50", "linear_b6_r5.0_n50", "quant_b6_calibrated_n50"}
    # The small tokenizer's channels deviate little: levels that know it lie closer.
    assert errors["quant_b6_calibrated_n50"] < errors["quant_b6_r5.0_n50"]
    assert "--sweep is Table 1" in refused("reconstruction", f"{common} --sweep --quantizer linear")


# --------------------------------------------------------------------------------------------------------------------
# Figures.


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_figures_are_commands(run, refused, cached, trained, vae_path, tmp_path):
    train = f"{TINY} {SHORT} --use_cached --cached_path {cached} --epochs 1 --head parallel"
    run("main_tokenbridge", f"{train} --output_dir {tmp_path}/parallel")
    common = f"--vae_path {vae_path} --num_iter 2 --resume {trained}"
    run("tools.figures", f"samples {common} --classes class2 1 --per_class 3 --output {tmp_path}/samples.png")
    run("tools.figures", f"parallel {common} --resume_parallel {tmp_path}/parallel --output {tmp_path}/parallel.png")
    run("tools.figures", f"confidence {common} --output {tmp_path}/confidence.png")
    for flags in ("", "--quant_calibrate", "--quantizer linear --quant_bits 3"):
        run("tools.figures", f"levels --cached_path {cached} --num_workers 0 --output {tmp_path}/levels.png {flags}")
        assert pixels(tmp_path / "levels.png").shape[0] > 300
    # Cells of 128 pixels with 2 between them, 16 above for titles: 2 classes by 3, 4 classes by 2, 4 classes by 3.
    sizes = {"samples": (2, 3), "parallel": (4, 2), "confidence": (4, 3)}
    for name, (columns, rows) in sizes.items():
        assert pixels(tmp_path / f"{name}.png").shape == (16 + 2 + 130 * rows, 2 + 130 * columns, 3)
    for bad, message in {
        f"samples {common} --classes klass2": "did you mean class2",
        f"samples {common} --classes 9": "there are 4",
        f"samples --vae_path {vae_path}": "--resume is missing",
        f"parallel {common} --resume_parallel {trained}": "--resume_parallel needs a model of --head parallel",
        f"samples {common} --output x.jpg": ".png",
        "levels": "--cached_path is missing",
        f"samples {common} --temperature -1": "--temperature -1",
        f"samples {common} --gen_seed -1": "--gen_seed -1",
    }.items():
        assert message in refused("tools.figures", bad)


def test_imagenet_classes_have_names():
    from tools import figures

    names = figures.readable([str(label) for label in range(1000)])
    assert figures.find_classes(["golden retriever", "980", "Tench"], names) == [207, 980, 0]
    assert figures.readable(["n01440764", "mine"]) == ["tench, Tinca tinca", "mine"]
    assert figures.find_classes(None, names[:3]) == [0, 1, 2]
