"""What main_cache.py does with its flags, with names and damage, with interruptions, and in two processes."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from models.vae import AutoencoderKL
from tests.conftest import TINY, damaged, write_images
from tests.rows import in_rows, write_rows
from tests.scripts.conftest import Watched
from util.checkpoint.vae_files import save_vae
from util.data.caches import VIEWS, CachedFolder
from util.data.datasets import image_transform
from util.data.sources import read_image
from util.files import read_arrays


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
    with pytest.raises(SystemExit):
        run("main_cache", f"{command} --num_workers 0")
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 6
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["complete"] is False
    train = f"{TINY} --epochs 1 --output_dir {tmp_path}/x --use_cached"
    line = refused("main_tokenbridge", f"{train} --cached_path {tmp_path}/cache")
    assert "incomplete: 6 of 16 files" in line
    watched.calls.clear()
    monkeypatch.setattr(
        AutoencoderKL, "encode", lambda vae, x: encode(vae, watched.note(vae, x)["x"])
    )
    run("main_cache", f"{command} --num_workers 0")
    assert sum(map(len, watched.all("x"))) == 2 * 10 and len(CachedFolder(tmp_path / "cache")) == 16


def test_a_cache_whose_files_are_all_there_but_was_not_finished_is_refused(
    refused, cached, tmp_path
):
    about = json.loads((cached / "cache.json").read_text())
    assert about["complete"] is True
    (cached / "cache.json").write_text(json.dumps({**about, "complete": False}))
    train = f"{TINY} --epochs 1 --output_dir {tmp_path}/x --use_cached"
    line = refused("main_tokenbridge", f"{train} --cached_path {cached}")
    assert "is incomplete" in line


def test_precision_and_split_are_those_asked_for(run, images, vae_path, tmp_path, monkeypatch):
    watched, encode = Watched(AutoencoderKL.encode), AutoencoderKL.encode
    monkeypatch.setattr(
        AutoencoderKL, "encode", lambda vae, x: encode(vae, watched.note(vae, x)["x"])
    )
    write_images(tmp_path / "other", each=1)
    (tmp_path / "other" / "train").rename(images / "val")
    command = (
        f"--img_size 16 --vae_path {vae_path} --data_path {images} --num_workers 0 --split val"
    )
    run("main_cache", f"{command} --precision fp16 --cached_path {tmp_path}/fp16")
    run("main_cache", f"{command} --cached_path {tmp_path}/fp32")
    assert watched.all("autocast") == 2 * [torch.float16] + 2 * [torch.float32]
    low, high = (
        CachedFolder(tmp_path / "fp16", mirror=False),
        CachedFolder(tmp_path / "fp32", mirror=False),
    )
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
    assert (
        said.count("cached 15 images") == 1
        and "13 were already cached, 0 are new, 2 replaced" in said
    )
    about = json.loads((cached / "cache.json").read_text())
    assert (about["images"], about["complete"]) == (15, True) and not list(cached.rglob("*.part"))
    assert len(CachedFolder(cached)) == 15


@pytest.mark.parametrize("made_by", ["main_cache", "tools.pack"])
def test_a_cache_is_flushed_at_once_and_then_called_complete(
    run, cached, images, vae_path, tmp_path, monkeypatch, made_by
):
    folder, flushed = tmp_path / "new", []
    command = f"--img_size 16 --vae_path {vae_path} --data_path {images} --cached_path {folder} --num_workers 0"
    if made_by == "tools.pack":
        run("tools.pack", f"--cached_path {cached} --output_dir {tmp_path}/packed --num_workers 0")
        command = f"--unpack --cached_path {tmp_path}/packed --output_dir {folder} --num_workers 0"
    monkeypatch.setattr(
        os, "fsync", lambda file: flushed.append(json.loads(os.pread(file, 9999, 0))["complete"])
    )
    monkeypatch.setattr(os, "sync", lambda: flushed.append(len(list(folder.rglob("*.npz")))))
    run(made_by, command)
    assert flushed == [False, 16, True]


# --------------------------------------------------------------------------------------------------------------------
# What a cache holds.


@torch.no_grad()
def test_the_cache_holds_both_views_of_every_image(images, vae_path, cached):
    names = sorted(str(path.relative_to(cached)) for path in cached.rglob("*.npz"))
    assert names == sorted(f"class{c}/{i}.png.npz" for c in range(4) for i in range(4))
    vae, factor = AutoencoderKL.from_pretrained(vae_path)

    image = image_transform(16)(read_image(str(images / "train" / "class2" / "3.png")))
    with np.load(cached / "class2" / "3.png.npz") as arrays:
        for name, view in {"moments": image, "moments_flip": image.flip(2)}.items():
            assert arrays[name].dtype == np.float32 and arrays[name].shape == (16, 4, 4)
            assert np.allclose(arrays[name], vae.encode(view[None]).parameters[0], atol=1e-4)
    about = json.loads((cached / "cache.json").read_text())
    assert (about["images"], about["img_size"], about["latent_factor"]) == (16, 16, factor)


def test_the_cache_of_a_split_is_of_its_images(run, refused, images, vae_path, tmp_path):
    (images / "train").rename(images / "val")
    cache = f"--img_size 16 --vae_path {vae_path} --data_path {images} --num_workers 0 --device cpu"
    assert "train" in refused("main_cache", f"{cache} --cached_path {tmp_path}/train")
    run("main_cache", f"{cache} --cached_path {tmp_path}/val --split val")
    assert len(list((tmp_path / "val").glob("*/*.npz"))) == 16


# --------------------------------------------------------------------------------------------------------------------
# Names.


@pytest.mark.parametrize(
    "name", ["a b.png", "ümläut.png", "#%[x]'.png", "-dash.png", "new\nline.png"]
)
def test_names_are_only_names(run, images, vae_path, tmp_path, name):
    (images / "train" / "class0" / "0.png").rename(images / "train" / "class0" / name)
    (images / "train" / "class1").rename(images / "train" / "class 1")
    (images / "train" / "class2").rename(tmp_path / "elsewhere")
    (images / "train" / "class2").symlink_to(tmp_path / "elsewhere")
    cache = f"{tmp_path}/cache"
    run(
        "main_cache",
        f"--img_size 16 --vae_path {vae_path} --data_path {images} --cached_path {cache} --num_workers 0",
    )
    assert len(CachedFolder(cache)) == 16
    assert (tmp_path / "cache" / "class0" / f"{name}.npz").exists()
    assert (tmp_path / "cache" / "class2").is_dir() and not list(
        (tmp_path / "elsewhere").glob("*.npz")
    )


def test_names_that_are_not_utf8(run, images, vae_path, tmp_path):
    folder = images / "train" / "class0"
    damaged(folder / "1.png")
    for name, other in (("0.png", b"\xff.png"), ("1.png", b"\xfe.png")):
        os.rename(folder / name, os.fsencode(folder) + b"/" + other)
    cache = f"--cached_path {tmp_path}/cache --num_workers 0 --skip_bad_images"
    run("main_cache", f"--img_size 16 --vae_path {vae_path} --data_path {images} {cache}")
    assert len(CachedFolder(tmp_path / "cache")) == 15
    assert b"\xfe.png" in (tmp_path / "cache" / "bad_images-rank0.txt").read_bytes()


# --------------------------------------------------------------------------------------------------------------------
# Made in several goes.


def test_caching_again_makes_only_what_is_missing_or_damaged(
    run, images, cached, vae_path, tmp_path, caplog
):
    command = f"--img_size 16 --vae_path {vae_path} --data_path {images} --cached_path {cached} --num_workers 0"
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in cached.rglob("*.npz")}
    (cached / "class0" / "1.png.npz").unlink()
    damaged(cached / "class1" / "2.png.npz")
    np.savez(
        cached / "class2" / "0.png.npz",
        **{n: np.zeros((16, 2, 2), np.float32) for n in ("moments", "moments_flip")},
    )
    (cached / "class3" / ".3.png.npz.123.part").write_bytes(b"left by a killed process")
    caplog.set_level("INFO")
    run("main_cache", command)
    assert "13 were already cached, 1 are new, 2 replaced" in caplog.text
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
    assert "img_size is 16 in the cache, 32 in this run" in refused(
        "main_cache", f"{command} --img_size 32"
    )
    assert "precision is fp32 in the cache, bf16 in this run" in refused(
        "main_cache", f"{command} --img_size 16 --precision bf16"
    )
    (images / "val").symlink_to(images / "train")
    assert "split is train in the cache, val in this run" in refused(
        "main_cache", f"{command} --img_size 16 --split val"
    )
    torch.manual_seed(5)
    save_vae(vae_path, AutoencoderKL(8, (1, 1, 2), ch=8, num_res_blocks=1), 0.5)
    assert "vae_sha256" in refused("main_cache", f"{command} --img_size 16")
    (cached / "packed.json").write_text("{}")
    assert "holds a packed cache" in refused("main_cache", f"{command} --img_size 16")
    (cached / "packed.json").unlink()
    (cached / "cache.json").unlink()
    assert "without cache.json" in refused("main_cache", f"{command} --img_size 16")


def test_moments_of_images_that_are_gone_are_named_and_nothing_is_encoded(
    refused, images, cached, vae_path, monkeypatch
):
    monkeypatch.setattr(AutoencoderKL, "encode", None)
    (images / "val").mkdir()
    (images / "train" / "class1").rename(images / "val" / "class1")
    (cached / "class2" / "3.png.npz").unlink()  # the cache is a partial one
    command = f"--img_size 16 --vae_path {vae_path} --data_path {images} --cached_path {cached} --num_workers 0"
    line = refused("main_cache", command)
    assert "4 files of images that are not in" in line and "class1/0.png.npz" in line


@pytest.mark.parametrize("kind", ["folder", "rows"])
@pytest.mark.parametrize("workers", [0, 2])
def test_moments_follow_the_images_of_their_names(
    run, images, vae_path, tmp_path, monkeypatch, caplog, kind, workers
):
    path, image = (
        tmp_path / "rows" if kind == "rows" else images,
        images / "train" / "class1" / "1.png",
    )
    command = (
        f"--img_size 16 --vae_path {vae_path} --data_path {path} --cached_path {tmp_path}/cache"
    )
    command += f" --num_workers {workers} --batch_size 3"
    caplog.set_level("INFO")
    for replaced in (False, True):
        if replaced:
            shutil.copy(images / "train" / "class2" / "3.png", image)
        if kind == "rows":
            write_rows(path, in_rows(images / "train"))
        run("main_cache", command)
    assert "15 were already cached, 0 are new, 1 replaced" in caplog.text
    names = ("1.png", "3.png") if kind == "folder" else ("train-00000005", "train-00000011")
    files = [
        tmp_path / "cache" / f"class{label}" / f"{name}.npz"
        for label, name in zip((1, 2), names, strict=True)
    ]
    new, same = (read_arrays(file, *VIEWS) for file in files)
    assert all(np.allclose(new[view], same[view], atol=1e-5) for view in VIEWS)
    # What is there is not decoded again.
    monkeypatch.setattr("util.data.sources.read_image", None)
    run("main_cache", command)
    assert "16 were already cached, 0 are new, 0 replaced" in caplog.text


def test_moments_without_a_hash_are_kept_with_one_warning(run, images, cached, vae_path, caplog):
    old = sorted(cached.rglob("*.npz"))[:3]
    for path in old:
        np.savez(path, **read_arrays(path, *VIEWS))
    before = {path: path.read_bytes() for path in cached.rglob("*.npz")}
    shutil.copy(images / "train" / "class2" / "3.png", images / "train" / "class0" / "0.png")
    command = f"--img_size 16 --vae_path {vae_path} --data_path {images} --cached_path {cached} --num_workers 2"
    run("main_cache", command)
    (line,) = [each.message for each in caplog.records if "could not be compared" in each.message]
    assert line.startswith("3 of them could not be compared") and "delete the files" in line
    assert {path: path.read_bytes() for path in cached.rglob("*.npz")} == before
    assert len(CachedFolder(cached)) == 16


def test_an_image_replaced_by_a_damaged_one_leaves_no_moments(run, images, cached, vae_path):
    (images / "train" / "class1" / "1.png").write_bytes(b"no image")
    command = f"--img_size 16 --vae_path {vae_path} --data_path {images} --cached_path {cached} --num_workers 0"
    run("main_cache", f"{command} --skip_bad_images")
    assert not (cached / "class1" / "1.png.npz").exists() and len(CachedFolder(cached)) == 15


@pytest.mark.parametrize("character", ["x", "ä"])
def test_long_names_are_cached_or_refused_in_one_line(
    run, refused, images, vae_path, tmp_path, character
):
    folder, size = images / "train" / "class0", len(character.encode())
    name = character * ((251 - len(".png")) // size) + ".png"
    (folder / "0.png").rename(folder / name)
    command = f"--img_size 16 --vae_path {vae_path} --data_path {images} --cached_path {tmp_path}/cache --num_workers 0"
    run("main_cache", command)
    assert (tmp_path / "cache" / "class0" / f"{name}.npz").exists() and len(
        CachedFolder(tmp_path / "cache")
    ) == 16
    (folder / name).rename(folder / f"xx{name}")
    line = refused("main_cache", command.replace("/cache", "/other"))
    assert "is longer than the 255 bytes" in line and "rename the image" in line
    assert not list((tmp_path / "other").rglob("*.npz"))
