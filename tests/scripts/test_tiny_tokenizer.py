"""All commands with a tiny autoencoder as tokenizer."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from models.pipeline import TokenBridgePipeline
from models.tiny_vae import TinyAutoencoder
from models.tokenizer import Tokenizer
from tests.conftest import TINY, filled, load, write_images
from tests.models.test_tiny_vae import write_pair
from tools import checkpoint as commands
from util.data.datasets import image_transform
from util.data.packed import open_cache
from util.data.sources import read_image

MODEL = TINY.replace("--img_size 16", "--img_size 32") + " --device cpu"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with images ``data``, a pair of files ``taef2``, and their cache ``cache``."""
    folder = tmp_path_factory.mktemp("tiny")
    write_images(folder / "data", size=40)
    write_pair(folder / "taef2", filled(TinyAutoencoder(6, ch=8, pooled=True)))
    return folder


@pytest.fixture
def cache(files, run):
    """The cache of the images."""
    flags = f"--img_size 32 --vae_path {files}/taef2 --data_path {files}/data --batch_size 8"
    run("main_cache", f"{flags} --cached_path {files}/cache --num_workers 0 --device cpu")
    return files / "cache"


def test_caches_hold_the_means_alone(files, cache, run, refused, tmp_path):
    tokenizer = Tokenizer.from_pretrained(str(files / "taef2"))
    metadata = json.loads((cache / "cache.json").read_text())
    assert metadata["vae"]["deterministic"] is True and metadata["latent_factor"] == 1.0
    assert metadata["vae_sha256"] == tokenizer.fingerprint
    image = image_transform(32)(read_image(files / "data/train/class1/2.png"))[None]
    with np.load(cache / "class1" / "2.png.npz") as stored:
        assert stored["moments"].shape == (6, 4, 4)
        mean = torch.from_numpy(stored["moments"])
    assert torch.allclose(mean, tokenizer.encode(image).mode()[0], atol=1e-6)
    run("tools.pack", f"--cached_path {cache} --output_dir {tmp_path}/packed --num_workers 0")
    for number in range(16):
        views = [opened.view(number, 1) for opened in map(open_cache, (cache, tmp_path / "packed"))]
        assert torch.equal(*views)
    odd = f"--img_size 20 --vae_path {files}/taef2 --data_path {files}/data"
    error = refused("main_cache", f"{odd} --cached_path {tmp_path}/odd --device cpu")
    assert "--img_size 20 is not a multiple of the tokenizer's stride, 8" in error


def test_train_resume_evaluate_and_edit(files, cache, run, refused, vae_path, tmp_path):
    run("tools.channel_order", f"--cached_path {cache} --output_dir {tmp_path} --num_workers 0")
    order = json.loads((tmp_path / "channel_order.json").read_text())["order"]
    assert sorted(order) == list(range(6))
    common = f"{MODEL} --output_dir {tmp_path}/run --lr 1e-3 --warmup_epochs 0"
    flags = f"{common} --use_cached --cached_path {cache} --vae_path {files}/taef2"
    flags += f" --quant_calibrate --channel_order {tmp_path}/channel_order.json"
    run("main_tokenbridge", f"{flags} --epochs 1")
    config = load(tmp_path / "run")["config"]
    assert config["vae_stride"] == 8 and config["channel_order"] == order
    opened = open_cache(cache)
    views = [opened.view(number, view) for number in range(16) for view in (0, 1)]
    std = torch.stack(views).std((0, 2, 3), correction=0)
    assert config["channel_std"] == pytest.approx(std.tolist(), rel=0.1)
    run("main_tokenbridge", f"{flags} --epochs 2 --resume {tmp_path}/run")
    assert load(tmp_path / "run")["epoch"] == 1
    sampling = "--evaluate --no_metrics --num_images 4 --num_iter 2 --keep_images"
    evaluate = f"{MODEL} --output_dir {tmp_path}/run --resume {tmp_path}/run {sampling}"
    run("main_tokenbridge", f"{evaluate} --vae_path {files}/taef2/taef2_encoder.pth")
    with Image.open(tmp_path / "run" / "samples" / "00003.png") as image:
        assert image.size == (32, 32)
    write_pair(tmp_path / "other", filled(TinyAutoencoder(6, ch=12, pooled=True)))
    error = refused("main_tokenbridge", f"{evaluate} --vae_path {tmp_path}/other")
    assert "was trained with another tokenizer" in error

    pipeline = TokenBridgePipeline.from_pretrained(tmp_path / "run")
    with Image.open(files / "data/train/class1/2.png") as image:
        mask_image = Image.new("L", image.size)
        mask_image.paste(255, (0, 0, image.width, image.height // 2))
        edited = pipeline(1, image=image, mask_image=mask_image, num_iter=2, seeds=0)
    assert edited.images[0].size == (32, 32)


def test_reconstruct_show_and_export(files, run, tmp_path, capsys):
    flags = f"--img_size 32 --vae_path {files}/taef2 --image_dir {files}/data --device cpu"
    flags += f" --num_workers 0 --no_metrics --quant_calibrate --output_dir {tmp_path}/out"
    run("reconstruction", flags)
    assert list(tmp_path.glob("out/**/results.json"))
    capsys.readouterr()
    commands.main(["show", str(files / "taef2")])
    assert "model: 158 tensors" in capsys.readouterr().out
    commands.main(["export", str(files / "taef2"), str(tmp_path / "exported")])
    found = [
        Tokenizer.from_pretrained(str(path)) for path in (files / "taef2", tmp_path / "exported")
    ]
    assert found[0].fingerprint == found[1].fingerprint
