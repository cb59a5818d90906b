"""Images of every kind, cached folders, their mirror images, samplers and loaders; what cannot be read is named."""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tests.conftest import ROOT, TINY, damaged, write_images
from util import distributed
from util.data import loaders
from util.data.caches import CachedFolder
from util.data.classes import check_classes
from util.data.datasets import (
    BadImages,
    ImageFolder,
    ImageFolderWithFilename,
    image_transform,
    to_pixels,
)
from util.data.images import to_uint8
from util.data.loaders import RankSampler, ShuffledRankSampler, training_loader
from util.data.sources import read_image
from util.errors import UserError

# --------------------------------------------------------------------------------------------------------------------
# Images.


def test_image_folder_with_filename(images):
    dataset = ImageFolderWithFilename(images / "train", image_transform(16))
    image, label, name = dataset[5]
    assert (label, name) == (1, "class1/1.png") and image.shape == (3, 16, 16)
    assert -1 <= image.min() < image.max() <= 1
    grey = dataset[0][0]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


def test_pixels_run_from_minus_one_to_one():
    image = Image.fromarray(np.array([[[0, 127, 255]]], dtype=np.uint8))
    assert torch.allclose(to_pixels(image).flatten(), torch.tensor([-1.0, 127 / 127.5 - 1, 1.0]))
    every = torch.arange(256).float() / 127.5 - 1
    assert torch.equal(to_uint8(every), torch.arange(256, dtype=torch.uint8))
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_mirrors_only_where_asked(images):
    plain = ImageFolder(images / "train", image_transform(16))
    mirrored = ImageFolder(images / "train", image_transform(16), mirror=True)
    image = plain[1][0]
    views = [mirrored[1][0] for _ in range(40)]
    same = sum(torch.equal(view, image) for view in views)
    assert (
        all(torch.equal(view, image) or torch.equal(view, image.flip(2)) for view in views)
        and 8 < same < 32
    )


def test_missing_folders_and_unreadable_images_are_named(tmp_path):
    for make in (ImageFolder, CachedFolder):
        with pytest.raises(UserError, match="nowhere"):
            make(tmp_path / "nowhere")
        with pytest.raises(UserError, match=str(tmp_path)):
            make(tmp_path)
    data = write_images(tmp_path / "data")
    (data / "train" / "class2" / "bad.png").write_bytes(b"no image")
    dataset = ImageFolder(data / "train")
    with pytest.raises(UserError, match=r"class2/bad\.png"):
        [dataset[i] for i in range(len(dataset))]
    with pytest.raises(UserError, match="4 classes, but class_num is 5: pass --class_num 4"):
        check_classes(dataset.classes, 5, data)
    with pytest.raises(
        UserError, match="1 class, but class_num is 4: put its images into the fold"
    ):
        check_classes(["images"], 4, data, trained=dataset.classes, held_out=True)


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
    colours = Image.fromarray(
        np.stack([ramp(255, np.uint8), ramp(255, np.uint8).T, ramp(255, np.uint8)], axis=-1)
    )
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


@pytest.mark.parametrize(
    "high, name, factor", [(255, "a.tif", 1), (65535, "a.tif", 257), (255, "a.png", 257)]
)
def test_integers_up_to_255_are_bytes_unless_the_file_says_16_bits(tmp_path, high, name, factor):
    values = ramp(high, np.uint16 if name == "a.png" else np.int32)
    Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(
        np.asarray(read_image(tmp_path / name))[..., 1], np.round(values / factor)
    )


def test_other_modes_and_orders_of_bytes(tmp_path):
    gray = ramp(65535, np.uint16)
    Image.fromarray(gray.astype(">u2")).save(tmp_path / "big.tif")
    (tmp_path / "gray.pgm").write_bytes(
        b"P5 64 64 65535\n" + ramp(200, np.uint16).astype(">u2").tobytes()
    )
    assert np.array_equal(
        np.asarray(read_image(tmp_path / "big.tif"))[..., 0], np.round(gray / 257)
    )
    assert np.asarray(read_image(tmp_path / "gray.pgm")).max() == 1  # 200 of 65535
    color = Image.new("RGB", (4, 4), (200, 100, 50))
    lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    for image in (
        color.convert("YCbCr"),
        color.convert("HSV"),
        ImageCms.applyTransform(color, lab),
    ):
        assert np.abs(np.asarray(read_image(image), dtype=int) - [200, 100, 50]).max() <= 2, (
            image.mode
        )


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.tif", "a.apng", "a.mpo"])
def test_of_several_frames_the_first_counts(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 0, 250), (0, 250, 0))]
    kind = {"a.apng": "PNG", "a.mpo": "MPO"}.get(name)
    frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(read_image(tmp_path / name), dtype=int) - [250, 0, 0]).max() < 4


def transparent_images() -> dict[str, Image.Image]:
    """Images of two pixels, of which the first is opaque and gray, the second black and transparent."""
    rgba = Image.new("RGBA", (2, 1), (90, 90, 90, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    palette = Image.new("P", (2, 1))
    palette.putpalette([90, 90, 90, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    by_palette = palette.copy()
    by_palette.putpalette([90, 90, 90, 255, 0, 0, 0, 0], "RGBA")
    wide = Image.fromarray(np.array([[90 * 257, 7]], dtype=np.uint16))
    keyed = {
        "rgb": rgba.convert("RGB"),
        "l": rgba.convert("L"),
        "p": palette,
        "pa": palette.copy(),
        "i16": wide,
    }
    keys = {"rgb": (0, 0, 0), "l": 0, "p": 1, "pa": bytes([255, 0]), "i16": 7}
    for name, image in keyed.items():
        image.info["transparency"] = keys[name]
    modes = {mode: rgba.convert(mode) for mode in ("RGBA", "RGBa", "LA")}
    return {**modes, **keyed, "La": modes["LA"].convert("La"), "palette": by_palette}


@pytest.mark.parametrize("name, image", transparent_images().items())
@pytest.mark.parametrize("ending", ["png", ""])
def test_transparent_images_lie_over_white(tmp_path, name, image, ending):
    file = image
    if ending:
        if name in ("RGBa", "La"):
            pytest.skip("no PNG")
        file = tmp_path / f"{name}.png"
        image.save(file, **{k: v for k, v in image.info.items() if k == "transparency"})
    assert np.asarray(read_image(file)).tolist() == [[[90] * 3, [255] * 3]]


def test_half_transparent_pixels_are_mixed_with_white():
    assert read_image(Image.new("RGBA", (1, 1), (0, 100, 255, 51))).getpixel((0, 0)) == (
        204,
        224,
        255,
    )


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_damaged_exif_data_do_not_damage_pixels(tmp_path, kind):
    image = Image.fromarray(np.tile(ramp(255, np.uint8)[..., None], 3))
    image.save(tmp_path / f"plain.{kind}")
    for number, exif in enumerate((b"garbage", b"Exif\0\0garbage", b"MM\0*\xff\xff\xff\xff")):
        image.save(tmp_path / f"{number}.{kind}", exif=exif)
        read, plain = (
            np.asarray(read_image(tmp_path / f"{name}.{kind}")) for name in (number, "plain")
        )
        assert np.array_equal(read, plain)


def test_what_is_no_image_is_told(tmp_path):
    contents = {
        "a.jpg": b"",
        "b.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "c.jpg": b"\xff\xd8\xff text",
    }
    says = {
        "a.jpg": r"\(it is empty\)",
        "b.jpg": r"\(it is HEIC, .*pillow-heif",
        "c.jpg": r"\(it is no image\)",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        for file in (tmp_path / name, io.BytesIO(content)):
            with pytest.raises(
                UserError, match=rf"cannot read image {tmp_path}/{name} {says[name]}"
            ):
                read_image(file, str(tmp_path / name))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_photographs_stand_upright(tmp_path, orientation):
    upright = Image.new("RGB", (40, 20))
    upright.paste((255, 255, 255), (0, 0, 10, 5))
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # Pillow's transpositions that a camera would have made
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    stored.save(tmp_path / "photo.tif", exif=exif)
    for name in ("photo.png", "photo.tif"):
        assert np.array_equal(np.asarray(read_image(tmp_path / name)), np.asarray(upright))


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


# --------------------------------------------------------------------------------------------------------------------
# Cached folders.


def write_cache(root, count=3, **arrays):
    for number in range(count):
        path = root / "a" / f"{number}.JPEG.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        moments = np.full((4, 2, 2), number, dtype=np.float32)
        np.savez(path, **{"moments": moments, "moments_flip": moments + 100, **arrays})
    return root


def test_cached_folder_picks_either_view(tmp_path):
    dataset = CachedFolder(write_cache(tmp_path))
    assert len(dataset) == 3 and dataset.classes == ["a"] and dataset.metadata == {}
    values = [dataset[2][0].unique().item() for _ in range(60)]
    assert set(values) == {2, 102} and 15 < values.count(2) < 45
    assert dataset[2][0].dtype == torch.float32 and dataset[2][1] == 0
    never = CachedFolder(tmp_path, mirror=False)
    assert {never[1][0].unique().item() for _ in range(30)} == {1}


def test_files_of_other_programs_are_no_moments(tmp_path):
    write_cache(tmp_path)
    shutil.copytree(tmp_path / "a", tmp_path / ".ipynb_checkpoints")
    shutil.copytree(tmp_path / "a", tmp_path / "a" / "@eaDir")
    (tmp_path / "a" / "._0.JPEG.npz").touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    cache = CachedFolder(tmp_path)
    assert cache.classes == ["a"] and [cache.name(index) for index in range(len(cache))] == [
        f"a/{number}.JPEG" for number in range(3)
    ]


def test_damaged_caches_are_named(tmp_path):
    dataset = CachedFolder(write_cache(tmp_path, moments_flip=np.full((4, 2, 2), np.nan)))
    with pytest.raises(UserError, match=r"0\.JPEG\.npz \(moments_flip is not finite"):
        [dataset[0] for _ in range(40)]
    path = tmp_path / "a" / "1.JPEG.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"1\.JPEG\.npz"):
        dataset[1]
    np.savez(tmp_path / "a" / "2.JPEG.npz", other=np.zeros(1))
    with pytest.raises(UserError, match=r"2\.JPEG\.npz"):
        dataset[2]
    (tmp_path / "cache.json").write_text('{"images": 9}')
    with pytest.raises(UserError, match="incomplete: 3 of 9"):
        CachedFolder(tmp_path)
    (tmp_path / "cache.json").write_text('{"images": 3, "complete": false}')
    with pytest.raises(UserError, match="incomplete: 3 of 3"):
        CachedFolder(tmp_path)
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(UserError, match=r"cache\.json is damaged"):
        CachedFolder(tmp_path)


def test_coins_follow_seed_epoch_and_index_once_told(tmp_path):
    dataset = CachedFolder(write_cache(tmp_path, count=40))

    def views(seed, epoch):
        dataset.set_draws(seed, epoch)
        return [dataset[i][0].unique().item() >= 100 for i in range(40)]

    assert views(1, 0) == views(1, 0) and 10 < sum(views(1, 0)) < 30
    assert views(1, 0) != views(1, 1) and views(1, 0) != views(2, 0)


def test_moments_of_another_shape_are_named(refused, cached, tmp_path):
    shape = (16, 2, 2)
    np.savez(
        cached / "class2" / "0.png.npz",
        **{n: np.zeros(shape, np.float32) for n in ("moments", "moments_flip")},
    )
    line = refused(
        "main_tokenbridge",
        f"{TINY} --use_cached --cached_path {cached} --output_dir {tmp_path}/run",
    )
    assert "class2/0.png.npz" in line and "[16, 2, 2]" in line


def test_metadata_of_no_tokenizer_is_named(refused, cached, tmp_path):
    metadata = json.loads((cached / "cache.json").read_text())
    (cached / "cache.json").write_text(json.dumps({**metadata, "vae": {"embed_dim": "many"}}))
    line = refused(
        "main_tokenbridge",
        f"{TINY} --use_cached --cached_path {cached} --output_dir {tmp_path}/run",
    )
    assert "does not describe a tokenizer" in line and str(cached) in line


# --------------------------------------------------------------------------------------------------------------------
# Samplers and loaders.


def test_a_share_of_an_epoch_can_start_in_its_middle():
    shares = [ShuffledRankSampler(range(20), 2, rank, shuffle=True, seed=3) for rank in range(2)]
    for share in shares:
        share.set_epoch(5)
    whole = [list(share) for share in shares]
    assert sorted(whole[0] + whole[1]) == list(range(20))
    shares[0].start = 4
    assert list(shares[0]) == whole[0][4:] and len(shares[0]) == 10


@pytest.mark.parametrize("processes, batch, accum", [(2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize("start", [0, 1], ids=["from the start", "resumed"])
def test_a_steps_images_depend_on_the_whole_batch_alone(
    monkeypatch, tmp_path, processes, batch, accum, start
):
    cache = CachedFolder(
        write_cache(tmp_path, count=31)
    )  # three steps of 8, and all but one image of a fourth

    def steps(processes: int, batch: int, accum: int) -> list[list[float]]:
        """The values of each step's items, which tell image and view."""
        images: list[list[float]] = []
        monkeypatch.setattr(distributed, "get_world_size", lambda: processes)
        for rank in range(processes):
            monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
            args = argparse.Namespace(
                batch_size=batch, accum_iter=accum, seed=1, num_workers=0, pin_mem=False
            )
            batches = training_loader(cache, torch.device("cpu"), args)
            count = len(batches) // accum
            batches.sampler.set_epoch(2)
            batches.sampler.start = start * batch * accum
            cache.set_draws(1, 2)
            values = torch.cat([moments[:, 0, 0, 0] for moments, _ in batches])
            values = values[: (count - start) * batch * accum].view(count - start, -1)
            images = [
                step + more
                for step, more in zip(images or [[]] * len(values), values.tolist(), strict=True)
            ]
        return [sorted(step) for step in images]

    alone = steps(1, 8, 1)
    assert len(alone) == 3 - start and steps(processes, batch, accum) == alone
    assert {value >= 100 for step in alone for value in step} == {
        True,
        False,
    }  # mirror images among them


def test_shares_cover_everything_once():
    shares = [list(RankSampler(11, rank, 3)) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == list(range(11)) and [
        len(RankSampler(11, rank, 3)) for rank in range(3)
    ] == [4, 4, 3]


def test_a_process_that_ends_amid_its_batches_ends_its_workers(tmp_path):
    (tmp_path / "ends.py").write_text(
        "import argparse, torch; from util.data.loaders import make_loader\n"
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


# --------------------------------------------------------------------------------------------------------------------
# Skipping.


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_left_out_counted_and_listed(
    run, images, vae_path, tmp_path, caplog, workers
):
    for name in ("class0/3", "class3/1"):
        damaged(images / "train" / f"{name}.png")
    tiny = TINY.replace("--num_workers 0", f"--num_workers {workers}")
    skip = f"--vae_path {vae_path} --data_path {images} --skip_bad_images"
    run(
        "main_cache",
        f"--img_size 16 --num_workers {workers} {skip} --cached_path {tmp_path}/cache --batch_size 2",
    )
    assert "2 images cannot be read" in caplog.text
    cache = CachedFolder(tmp_path / "cache")
    assert len(cache) == cache.metadata["images"] == 14

    caplog.clear()
    run("main_tokenbridge", f"{tiny} {skip} --epochs 2 --lr 1e-3 --output_dir {tmp_path}/run")
    assert caplog.text.count("2 images cannot be read") == 2  # once an epoch, each image once
    listed = (tmp_path / "run" / "bad_images-rank0.txt").read_text()
    assert (
        listed.count("class0/3.png") == listed.count("class3/1.png") == 1
    )  # however often they are met
    assert (tmp_path / "run" / "checkpoint-last.pth").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_damaged_moments_are_left_out_counted_and_listed(
    run, refused, cached, tmp_path, caplog, packed
):
    if packed:
        run("tools.pack", f"--cached_path {cached} --output_dir {tmp_path}/packed --num_workers 0")
        np.lib.format.open_memmap(tmp_path / "packed" / "shard-00000.npy", mode="r+")[[0, 13]] += 1
    for name in ("class0/0", "class3/1"):
        damaged(cached / f"{name}.png.npz")
    tiny = TINY.replace("--num_workers 0", "--num_workers 1")
    command = f"{tiny} --use_cached --cached_path {tmp_path}/{'packed' if packed else 'cache'} --epochs 2 --lr 1e-3"
    line = refused("main_tokenbridge", f"{command} --output_dir {tmp_path}/run")
    assert "class0/0.png" in line and line.endswith("or skip such images with --skip_bad_images")
    assert ("pack the cache again" if packed else "regenerate them with main_cache.py") in line

    caplog.clear()
    run("main_tokenbridge", f"{command} --output_dir {tmp_path}/run --skip_bad_images")
    assert caplog.text.count("2 images cannot be read") == 2  # once an epoch, each image once
    listed = (tmp_path / "run" / "bad_images-rank0.txt").read_text()
    assert "class0/0.png" in listed and "class3/1.png" in listed
    assert (tmp_path / "run" / "checkpoint-last.pth").exists()


def test_the_next_image_takes_a_bad_ones_place(images, tmp_path):
    damaged(images / "train" / "class3" / "3.png")
    data = ImageFolder(images / "train", image_transform(16), bad_images=BadImages(tmp_path))
    assert torch.equal(data[15][0], data[0][0]) and data[15][1] == 0
    cache = CachedFolder(write_cache(tmp_path / "cache"), mirror=False)
    damaged(tmp_path / "cache" / "a" / "1.JPEG.npz")
    cache.bad_images = data.bad_images
    assert torch.equal(cache[1][0], cache[2][0])
    assert len(list(cache)) == 3 and len(list(data)) == 16
    for path in (images / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the images"):
        data[0]


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="any SIGTERM ends a worker here")
def test_a_signal_to_a_worker_that_is_starting_does_not_end_it(monkeypatch):
    def start_slowly(worker):
        time.sleep(0.3)
        leave_signals(worker)

    leave_signals = loaders.leave_signals_to_parent
    monkeypatch.setattr(loaders, "leave_signals_to_parent", start_slowly)
    batches = iter(loaders.WorkerLoader(range(4), batch_size=2, num_workers=1))
    # Not from this process: a worker ends with its parent
    subprocess.run(["kill", str(batches._workers[0].pid)], check=True)
    assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3]]
