"""Images and folders as they are found: odd modes and names, damage, links; and caches made in several goes."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import engine_tokenbridge
from models.vae import AutoencoderKL
from tests.conftest import TINY, filled
from util import checkpoint
from util.errors import UserError
from util.files import inside, read_arrays
from util.loader import BadImages, CachedFolder, ImageFolder, image_transform, read_image

# --------------------------------------------------------------------------------------------------------------------
# Images.


def ramp(high: int, dtype: type) -> np.ndarray:
    """Two rows of values from 0 to ``high``."""
    return np.tile(np.linspace(0, high, 64), (64, 1)).round().astype(dtype)


@pytest.mark.parametrize("format", ["png", "tif"])
def test_sixteen_bits_keep_their_range(tmp_path, format):
    path = tmp_path / f"grey.{format}"
    Image.fromarray(ramp(65535, np.uint16)).save(path)
    pixels = np.asarray(read_image(path))
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels[..., 0].astype(int) - ramp(255, np.uint8)).max() <= 1


def test_every_mode_becomes_rgb(tmp_path):
    colours = Image.fromarray(np.stack([ramp(255, np.uint8), ramp(255, np.uint8).T, ramp(255, np.uint8)], axis=-1))
    saved = {
        "rgb.png": colours,
        "cmyk.jpg": colours.convert("CMYK"),
        "rgba.png": colours.convert("RGBA"),
        "palette.png": colours.quantize(256),
        "two.png": colours.convert("1"),
        "grey.jpg": colours.convert("L"),
        "alpha.png": colours.convert("LA"),
        "int.tif": Image.fromarray(ramp(65535, np.int32)),
    }
    for name, image in saved.items():
        image.save(tmp_path / name)
        read = read_image(tmp_path / name)
        assert read.mode == "RGB" and read.size == (64, 64)
        if name.startswith(("rgb", "cmyk", "palette")):
            assert np.abs(np.asarray(read).astype(int) - np.asarray(colours)).mean() < 12, name


def test_what_has_no_range_is_named(tmp_path):
    Image.fromarray(ramp(1, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float\.tif \(values of mode F"):
        read_image(tmp_path / "float.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_photographs_stand_upright(tmp_path, orientation):
    upright = Image.new("RGB", (40, 20))
    upright.paste((255, 255, 255), (0, 0, 10, 5))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that a camera would have made
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "photo.png")), np.asarray(upright))


def folder_of(root, **files) -> str:
    for name, image in files.items():
        path = root / "train" / "class" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return root / "train"


def test_tiny_images_grow_and_slivers_are_named(tmp_path):
    root = folder_of(tmp_path, dot=Image.new("RGB", (1, 1)), sliver=Image.new("RGB", (1, 60000)))
    data = ImageFolder(root, image_transform(64))
    assert data[0][0].shape == (3, 64, 64)
    with pytest.raises(UserError, match=r"sliver\.png \(1x60000 pixels are too narrow"):
        data[1]


def damaged(path) -> None:
    """Cuts an image short, or makes it empty."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if path.stem != "3" else 0])


@pytest.mark.parametrize("name", ["a b.png", "ümläut.png", "#%[x]'.png", "-dash.png", "new\nline.png", ".hidden.png"])
def test_names_are_only_names(run, images, vae_path, tmp_path, name):
    (images / "train" / "class0" / "0.png").rename(images / "train" / "class0" / name)
    (images / "train" / "class1").rename(images / "train" / "class 1")
    (images / "train" / "class2").rename(tmp_path / "elsewhere")
    (images / "train" / "class2").symlink_to(tmp_path / "elsewhere")
    cache = f"{tmp_path}/cache"
    run("main_cache", f"--img_size 16 --vae_path {vae_path} --data_path {images} --cached_path {cache} --num_workers 0")
    assert len(CachedFolder(cache)) == 16
    assert (tmp_path / "cache" / "class0" / f"{name}.npz").exists()
    assert (tmp_path / "cache" / "class2").is_dir() and not list((tmp_path / "elsewhere").glob("*.npz"))


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "", "a/../x"])
def test_names_that_leave_their_folder_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="leads out of"):
        inside(tmp_path, name)
    vae = filled(AutoencoderKL(8, (1, 1, 2), ch=8, num_res_blocks=1))
    batches = [(torch.zeros(1, 3, 8, 8), None, [name])]
    if name:
        with pytest.raises(UserError, match="leads out of"):
            engine_tokenbridge.cache_latents(vae, batches, tmp_path / "cache", torch.device("cpu"))
    assert not list(tmp_path.rglob("*.npz"))


# --------------------------------------------------------------------------------------------------------------------
# Skipping.


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_left_out_counted_and_listed(run, images, vae_path, tmp_path, caplog, workers):
    for name in ("class0/3", "class3/1"):
        damaged(images / "train" / f"{name}.png")
    tiny = TINY.replace("--num_workers 0", f"--num_workers {workers}")
    skip = f"--vae_path {vae_path} --data_path {images} --skip_bad_images"
    run("main_cache", f"--img_size 16 --num_workers {workers} {skip} --cached_path {tmp_path}/cache --batch_size 2")
    assert "2 images cannot be read" in caplog.text
    cache = CachedFolder(tmp_path / "cache")
    assert len(cache) == cache.metadata["images"] == 14

    caplog.clear()
    run("main_tokenbridge", f"{tiny} {skip} --epochs 2 --lr 1e-3 --output_dir {tmp_path}/run")
    assert caplog.text.count("2 images cannot be read") == 2  # once an epoch, each image once
    listed = (tmp_path / "run" / "bad_images-rank0.txt").read_text()
    assert "class0/3.png" in listed and "class3/1.png" in listed
    assert (tmp_path / "run" / "checkpoint-last.pth").exists()


def test_the_next_image_takes_a_bad_ones_place(images, tmp_path):
    damaged(images / "train" / "class3" / "3.png")
    data = ImageFolder(images / "train", image_transform(16), bad_images=BadImages(tmp_path))
    assert torch.equal(data[15][0], data[0][0]) and data[15][1] == 0
    for path in (images / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the images"):
        data[0]


# --------------------------------------------------------------------------------------------------------------------
# Caches made in several goes.


def test_caching_again_makes_only_what_is_missing_or_damaged(run, images, cached, vae_path, tmp_path, caplog):
    command = f"--img_size 16 --vae_path {vae_path} --data_path {images} --cached_path {cached} --num_workers 0"
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in cached.rglob("*.npz")}
    (cached / "class0" / "1.png.npz").unlink()
    damaged(cached / "class1" / "2.png.npz")
    np.savez(
        cached / "class2" / "0.png.npz", **{n: np.zeros((16, 2, 2), np.float32) for n in ("moments", "moments_flip")}
    )
    (cached / "class3" / ".3.png.npz.123.part").write_bytes(b"left by a killed process")
    caplog.set_level("INFO")
    run("main_cache", command)
    assert "13 were there, 1 are new, 2 replace damaged ones" in caplog.text
    assert not list(cached.rglob(".*"))
    changed = {path.name for path, (time, _) in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"1.png.npz", "2.png.npz", "0.png.npz"}
    for path, (_, content) in before.items():
        for name in ("moments", "moments_flip"):
            (tmp_path / "old.npz").write_bytes(content)
            old, new = read_arrays(tmp_path / "old.npz", name)[name], read_arrays(path, name)[name]
            assert np.allclose(old, new, atol=1e-5)


def test_two_caches_are_never_mixed(refused, images, cached, vae_path, tmp_path):
    command = f"--vae_path {vae_path} --data_path {images} --cached_path {cached} --num_workers 0"
    assert "img_size 16 there, 32 here" in refused("main_cache", f"{command} --img_size 32")
    assert "precision fp32 there, bf16 here" in refused("main_cache", f"{command} --img_size 16 --precision bf16")
    (images / "val").symlink_to(images / "train")
    assert "split train there, val here" in refused("main_cache", f"{command} --img_size 16 --split val")
    torch.manual_seed(5)
    checkpoint.save_vae(vae_path, AutoencoderKL(8, (1, 1, 2), ch=8, num_res_blocks=1), 0.5)
    assert "vae_sha256" in refused("main_cache", f"{command} --img_size 16")
    (cached / "packed.json").write_text("{}")
    assert "holds a packed cache" in refused("main_cache", f"{command} --img_size 16")
    (cached / "packed.json").unlink()
    (cached / "cache.json").unlink()
    assert "without cache.json" in refused("main_cache", f"{command} --img_size 16")


def test_files_of_images_that_are_gone_are_named(run, refused, images, cached, vae_path, tmp_path):
    (images / "train" / "class1" / "1.png").unlink()
    run(
        "main_cache", f"--img_size 16 --vae_path {vae_path} --data_path {images} --cached_path {cached} --num_workers 0"
    )
    line = refused("main_tokenbridge", f"{TINY} --use_cached --cached_path {cached} --output_dir {tmp_path}/run")
    assert "holds 16 files, but was made of 15 images" in line


def test_moments_of_another_shape_are_named(refused, cached, tmp_path):
    shape = (16, 2, 2)
    np.savez(cached / "class2" / "0.png.npz", **{n: np.zeros(shape, np.float32) for n in ("moments", "moments_flip")})
    line = refused("main_tokenbridge", f"{TINY} --use_cached --cached_path {cached} --output_dir {tmp_path}/run")
    assert "class2/0.png.npz" in line and "[16, 2, 2]" in line


def test_metadata_of_no_tokenizer_is_named(refused, cached, tmp_path):
    metadata = json.loads((cached / "cache.json").read_text())
    (cached / "cache.json").write_text(json.dumps({**metadata, "vae": {"embed_dim": "many"}}))
    line = refused("main_tokenbridge", f"{TINY} --use_cached --cached_path {cached} --output_dir {tmp_path}/run")
    assert "describes no tokenizer" in line and str(cached) in line


def test_names_that_are_not_utf8(run, images, vae_path, tmp_path):
    folder = images / "train" / "class0"
    damaged(folder / "1.png")
    for name, other in (("0.png", b"\xff.png"), ("1.png", b"\xfe.png")):
        os.rename(folder / name, os.fsencode(folder) + b"/" + other)
    cache = f"--cached_path {tmp_path}/cache --num_workers 0 --skip_bad_images"
    run("main_cache", f"--img_size 16 --vae_path {vae_path} --data_path {images} {cache}")
    assert len(CachedFolder(tmp_path / "cache")) == 15
    assert b"\xfe.png" in (tmp_path / "cache" / "bad_images-rank0.txt").read_bytes()
