"""What main_metrics.py reads, measures, writes and refuses."""

import json
import shutil
from unittest import mock

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.conftest import FID


def test_measuring_reads_images_and_reference_where_the_flags_say(
    run, tmp_path, quick_inception, monkeypatch, capsys
):
    monkeypatch.setattr(
        "util.metrics.compute.fid_statistics_to_metric", lambda a, b, **_: {FID: 7.0}
    )
    random = np.random.RandomState(0)
    for name, spread_of in {"images": 4, "reference": 250}.items():
        (tmp_path / name).mkdir()
        for number in range(20):
            colour = (
                (120 + random.randint(-spread_of // 2, spread_of // 2, 3))
                .clip(0, 255)
                .astype(np.uint8)
            )
            Image.fromarray(np.broadcast_to(colour, (24, 24, 3))).save(
                tmp_path / name / f"{number}.png"
            )
    common = f"--images {tmp_path}/images {quick_inception.flag} --num_workers 0 --batch_size 8 --device cpu"
    run("main_metrics", f"{common} --reference {tmp_path}/reference --json {tmp_path}/m.json")
    figures = json.loads((tmp_path / "m.json").read_text())
    assert figures["precision"] == 1 and figures["recall"] < 0.5 and figures["images"] == 20
    assert [len(x) for x in quick_inception.all("x")] == [8, 8, 4, 8, 8, 4]
    assert "precision" in capsys.readouterr().out

    # The crop is for the statistics; figures are of the images as they are.
    quick_inception.calls.clear()
    run("main_metrics", f"{common} --img_size 12 --save_stats {tmp_path}/s.npz")
    assert {x.shape[-1] for x in quick_inception.all("x")} == {12} and capsys.readouterr().out == ""
    run(
        "main_metrics",
        f"{common} --img_size 12 --save_stats {tmp_path}/s.npz --fid_stats {tmp_path}/s.npz",
    )
    assert {x.shape[-1] for x in quick_inception.all("x")[-3:]} == {
        24
    } and "FID" in capsys.readouterr().out
    with np.load(tmp_path / "s.npz") as stats:
        assert (
            0.4 < stats["mu"][0] < 0.6
            and 0 < stats["sigma"][0, 0] < 0.001
            and not stats["mu"][3:].any()
        )


def test_statistics_read_back_give_zero_whatever_the_processes(
    run_two, inception, photographs, stats, tmp_path
):
    # An npz in ADM's layout holds the same images.
    arrays = [np.array(Image.open(path)) for path in sorted((photographs / "sharp").iterdir())]
    np.savez(tmp_path / "sharp.npz", arr_0=np.stack(arrays))
    common = f"--fid_stats {stats} --inception_weights {inception} --device cpu --num_workers 0"
    run_two("main_metrics", f"--images {tmp_path}/sharp.npz {common} --json {tmp_path}/two.json")
    assert abs(json.loads((tmp_path / "two.json").read_text())["frechet_inception_distance"]) < 1e-3


def test_statistics_are_of_the_training_crop(inception, tmp_path, run):
    large, small = tmp_path / "large", tmp_path / "small"
    for folder in (large, small):
        folder.mkdir()
    from util.crop import center_crop_arr

    for number in range(4):
        image = Image.fromarray(
            load_sample_images().images[0][: 100 + 30 * number, 40 * number : 40 * number + 150]
        )
        image.save(large / f"{number}.png")
        center_crop_arr(image, 32).save(small / f"{number}.png")
    common = f"--inception_weights {inception} --device cpu --num_workers 0"
    run("main_metrics", f"--images {large} --img_size 32 --save_stats {tmp_path}/a.npz {common}")
    run("main_metrics", f"--images {small} --save_stats {tmp_path}/b.npz {common}")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        for name in ("mu", "sigma"):
            assert np.allclose(a[name], b[name], atol=1e-5) and a[name].dtype == np.float64


def test_too_few_images_are_refused_before_inception_runs(
    run, refused, tmp_path, quick_inception, fid_stats
):
    for name, count in {"one": 1, "three": 3, "four": 4}.items():
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8), (50 * number,) * 3).save(tmp_path / name / f"{number}.png")
    common = f"{quick_inception.flag} --num_workers 0 --device cpu --images {tmp_path}"
    cases = {
        f"{common}/one --save_stats {tmp_path}/s.npz": "too few images for FID: 1, at least 2 are needed",
        f"{common}/one --fid_stats {fid_stats[0]}": "too few images to measure for FID: 1, at least 2",
        f"{common}/three --reference {tmp_path}/four": "too few images to measure for precision and recall: 3,",
        f"{common}/four --reference {tmp_path}/three": "too few reference images for precision and recall: 3,",
    }
    for command, words in cases.items():
        assert words in refused("main_metrics", command), command
    assert not quick_inception.calls and not (tmp_path / "s.npz").exists()
    run("main_metrics", f"{common}/one --json {tmp_path}/one.json")  # an Inception Score takes one
    assert json.loads((tmp_path / "one.json").read_text())["images"] == 1


def test_what_cannot_be_measured_is_named(refused, inception, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", mock.Mock(side_effect=OSError("no network"))
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    weights, sharp = (
        f"--inception_weights {inception} --device cpu --num_workers 0",
        photographs / "sharp",
    )
    line = refused("main_metrics", f"--images {sharp} --device cpu")
    assert (
        "weights-inception-2015-12-05-6726825d.pth" in line
        and "https://" in line
        and str(tmp_path / "hub") in line
    )
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.zeros((64, 64)))
    np.savez(tmp_path / "none.npz", images=np.zeros(3))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((3, 8, 8, 3)))
    mixed = shutil.copytree(sharp, tmp_path / "mixed")
    Image.new("RGB", (20, 30)).save(mixed / "09.png")
    unreadable = shutil.copytree(sharp, tmp_path / "unreadable")
    (unreadable / "07.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "trap.pth").write_bytes(
        b"cos\nmkdir\n(S'" + str(tmp_path / "trace").encode() + b"'\ntR."
    )
    torch.save({"weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    cases = {
        f"{weights}": "--images is missing",
        f"--images {sharp} --img_size 32 {weights}": "only applies to --save_stats",
        f"--images {tmp_path}/nowhere {weights}": "nowhere",
        f"--images {tmp_path}/empty {weights}": "holds no images",
        f"--images {mixed} {weights}": "09.png has 20x30 pixels",
        f"--images {unreadable} {weights}": "07.png",
        f"--images {tmp_path}/none.npz {weights}": "has no arr_0",
        f"--images {tmp_path}/floats.npz {weights}": "expected uint8 [N, H, W, 3]",
        f"--images {sharp} --fid_stats {tmp_path}/nowhere.npz {weights}": "no file at",
        f"--images {sharp} --fid_stats {tmp_path}/none.npz {weights}": "has no mu and sigma",
        f"--images {sharp} --fid_stats {tmp_path}/other.npz {weights}": "mu [64], sigma [64, 64]",
        f"--images {sharp} --inception_weights {tmp_path}/trap.pth --device cpu": "not loaded",
        f"--images {sharp} --inception_weights {tmp_path}/wrong.pth --device cpu": "does not contain the weights",
    }
    for command, words in cases.items():
        assert words in refused("main_metrics", command), command
    assert not (tmp_path / "trace").exists()
