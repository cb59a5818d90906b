"""The order of channels that tools/channel_order.py measures."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import SHORT, TINY, write_maps
from tools import channel_order
from util.checkpoint.files import read_checkpoint


def maps_with_share(shares: list[float], images: int = 40, side: int = 16) -> torch.Tensor:
    """Maps ``[N, C, side, side]`` whose expected energy lies by ``shares`` inside the low frequencies."""
    low = channel_order.low_frequencies(side, side, 0.5)
    low[0, 0] = False
    high = ~low
    high[0, 0] = False
    spectrum = torch.fft.fft2(torch.randn(images, len(shares), side, side))
    for channel, share in enumerate(shares):
        spectrum[:, channel] *= low * math.sqrt(share / low.sum()) + high * math.sqrt(
            (1 - share) / high.sum()
        )
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
    (root / "cache.json").write_text(
        json.dumps({"images": len(maps), "complete": True, **metadata})
    )


def test_the_order_is_measured_drawn_and_trained_with(run, refused, tmp_path):
    shares = [0.1, 0.8, 0.5, 0.3]
    vae = {"embed_dim": 4, "ch_mult": [1, 1, 2]}
    write_moments(
        tmp_path / "cache",
        maps_with_share(shares),
        {"vae": vae, "latent_factor": 0.5, "img_size": 64},
    )
    cache = f"--cached_path {tmp_path}/cache --num_workers 0"
    run("tools.channel_order", f"{cache} --output_dir {tmp_path}/order")
    written = json.loads((tmp_path / "order" / "channel_order.json").read_text())
    assert written["order"] == [1, 2, 3, 0] and written["images"] == 40
    assert written["shares"] == pytest.approx(shares, abs=0.06)
    with Image.open(tmp_path / "order" / "channel_order.png") as picture:
        assert min(picture.size) > 100

    tiny = (
        TINY.replace("--img_size 16", "--img_size 64") + f" {SHORT} --epochs 1 --use_cached {cache}"
    )
    by_file = f"--channel_order {tmp_path}/order/channel_order.json"
    run("main_tokenbridge", f"{tiny} --output_dir {tmp_path}/run {by_file}")
    assert read_checkpoint(tmp_path / "run" / "checkpoint-last.pth")["config"]["channel_order"] == [
        1,
        2,
        3,
        0,
    ]
    assert "neither frequency" in refused(
        "main_tokenbridge", f"{tiny} --output_dir {tmp_path}/x --channel_order best"
    )
    assert "0 to 3 once" in refused(
        "main_tokenbridge", f"{tiny} --output_dir {tmp_path}/x --channel_order 0,1,2,2"
    )
    line = refused(
        "main_tokenbridge", f"{tiny} --output_dir {tmp_path}/x --channel_order frequency"
    )
    assert "tools.channel_order" in line

    run("tools.channel_order", f"{cache} --output_dir {tmp_path}/patches --patch_size 2")
    assert sorted(
        json.loads((tmp_path / "patches" / "channel_order.json").read_text())["order"]
    ) == list(range(16))
    assert "too few" in refused("tools.channel_order", f"{cache} --patch_size 8")
    assert "--cached_path" in refused("tools.channel_order", "--num_workers 0")


def test_channels_are_ordered_alike_by_two_processes_and_by_patches(run, run_two, tmp_path):
    # Each row of a map is a wave of its channel's frequency, at odd places of patches another one's.
    wave = torch.cos(math.pi * torch.arange(16) * torch.tensor([7, 1, 4])[:, None] / 8)
    sizes = 1 + torch.rand(13, 3, 1, 1)
    maps = sizes * wave[None, :, None].expand(13, 3, 16, 16) + 0.1 * torch.randn(13, 3, 16, 16)
    cache = write_maps(tmp_path / "cache", maps)
    run("tools.channel_order", f"{cache} --output_dir {tmp_path}/one")
    run_two("tools.channel_order", f"{cache} --output_dir {tmp_path}/two")
    one, two = (
        json.loads((tmp_path / n / "channel_order.json").read_text()) for n in ("one", "two")
    )
    assert one["order"] == [1, 2, 0] and one["images"] == 13 and one["cutoff"] == 0.5
    assert two["order"] == one["order"] and two["shares"] == pytest.approx(one["shares"], rel=1e-9)
    assert one["shares"][0] < 0.2 < 0.9 < one["shares"][1]
    run("tools.channel_order", f"{cache} --output_dir {tmp_path}/wide --cutoff 0.2")
    assert json.loads((tmp_path / "wide" / "channel_order.json").read_text())["shares"][2] < 0.2
    run("tools.channel_order", f"{cache} --output_dir {tmp_path}/few --num_images 5")
    assert (
        json.loads((tmp_path / "few" / "channel_order.json").read_text())["images"] == 5
    )  # every third

    # In patches of 2, channel 0's corners: constant at the upper left, noise elsewhere.
    maps = torch.randn(13, 1, 16, 16)
    maps[..., ::2, ::2] = torch.randn(13, 1, 1, 1)
    cache = write_maps(tmp_path / "corners", maps)
    run("tools.channel_order", f"{cache} --output_dir {tmp_path}/patches --patch_size 2")
    patches = json.loads((tmp_path / "patches" / "channel_order.json").read_text())
    assert patches["order"][0] == 0 and patches["shares"][0] > 0.99 and len(patches["order"]) == 4
