"""What evaluation hands to the sampler, the decoder and the metrics, and what it makes of their answers."""

import json
import math
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine_tokenbridge import held_out_likelihood
from models.tokenbridge import TokenBridge
from models.vae import DiagonalGaussianDistribution
from tests.conftest import SHORT, SMALL, TINY, filled, write_images
from util import metrics
from util.images import confidence_maps

FID, IS = "frechet_inception_distance", "inception_score_mean"


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
# Metrics.


def spread(count: int, width: float) -> dict[str, torch.Tensor]:
    """Features of images that differ by ``width`` in two dimensions."""
    pool, logits = torch.zeros(count, 2048), torch.zeros(count, 1008)
    pool[:, :2] = width * torch.rand(count, 2)
    logits[:, :4] = torch.rand(count, 4)
    return {metrics.POOL: pool, metrics.LOGITS: logits}


def test_precision_is_of_the_images_and_recall_of_the_reference(monkeypatch):
    distances = mock.Mock(side_effect=lambda a, b, **_: {FID: 7.0})
    monkeypatch.setattr(metrics, "fid_statistics_to_metric", distances)
    images, reference = spread(60, 0.01), spread(60, 1.0)
    images[metrics.POOL][:, :2] += reference[metrics.POOL][0, :2]
    # All images lie among the reference's, which are hardly covered by them.
    figures = metrics.compute_metrics(images, None, reference)
    assert figures["precision"] == 1 and figures["recall"] < 0.2 and figures[FID] == 7
    # FID is against the statistics where there are any.
    stats = {"mu": np.ones(2048), "sigma": np.eye(2048)}
    metrics.compute_metrics(images, stats, reference)
    assert distances.call_args.args[1] is stats
    assert np.allclose(distances.call_args_list[0].args[1]["mu"][:2], reference[metrics.POOL][:, :2].mean(0), atol=1e-6)
    assert not {"precision", "recall"} & set(metrics.compute_metrics(images, stats))
    assert FID not in metrics.compute_metrics(images)


def test_measuring_reads_images_and_reference_where_the_flags_say(run, tmp_path, quick_inception, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "fid_statistics_to_metric", lambda a, b, **_: {FID: 7.0})
    random = np.random.RandomState(0)
    for name, spread_of in {"images": 4, "reference": 250}.items():
        (tmp_path / name).mkdir()
        for number in range(20):
            colour = (120 + random.randint(-spread_of // 2, spread_of // 2, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(np.broadcast_to(colour, (24, 24, 3))).save(tmp_path / name / f"{number}.png")
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
    run("main_metrics", f"{common} --img_size 12 --save_stats {tmp_path}/s.npz --fid_stats {tmp_path}/s.npz")
    assert {x.shape[-1] for x in quick_inception.all("x")[-3:]} == {24} and "FID" in capsys.readouterr().out
    with np.load(tmp_path / "s.npz") as stats:
        assert 0.4 < stats["mu"][0] < 0.6 and 0 < stats["sigma"][0, 0] < 0.001 and not stats["mu"][3:].any()


# --------------------------------------------------------------------------------------------------------------------
# Noise on confidences.


def test_noise_on_confidences_falls_to_nothing_over_the_steps():
    model = filled(TokenBridge(**{**SMALL, "vae_embed_dim": 4}))
    options = {"temperature": 0, "order": "confidence", "return_confidence": True}
    ((confidence,),) = [model.sample_tokens(1, 1, **options)[1]]
    # Of two steps the first takes 5 of 16 tokens; those of the second have seen them, and have other confidences.
    noisy = model.sample_tokens(200, 2, **options, confidence_noise=2.0)[1]
    first = (noisy - confidence).abs() < 1e-4
    assert (first.sum(dim=1) == 5).all()
    gumbel = -torch.log(-torch.log(torch.rand(20_000, 16)))

    def distance(scale: float) -> float:
        """How far shares of images that take a token first are from those that noise of this scale gives."""
        chosen = (confidence + scale * gumbel).topk(5).indices
        expected = torch.zeros(20_000, 16).scatter(1, chosen, 1.0).mean(dim=0)
        return (first.float().mean(dim=0) - expected).abs().mean().item()

    # Half of the noise at the first of two steps, as none is left at the second.
    assert distance(1.0) < 0.03 < min(distance(2.0), distance(0.0))
