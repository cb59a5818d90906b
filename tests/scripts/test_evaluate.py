"""What evaluation.py samples, searches, measures and writes, alone and during training."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine_tokenbridge import held_out_likelihood
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL, DiagonalGaussianDistribution
from tests.conftest import BASE, FACTOR, FID, IS, ROOT, SHORT, SMALL, TINY, filled, load, seen, torchrun, write_images
from util import metrics
from util.images import confidence_maps, to_uint8
from util.rng import image_seeds


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


def grey(value: float) -> int:
    """The byte of a picture whose latents, before the division by the factor 0.5, are ``value``."""
    return round(255 * (value / 0.5 / 40 + 1) / 2)


def averaged(folder, name: str = "checkpoint-last.pth", part: str = "model_ema") -> torch.Tensor:
    return torch.load(folder / name, weights_only=True)[part]["mask_token"]


@pytest.fixture
def fid_stats(tmp_path):
    """Two files of reference statistics."""
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    return tmp_path / "a.npz", tmp_path / "b.npz"


@pytest.fixture
def measured(monkeypatch):
    """compute_metrics, in no time, whose FID counts the calls."""
    counted = mock.Mock(side_effect=lambda *_: {FID: float(counted.call_count), IS: 2.0})
    monkeypatch.setattr("util.metrics.compute_metrics", counted)
    return counted


# --------------------------------------------------------------------------------------------------------------------
# Sampling.


def test_every_flag_of_sampling_reaches_the_sampler(run, weights, tmp_path, sampler, decoder):
    flags = {
        "num_iter": 3, "cfg": 2.5, "cfg_schedule": "constant", "temperature": 0.7, "order": "confidence",
        "confidence_noise": 0.4,
    }  # fmt: skip
    typed = " ".join(f"--{name} {value}" for name, value in flags.items())
    common = f"{weights} --evaluate --no_metrics --num_images 8 {typed}"
    run("main_tokenbridge", f"{common} --eval_bsz 3 --output_dir {tmp_path}/a --precision fp16 --vae_precision fp32")
    for call in sampler.calls:
        assert {name: call[name] for name in flags} == flags and call["autocast"] == torch.float16
        assert torch.equal(call["mask_token"], averaged(tmp_path / "weights"))
    assert sampler.all("bsz") == [3, 3, 2]
    assert [int(label) for label in sampler.joined("labels")] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert set(decoder.all("autocast")) == {torch.float32}
    seeds = sampler.joined("seeds")
    assert len(set(seeds)) == 8

    sampler.calls.clear()
    run("main_tokenbridge", f"{common} --eval_bsz 8 --output_dir {tmp_path}/b --no_ema --precision fp32")
    (call,) = sampler.calls
    assert call["seeds"] == seeds and call["autocast"] == torch.float32
    assert torch.equal(call["mask_token"], averaged(tmp_path / "weights", part="model"))
    run("main_tokenbridge", f"{common} --eval_bsz 8 --output_dir {tmp_path}/c --gen_seed 9 --precision fp16")
    assert not set(sampler.calls[-1]["seeds"]) & set(seeds)
    assert decoder.calls[-1]["autocast"] == torch.float16  # as sampled, where nothing else is asked for


def test_pictures_are_of_the_unscaled_latents_each_under_its_number(run, weights, tmp_path, sampler, decoder):
    common = f"{weights} --evaluate --no_metrics --num_images 120 --eval_bsz 50 --output_dir {tmp_path}/out"
    run("main_tokenbridge", f"{common} --precision fp32 --save_npz")
    folder = tmp_path / "out" / "samples"
    for number in (0, 29, 30, 59, 60, 99, 119):
        assert (pixels(folder / f"{number:05d}.png") == grey(number // 30)).all(), number
    grid = pixels(tmp_path / "out" / "samples.png")
    for place in range(100):  # of 120, evenly spaced, ten in a row
        cell = grid[2 + place // 10 * 66 :, 2 + place % 10 * 66 :][:64, :64]
        assert (cell == grey(place * 120 // 100 // 30)).all(), place
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"][:, 0, 0, 0].tolist() == [grey(number // 30) for number in range(120)]


def test_only_what_is_missing_is_sampled_again(run, weights, tmp_path, sampler, decoder):
    common = f"{weights} --evaluate --no_metrics --num_images 8 --eval_bsz 2 --save_confidence"
    common += f" --output_dir {tmp_path}/out"
    run("main_tokenbridge", common)
    folder = tmp_path / "out" / "samples"
    (folder / "00002.png").unlink()
    (folder.with_name("samples-confidence") / "00005.png").unlink()
    sampler.calls.clear()
    run("main_tokenbridge", common)
    assert [int(label) for label in sampler.joined("labels")] == [1, 1, 2, 2]
    sampler.calls.clear()
    run("main_tokenbridge", common)
    assert not sampler.calls


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
def test_another_file_in_the_same_place_replaces_the_images(run, weights, vae_path, tmp_path, sampler, decoder, part):
    common = f"{weights} --evaluate --no_metrics --num_images 4 --output_dir {tmp_path}/out"
    run("main_tokenbridge", common)
    path = vae_path if part == "tokenizer" else tmp_path / "weights" / "checkpoint-last.pth"
    torch.save(torch.load(path, weights_only=True), path)
    run("main_tokenbridge", common)
    assert len(sampler.calls) == 2


def test_images_of_another_run_go_and_what_else_lies_there_stays(run, weights, tmp_path, sampler, decoder, refused):
    common = f"{weights} --evaluate --no_metrics --output_dir {tmp_path}/out --save_confidence"
    run("main_tokenbridge", f"{common} --num_images 8")
    folder, maps = tmp_path / "out" / "samples", tmp_path / "out" / "samples-confidence"
    (folder / "notes.txt").write_text("mine")
    (folder / "mine.png").write_bytes((folder / "00000.png").read_bytes())
    assert "holds 5 images, not 4" in refused("main_tokenbridge", f"{common} --num_images 4")
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{n:05d}.png" for n in range(4)),
        "mine.png",
        "notes.txt",
    ]
    assert len(list(maps.iterdir())) == 4
    (folder / "mine.png").unlink()
    run("main_tokenbridge", f"{common.removesuffix('--save_confidence')} --num_images 4")
    assert not maps.exists() and (folder / "notes.txt").read_text() == "mine"


def test_confidence_is_pictured_where_its_token_lies(run, weights, tmp_path, sampler, decoder):
    run(
        "main_tokenbridge",
        f"{weights} --evaluate --no_metrics --num_images 4 --save_confidence --output_dir {tmp_path}/out",
    )
    brightness = pixels(tmp_path / "out" / "samples-confidence" / "00003.png").astype(int).sum(axis=2)
    cells = brightness[2::4, 2::4]  # 16 tokens, 4 pixels wide each
    assert (np.diff(cells.flatten()) > 0).all() and len(np.unique(brightness)) == 16
    # Every map from its own lowest value to its own highest.
    maps = confidence_maps(torch.tensor([[[-4.0, -2.0]], [[-400.0, -200.0]]]), 2)
    assert torch.equal(maps[0], maps[1]) and maps[0, :, 0, 0].tolist() == [68, 1, 84] and maps[0, 1, 0, 1] == 231


def test_numbers_of_images_that_would_fit_are_told(refused, weights, tmp_path):
    for asked, fitting in {10: 8, 11: 12, 1: 4}.items():
        line = refused("main_tokenbridge", f"{weights} --evaluate --num_images {asked} --output_dir {tmp_path}/out")
        assert f"such as {fitting}" in line


def test_two_processes_share_the_work_and_measure_once(
    run, run_two, weights, tmp_path, sampler, decoder, quick_inception, monkeypatch
):
    """One run by both: what is sampled, measured, written and removed."""
    monkeypatch.setattr(metrics, "fid_statistics_to_metric", lambda a, b, **_: {FID: abs(a["mu"] - b["mu"]).sum()})
    note = sampler.note

    def noted(*args, **kwargs):  # a file hears of the other process, too
        given = note(*args, **kwargs)
        with open(tmp_path / "chunks", "a") as file:
            file.write(f"{metrics.misc.get_rank()} {given['labels'].tolist()}\n")
        return given

    monkeypatch.setattr(sampler, "note", noted)
    reference = write_images(tmp_path / "reference", size=16) / "train"
    for path in reference.rglob("*.png"):
        Image.fromarray(pixels(path)[:16]).save(path)
    common = f"{weights} --evaluate --num_images 12 --eval_bsz 2 --reference {reference} {quick_inception.flag}"
    common += " --cfg 1 2 --num_workers 0"
    run_two("main_tokenbridge", f"{common} --output_dir {tmp_path}/two")
    chunks = sorted((tmp_path / "chunks").read_text().splitlines())
    once = ["0 [0, 0]", "0 [1, 1]", "0 [2, 3]", "1 [0, 1]", "1 [2, 2]", "1 [3, 3]"]
    assert chunks == sorted(2 * once)
    assert sorted(path.name for path in (tmp_path / "two").iterdir() if path.is_dir()) == []  # measured, and removed
    run("main_tokenbridge", f"{common} --output_dir {tmp_path}/one")
    one, two = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("one", "two"))
    assert len(one) == 2 and one[0]["images"] == 12 and {"precision", "recall"} <= set(one[0])
    for row, other in zip(one, two, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Searches.


def test_a_search_is_taken_up_only_where_it_was_measured_alike(
    run, weights, tmp_path, sampler, decoder, quick_inception, fid_stats, measured
):
    reference = shutil.copytree(write_images(tmp_path / "reference", size=16) / "train" / "class0", tmp_path / "ref")
    for path in reference.glob("*.png"):
        Image.fromarray(pixels(path)[:16]).save(path)
    common = f"{weights} --evaluate --num_images 4 --cfg 1 2 --output_dir {tmp_path}/out {quick_inception.flag}"
    common += " --num_workers 0"
    first, second = (f"{common} --fid_stats {path}" for path in fid_stats)

    def rows() -> list[float]:
        return [row[FID] for row in json.loads((tmp_path / "out" / "search.json").read_text())]

    run("main_tokenbridge", first)
    assert rows() == [1, 2] and sampler.all("cfg") == [1, 2]
    run("main_tokenbridge", first)
    assert rows() == [1, 2] and len(sampler.calls) == 2
    assert [row["images"] for row in json.loads((tmp_path / "out" / "search.json").read_text())] == [4, 4]
    run("main_tokenbridge", second)
    assert rows() == [3, 4]
    run("main_tokenbridge", f"{second} --reference {reference}")
    assert rows() == [5, 6]
    shutil.copy(tmp_path / "weights" / "checkpoint-last.pth", tmp_path / "weights" / "other")
    (tmp_path / "weights" / "other").replace(tmp_path / "weights" / "checkpoint-last.pth")
    run("main_tokenbridge", f"{second} --reference {reference}")
    assert rows() == [7, 8]
    run("main_tokenbridge", f"{second} --reference {reference} --cfg 2 3")
    assert rows() == [8, 9]
    # A single pair is always measured; without metrics nothing is taken for measured.
    for _ in range(2):
        run("main_tokenbridge", f"{second} --cfg 2 --keep_images")
    assert measured.call_count == 11
    run("main_tokenbridge", f"{second} --reference {reference} --cfg 2 3 --no_metrics")
    assert len(list((tmp_path / "out" / "samples-cfg3-t1").glob("*.png"))) == 4


def test_statistics_made_anew_in_place_are_measured_against_anew(
    run, weights, tmp_path, sampler, decoder, quick_inception, fid_stats, measured
):
    common = f"{weights} --evaluate --num_images 4 --cfg 1 2 --output_dir {tmp_path}/out --num_workers 0"
    run("main_tokenbridge", f"{common} {quick_inception.flag} --fid_stats {fid_stats[0]}")
    np.savez(fid_stats[0], mu=np.ones(2048), sigma=np.eye(2048))
    run("main_tokenbridge", f"{common} {quick_inception.flag} --fid_stats {fid_stats[0]}")
    assert measured.call_count == 4


# --------------------------------------------------------------------------------------------------------------------
# During training.


@pytest.mark.parametrize("no_ema", [False, True])
def test_online_evaluation_is_of_the_average_at_every_scale_and_temperature(
    run, cached, vae_path, tmp_path, sampler, decoder, quick_inception, fid_stats, measured, no_ema
):
    out = tmp_path / "run"
    command = (
        f"{TINY} {SHORT} --epochs 3 --ema_rate 0.5 --keep_last 3 --precision fp32 --use_cached --cached_path {cached} "
        f"--vae_path {vae_path} --output_dir {out} --online_eval --eval_freq 2 --num_images 4 --num_iter 2 --cfg 3 1 "
        f"--temperature 0.5 0.9 --fid_stats {fid_stats[0]} {quick_inception.flag} {'--no_ema' * no_ema}"
    )
    run("main_tokenbridge", command)
    pairs = list(zip(sampler.all("cfg"), sampler.all("temperature"), strict=True))
    assert pairs == 2 * [(1, 0.5), (1, 0.9), (3, 0.5), (3, 0.9)]  # after the second epoch and the last
    for call, name in zip(sampler.calls[3:5], ("checkpoint-last.1.pth", "checkpoint-last.pth"), strict=True):
        assert torch.equal(call["mask_token"], averaged(out, name, "model" if no_ema else "model_ema"))
    assert not torch.equal(averaged(out), averaged(out, part="model"))
    log = EventAccumulator(str(out)).Reload()
    for value, (cfg, temperature) in enumerate(pairs[:4], 1):
        events = log.Scalars(f"eval/{FID}-cfg{cfg:g}-t{temperature:g}")
        assert [(event.step, event.value) for event in events] == [(2, value), (3, value + 4)]
    assert f"eval/{FID}-cfg1" not in log.Tags()["scalars"] and "eval/images-cfg1-t0.5" not in log.Tags()["scalars"]
    if not no_ema:
        # Begun anew in the same folder, without metrics: the pictures are the new run's.
        for _ in range(2):
            sampler.calls.clear()
            run("main_tokenbridge", f"{command} --no_metrics")
            assert len(sampler.calls) == 8


# --------------------------------------------------------------------------------------------------------------------
# Likelihood.


@pytest.fixture
def losses(monkeypatch):
    """TokenBridge.forward outside training: the mean label; and what it is given."""
    calls, original = [], TokenBridge.forward

    def forward(self, latents, labels, mask=None):
        if self.training:
            return original(self, latents, labels, mask)
        calls.append((latents, labels, mask, self.state_dict()["mask_token"].clone()))
        return labels.float().mean()

    monkeypatch.setattr(TokenBridge, "forward", forward)
    return calls


def test_likelihood_is_of_scaled_posterior_samples_a_mean_over_images(
    run, cached, weights, tmp_path, losses, monkeypatch
):
    draws, sample = [], DiagonalGaussianDistribution.sample

    def noted(posterior, noise=None):
        draws.append((posterior.mean, posterior.std, noise, sample(posterior, noise)))
        return draws[-1][-1]

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", noted)
    common = f"{weights} --evaluate_nll --use_cached --cached_val_path {cached}"
    run("main_tokenbridge", f"{common} --batch_size 5 --output_dir {tmp_path}/out --precision fp32")
    figures = json.loads((tmp_path / "out" / "likelihood.json").read_text())
    assert figures["images"] == 16 and figures["resume"] == f"{tmp_path}/weights"
    # Batches of 5, 5, 5 and 1: a mean of means would be another.
    assert figures["nats_per_dim"] == pytest.approx(1.5, abs=1e-6)
    assert figures["bits_per_dim"] == pytest.approx(1.5 / math.log(2), abs=1e-6)
    assert len(draws) == 4 and len(losses) == 16
    model = TokenBridge(**SMALL)  # of as many tokens
    counts = [model.num_masked_at(quantile) for quantile in (0.125, 0.375, 0.625, 0.875)]
    for number, (latents, _, mask, mask_token) in enumerate(losses):
        mean, std, noise, _ = draws[number // 4]
        assert torch.allclose(latents, 0.5 * (mean + std * noise), atol=1e-6) and noise.abs().max() > 1
        assert mask.sum(dim=1).tolist() == len(latents) * [counts[number % 4]]
        assert torch.equal(mask_token, averaged(tmp_path / "weights"))
    assert not torch.equal(losses[0][2][0], losses[0][2][1])  # every image has its own masks
    run("main_tokenbridge", f"{common} --no_ema --output_dir {tmp_path}/out")
    assert torch.equal(losses[-1][3], averaged(tmp_path / "weights", part="model"))


def test_two_processes_measure_one_likelihood(run, run_two, cached, weights, tmp_path, losses):
    common = f"{weights} --evaluate_nll --use_cached --cached_val_path {cached} --batch_size 3"
    run_two("main_tokenbridge", f"{common} --output_dir {tmp_path}/out")
    figures = json.loads((tmp_path / "out" / "likelihood.json").read_text())
    assert figures["images"] == 16 and figures["nats_per_dim"] == pytest.approx(1.5)


def test_likelihoods_during_training_are_of_the_average(run, cached, tmp_path, losses):
    run(
        "main_tokenbridge",
        f"{TINY} {SHORT} --epochs 2 --ema_rate 0.5 --use_cached --cached_path {cached} --cached_val_path {cached} "
        f"--output_dir {tmp_path}/run --online_nll --eval_freq 1",
    )
    assert torch.equal(losses[15][3], averaged(tmp_path / "run", "checkpoint-last.1.pth"))
    assert torch.equal(losses[-1][3], averaged(tmp_path / "run"))
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(e.step, e.value) for e in log.Scalars("eval/nats_per_dim")] == [(1, 1.5), (2, 1.5)]


def test_likelihood_is_a_channels_also_where_groups_are_predicted():
    model = filled(TokenBridge(**{**SMALL, "quant_levels": 4}, channels_per_group=2))
    for head in model.head.channel_heads:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    loader = [(torch.cat([torch.randn(4, 16, 4, 4), torch.zeros(4, 16, 4, 4)], dim=1), torch.arange(4))]
    figures = held_out_likelihood(model, None, 1.0, loader, torch.device("cpu"), "fp32")
    assert figures["bits_per_dim"] == pytest.approx(2, abs=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# What is sampled, whatever the processes, chunks and interruptions.


def pictures(folder) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


def test_images_depend_neither_on_processes_nor_on_interruption(run, weights, tmp_path):
    common = f"{weights} --evaluate --no_metrics --num_images 40 --num_iter 16 --cfg 2.0 --precision fp32"
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


def all_pixels(folder) -> list[np.ndarray]:
    return [np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def test_chunk_sizes_change_rounding_only(run, weights, tmp_path):
    common = f"{weights} --evaluate --no_metrics --num_images 40 --num_iter 16 --cfg 2.0 --precision fp32"
    sizes = {}
    for size in (1, 7, 40):
        run("main_tokenbridge", f"{common} --eval_bsz {size} --output_dir {tmp_path}/{size}")
        sizes[size] = all_pixels(tmp_path / str(size) / "samples")
    for size in (1, 7):
        assert sum(np.array_equal(a, b) for a, b in zip(sizes[size], sizes[40], strict=True)) >= 38


def test_images_of_other_settings_or_weights_are_replaced(run, weights, tmp_path, caplog):
    caplog.set_level("INFO")
    common = f"{weights} --evaluate --no_metrics --num_images 4 --num_iter 2 --output_dir {tmp_path}/out --eval_bsz 4"
    folder = tmp_path / "out" / "samples"
    seen = []
    for flags in ("", "--gen_seed 1", "--gen_seed 1 --no_ema", "--gen_seed 1 --no_ema"):
        run("main_tokenbridge", f"{common} {flags}")
        seen.append(pictures(folder))
    assert seen[0] != seen[1] != seen[2] == seen[3]
    assert caplog.text.count("replacing the images of another run") == 2 and "gen_seed 0 then, 1 now" in caplog.text


def test_evaluation_writes_the_same_pictures_every_time(run, trained, vae_path, tmp_path):
    common = (
        f"{TINY} --vae_path {vae_path} --evaluate --no_metrics --resume {trained} --num_images 8 --num_iter 4 --cfg 2.0"
    )
    pictures = []
    for chunk, seed in ((8, 0), (3, 0), (8, 1)):
        out = tmp_path / f"eval{chunk}-{seed}"
        run("main_tokenbridge", f"{common} --eval_bsz {chunk} --gen_seed {seed} --output_dir {out} --precision fp32")
        assert sorted(os.listdir(out / "samples")) == [f"{i:05d}.png" for i in range(8)]
        pictures.append([np.array(Image.open(out / "samples" / f"{i:05d}.png"), dtype=int) for i in range(8)])
        with Image.open(out / "samples.png") as grid:
            assert grid.size == (8 * 66 + 2, 66 + 2)
    assert max(np.abs(a - b).max() for a, b in zip(pictures[0], pictures[1], strict=True)) <= 1
    assert any(np.abs(a - b).max() > 1 for a, b in zip(pictures[0], pictures[2], strict=True))
    # What is pictured: the average's samples of every class, two each, with their seeds and the flags.
    content = load(trained)
    model = TokenBridge.from_content(content, trained, ema=True)
    vae, factor = AutoencoderKL.from_pretrained(vae_path)
    labels, seeds = torch.arange(8) // 2, image_seeds(0, range(8))
    with torch.no_grad():
        latents = model.sample_tokens(8, 4, 2.0, labels=labels, seeds=seeds)
        expected = to_uint8(vae.decode(latents / factor)).permute(0, 2, 3, 1).numpy().astype(int)
    assert max(np.abs(a - b).max() for a, b in zip(pictures[0], expected, strict=True)) <= 1


@pytest.mark.parametrize("flag, key", [("", "model_ema"), ("--no_ema", "model")])
def test_evaluation_samples_from_averages_or_weights_and_divides_by_the_factor(
    run, train, vae_path, tmp_path, trace, flag, key
):
    folder = train("run", "--epochs 1 --ema_rate 0.5")
    trace.clear()
    how = "--num_images 8 --num_iter 3 --cfg 2.5 --temperature 0.8 --cfg_schedule constant --eval_bsz 4 --gen_seed 3"
    out = f"--resume {folder} --output_dir {tmp_path}/out --vae_path {vae_path}"
    run("main_tokenbridge", f"{BASE} {out} --evaluate --no_metrics {how} {flag}")
    content = load(folder)
    expected = {"num_iter": 3, "cfg": 2.5, "temperature": 0.8, "cfg_schedule": "constant"}
    for sampled in trace.sampled:
        assert {name: sampled[name] for name in expected} == expected
        assert torch.equal(sampled["class_emb"], content[key]["class_emb.weight"])
    assert torch.cat([sampled["labels"] for sampled in trace.sampled]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({seed for sampled in trace.sampled for seed in sampled["seeds"]}) == 8
    latents = torch.cat([sampled["latents"] for sampled in trace.sampled])
    assert torch.allclose(torch.cat(trace.decoded), latents / FACTOR)


# --------------------------------------------------------------------------------------------------------------------
# Figures and searches, with Inception.


def test_evaluation_measures_and_exports(run, weights, inception, stats, photographs, tmp_path):
    measuring = f"--fid_stats {stats} --reference {photographs}/sharp --inception_weights {inception}"
    common = f"{weights} --evaluate --num_images 8 --num_iter 3 {measuring} --output_dir {tmp_path}/out"
    run("main_tokenbridge", f"{common} --save_npz --keep_images")
    figures = json.loads((tmp_path / "out" / "samples.json").read_text())
    names = {"frechet_inception_distance", "inception_score_mean", "inception_score_std", "precision", "recall"}
    assert names <= set(figures) and figures["images"] == 8 and figures["seed"] == 0 and figures["commit"]
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (8, 16, 16, 3)
        assert np.array_equal(arrays["arr_0"], np.stack(all_pixels(tmp_path / "out" / "samples")))
    run("main_metrics", f"--images {tmp_path}/out/samples {measuring} --json {tmp_path}/again.json --device cpu")
    again = json.loads((tmp_path / "again.json").read_text())
    assert all(again[name] == pytest.approx(figures[name], rel=1e-5) for name in names)

    # Without --keep_images they go once they are measured; if measuring fails, they stay.
    run("main_tokenbridge", common)
    assert not (tmp_path / "out" / "samples").exists() and (tmp_path / "out" / "samples.png").exists()
    with mock.patch("util.metrics.compute_metrics", side_effect=RuntimeError("broken")), pytest.raises(RuntimeError):
        run("main_tokenbridge", common)
    assert len(pictures(tmp_path / "out" / "samples")) == 8


def test_a_search_makes_a_table_and_a_heat_map(run, weights, inception, stats, tmp_path, monkeypatch, sampler):
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
        f"{weights} --evaluate --num_images 4 --num_iter 2 --cfg 1.0 3.5 --temperature 0.9 1.0 --fid_stats {stats} "
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


def test_an_interrupted_search_keeps_what_it_measured(run, weights, inception, stats, tmp_path, monkeypatch):
    counted = mock.Mock(side_effect=lambda *_: {"frechet_inception_distance": 5.0, "inception_score_mean": 2.0})
    monkeypatch.setattr("util.metrics.compute_metrics", counted)
    common = f"{weights} --evaluate --num_images 4 --num_iter 2 --fid_stats {stats} --inception_weights {inception}"
    common += f" --output_dir {tmp_path}/out --cfg 1.0 2.0 --temperature 1.0"
    run("main_tokenbridge", common)
    (tmp_path / "out" / "samples-cfg2-t1.json").unlink()
    run("main_tokenbridge", common)
    assert counted.call_count == 3  # two pairs, then the one whose figures were lost
    run("main_tokenbridge", f"{common} --num_iter 3")
    assert counted.call_count == 5


# --------------------------------------------------------------------------------------------------------------------
# Online evaluation.


def test_online_evaluation_samples_with_and_without_guidance(run, cached, vae_path, tmp_path, sampler):
    run(
        "main_tokenbridge",
        f"{TINY} {SHORT} --epochs 2 --use_cached --cached_path {cached} --vae_path {vae_path} "
        f"--output_dir {tmp_path}/run --online_eval --no_metrics --eval_freq 1 --num_images 4 --num_iter 2 --cfg 3.0",
    )
    folders = sorted(path.name for path in (tmp_path / "run" / "online_eval").iterdir() if path.is_dir())
    assert folders == [f"epoch000{epoch}-cfg{cfg}" for epoch in (0, 1) for cfg in (1, 3)]
    assert sampler.all("cfg") == [1, 3, 1, 3] and {call["num_iter"] for call in sampler.calls} == {2}
    assert all(call["labels"].tolist() == [0, 1, 2, 3] for call in sampler.calls)
    averages = [
        torch.load(tmp_path / "run" / f"checkpoint-last{age}.pth", weights_only=True)["model_ema"]["mask_token"]
        for age in (".1", "")
    ]
    for call, epoch in zip(sampler.calls, (0, 0, 1, 1), strict=True):
        assert torch.equal(call["mask_token"], averages[epoch])


@pytest.mark.parametrize("flag", ["", "--no_ema"])
def test_measurements_during_training_are_of_that_epochs_averages_or_weights(train, vae_path, trace, flag):
    online = f"--online_eval --no_metrics --num_images 4 --num_iter 2 --cfg 3 1 --vae_path {vae_path} {flag}"
    for seed in (2,) if flag else (1, 2):  # pictures of another run in the same folder are not taken for this one's
        trace.clear()
        folder = train("run", f"--epochs 3 --eval_freq 2 --ema_rate 0.5 --seed {seed} {online}")
        content, pictures = (
            load(folder),
            sorted(path.name for path in (folder / "online_eval").iterdir() if path.is_dir()),
        )
        assert pictures == [f"epoch000{epoch}-cfg{cfg}" for epoch in (1, 2) for cfg in (1, 3)]
        assert [sampled["cfg"] for sampled in trace.sampled] == [1.0, 3.0, 1.0, 3.0]
        weights = [sampled["class_emb"] for sampled in trace.sampled]
        assert torch.equal(weights[3], content["model" if flag else "model_ema"]["class_emb.weight"])
        assert not torch.equal(weights[1], weights[3])
        assert all(batch["training"] for batch in trace.batches)


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
# Likelihood of models, as a command, and in training.


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


def test_likelihood_as_a_command_and_in_training(run, refused, weights, images, vae_path, tmp_path):
    shutil.copytree(images / "train", images / "val")
    data = f"--data_path {images}"
    run("main_tokenbridge", f"{weights} --evaluate_nll {data} --output_dir {tmp_path}/a --precision fp32")
    direct = json.loads((tmp_path / "a" / "likelihood.json").read_text())
    assert direct["images"] == 16 and direct["bits_per_dim"] == pytest.approx(direct["nats_per_dim"] / math.log(2))
    cache = f"--img_size 16 --vae_path {vae_path} --data_path {images} --num_workers 0"
    for split in ("train", "val"):
        run("main_cache", f"{cache} --split {split} --cached_path {tmp_path}/{split}")
    cached = f"--use_cached --cached_path {tmp_path}/train --cached_val_path {tmp_path}/val"
    run("main_tokenbridge", f"{weights} --evaluate_nll {cached} --output_dir {tmp_path}/b --precision fp32")
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


def test_held_out_likelihoods_are_of_scaled_samples_of_plain_images(run, refused, train, cached, images, trace):
    folder = train("run")
    measure = f"{BASE} --resume {folder} --output_dir {folder} --evaluate_nll"
    trace.clear()
    run("main_tokenbridge", f"{measure} --use_cached --cached_val_path {cached}")
    assert not any(mirrored for epoch in seen(trace, cached) for _, mirrored in epoch)
    assert len(trace.batches) == 16  # four batches, four masks each
    for i, batch in enumerate(trace.batches):
        assert torch.equal(batch["latents"], FACTOR * trace.drawn[i // 4]["latents"]) and not batch["training"]


def test_measurements_are_of_all_images_or_none(run, refused, train, images, vae_path):
    folder = train("run")
    shutil.copytree(images / "train", images / "val")
    (images / "val" / "class1" / "2.png").write_bytes(b"no image")
    measure = f"{BASE} --resume {folder} --output_dir {folder} --evaluate_nll --data_path {images}"
    assert "class1/2.png" in refused("main_tokenbridge", f"{measure} --vae_path {vae_path} --skip_bad_images")


# --------------------------------------------------------------------------------------------------------------------
# Refused.


def test_everything_is_checked_before_the_first_image(refused, weights, inception, stats, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=OSError("no network")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    common = f"{weights} --evaluate --num_images 4 --output_dir {tmp_path}/out"
    assert "no FID statistics at fid_stats/adm_in256_stats.npz" in refused("main_tokenbridge", common)
    assert "no Inception weights" in refused("main_tokenbridge", f"{common} --fid_stats {stats}")
    missing = f"--fid_stats {stats} --inception_weights {inception} --reference {tmp_path}/nowhere"
    assert "nowhere" in refused("main_tokenbridge", f"{common} {missing}")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_than_the_checkpoints_is_refused(refused, run, trained, vae_path, tmp_path):
    content = torch.load(vae_path, weights_only=True)
    content["config"]["latent_factor"] = 0.6
    torch.save(content, tmp_path / "other.ckpt")
    command = f"{TINY} --evaluate --no_metrics --resume {trained} --vae_path {tmp_path}/other.ckpt --num_images 4"
    assert "latent_factor is 0.5 there, 0.6 here" in refused("main_tokenbridge", command)


def test_evaluation_never_takes_an_older_checkpoint_for_the_newest(refused, train, vae_path):
    folder = train("run", "--epochs 2 --save_last_freq 1")
    (folder / "checkpoint-last.pth").write_bytes(b"damaged")
    measure = f"{BASE} --evaluate --no_metrics --num_images 4 --resume {folder} --output_dir {folder}"
    assert "checkpoint-last.pth" in refused("main_tokenbridge", f"{measure} --vae_path {vae_path}")
