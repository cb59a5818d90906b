"""What caching does with its flags, with interruptions, and in two processes; what measures caches."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from models.vae import AutoencoderKL
from tests.conftest import TINY, Watched, write_images
from util.loader import CachedFolder


def test_an_interrupted_cache_is_refused_and_goes_on_where_it_stopped(
    run, refused, images, vae_path, tmp_path, monkeypatch
):
    watched, encode = Watched(AutoencoderKL.encode), AutoencoderKL.encode

    def stopped(vae, x):
        if len(watched.calls) == 4:  # two batches, both views of each
            raise KeyboardInterrupt
        watched.note(vae, x)
        return encode(vae, x)

    monkeypatch.setattr(AutoencoderKL, "encode", stopped)
    command = f"--img_size 16 --vae_path {vae_path} --data_path {images} --cached_path {tmp_path}/cache --batch_size 3"
    with pytest.raises(KeyboardInterrupt):
        run("main_cache", f"{command} --num_workers 0")
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 6
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["complete"] is False
    train = f"{TINY} --epochs 1 --output_dir {tmp_path}/x --use_cached"
    line = refused("main_tokenbridge", f"{train} --cached_path {tmp_path}/cache")
    assert "incomplete: 6 of 16 files" in line
    watched.calls.clear()
    monkeypatch.setattr(AutoencoderKL, "encode", lambda vae, x: encode(vae, watched.note(vae, x)["x"]))
    run("main_cache", f"{command} --num_workers 0")
    assert sum(map(len, watched.all("x"))) == 2 * 10 and len(CachedFolder(tmp_path / "cache")) == 16


def test_a_cache_whose_files_are_all_there_but_was_not_finished_is_refused(refused, cached, tmp_path):
    about = json.loads((cached / "cache.json").read_text())
    assert about["complete"] is True
    (cached / "cache.json").write_text(json.dumps({**about, "complete": False}))
    train = f"{TINY} --epochs 1 --output_dir {tmp_path}/x --use_cached"
    line = refused("main_tokenbridge", f"{train} --cached_path {cached}")
    assert "is incomplete" in line


def test_precision_and_split_are_those_asked_for(run, images, vae_path, tmp_path, monkeypatch):
    watched, encode = Watched(AutoencoderKL.encode), AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda vae, x: encode(vae, watched.note(vae, x)["x"]))
    write_images(tmp_path / "other", each=1)
    (tmp_path / "other" / "train").rename(images / "val")
    command = f"--img_size 16 --vae_path {vae_path} --data_path {images} --num_workers 0 --split val"
    run("main_cache", f"{command} --precision fp16 --cached_path {tmp_path}/fp16")
    run("main_cache", f"{command} --cached_path {tmp_path}/fp32")
    assert watched.all("autocast") == 2 * [torch.float16] + 2 * [torch.float32]
    low, high = CachedFolder(tmp_path / "fp16", mirror=False), CachedFolder(tmp_path / "fp32", mirror=False)
    assert len(low) == 4 and low.metadata["split"] == "val" and low.metadata["precision"] == "fp16"
    for (moments, _), (exact, _) in zip(low, high, strict=True):
        assert torch.allclose(moments, exact, atol=0.05) and not torch.equal(moments, exact)
    with np.load(tmp_path / "fp16" / "class0" / "0.png.npz") as arrays:
        assert arrays["moments"].dtype == np.float32


def test_two_processes_cache_and_count_together(run_two, images, vae_path, cached, tmp_path, capfd):
    (cached / "class1" / "1.png.npz").unlink()
    (cached / "class2" / "1.png.npz").write_bytes(b"damaged")
    (cached / "class2" / "2.png.npz").write_bytes(b"damaged")
    (images / "train" / "class1" / "1.png").write_bytes(b"no image")  # the second process meets it
    (cached / "class1" / ".1.png.npz.7.part").write_bytes(b"left over")
    command = f"--img_size 16 --vae_path {vae_path} --data_path {images} --cached_path {cached} --num_workers 0"
    run_two("main_cache", f"{command} --skip_bad_images")
    said = capfd.readouterr().err
    assert said.count("cached 15 images") == 1 and "13 were there, 0 are new, 2 replace damaged ones" in said
    about = json.loads((cached / "cache.json").read_text())
    assert (about["images"], about["complete"]) == (15, True) and not list(cached.rglob("*.part"))
    assert len(CachedFolder(cached)) == 15


# --------------------------------------------------------------------------------------------------------------------
# Measured on caches: the order of channels.


def write_cache(root, maps: torch.Tensor) -> str:
    """A cache whose means are ``maps [N, C, h, w]`` and whose deviations are large."""
    moments = torch.cat([maps, torch.full_like(maps, 2.0)], dim=1).float().numpy()
    for number, each in enumerate(moments):
        path = root / str(number % 2) / f"{number}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, moments=each, moments_flip=0 * each)
    about = {"images": len(maps), "vae": {"embed_dim": maps.shape[1], "ch_mult": [1, 1, 2]}, "latent_factor": 0.5}
    (root / "cache.json").write_text(json.dumps(about))
    return f"--cached_path {root} --num_workers 0 --batch_size 4"


def test_channels_are_ordered_alike_by_two_processes_and_by_patches(run, run_two, tmp_path):
    # Each row of a map is a wave of its channel's frequency, at odd places of patches another one's.
    wave = torch.cos(math.pi * torch.arange(16) * torch.tensor([7, 1, 4])[:, None] / 8)
    sizes = 1 + torch.rand(13, 3, 1, 1)
    maps = sizes * wave[None, :, None].expand(13, 3, 16, 16) + 0.1 * torch.randn(13, 3, 16, 16)
    cache = write_cache(tmp_path / "cache", maps)
    run("tools.channel_order", f"{cache} --output_dir {tmp_path}/one")
    run_two("tools.channel_order", f"{cache} --output_dir {tmp_path}/two")
    one, two = (json.loads((tmp_path / n / "channel_order.json").read_text()) for n in ("one", "two"))
    assert one["order"] == [1, 2, 0] and one["images"] == 13 and one["cutoff"] == 0.5
    assert two["order"] == one["order"] and two["shares"] == pytest.approx(one["shares"], rel=1e-9)
    assert one["shares"][0] < 0.2 < 0.9 < one["shares"][1]
    run("tools.channel_order", f"{cache} --output_dir {tmp_path}/wide --cutoff 0.2")
    assert json.loads((tmp_path / "wide" / "channel_order.json").read_text())["shares"][2] < 0.2
    run("tools.channel_order", f"{cache} --output_dir {tmp_path}/few --num_images 5")
    assert json.loads((tmp_path / "few" / "channel_order.json").read_text())["images"] == 5  # every third

    # In patches of 2, channel 0's corners: constant at the upper left, noise elsewhere.
    maps = torch.randn(13, 1, 16, 16)
    maps[..., ::2, ::2] = torch.randn(13, 1, 1, 1)
    cache = write_cache(tmp_path / "corners", maps)
    run("tools.channel_order", f"{cache} --output_dir {tmp_path}/patches --patch_size 2")
    patches = json.loads((tmp_path / "patches" / "channel_order.json").read_text())
    assert patches["order"][0] == 0 and patches["shares"][0] > 0.99 and len(patches["order"]) == 4


# --------------------------------------------------------------------------------------------------------------------
# Figures.


def cell(path, row: int, column: int) -> int:
    """The one grey of a cell of 128 pixels, below titles."""
    with Image.open(path) as picture:
        part = np.array(picture)[18 + 130 * row :, 2 + 130 * column :][:128, :128]
    assert len(np.unique(part)) == 1
    return int(part[0, 0, 0])


def test_figures_sample_as_asked_and_place_what_they_sample(run, weights, vae_path, tmp_path, sampler, decoder):
    greys = [round(255 * (label / 0.5 / 40 + 1) / 2) for label in range(4)]
    flags = {
        "num_iter": 3, "cfg": 2.5, "cfg_schedule": "constant", "temperature": 0.7, "order": "raster",
        "confidence_noise": 0.4,
    }  # fmt: skip
    typed = " ".join(f"--{name} {value}" for name, value in flags.items())
    common = f"--vae_path {vae_path} --resume {tmp_path}/weights --device cpu"
    typed += " --classes 2 1 --per_class 3 --batch_size 4 --precision fp16"
    run("tools.figures", f"samples {common} {typed} --output {tmp_path}/s.png")
    for call in sampler.calls:
        assert {name: call[name] for name in flags} == flags and call["autocast"] == torch.float16
    assert sampler.all("bsz") == [4, 2] and len(set(sampler.joined("seeds"))) == 6
    average = sampler.calls[0]["mask_token"]
    assert [[cell(tmp_path / "s.png", row, column) for column in (0, 1)] for row in range(3)] == 3 * [
        [greys[2], greys[1]]
    ]
    sampler.calls.clear()
    run("tools.figures", f"confidence {common} --no_ema --gen_seed 5 --output {tmp_path}/c.png")
    random, confident = sampler.calls
    assert (random["order"], confident["order"], random["cfg"]) == ("random", "confidence", 3)
    assert random["seeds"] == confident["seeds"] and random["labels"].tolist() == [0, 1, 2, 3]
    assert torch.allclose(1.1 * random["mask_token"], average)
    for row in (0, 1):
        assert [cell(tmp_path / "c.png", row, column) for column in range(4)] == greys
    with Image.open(tmp_path / "c.png") as picture:
        brightness = np.array(picture).astype(int)[18 + 260 :, 2:][16:128:32, 16:128:32].sum(axis=2)
    assert (np.diff(brightness.flatten()) > 0).all()


def test_figure_7_has_the_parallel_head_above(run, weights, vae_path, tmp_path, sampler, decoder, monkeypatch):
    content = torch.load(tmp_path / "weights" / "checkpoint-last.pth", weights_only=True)
    from models.tokenbridge import TokenBridge

    config = {name: value for name, value in content["config"].items() if name != "latent_factor"}
    parallel = TokenBridge.from_config({**config, "head": "parallel"})
    (tmp_path / "parallel").mkdir()
    torch.save(
        {"model": parallel.state_dict(), "config": {**parallel.config, "latent_factor": 0.5}},
        tmp_path / "parallel" / "checkpoint-last.pth",
    )
    note = sampler.note

    def by_head(model, *args, **kwargs):  # classes in the opposite order from the parallel head
        given = note(model, *args, **kwargs)
        return {**given, "labels": 3 - given["labels"]} if model.config["head"] == "parallel" else given

    monkeypatch.setattr(sampler, "note", by_head)
    common = f"--vae_path {vae_path} --resume {tmp_path}/weights --resume_parallel {tmp_path}/parallel --no_ema"
    run("tools.figures", f"parallel {common} --device cpu --output {tmp_path}/p.png")
    above, below = ([cell(tmp_path / "p.png", row, column) for column in range(4)] for row in (0, 1))
    assert above == below[::-1] and below == sorted(below) and below[0] < below[3]
    assert sampler.calls[0]["seeds"] == sampler.calls[1]["seeds"]


@pytest.mark.parametrize("calibrate", [False, True])
def test_figure_3_is_of_scaled_posterior_samples_channel_by_channel(run, tmp_path, monkeypatch, calibrate):
    shown = []
    monkeypatch.setattr("matplotlib.axes.Axes.hist", lambda axes, values, **_: shown.append(torch.as_tensor(values)))
    stairs = []
    monkeypatch.setattr("matplotlib.axes.Axes.stairs", lambda axes, values, edges, **_: stairs.append((values, edges)))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda *_, **__: None)
    offsets = torch.tensor([-3.0, 0.0, 3.0])[:, None, None]
    write_cache(tmp_path / "cache", offsets.expand(20, 3, 16, 16))  # of deviation e
    run(
        "tools.figures",
        f"levels --cached_path {tmp_path}/cache --num_workers 0 --quant_bits 3 --num_images 10 "
        f"--output {tmp_path}/levels.png {'--quant_calibrate' * calibrate}",
    )
    together, *channels = shown
    assert together.shape == (3 * 10 * 256,) and [len(values) for values in channels] == 3 * [2560]
    means = [0, 0, 0] if calibrate else [-1.5, 0, 1.5]
    for values, mean in zip(channels, means, strict=True):
        assert values.mean().item() == pytest.approx(mean, abs=0.1)
        assert values.std().item() == pytest.approx(1 if calibrate else 0.5 * np.e, rel=0.05)
    density, edges = stairs[0]
    assert len(density) == 8 and (density * np.diff(edges)).sum() == pytest.approx(1)
    inside = ((together >= edges[3]) & (together < edges[4])).float().mean().item()
    assert density[3] * (edges[4] - edges[3]) == pytest.approx(inside, abs=1e-3)
    assert abs(edges).max() < 6 and edges[4] == pytest.approx(0, abs=1e-5)
