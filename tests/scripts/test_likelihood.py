"""Held-out likelihood: as a command, during training, over processes."""

import json
import math
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluation import held_out_likelihood
from models.tokenbridge import TokenBridge
from models.tokenizer import CachedMoments
from models.vae import DiagonalGaussianDistribution
from tests.conftest import SHORT, SMALL, TINY, filled
from tests.scripts.conftest import BASE, FACTOR, averaged, seen

# --------------------------------------------------------------------------------------------------------------------
# Likelihood.


@pytest.fixture
def losses(monkeypatch):
    """TokenBridge.forward outside training: the mean label; and what it is given."""
    calls, original = [], TokenBridge.forward

    def forward(self, latents, labels, mask=None):
        if self.training:
            return original(self, latents, labels, mask)
        calls.append((latents, labels, mask, self.backbone.mask_token.detach().clone()))
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
        assert (
            torch.allclose(latents, 0.5 * (mean + std * noise), atol=1e-6) and noise.abs().max() > 1
        )
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
    assert [(e.step, e.value) for e in log.Scalars("eval/nats_per_dim")] == [(4, 1.5), (8, 1.5)]


def test_likelihood_is_a_channels_also_where_groups_are_predicted():
    model = filled(TokenBridge(**{**SMALL, "quant_levels": 4}, channels_per_group=2))
    for head in model.head.channel_heads:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    loader = [
        (torch.cat([torch.randn(4, 16, 4, 4), torch.zeros(4, 16, 4, 4)], dim=1), torch.arange(4))
    ]
    figures = held_out_likelihood(model, CachedMoments(1.0), loader, torch.device("cpu"), "fp32")
    assert figures["bits_per_dim"] == pytest.approx(2, abs=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Likelihood of models, as a command, and in training.


def test_likelihood_of_a_model_that_knows_nothing_is_the_uniform_ones():
    model = TokenBridge(**SMALL)
    for head in model.head.channel_heads:
        torch.nn.init.zeros_(head.weight)
    moments = torch.cat([torch.randn(6, 16, 4, 4), torch.zeros(6, 16, 4, 4)], dim=1)
    loader = [(moments[:4], torch.arange(4)), (moments[4:], torch.arange(2))]
    figures = held_out_likelihood(model, CachedMoments(1.0), loader, torch.device("cpu"), "fp32")
    assert figures["bits_per_dim"] == pytest.approx(4, abs=1e-5) and figures["images"] == 6
    assert figures["nats_per_dim"] == pytest.approx(4 * math.log(2), abs=1e-5)


def test_likelihood_does_not_depend_on_the_batches(small_model):
    moments = torch.cat([torch.randn(6, 16, 4, 4), torch.zeros(6, 16, 4, 4)], dim=1)
    labels = torch.arange(6) % 4
    values = []
    for size in (1, 4, 6):
        torch.manual_seed(size)
        loader = list(zip(moments.split(size), labels.split(size), strict=True))
        values.append(
            held_out_likelihood(
                small_model.train(), CachedMoments(1.0), loader, torch.device("cpu"), "fp32"
            )
        )
        assert small_model.training
    assert values[0]["nats_per_dim"] == pytest.approx(values[1]["nats_per_dim"], rel=1e-5)
    assert values[0]["nats_per_dim"] == pytest.approx(values[2]["nats_per_dim"], rel=1e-5)


def test_likelihood_as_a_command_and_in_training(run, refused, weights, images, vae_path, tmp_path):
    shutil.copytree(images / "train", images / "val")
    data = f"--data_path {images}"
    run(
        "main_tokenbridge",
        f"{weights} --evaluate_nll {data} --output_dir {tmp_path}/a --precision fp32",
    )
    direct = json.loads((tmp_path / "a" / "likelihood.json").read_text())
    assert direct["images"] == 16 and direct["bits_per_dim"] == pytest.approx(
        direct["nats_per_dim"] / math.log(2)
    )
    cache = f"--img_size 16 --vae_path {vae_path} --data_path {images} --num_workers 0"
    for split in ("train", "val"):
        run("main_cache", f"{cache} --split {split} --cached_path {tmp_path}/{split}")
    cached = f"--use_cached --cached_path {tmp_path}/train --cached_val_path {tmp_path}/val"
    run(
        "main_tokenbridge",
        f"{weights} --evaluate_nll {cached} --output_dir {tmp_path}/b --precision fp32",
    )
    assert json.loads((tmp_path / "b" / "likelihood.json").read_text())[
        "nats_per_dim"
    ] == pytest.approx(direct["nats_per_dim"], rel=1e-3)
    run(
        "main_tokenbridge",
        f"{TINY} {cached} --online_nll --eval_freq 1 --epochs 2 --output_dir {tmp_path}/run",
    )
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in log.Scalars("eval/bits_per_dim")] == [4, 8]
    assert [event.value for event in log.Scalars("epoch") if event.step in (4, 8)][-1] == 2
    assert "--cached_val_path" in refused(
        "main_tokenbridge", f"{TINY} --use_cached --cached_path x --online_nll"
    )


def test_all_processes_average_the_same_weights(run, run_two, images, vae_path, tmp_path):
    cache = f"--img_size 16 --vae_path {vae_path} --data_path {images} --num_workers 0 --cached_path {tmp_path}/cache"
    run("main_cache", cache)
    data = f"--use_cached --cached_path {tmp_path}/cache --cached_val_path {tmp_path}/cache --precision fp32 --device cpu"
    run_two(
        "main_tokenbridge", f"{TINY} {data} --epochs 1 --online_nll --output_dir {tmp_path}/run"
    )
    # Each of the two processes measured half of the images with its own average; the file holds the first one's.
    online = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("eval/nats_per_dim")[-1].value
    run(
        "main_tokenbridge",
        f"{TINY} {data} --evaluate_nll --resume {tmp_path}/run --output_dir {tmp_path}/run",
    )
    saved = json.loads((tmp_path / "run" / "likelihood.json").read_text())["nats_per_dim"]
    assert online == pytest.approx(saved, rel=1e-4)


def test_held_out_likelihoods_are_of_scaled_samples_of_plain_images(
    run, refused, train, cached, images, trace
):
    folder = train("run")
    measure = f"{BASE} --resume {folder} --output_dir {folder} --evaluate_nll"
    trace.clear()
    run("main_tokenbridge", f"{measure} --use_cached --cached_val_path {cached}")
    assert not any(mirrored for epoch in seen(trace, cached) for _, mirrored in epoch)
    assert len(trace.batches) == 16  # four batches, four masks each
    for i, batch in enumerate(trace.batches):
        assert (
            torch.equal(batch["latents"], FACTOR * trace.drawn[i // 4]["latents"])
            and not batch["training"]
        )


def test_measurements_are_of_all_images_or_none(run, refused, train, images, vae_path):
    folder = train("run")
    shutil.copytree(images / "train", images / "val")
    (images / "val" / "class1" / "2.png").write_bytes(b"no image")
    measure = f"{BASE} --data_path {images} --vae_path {vae_path}"
    line = refused(
        "main_tokenbridge",
        f"{measure} --output_dir {folder}2 --epochs 1 --online_nll --skip_bad_images",
    )
    assert "class1/2.png" in line and "skip_bad_images" not in line
    evaluate = f"{measure} --resume {folder} --output_dir {folder} --evaluate_nll"
    assert "class1/2.png" in refused("main_tokenbridge", evaluate)
    assert "--skip_bad_images is for training" in refused(
        "main_tokenbridge", f"{evaluate} --skip_bad_images"
    )


@pytest.mark.parametrize("kind", ["images", "cache", "packed"])
def test_held_out_folders_that_are_numbers_are_labels(
    run, train, images, vae_path, tmp_path, losses, caplog, kind
):
    folder = train("run")
    for label, name in enumerate(("00", "1", "02", "3")):  # as text, 02 goes before 1
        shutil.copytree(images / "train" / f"class{label}", images / "val" / name)
    source = f"--data_path {images} --vae_path {vae_path}"
    if kind != "images":
        cache = f"--img_size 16 --num_workers 0 --split val --cached_path {tmp_path}/val"
        run("main_cache", f"{source} {cache}")
        run(
            "tools.pack",
            f"--cached_path {tmp_path}/val --output_dir {tmp_path}/packed --num_workers 0",
        )
        source = (
            f"--use_cached --cached_val_path {tmp_path}/{'val' if kind == 'cache' else 'packed'}"
        )
    losses.clear()
    with caplog.at_level("INFO", logger="tokenbridge"):
        run(
            "main_tokenbridge",
            f"{BASE} --resume {folder} --output_dir {folder} --evaluate_nll {source}",
        )
    labels = torch.cat(
        [labels for _, labels, _, _ in losses[::4]]
    )  # each batch is measured with four masks
    assert labels.tolist() == 4 * [0] + 4 * [2] + 4 * [1] + 4 * [3]
    assert "class names are numbers, and are used as the labels in training" in caplog.text


def test_held_out_folders_that_are_other_numbers_are_refused(refused, train, images, vae_path):
    folder = train("run")
    for label in range(4):
        shutil.copytree(images / "train" / f"class{label}", images / "val" / f"{label + 1}")
    measure = f"{BASE} --resume {folder} --output_dir {folder} --evaluate_nll --data_path {images}"
    line = refused("main_tokenbridge", f"{measure} --vae_path {vae_path}")
    assert "numbers, from 1 to 4: they must be different ones of 0 to 3" in line
