"""What main_vae.py trains, measures and exports; what it refuses."""

import json
import math

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.vae import AutoencoderKL, DiagonalGaussianDistribution
from models.vae_losses import VAELosses
from tests.conftest import damaged, scalars, write_images
from tests.scripts.trace import traced_two
from util.data.caches import CachedFolder
from util.data.datasets import ImageFolder, image_transform
from util.data.images import psnr, to_uint8

SMALL_VAE = "--img_size 16 --ch 8 --ch_mult 1 2 --num_res_blocks 1 --vae_embed_dim 4 --num_workers 0 --precision fp32"


@pytest.fixture
def seen(monkeypatch) -> list[bytes]:
    """The images that losses were computed of, in order."""
    rows, forward = [], VAELosses.forward

    def traced(losses, images, labels):
        rows.extend(image.numpy().tobytes() for image in images)
        return forward(losses, images, labels)

    monkeypatch.setattr(VAELosses, "forward", traced)
    return rows


def test_a_tokenizer_is_trained_and_tells_its_latent_factor(run, images, tmp_path, caplog):
    caplog.set_level("INFO")
    run(
        "main_vae",
        f"--data_path {images} --img_size 16 --output_dir {tmp_path} --ch 8 --ch_mult 1 2 --num_res_blocks 1 "
        "--vae_embed_dim 4 --batch_size 8 --epochs 30 --lr 3e-3 --num_workers 0 --ema_rate 0.9",
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


def test_the_tokenizer_sees_every_epoch_in_its_own_order_and_follows_its_flags(
    run, images, tmp_path, seen
):
    common = f"{SMALL_VAE} --device cpu --data_path {images} --batch_size 8 --output_dir {tmp_path}"
    orders, finals = {}, {}
    for name, flags in {
        "one": "--epochs 2 --no_mirror --lr 1e-3 --min_lr 1e-4 --warmup_epochs 0",
        "two": "--epochs 1 --no_mirror --seed 7 --lr_schedule constant --lr 2e-3 --warmup_epochs 0",
        "kl": "--epochs 2 --no_mirror --lr 1e-3 --min_lr 1e-4 --warmup_epochs 0 --kl_weight 1e4",
        "mirrored": "--epochs 2",
    }.items():
        seen.clear()
        run("main_vae", f"{common}/{name} {flags}")
        orders[name] = list(seen)
        finals[name] = {
            tag: scalars(tmp_path / name / "tokenizer_log", tag)
            for tag in ("tokenizer/kl", "train/lr")
        }
    one, two = orders["one"], orders["two"]
    assert len({tuple(one[:16]), tuple(one[16:32]), tuple(two[:16])}) == 3
    assert len(set(one)) == 16 < len(set(orders["mirrored"]))
    assert finals["one"]["train/lr"][4] == pytest.approx(
        1e-4 + 9e-4 * (1 + math.cos(math.pi * 0.75)) / 2
    )
    assert finals["two"]["train/lr"] == pytest.approx({2: 2e-3})
    assert finals["kl"]["tokenizer/kl"][4] < 0.98 * finals["one"]["tokenizer/kl"][4]


def expected_ratio(folder, data) -> float:
    """Mean PSNR of the exported tokenizer's reconstructions."""
    vae, _ = AutoencoderKL.from_pretrained(folder / "vae.ckpt")
    folder = ImageFolder(data, image_transform(16))
    images = torch.stack([folder[i][0] for i in range(len(folder))])
    with torch.no_grad():
        return psnr(to_uint8(images), to_uint8(vae.decode(vae.encode(images).mode()))).mean().item()


def test_reconstructions_and_latents_are_measured_of_what_is_exported(
    run, images, tmp_path, caplog
):
    caplog.set_level("INFO")
    common = (
        f"{SMALL_VAE} --device cpu --data_path {images} --batch_size 8 --warmup_epochs 0 --lr 1e-3"
    )
    for name, flags in {"average": "--ema_rate 0.5", "last": "--no_ema"}.items():
        run("main_vae", f"{common} --epochs 3 --eval_freq 2 {flags} --output_dir {tmp_path}/{name}")
    assert "measured on training images" in caplog.text
    ratios = {}
    for name in ("average", "last"):
        figures = json.loads((tmp_path / name / "vae.json").read_text())
        ratios[name] = scalars(tmp_path / name / "tokenizer_log", "tokenizer/psnr")
        assert (
            figures["psnr"] == pytest.approx(ratios[name][6], rel=1e-6)
            and figures["psnr_of"] == "train"
        )
        assert figures["psnr"] == pytest.approx(
            expected_ratio(tmp_path / name, images / "train"), rel=1e-4
        )
    assert sorted(ratios["last"]) == [4, 6] and ratios["average"][6] != ratios["last"][6]
    states = {
        name: torch.load(tmp_path / name / "vae-last.pth", weights_only=True)
        for name in ("average", "last")
    }
    exported = {
        name: torch.load(tmp_path / name / "vae.ckpt", weights_only=True)["model"]
        for name in states
    }
    for name, key in {"average": "model_ema", "last": "model"}.items():
        assert all(
            torch.equal(value, states[name][key][f"vae.{n}"]) for n, value in exported[name].items()
        )
    assert not torch.equal(
        exported["average"]["quant_conv.bias"], exported["last"]["quant_conv.bias"]
    )

    write_images(tmp_path / "other").joinpath("train").rename(images / "val")
    (images / "val" / "class0" / "0.png").unlink()
    caplog.clear()
    run("main_vae", f"{common} --epochs 1 --output_dir {tmp_path}/held_out")
    figures = json.loads((tmp_path / "held_out" / "vae.json").read_text())
    assert figures["psnr"] == pytest.approx(
        expected_ratio(tmp_path / "held_out", images / "val"), rel=1e-4
    )
    assert "measured on training images" not in caplog.text and (
        figures["psnr_of"],
        figures["images"],
    ) == ("val", 16)
    (picture,) = (
        EventAccumulator(str(tmp_path / "held_out" / "tokenizer_log"))
        .Reload()
        .Images("tokenizer/originals over reconstructions")
    )
    assert (picture.height, picture.width) == (2 * 18 + 2, 8 * 18 + 2)


def test_latents_are_told_by_channel(run, images, tmp_path):
    run(
        "main_vae",
        f"{SMALL_VAE} --data_path {images} --batch_size 8 --epochs 1 --no_mirror --output_dir {tmp_path}/v",
    )
    figures = json.loads((tmp_path / "v" / "vae.json").read_text())
    _, latent_factor = AutoencoderKL.from_pretrained(tmp_path / "v" / "vae.ckpt")
    cache = f"--vae_path {tmp_path}/v/vae.ckpt --cached_path {tmp_path}/c --num_workers 0"
    run("main_cache", f"{cache} --img_size 16 --data_path {images} --precision fp32")
    run(
        "tools.channel_order",
        f"--cached_path {tmp_path}/c --num_workers 0 --output_dir {tmp_path}/order",
    )
    shares = json.loads((tmp_path / "order" / "channel_order.json").read_text())["shares"]
    assert figures["low_frequency_shares"] == pytest.approx(shares, rel=1e-4)
    moments = DiagonalGaussianDistribution(
        torch.stack([moments for moments, _ in CachedFolder(tmp_path / "c", False)])
    )
    variance = moments.mean.var(dim=(0, 2, 3), correction=0) + moments.std.square().mean(
        dim=(0, 2, 3)
    )
    assert figures["channel_deviations"] == pytest.approx(
        (latent_factor * variance.sqrt()).tolist(), rel=1e-4
    )


# --------------------------------------------------------------------------------------------------------------------
# Bad input.


def test_a_folder_that_holds_a_run_is_refused(run, refused, images, tmp_path):
    command = (
        f"{SMALL_VAE} --data_path {images} --batch_size 8 --epochs 1 --output_dir {tmp_path}/vae"
    )
    run("main_vae", command)
    (tmp_path / "vae" / "vae.ckpt").rename(tmp_path / "kept")
    for name in ("vae-last.pth", "vae.ckpt"):
        line = refused("main_vae", command)
        assert (
            name in line and "another --output_dir" in line and f"--resume {tmp_path}/vae" in line
        )
        (tmp_path / "vae" / "vae-last.pth").unlink(missing_ok=True)
        (tmp_path / "kept").exists() and (tmp_path / "kept").rename(tmp_path / "vae" / "vae.ckpt")


def test_what_cannot_work_is_told_in_one_line(run, refused, images, tmp_path):
    common = f"{SMALL_VAE} --device cpu --epochs 1 --output_dir {tmp_path}/vae --data_path"
    one = write_images(tmp_path / "one", classes=1, each=1)
    assert "1 images do not fill one step of 16" in refused("main_vae", f"{common} {one}")
    line = refused("main_vae", f"{common} {images} --batch_size 8 --accum_iter 3")
    assert "16 images do not fill one step of 24" in line
    line = refused(
        "main_vae", f"{common} {images} --perceptual_weight 1 --vgg_weights {tmp_path}/none.pth"
    )
    assert "none.pth" in line and "https://" in line and "--perceptual_weight 0" in line
    assert "16 pixels" in refused("main_vae", f"{common} {images} --img_size 8 --disc_weight 1")
    assert not (tmp_path / "vae").exists()

    with Image.open(images / "train" / "class1" / "1.png") as image:
        image.resize((90, 33)).save(images / "train" / "class1" / "1.png")
        image.resize((7, 9)).save(images / "train" / "class1" / "2.png")
    run("main_vae", f"{common} {images} --batch_size 8")  # sizes may be mixed
    for path in images.glob("train/*/*.png"):
        damaged(path)
    for workers in (0, 2):
        new = common.replace("--num_workers 0", f"--num_workers {workers}").replace(
            "/vae ", f"/vae{workers} "
        )
        assert "cannot read image" in refused("main_vae", f"{new} {images} --batch_size 8")
        line = refused("main_vae", f"{new} {images} --batch_size 8 --skip_bad_images")
        assert "none of the images" in line


def test_two_processes_train_one_tokenizer(images, tmp_path):
    flags = f"{SMALL_VAE} --data_path {images} --output_dir {tmp_path}/vae --batch_size 4 --epochs 2 --no_mirror"
    traces, said, statuses = traced_two(tmp_path, "main_vae", flags)
    assert statuses == [0, 0], said
    batches = [
        [batch for batch in trace["images"] if len(batch) == 4][:2] for trace in traces
    ]  # the first epoch's
    rows = [[row.numpy().tobytes() for batch in both for row in batch] for both in batches]
    assert len({*rows[0], *rows[1]}) == 16
    assert len(traces[0]["steps"]) == 4 and torch.equal(
        traces[0]["steps"][-1], traces[1]["steps"][-1]
    )
    assert traces[0]["saved"] and not traces[1]["saved"]
