"""FID and its relatives against torch-fidelity's own command, and the scripts that use them."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from unittest import mock

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image, ImageFilter
from skimage.metrics import structural_similarity
from sklearn.datasets import load_sample_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from engine_tokenbridge import held_out_likelihood
from models.tokenbridge import TokenBridge
from tests.conftest import ROOT, SMALL, filled
from tests.test_scripts import TINY, torchrun
from util import metrics
from util.errors import UserError
from util.images import ssim
from util.plots import write_search

URL = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of Inception weights drawn at random, scaled so that features vary from image to image."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"), mock.patch(URL):
        model = FeatureExtractorInceptionV3("inception", ["2048"])
    for parameter in model.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    torch.nn.init.normal_(model.fc.weight, std=0.1)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Two folders: 30 crops of photographs, and the same crops blurred."""
    root = tmp_path_factory.mktemp("photographs")
    random = np.random.RandomState(0)
    for number in range(30):
        photograph = load_sample_images().images[number % 2]
        top, left = (random.randint(0, side - 80) for side in photograph.shape[:2])
        crop = Image.fromarray(photograph[top : top + 80, left : left + 80])
        for name, image in {"sharp": crop, "blurred": crop.filter(ImageFilter.GaussianBlur(1.5))}.items():
            (root / name).mkdir(exist_ok=True)
            image.save(root / name / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def stats(tmp_path_factory, inception, photographs):
    """Statistics of the sharp photographs, as main_metrics.py writes them."""
    path = tmp_path_factory.mktemp("stats") / "stats.npz"
    command = f"main_metrics.py --images {photographs}/sharp --save_stats {path} --inception_weights {inception}"
    subprocess.run([sys.executable, *command.split(), "--device", "cpu"], cwd=ROOT, check=True)
    return path


# --------------------------------------------------------------------------------------------------------------------
# main_metrics.py


def test_metrics_equal_torch_fidelitys(run, inception, photographs, tmp_path, capsys):
    expected = torch_fidelity.calculate_metrics(
        input1=str(photographs / "blurred"), input2=str(photographs / "sharp"), isc=True, fid=True, prc=True,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception), cuda=False,
        verbose=False,
    )  # fmt: skip
    command = f"--images {photographs}/blurred --reference {photographs}/sharp --inception_weights {inception}"
    run("main_metrics", f"{command} --json {tmp_path}/figures.json --device cpu --batch_size 7 --num_workers 2")
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-3), name
    assert expected["frechet_inception_distance"] > 0.1 and expected["inception_score_mean"] > 1.001
    assert figures["images"] == 30 and figures["torch_version"] == version("torch") and figures["commit"]
    out = capsys.readouterr()
    assert f"{expected['frechet_inception_distance']:.2f}" in out.out and "FID is biased" in out.err


def test_statistics_read_back_give_zero_whatever_the_processes(inception, photographs, stats, tmp_path):
    # An npz in ADM's layout holds the same images.
    arrays = [np.array(Image.open(path)) for path in sorted((photographs / "sharp").iterdir())]
    np.savez(tmp_path / "sharp.npz", arr_0=np.stack(arrays))
    common = f"--fid_stats {stats} --inception_weights {inception} --device cpu --num_workers 0"
    result = torchrun(f"main_metrics.py --images {tmp_path}/sharp.npz {common} --json {tmp_path}/two.json")
    assert result.returncode == 0, result.stderr
    assert abs(json.loads((tmp_path / "two.json").read_text())["frechet_inception_distance"]) < 1e-3


def test_statistics_are_of_the_training_crop(inception, tmp_path, run):
    large, small = tmp_path / "large", tmp_path / "small"
    for folder in (large, small):
        folder.mkdir()
    from util.crop import center_crop_arr

    for number in range(4):
        image = Image.fromarray(load_sample_images().images[0][: 100 + 30 * number, 40 * number : 40 * number + 150])
        image.save(large / f"{number}.png")
        center_crop_arr(image, 32).save(small / f"{number}.png")
    common = f"--inception_weights {inception} --device cpu --num_workers 0"
    run("main_metrics", f"--images {large} --img_size 32 --save_stats {tmp_path}/a.npz {common}")
    run("main_metrics", f"--images {small} --save_stats {tmp_path}/b.npz {common}")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        for name in ("mu", "sigma"):
            assert np.allclose(a[name], b[name], atol=1e-5) and a[name].dtype == np.float64


def test_what_cannot_be_measured_is_named(refused, inception, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=OSError("no network")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    weights, sharp = f"--inception_weights {inception} --device cpu --num_workers 0", photographs / "sharp"
    line = refused("main_metrics", f"--images {sharp} --device cpu")
    assert "weights-inception-2015-12-05-6726825d.pth" in line and "https://" in line and str(tmp_path / "hub") in line
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.zeros((64, 64)))
    np.savez(tmp_path / "none.npz", images=np.zeros(3))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((3, 8, 8, 3)))
    mixed = shutil.copytree(sharp, tmp_path / "mixed")
    Image.new("RGB", (20, 30)).save(mixed / "29.png")
    unreadable = shutil.copytree(sharp, tmp_path / "unreadable")
    (unreadable / "07.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "trap.pth").write_bytes(b"cos\nmkdir\n(S'" + str(tmp_path / "trace").encode() + b"'\ntR.")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    cases = {
        f"{weights}": "--images is missing",
        f"--images {sharp} --img_size 32 {weights}": "--save_stats only",
        f"--images {tmp_path}/nowhere {weights}": "nowhere",
        f"--images {tmp_path}/empty {weights}": "holds no images",
        f"--images {mixed} {weights}": "29.png has 20x30 pixels",
        f"--images {unreadable} {weights}": "07.png",
        f"--images {tmp_path}/none.npz {weights}": "has no arr_0",
        f"--images {tmp_path}/floats.npz {weights}": "expected uint8 [N, H, W, 3]",
        f"--images {sharp} --fid_stats {tmp_path}/nowhere.npz {weights}": "no file at",
        f"--images {sharp} --fid_stats {tmp_path}/none.npz {weights}": "has no mu and sigma",
        f"--images {sharp} --fid_stats {tmp_path}/other.npz {weights}": "mu [64], sigma [64, 64]",
        f"--images {sharp} --inception_weights {tmp_path}/trap.pth --device cpu": "not loaded",
        f"--images {sharp} --inception_weights {tmp_path}/wrong.pth --device cpu": "does not hold the weights",
    }
    for command, words in cases.items():
        assert words in refused("main_metrics", command), command
    assert not (tmp_path / "trace").exists()


def test_missing_weights_are_fetched_once_to_torch_hubs_folder(inception, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fetch = mock.Mock(side_effect=lambda url, place, **_: shutil.copy(inception, place))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert metrics.find_inception_weights(None) == metrics.find_inception_weights(None)
    assert fetch.call_count == 1 and metrics.find_inception_weights(str(inception)) == inception


def test_shares_come_back_in_order():
    # 11 rows over 3 processes, each holding rank, rank + 3, ...
    rows = torch.arange(22.0).view(11, 2)
    shares = [torch.cat([rows[rank::3], torch.zeros(4 - len(rows[rank::3]), 2)]) for rank in range(3)]

    def all_gather(out, own):
        for place, share in zip(out, shares, strict=True):
            place.copy_(share)

    with mock.patch("util.misc.get_world_size", return_value=3), mock.patch("torch.distributed.all_gather", all_gather):
        assert torch.equal(metrics.misc.gather_shares(rows[1::3], 11), rows)


def test_ssim_is_scikit_images():
    a = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    b = (a.float() * 0.8 + 20 * torch.rand(a.shape)).to(torch.uint8)
    for x, y, value in zip(a, b, ssim(a, b), strict=True):
        expected = structural_similarity(
            x.numpy(), y.numpy(), channel_axis=0, data_range=255, gaussian_weights=True, use_sample_covariance=False
        )
        assert value.item() == pytest.approx(expected, abs=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# Sampling for evaluation.


@pytest.fixture
def trained(tmp_path, vae_path):
    """A checkpoint of the tiny model, its weights filled by rule, for 4 classes at 16 pixels."""
    from models.tokenbridge import tokenbridge_tiny

    kwargs = {"img_size": 16, "vae_stride": 4, "vae_embed_dim": 8, "class_num": 4, "buffer_size": 4, "quant_levels": 8}
    model = filled(tokenbridge_tiny(**kwargs))
    learned = {name: value.detach() for name, value in model.named_parameters()}
    (tmp_path / "trained").mkdir()
    config = {**model.config, "latent_factor": 0.5}
    content = {"model": model.state_dict(), "model_ema": {n: 1.1 * v for n, v in learned.items()}, "config": config}
    torch.save(content, tmp_path / "trained" / "checkpoint-last.pth")
    return f"{TINY} --vae_path {vae_path} --resume {tmp_path}/trained --device cpu"


def pictures(folder) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


def pixels(folder) -> list[np.ndarray]:
    return [np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def test_images_depend_neither_on_processes_nor_on_interruption(run, trained, tmp_path):
    common = f"{trained} --evaluate --no_metrics --num_images 40 --num_iter 16 --cfg 2.0 --precision fp32"
    run("main_tokenbridge", f"{common} --eval_bsz 7 --output_dir {tmp_path}/one")
    one = pictures(tmp_path / "one" / "samples")
    assert len(one) == 40 == len(set(one))

    # Threads change sums: both sides of the comparison have one a process.
    serial = subprocess.run(
        [sys.executable, "main_tokenbridge.py", *f"{common} --eval_bsz 7 --output_dir {tmp_path}/serial".split()],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert serial.returncode == 0, serial.stderr
    result = torchrun(f"main_tokenbridge.py {common} --eval_bsz 7 --output_dir {tmp_path}/two")
    assert result.returncode == 0, result.stderr
    assert pictures(tmp_path / "two" / "samples") == pictures(tmp_path / "serial" / "samples")

    # Killed half-way, then continued: images that were there stay, the others are the same.
    command = [sys.executable, "main_tokenbridge.py", *f"{common} --eval_bsz 2 --output_dir {tmp_path}/cut".split()]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    folder = tmp_path / "cut" / "samples"
    while not (folder.is_dir() and len(list(folder.glob("*.png"))) >= 6) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert 6 <= len(before) < 40
    run("main_tokenbridge", f"{common} --eval_bsz 2 --output_dir {tmp_path}/cut")
    whole_chunks = [p for p in before if folder / f"{int(p.stem) ^ 1:05d}.png" in before]
    assert all(path.stat().st_mtime_ns == before[path] for path in whole_chunks)
    run("main_tokenbridge", f"{common} --eval_bsz 2 --output_dir {tmp_path}/uncut")
    assert pictures(folder) == pictures(tmp_path / "uncut" / "samples")


def test_chunk_sizes_change_rounding_only(run, trained, tmp_path):
    common = f"{trained} --evaluate --no_metrics --num_images 40 --num_iter 16 --cfg 2.0 --precision fp32"
    sizes = {}
    for size in (1, 7, 40):
        run("main_tokenbridge", f"{common} --eval_bsz {size} --output_dir {tmp_path}/{size}")
        sizes[size] = pixels(tmp_path / str(size) / "samples")
    for size in (1, 7):
        assert sum(np.array_equal(a, b) for a, b in zip(sizes[size], sizes[40], strict=True)) >= 38


def test_images_of_other_settings_or_weights_are_replaced(run, trained, tmp_path, caplog):
    caplog.set_level("INFO")
    common = f"{trained} --evaluate --no_metrics --num_images 4 --num_iter 2 --output_dir {tmp_path}/out --eval_bsz 4"
    folder = tmp_path / "out" / "samples"
    seen = []
    for flags in ("", "--gen_seed 1", "--gen_seed 1 --no_ema", "--gen_seed 1 --no_ema"):
        run("main_tokenbridge", f"{common} {flags}")
        seen.append(pictures(folder))
    assert seen[0] != seen[1] != seen[2] == seen[3]
    assert caplog.text.count("replacing the images of another run") == 2 and "gen_seed 0 then, 1 now" in caplog.text


def test_evaluation_measures_and_exports(run, trained, inception, stats, photographs, tmp_path):
    measuring = f"--fid_stats {stats} --reference {photographs}/sharp --inception_weights {inception}"
    common = f"{trained} --evaluate --num_images 8 --num_iter 3 {measuring} --output_dir {tmp_path}/out"
    run("main_tokenbridge", f"{common} --save_npz --keep_images")
    figures = json.loads((tmp_path / "out" / "samples.json").read_text())
    names = {"frechet_inception_distance", "inception_score_mean", "inception_score_std", "precision", "recall"}
    assert names <= set(figures) and figures["images"] == 8 and figures["seed"] == 0 and figures["commit"]
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (8, 16, 16, 3)
        assert np.array_equal(arrays["arr_0"], np.stack(pixels(tmp_path / "out" / "samples")))
    run("main_metrics", f"--images {tmp_path}/out/samples {measuring} --json {tmp_path}/again.json --device cpu")
    again = json.loads((tmp_path / "again.json").read_text())
    assert all(again[name] == pytest.approx(figures[name], rel=1e-5) for name in names)

    # Without --keep_images they go once they are measured; if measuring fails, they stay.
    run("main_tokenbridge", common)
    assert not (tmp_path / "out" / "samples").exists() and (tmp_path / "out" / "samples.png").exists()
    with mock.patch("util.metrics.compute_metrics", side_effect=RuntimeError("broken")), pytest.raises(RuntimeError):
        run("main_tokenbridge", common)
    assert len(pictures(tmp_path / "out" / "samples")) == 8


def test_everything_is_checked_before_the_first_image(refused, trained, inception, stats, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=OSError("no network")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    common = f"{trained} --evaluate --num_images 4 --output_dir {tmp_path}/out"
    assert "no FID statistics at fid_stats/adm_in256_stats.npz" in refused("main_tokenbridge", common)
    assert "no Inception weights" in refused("main_tokenbridge", f"{common} --fid_stats {stats}")
    missing = f"--fid_stats {stats} --inception_weights {inception} --reference {tmp_path}/nowhere"
    assert "nowhere" in refused("main_tokenbridge", f"{common} {missing}")
    assert not (tmp_path / "out").exists()


def test_a_search_makes_a_table_and_a_heat_map(run, trained, inception, stats, tmp_path, monkeypatch, sampler):
    counted = mock.Mock(
        side_effect=lambda features, *_: {
            "frechet_inception_distance": 5.0,
            "inception_score_mean": 2.0,
            "precision": 10 * sampler.calls[-1]["cfg"] + sampler.calls[-1]["temperature"],  # tells one pair's images
        }
    )
    monkeypatch.setattr("util.metrics.compute_metrics", counted)
    run(
        "main_tokenbridge",
        f"{trained} --evaluate --num_images 4 --num_iter 2 --cfg 1.0 3.5 --temperature 0.9 1.0 --fid_stats {stats} "
        f"--inception_weights {inception} --output_dir {tmp_path}/out",
    )
    rows = json.loads((tmp_path / "out" / "search.json").read_text())
    assert [(row["cfg"], row["temperature"]) for row in rows] == [(1.0, 0.9), (1.0, 1.0), (3.5, 0.9), (3.5, 1.0)]
    assert "| 3.5 | 0.9 | 5 | 2 |" in (tmp_path / "out" / "search.md").read_text() and counted.call_count == 4
    with Image.open(tmp_path / "out" / "search.png") as picture:
        assert picture.size[0] > 500
    # Every pair is sampled as its row says, and each row holds the figures of its own images.
    pairs = list(zip(sampler.all("cfg"), sampler.all("temperature"), strict=True))
    assert pairs == [(row["cfg"], row["temperature"]) for row in rows]
    for cfg, temperature in pairs:
        about = json.loads((tmp_path / "out" / f"samples-cfg{cfg:g}-t{temperature:g}.json").read_text())
        assert (about["settings"]["cfg"], about["settings"]["temperature"]) == (cfg, temperature)
    assert [row["precision"] for row in rows] == [10.9, 11.0, 35.9, 36.0]
    assert all(row["images"] == 4 for row in rows)


def test_the_heat_map_has_the_scales_across_and_temperatures_up(tmp_path):
    from matplotlib.figure import Figure

    from util.plots import heat_map

    rows = [{"cfg": c, "temperature": t, "frechet_inception_distance": 10 * c + t} for c in (1, 2, 3) for t in (0.5, 1)]
    axes = Figure().subplots()
    heat_map(rows, "frechet_inception_distance", axes)
    assert axes.images[0].get_array().tolist() == [[10.5, 20.5, 30.5], [11, 21, 31]]
    write_search(rows, tmp_path)
    assert (tmp_path / "search.png").stat().st_size > 5000


# --------------------------------------------------------------------------------------------------------------------
# Held-out likelihood.


def test_likelihood_of_a_model_that_knows_nothing_is_the_uniform_ones():
    model = TokenBridge(**SMALL)
    for head in model.head.channel_heads:
        torch.nn.init.zeros_(head.weight)
    moments = torch.cat([torch.randn(6, 16, 4, 4), torch.zeros(6, 16, 4, 4)], dim=1)
    loader = [(moments[:4], torch.arange(4)), (moments[4:], torch.arange(2))]
    figures = held_out_likelihood(model, None, 1.0, loader, torch.device("cpu"), "fp32")
    assert figures["bits_per_dim"] == pytest.approx(4, abs=1e-5) and figures["images"] == 6
    assert figures["nats_per_dim"] == pytest.approx(4 * math.log(2), abs=1e-5)


def test_likelihood_does_not_depend_on_the_batches(small_model):
    moments = torch.cat([torch.randn(6, 16, 4, 4), torch.zeros(6, 16, 4, 4)], dim=1)
    labels = torch.arange(6) % 4
    values = []
    for size in (1, 4, 6):
        torch.manual_seed(size)
        loader = list(zip(moments.split(size), labels.split(size), strict=True))
        values.append(held_out_likelihood(small_model.train(), None, 1.0, loader, torch.device("cpu"), "fp32"))
        assert small_model.training
    assert values[0]["nats_per_dim"] == pytest.approx(values[1]["nats_per_dim"], rel=1e-5)
    assert values[0]["nats_per_dim"] == pytest.approx(values[2]["nats_per_dim"], rel=1e-5)


def test_likelihood_as_a_command_and_in_training(run, refused, trained, images, vae_path, tmp_path):
    shutil.copytree(images / "train", images / "val")
    data = f"--data_path {images}"
    run("main_tokenbridge", f"{trained} --evaluate_nll {data} --output_dir {tmp_path}/a --precision fp32")
    direct = json.loads((tmp_path / "a" / "likelihood.json").read_text())
    assert direct["images"] == 16 and direct["bits_per_dim"] == pytest.approx(direct["nats_per_dim"] / math.log(2))
    cache = f"--img_size 16 --vae_path {vae_path} --data_path {images} --num_workers 0"
    for split in ("train", "val"):
        run("main_cache", f"{cache} --split {split} --cached_path {tmp_path}/{split}")
    cached = f"--use_cached --cached_path {tmp_path}/train --cached_val_path {tmp_path}/val"
    run("main_tokenbridge", f"{trained} --evaluate_nll {cached} --output_dir {tmp_path}/b --precision fp32")
    assert json.loads((tmp_path / "b" / "likelihood.json").read_text())["nats_per_dim"] == pytest.approx(
        direct["nats_per_dim"], rel=1e-3
    )
    run("main_tokenbridge", f"{TINY} {cached} --online_nll --eval_freq 1 --epochs 2 --output_dir {tmp_path}/run")
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in log.Scalars("eval/bits_per_dim")] == [1, 2]
    assert "--cached_val_path" in refused("main_tokenbridge", f"{TINY} --use_cached --cached_path x --online_nll")


def test_all_processes_average_the_same_weights(run, images, vae_path, tmp_path):
    cache = f"--img_size 16 --vae_path {vae_path} --data_path {images} --num_workers 0 --cached_path {tmp_path}/cache"
    run("main_cache", cache)
    data = (
        f"--use_cached --cached_path {tmp_path}/cache --cached_val_path {tmp_path}/cache --precision fp32 --device cpu"
    )
    result = torchrun(f"main_tokenbridge.py {TINY} {data} --epochs 1 --online_nll --output_dir {tmp_path}/run")
    assert result.returncode == 0, result.stderr
    # Each of the two processes measured half of the images with its own average; the file holds the first one's.
    online = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("eval/nats_per_dim")[-1].value
    run("main_tokenbridge", f"{TINY} {data} --evaluate_nll --resume {tmp_path}/run --output_dir {tmp_path}/run")
    saved = json.loads((tmp_path / "run" / "likelihood.json").read_text())["nats_per_dim"]
    assert online == pytest.approx(saved, rel=1e-4)


def test_an_interrupted_search_keeps_what_it_measured(run, trained, inception, stats, tmp_path, monkeypatch):
    counted = mock.Mock(side_effect=lambda *_: {"frechet_inception_distance": 5.0, "inception_score_mean": 2.0})
    monkeypatch.setattr("util.metrics.compute_metrics", counted)
    common = f"{trained} --evaluate --num_images 4 --num_iter 2 --fid_stats {stats} --inception_weights {inception}"
    common += f" --output_dir {tmp_path}/out --cfg 1.0 2.0 --temperature 1.0"
    run("main_tokenbridge", common)
    (tmp_path / "out" / "samples-cfg2-t1.json").unlink()
    run("main_tokenbridge", common)
    assert counted.call_count == 3  # two pairs, then the one whose figures were lost
    run("main_tokenbridge", f"{common} --num_iter 3")
    assert counted.call_count == 5


def test_online_metrics_go_to_tensorboard(run, images, vae_path, inception, stats, tmp_path, monkeypatch, sampler):
    monkeypatch.setattr(
        "util.metrics.compute_metrics",
        lambda *_: {
            "frechet_inception_distance": 5.0,
            "inception_score_mean": 2.0,
            "precision": 10 * sampler.calls[-1]["cfg"],
        },
    )
    run(
        "main_tokenbridge",
        f"{TINY} --data_path {images} --vae_path {vae_path} --epochs 1 --online_eval --num_images 4 --num_iter 2 "
        f"--cfg 2.5 --fid_stats {stats} --inception_weights {inception} --output_dir {tmp_path}/run",
    )
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    for name, cfg in {"cfg1": 1, "cfg2.5": 2.5}.items():
        assert [event.value for event in log.Scalars(f"eval/frechet_inception_distance-{name}")] == [5.0]
        events = log.Scalars(f"eval/precision-{name}")
        assert [(event.step, event.value) for event in events] == [(1, 10 * cfg)]
    assert not [path for path in (tmp_path / "run" / "online_eval").iterdir() if path.is_dir()]  # measured, removed


# --------------------------------------------------------------------------------------------------------------------
# reconstruction.py


def test_reconstruction_measures_against_statistics_and_originals(run, images, vae_path, inception, stats, tmp_path):
    run(
        "reconstruction",
        f"--img_size 16 --vae_path {vae_path} --image_dir {images} --bits 4 --images_per_class 3 --num_workers 0 "
        f"--output_dir {tmp_path}/out --inception_weights {inception} --fid_stats {stats} --device cpu",
    )
    folder = tmp_path / "out" / "quant_b4_r5.0_n3"
    results = json.loads((folder / "results.json").read_text())
    expected = {}
    for name, part in {"frechet_inception_distance_to_originals": "real", "statistics": None}.items():
        against = f"--reference {folder}/{part}" if part else f"--fid_stats {stats}"
        run(
            "main_metrics",
            f"--images {folder}/recon {against} --inception_weights {inception} --json {tmp_path}/m.json --device cpu",
        )
        expected[name] = json.loads((tmp_path / "m.json").read_text())
    for name, figures in expected.items():
        key = name if name in results else "frechet_inception_distance"
        assert results[key] == pytest.approx(figures["frechet_inception_distance"], rel=1e-3)
        assert results["inception_score_mean"] == pytest.approx(figures["inception_score_mean"], rel=1e-3)
    assert len(results["entropy_bits"]) == 8 and all(0 < bits <= 4 for bits in results["entropy_bits"])


def test_the_sweep_writes_table_1_and_the_figures(run, images, vae_path, tmp_path):
    common = (
        f"--img_size 16 --vae_path {vae_path} --image_dir {images} --num_workers 0 --device cpu --images_per_class 3"
    )
    run("reconstruction", f"{common} --sweep --no_metrics --output_dir {tmp_path}/out")
    folder = tmp_path / "out" / "sweep_n3"
    rows = json.loads((folder / "table1.json").read_text())["rows"]
    by_setting = {(row["bits"], row["range"]): row for row in rows}
    assert set(by_setting) == {(-1, 5.0), *((b, 5.0) for b in (3, 4, 5, 6)), *((6, r) for r in (2.0, 3.0, 4.0))}
    assert by_setting[6, 2.0]["paper_rfid"] == 2.26 and by_setting[-1, 5.0]["latent_mse"] == 0
    errors = [by_setting[bits, 5.0]["latent_mse"] for bits in (3, 4, 5, 6)]
    assert errors == sorted(errors, reverse=True)
    table = (folder / "table1.md").read_text()
    assert table.count("\n") == 10 and "| 8 levels, range 5 | 3.69 | 250.3 |" in table
    for name, columns in {"figure5.png": 3, "figure6.png": 5}.items():
        with Image.open(folder / name) as picture:
            assert picture.size[0] == columns * 130 + 2
    # One setting alone gives the same figures.
    run("reconstruction", f"{common} --bits 4 --no_metrics --output_dir {tmp_path}/out")
    alone = json.loads((tmp_path / "out" / "quant_b4_r5.0_n3" / "results.json").read_text())
    assert alone["psnr_db"] == by_setting[4, 5.0]["psnr_db"] and alone["ssim"] == by_setting[4, 5.0]["ssim"]


def test_reconstruction_asked_to_measure_needs_what_it_takes(refused, images, vae_path, inception, tmp_path):
    common = f"--img_size 16 --vae_path {vae_path} --image_dir {images} --output_dir {tmp_path}/out --device cpu"
    for flags in (f"--inception_weights {tmp_path}/no", f"--inception_weights {inception} --fid_stats {tmp_path}/no"):
        assert str(tmp_path / "no") in refused("reconstruction", f"{common} {flags}")
    assert not (tmp_path / "out").exists()


def test_damaged_statistics_are_named(tmp_path):
    (tmp_path / "damaged.npz").write_bytes(b"PK no")
    with pytest.raises(UserError, match=r"damaged\.npz is damaged"):
        metrics.load_statistics(tmp_path / "damaged.npz")
