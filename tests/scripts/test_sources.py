"""Scripts on every source of images, as typed: the same caches, trainings, statistics and reconstructions."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import damaged, load, write_images
from tests.rows import every_source, in_rows, own_cache, write_bare, write_rows  # noqa: F401
from tests.scripts.conftest import BASE
from util.data.caches import CachedFolder
from util.data.packed import PackedCache
from util.signals import StopSignals


@pytest.fixture
def rows(images, tmp_path):
    """The images as a data set, whose order is not that of their classes."""
    return write_rows(
        tmp_path / "rows", in_rows(images / "train", ["dog", "cat", "bee", "ant"]).shuffle(seed=1)
    )


def moments(cache: CachedFolder | PackedCache) -> list[tuple[bytes, int]]:
    """Both views of each image and its label."""
    views = [
        torch.stack([cache.view(index, which) for which in (0, 1)]) for index in range(len(cache))
    ]
    return [
        (view.numpy().tobytes(), label)
        for view, (_, label) in zip(views, cache.samples, strict=True)
    ]


def test_caches_of_every_source_hold_the_same_moments(
    run, images, vae_path, cached, tmp_path, served, monkeypatch
):
    expected = moments(CachedFolder(cached))
    command = f"--img_size 16 --vae_path {vae_path} --num_workers 0 --batch_size 3 --device cpu"
    for name, path in every_source(images, tmp_path, served, monkeypatch).items():
        folder = tmp_path / name.replace(" ", "_")
        run("main_cache", f"{command} --data_path {path} --cached_path {folder}")
        assert moments(CachedFolder(folder)) == expected, name
    assert (tmp_path / "Hub" / "class2" / "train-00000009.npz").exists()


def test_caches_of_rows_have_the_labels_of_the_rows_packed_or_not(
    run, run_two, rows, vae_path, tmp_path
):
    table = datasets.load_dataset(str(rows), split="train")
    cache = f"--img_size 16 --vae_path {vae_path} --num_workers 0 --data_path {rows} --cached_path {tmp_path}/cache"
    run_two("main_cache", cache)
    run(
        "tools.pack",
        f"--cached_path {tmp_path}/cache --output_dir {tmp_path}/packed --num_workers 0",
    )
    found = CachedFolder(tmp_path / "cache")
    assert (
        found.classes
        == ["0 dog", "1 cat", "2 bee", "3 ant"]
        == PackedCache(tmp_path / "packed").classes
    )
    by_row = {int(found.name(index)[-8:]): label for index, (_, label) in enumerate(found.samples)}
    assert [by_row[row] for row in range(16)] == table["label"][:]
    assert moments(found) == moments(PackedCache(tmp_path / "packed"))


# --------------------------------------------------------------------------------------------------------------------
# Training.


def test_training_on_rows_is_that_on_the_folder_whatever_the_processes(
    run, run_two, images, vae_path, tmp_path
):
    rows = write_rows(tmp_path / "rows", in_rows(images / "train"))
    common = f"{BASE} --epochs 1 --vae_path {vae_path}"
    runs = []
    for name, path, start in (("folder", images, run), ("rows", rows, run), ("two", rows, run_two)):
        batch = "--batch_size 2" if start is run_two else ""
        start(
            "main_tokenbridge",
            f"{common} --data_path {path} --output_dir {tmp_path}/{name} {batch}",
        )
        runs.append(load(tmp_path / name))
    assert all(
        torch.equal(value, runs[1]["model"][name]) for name, value in runs[0]["model"].items()
    )
    assert all(run["config"]["class_names"] == [f"class{i}" for i in range(4)] for run in runs)
    assert runs[1]["config"] == runs[2]["config"]


def test_training_on_rows_resumes_in_the_middle_of_an_epoch(
    run, trace, rows, vae_path, tmp_path, monkeypatch
):
    common = (
        f"{BASE} --epochs 2 --vae_path {vae_path} --data_path {rows} --save_every_steps 1".replace(
            "--num_workers 0", "--num_workers 1"
        )
    )
    run("main_tokenbridge", f"{common} --output_dir {tmp_path}/whole")
    whole = [drawn["moments"] for drawn in trace.drawn]
    trace.drawn.clear()
    agreed, calls = StopSignals.agreed, []
    monkeypatch.setattr(StopSignals, "agreed", lambda signals: calls.append(1) or len(calls) == 6)
    with pytest.raises(SystemExit) as stop:
        run("main_tokenbridge", f"{common} --output_dir {tmp_path}/parts --resume {tmp_path}/parts")
    assert stop.value.code == 75 and load(tmp_path / "parts")["step"] == 2
    monkeypatch.setattr(StopSignals, "agreed", agreed)
    run("main_tokenbridge", f"{common} --output_dir {tmp_path}/parts --resume {tmp_path}/parts")
    assert (
        all(map(torch.equal, whole, [drawn["moments"] for drawn in trace.drawn]))
        and len(whole) == 8
    )
    parts, unbroken = (load(tmp_path / name)["model"] for name in ("parts", "whole"))
    assert all(torch.equal(value, unbroken[name]) for name, value in parts.items())


@pytest.mark.parametrize("kind", ["flat", "classes", "rows", "cache", "packed"])
def test_one_class_takes_every_image_whatever_its_own(
    run, images, vae_path, cached, tmp_path, trace, kind
):
    rows = write_rows(
        tmp_path / "rows", in_rows(images / "train", "abcde")
    )  # there is no image of class e
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (images / "train").rglob("*.png"):
        path.rename(flat / f"{path.parent.name}-{path.name}") if kind == "flat" else None
    if kind == "packed":
        run("tools.pack", f"--cached_path {cached} --output_dir {tmp_path}/packed --num_workers 0")
    source = {
        "flat": flat,
        "classes": images,
        "rows": rows,
        "cache": cached,
        "packed": tmp_path / "packed",
    }[kind]
    flag = (
        f"--use_cached --cached_path {source}"
        if kind in ("cache", "packed")
        else f"--data_path {source}"
    )
    one = BASE.replace("--class_num 4", "--class_num 1")
    run(
        "main_tokenbridge",
        f"{one} --epochs 1 --vae_path {vae_path} {flag} --output_dir {tmp_path}/run",
    )
    content = load(tmp_path / "run")
    assert content["config"]["class_names"] == ["images"] and content["config"]["class_num"] == 1
    assert sum(len(drawn["moments"]) for drawn in trace.drawn) == 16


def test_a_tokenizer_is_the_same_from_rows_and_folder(run, images, tmp_path):
    rows = write_rows(tmp_path / "rows", in_rows(images / "train"))
    small = "--img_size 16 --ch 8 --ch_mult 1 2 --num_res_blocks 1 --vae_embed_dim 4 --epochs 1 --batch_size 4"
    for name, path in (("a", images), ("b", rows)):
        run(
            "main_vae",
            f"{small} --num_workers 0 --device cpu --data_path {path} --output_dir {tmp_path}/{name}",
        )
    a, b = (torch.load(tmp_path / name / "vae.ckpt", weights_only=True) for name in ("a", "b"))
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())


# --------------------------------------------------------------------------------------------------------------------
# Measuring.


def test_statistics_of_every_source_are_equal(
    run, images, tmp_path, served, monkeypatch, quick_inception
):
    found = []
    for number, path in enumerate(every_source(images, tmp_path, served, monkeypatch).values()):
        flags = f"--images {path} --save_stats {tmp_path}/{number}.npz {quick_inception.flag} --img_size 16"
        run("main_metrics", f"{flags} --num_workers 0 --device cpu")
        with np.load(tmp_path / f"{number}.npz") as stats:
            found.append({name: stats[name] for name in stats})
    assert found[0]["mu"][:3].all()
    assert all(
        np.array_equal(stats[name], found[0][name]) for stats in found for name in ("mu", "sigma")
    )


def test_reconstructed_are_the_first_rows_of_each_class(run, rows, vae_path, tmp_path):
    flags = f"--image_dir {rows} --vae_path {vae_path} --img_size 16 --images_per_class 2 --no_metrics --bits 4"
    run("reconstruction", f"{flags} --num_workers 0 --device cpu --output_dir {tmp_path}/out")
    (folder,) = (tmp_path / "out").iterdir()
    assert json.loads((folder / "results.json").read_text())["images"] == 8
    table = datasets.load_dataset(str(rows), split="train")
    labels = table["label"][:]
    first = [row for row, label in enumerate(labels) if labels[:row].count(label) < 2]
    for number, row in enumerate(first):
        real = np.asarray(Image.open(folder / "real" / f"{number:05d}.png"), dtype=float)
        assert (
            abs(real.mean() - np.asarray(table[row]["image"].convert("RGB"), dtype=float).mean())
            < 12
        )


def test_every_command_finds_the_same_images_and_reports_them_once(
    run, images, vae_path, tmp_path, quick_inception, caplog
):
    (images / "train").rename(images / "Train")
    shutil.copytree(images / "Train", images / "valid")
    for folder in (".ipynb_checkpoints", "__MACOSX", "class1/@eaDir"):
        shutil.copytree(images / "Train" / "class0", images / "Train" / folder)
    (images / "Train" / "class2" / "up").symlink_to(images)
    (images / "Train" / "class2" / "notes.txt").touch()
    with Image.open(images / "Train" / "class3" / "0.png") as image:
        image.convert("RGB").save(images / "Train" / "class3" / "4.gif")
    found = (
        f"{images}/Train: 17 images of 4 classes, class0 to class3; skipped: 3 hidden or system, "
    )
    small, common = (
        "--img_size 16 --ch 8 --ch_mult 1 2 --vae_embed_dim 4 --epochs 1",
        "--num_workers 0 --device cpu",
    )
    vae = f"--img_size 16 --vae_path {vae_path}"
    commands = {
        "main_cache": f"{vae} {common} --data_path {images} --cached_path {tmp_path}/cache",
        "main_vae": f"{small} {common} --data_path {images} --output_dir {tmp_path}/vae --batch_size 8",
        "main_tokenbridge": f"{BASE} {vae} --data_path {images} --output_dir {tmp_path}/run --epochs 1",
        "reconstruction": f"{vae} {common} --image_dir {images} --no_metrics --output_dir {tmp_path}/out",
        "main_metrics": f"--images {images} {quick_inception.flag} {common} --img_size 16 --save_stats {tmp_path}/s",
    }
    for script, command in commands.items():
        caplog.clear()
        with caplog.at_level("INFO", logger="tokenbridge"):
            run(script, command)
        expected = (
            found
            if script != "main_metrics"
            else f"{images}/Train: 17 images; skipped: 3 hidden or system, "
        )
        assert caplog.text.count(expected) == 1, script
    assert len(CachedFolder(tmp_path / "cache")) == len(quick_inception.joined("x")) == 17
    assert json.loads((tmp_path / "vae" / "vae.json").read_text())["psnr_of"] == "valid"


def test_one_process_reports_what_was_found(run_two, images, vae_path, tmp_path, capfd):
    flags = f"--img_size 16 --vae_path {vae_path} --num_workers 0 --data_path {images} --cached_path {tmp_path}/cache"
    run_two("main_cache", flags)
    assert capfd.readouterr().err.count("16 images of 4 classes, class0 to class3") == 1


# --------------------------------------------------------------------------------------------------------------------
# What is refused.


def test_a_folder_of_two_readings_is_refused_by_every_command(
    refused, images, vae_path, tmp_path, quick_inception
):
    (images / "bus").mkdir()
    shutil.copy(images / "train" / "class0" / "0.png", images / "bus")
    common = "--num_workers 0 --device cpu"
    commands = {
        "main_cache": f"{common} --vae_path {vae_path} --data_path {images} --cached_path {tmp_path}/new",
        "main_vae": f"{common} --img_size 16 --data_path {images} --output_dir {tmp_path}/new",
        "main_tokenbridge": f"{BASE} --vae_path {vae_path} --data_path {images} --output_dir {tmp_path}/new",
        "reconstruction": f"{common} --vae_path {vae_path} --image_dir {images} --output_dir {tmp_path}/new",
        "main_metrics": f"{common} --images {images} {quick_inception.flag}",
    }
    for script, command in commands.items():
        line = refused(script, command)
        assert (
            "has train beside bus, which hold images, too: if train is a split, move the others out"
            in line
        )
        assert "if they are classes, put all class folders into a folder train/" in line, script
    assert not (tmp_path / "new").exists()
    shutil.rmtree(images / "bus")
    for name in ("val", "valid"):  # not taken for a folder without held-out images
        shutil.copytree(images / "train", images / name)
    assert "has val and valid, either of which" in refused("main_vae", commands["main_vae"])


def test_both_processes_end_with_the_one_line_of_a_refused_folder(
    run_two, images, vae_path, tmp_path, capfd
):
    shutil.copytree(images / "train" / "class0", images / "bus")
    flags = (
        f"--vae_path {vae_path} --num_workers 0 --data_path {images} --cached_path {tmp_path}/cache"
    )
    run_two("main_cache", flags, 2)
    assert capfd.readouterr().err.count("if they are classes, put all class folders") == 1


def test_labels_that_are_not_clear_are_refused_where_they_count(
    run, refused, images, vae_path, tmp_path
):
    rows = (
        in_rows(images / "train")
        .remove_columns(["label", "width"])
        .add_column("mood", 8 * ["good", "bad"])
    )
    path = write_bare(tmp_path / "a.parquet", rows)
    cache = f"--img_size 16 --vae_path {vae_path} --num_workers 0 --data_path {path} --cached_path {tmp_path}/cache"
    assert "may have labels in column mood (strings): pass --label_column mood" in refused(
        "main_cache", cache
    )
    run("main_cache", f"{cache} --label_column mood")
    assert CachedFolder(tmp_path / "cache").classes == ["bad", "good"]
    run("main_cache", f"{cache}2 --label_column none")
    assert CachedFolder(tmp_path / "cache2").classes == ["images"]
    one = BASE.replace("--class_num 4", "--class_num 1")
    run(
        "main_tokenbridge",
        f"{one} --epochs 1 --vae_path {vae_path} --data_path {path} --output_dir {tmp_path}/run",
    )


def test_a_resumed_run_keeps_its_classes(refused, run, images, vae_path, tmp_path):
    train = f"{BASE} --vae_path {vae_path} --data_path {images} --output_dir {tmp_path}/run --resume {tmp_path}/run"
    run("main_tokenbridge", f"{train} --epochs 1")
    (images / "train" / "class1").rename(images / "train" / "class9")
    assert "lacks class1; also has class9" in refused("main_tokenbridge", f"{train} --epochs 2")


def test_what_cannot_be_read_is_one_line_and_nothing_is_left(
    refused, rows, images, vae_path, tmp_path, served
):
    table = in_rows(images / "train")
    cut = write_bare(tmp_path / "cut.parquet", table)
    cut.write_bytes(cut.read_bytes()[:3000])
    one = write_images(tmp_path / "one", classes=1, each=1)
    train = f"{BASE} --epochs 1 --vae_path {vae_path} --output_dir {tmp_path}/new --data_path"
    cases = {
        f"{train} {cut}": "cannot open",
        f"{train} {rows} --image_column pixels": "its columns are width (integers), image (images), label (classes)",
        f"{train} {rows} --label_column image": "no such column of labels",
        f"{train} {rows} --class_num 3": "has 4 classes, but class_num is 3: pass --class_num 4",
        f"{train} {one}": "has 1 class, but class_num is 4: pass --class_num 1",
        f"{train} {one} --class_num 1": "1 images do not fill one step of 4",
    }
    for command, words in cases.items():
        assert words in refused("main_tokenbridge", command), command
    assert not (tmp_path / "new").exists()
    cache = f"--img_size 16 --num_workers 0 --device cpu --vae_path {vae_path} --cached_path {tmp_path}/cache --data_path"
    assert "cannot open" in refused("main_cache", f"{cache} {cut}")
    assert "no split validation" in refused("main_cache", f"{cache} {rows} --split val")
    assert not list((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_rows_are_named_or_left_out(run, refused, images, vae_path, tmp_path, caplog, workers):
    for path in (images / "train").rglob("1.png"):
        damaged(path)
    rows = write_rows(tmp_path / "rows", in_rows(images / "train"))
    flags = f"--img_size 16 --num_workers {workers} --device cpu --vae_path {vae_path} --cached_path {tmp_path}/cache"
    assert "cannot read image class0/train-00000001 of" in refused(
        "main_cache", f"{flags} --data_path {rows}"
    )
    run("main_cache", f"{flags} --data_path {rows} --skip_bad_images")
    assert len(CachedFolder(tmp_path / "cache")) == 12 and "4 images cannot be read" in caplog.text
    for path in (images / "train").rglob("*.png"):
        path.write_bytes(b"")
    broken = write_bare(tmp_path / "broken.parquet", in_rows(images / "train"))
    train = (
        f"{BASE} --epochs 1 --vae_path {vae_path} --output_dir {tmp_path}/new --data_path {broken}"
    )
    assert "none of the images" in refused(
        "main_tokenbridge", f"{train} --skip_bad_images --num_workers {workers}"
    )
