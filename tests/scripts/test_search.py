"""Metrics of samples: searches over guidance and temperature, measuring during training."""

import json
import os
import shutil
import signal
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine_tokenbridge import Trainer
from evaluation import held_out_likelihood
from models.tokenbridge import TokenBridge
from tests.conftest import FID, SHORT, TINY, load, scalars, write_images
from tests.scripts.conftest import BASE, all_pixels, averaged, pictures, pixels
from util.errors import UserError

# --------------------------------------------------------------------------------------------------------------------
# Searches.


def test_a_search_is_taken_up_only_where_it_was_measured_alike(
    run, weights, tmp_path, sampler, decoder, quick_inception, fid_stats, measured
):
    reference = shutil.copytree(
        write_images(tmp_path / "reference", size=16) / "train" / "class0", tmp_path / "ref"
    )
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
    assert [
        row["images"] for row in json.loads((tmp_path / "out" / "search.json").read_text())
    ] == [4, 4]
    run("main_tokenbridge", second)
    assert rows() == [3, 4]
    run("main_tokenbridge", f"{second} --reference {reference}")
    assert rows() == [5, 6]
    path = tmp_path / "weights" / "checkpoint-last.pth"
    content = torch.load(path, weights_only=True)
    content["model_ema"]["mask_token"] += 1
    torch.save(content, path)
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
    common = (
        f"{weights} --evaluate --num_images 4 --cfg 1 2 --output_dir {tmp_path}/out --num_workers 0"
    )
    run("main_tokenbridge", f"{common} {quick_inception.flag} --fid_stats {fid_stats[0]}")
    before = fid_stats[0].stat()
    np.savez(fid_stats[0], mu=np.ones(2048), sigma=np.eye(2048))
    os.utime(fid_stats[0], ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size, too
    run("main_tokenbridge", f"{common} {quick_inception.flag} --fid_stats {fid_stats[0]}")
    assert measured.call_count == 4


# --------------------------------------------------------------------------------------------------------------------
# Figures and searches, with Inception.


def test_evaluation_measures_and_exports(run, weights, inception, stats, photographs, tmp_path):
    measuring = (
        f"--fid_stats {stats} --reference {photographs}/sharp --inception_weights {inception}"
    )
    common = (
        f"{weights} --evaluate --num_images 8 --num_iter 3 {measuring} --output_dir {tmp_path}/out"
    )
    run("main_tokenbridge", f"{common} --save_npz --keep_images")
    figures = json.loads((tmp_path / "out" / "samples.json").read_text())
    names = {
        "frechet_inception_distance",
        "inception_score_mean",
        "inception_score_std",
        "precision",
        "recall",
    }
    assert (
        names <= set(figures)
        and figures["images"] == 8
        and figures["seed"] == 0
        and figures["commit"]
    )
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (8, 16, 16, 3)
        assert np.array_equal(arrays["arr_0"], np.stack(all_pixels(tmp_path / "out" / "samples")))
    run(
        "main_metrics",
        f"--images {tmp_path}/out/samples {measuring} --json {tmp_path}/again.json --device cpu",
    )
    again = json.loads((tmp_path / "again.json").read_text())
    assert all(again[name] == pytest.approx(figures[name], rel=1e-5) for name in names)


def test_images_are_removed_once_they_are_measured(
    run, weights, quick_inception, measured, tmp_path, sampler
):
    common = f"{weights} --evaluate --num_images 8 {quick_inception.flag} --output_dir {tmp_path}/out --num_workers 0"
    run("main_tokenbridge", common)
    assert (
        not (tmp_path / "out" / "samples").exists() and (tmp_path / "out" / "samples.png").exists()
    )
    measured.side_effect = RuntimeError("broken")
    with pytest.raises(RuntimeError):
        run("main_tokenbridge", common)
    assert len(pictures(tmp_path / "out" / "samples")) == 8


def test_a_search_makes_a_table_and_a_heat_map(
    run, weights, quick_inception, fid_stats, tmp_path, monkeypatch, sampler
):
    counted = mock.Mock(
        side_effect=lambda features, *_: {
            "frechet_inception_distance": 5.0,
            "inception_score_mean": 2.0,
            "precision": 10 * sampler.calls[-1]["cfg"]
            + sampler.calls[-1]["temperature"],  # tells one pair's images
        }
    )
    monkeypatch.setattr("util.metrics.compute.compute_metrics", counted)
    run(
        "main_tokenbridge",
        f"{weights} --evaluate --num_images 4 --num_iter 2 --cfg 1.0 3.5 --temperature 0.9 1.0 "
        f"--fid_stats {fid_stats[0]} {quick_inception.flag} --output_dir {tmp_path}/out",
    )
    rows = json.loads((tmp_path / "out" / "search.json").read_text())
    assert [(row["cfg"], row["temperature"]) for row in rows] == [
        (1.0, 0.9),
        (1.0, 1.0),
        (3.5, 0.9),
        (3.5, 1.0),
    ]
    assert (
        "| 3.5 | 0.9 | 5 | 2 |" in (tmp_path / "out" / "search.md").read_text()
        and counted.call_count == 4
    )
    with Image.open(tmp_path / "out" / "search.png") as picture:
        assert picture.size[0] > 500
    # Every pair is sampled as its row says, and each row holds the figures of its own images.
    pairs = list(zip(sampler.all("cfg"), sampler.all("temperature"), strict=True))
    assert pairs == [(row["cfg"], row["temperature"]) for row in rows]
    for cfg, temperature in pairs:
        about = json.loads(
            (tmp_path / "out" / f"samples-cfg{cfg:g}-t{temperature:g}.json").read_text()
        )
        assert (about["settings"]["cfg"], about["settings"]["temperature"]) == (cfg, temperature)
    assert [row["precision"] for row in rows] == [10.9, 11.0, 35.9, 36.0]
    assert all(row["images"] == 4 for row in rows)


def test_an_interrupted_search_keeps_what_it_measured(
    run, weights, quick_inception, fid_stats, tmp_path, monkeypatch
):
    counted = mock.Mock(
        side_effect=lambda *_: {"frechet_inception_distance": 5.0, "inception_score_mean": 2.0}
    )
    monkeypatch.setattr("util.metrics.compute.compute_metrics", counted)
    common = f"{weights} --evaluate --num_images 4 --num_iter 2 --fid_stats {fid_stats[0]} {quick_inception.flag}"
    common += f" --output_dir {tmp_path}/out --cfg 1.0 2.0 --temperature 1.0"
    run("main_tokenbridge", common)
    (tmp_path / "out" / "samples-cfg2-t1.json").unlink()
    run("main_tokenbridge", common)
    assert counted.call_count == 3  # two pairs, then the one whose figures were lost
    run("main_tokenbridge", f"{common} --num_iter 3")
    assert counted.call_count == 5


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
    assert pairs == 2 * [
        (1, 0.5),
        (1, 0.9),
        (3, 0.5),
        (3, 0.9),
    ]  # after the second epoch and the last
    for call, name in zip(
        sampler.calls[3:5], ("checkpoint-last.1.pth", "checkpoint-last.pth"), strict=True
    ):
        assert torch.equal(
            call["mask_token"], averaged(out, name, "model" if no_ema else "model_ema")
        )
    assert not torch.equal(averaged(out), averaged(out, part="model"))
    log = EventAccumulator(str(out)).Reload()
    for value, (cfg, temperature) in enumerate(pairs[:4], 1):
        events = log.Scalars(f"eval/{FID}-cfg{cfg:g}-t{temperature:g}")
        assert [(event.step, event.value) for event in events] == [(8, value), (12, value + 4)]
    assert (
        f"eval/{FID}-cfg1" not in log.Tags()["scalars"]
        and "eval/images-cfg1-t0.5" not in log.Tags()["scalars"]
    )
    if not no_ema:
        # Begun anew in the same folder, without metrics: the pictures are the new run's, unless its weights are equal.
        for seed, sampled in ((1, 8), (2, 8), (2, 0)):
            sampler.calls.clear()
            (out / "checkpoint-last.pth").unlink()  # or it would not start
            run("main_tokenbridge", f"{command} --no_metrics --seed {seed}")
            assert len(sampler.calls) == sampled


# --------------------------------------------------------------------------------------------------------------------
# Online evaluation.


@pytest.fixture
def online(cached, vae_path, images, tmp_path) -> str:
    """Flags of a run that saves and measures after its second epoch, 8 images in 4 chunks, and after its third."""
    shutil.copytree(cached, tmp_path / "val")
    return (
        f"{BASE} --epochs 3 --save_last_freq 9 --eval_freq 2 --use_cached --cached_path {cached} --vae_path {vae_path} "
        f"--online_eval --no_metrics --num_images 8 --eval_bsz 2 --num_iter 2 --online_nll "
        f"--cached_val_path {tmp_path}/val --output_dir {tmp_path}/run --resume {tmp_path}/run"
    )


def stopped(run, command: str, status: int) -> None:
    """Runs a training, which must end with ``status``."""
    with pytest.raises(SystemExit) as stop:
        run("main_tokenbridge", command)
    assert stop.value.code == status


def test_a_signal_ends_an_evaluation_after_its_chunk_and_the_run_takes_it_up(
    run, online, tmp_path, sampler, decoder, capsys, monkeypatch
):
    note, folder = sampler.note, tmp_path / "run"

    def signalled(*args, **kwargs):
        if len(sampler.calls) == 1:
            signal.raise_signal(signal.SIGUSR1)
        return note(*args, **kwargs)

    monkeypatch.setattr(sampler, "note", signalled)
    stopped(run, online, 75)
    assert (
        f"stopped: by SIGUSR1 while measuring after epoch 1; start the same command with --resume {folder}"
        in (capsys.readouterr().err)
    )
    assert load(folder)["epoch"] == 1 and len(sampler.calls) == 2
    assert len(list((folder / "online_eval" / "epoch0001-cfg1").iterdir())) == 4
    assert "eval/nats_per_dim" not in EventAccumulator(str(folder)).Reload().Tags()["scalars"]

    likelihood, calls = held_out_likelihood, []
    monkeypatch.setattr(
        "evaluation.held_out_likelihood",
        lambda *args, **how: calls.append(1) or likelihood(*args, **how),
    )
    run("main_tokenbridge", online)
    # What was there stays; then the evaluation after the last epoch.
    assert [call["labels"].tolist() for call in sampler.calls[2:]] == [
        [2, 2],
        [3, 3],
        *([n, n] for n in range(4)),
    ]
    assert len(calls) == 1 and set(scalars(folder, "eval/nats_per_dim")) == {8, 12}
    # Nothing is left to do.
    run("main_tokenbridge", online)
    assert len(sampler.calls) == 8 and len(calls) == 1


def test_a_signal_ends_a_likelihood_after_its_batch_on_both_processes(
    run_two, online, tmp_path, monkeypatch, capfd
):
    forward, batches = TokenBridge.forward, []

    def signalled(model, *args):
        if not model.training:
            batches.append(1)
            if len(batches) == 1 and torch.distributed.get_rank() == 1:
                signal.raise_signal(signal.SIGTERM)
            assert len(batches) <= 4  # mask ratios of a batch
        return forward(model, *args)

    monkeypatch.setattr(TokenBridge, "forward", signalled)
    run_two("main_tokenbridge", online, status=75)
    assert "stopped: by SIGTERM while measuring after epoch 1" in capfd.readouterr().err
    assert load(tmp_path / "run")["epoch"] == 1


def test_an_evaluation_that_fails_loses_no_training_and_is_repeated(
    run, run_two, online, tmp_path, sampler, decoder, capfd, monkeypatch
):
    full, folder = mock.Mock(side_effect=UserError("cannot write it: disk full")), tmp_path / "run"
    with mock.patch("util.metrics.sample_folder.save_png", full):
        run_two("main_tokenbridge", online, status=2)
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert lines and all(
        line.startswith("error: cannot write it: disk full (2 of 2 ranks") for line in lines
    )
    assert load(folder)["epoch"] == 1 and not list((folder / "online_eval").glob("*.png"))
    trained = load(folder)["model"]["mask_token"]
    monkeypatch.setattr(Trainer, "step", mock.Mock(side_effect=AssertionError))  # none comes first
    with pytest.raises(AssertionError):
        run("main_tokenbridge", online)
    assert (folder / "online_eval" / "epoch0001-cfg1.png").exists() and len(sampler.calls) == 4
    assert torch.equal(load(folder)["model"]["mask_token"], trained)


def test_online_evaluation_samples_with_and_without_guidance(
    run, cached, vae_path, tmp_path, sampler
):
    run(
        "main_tokenbridge",
        f"{TINY} {SHORT} --epochs 2 --use_cached --cached_path {cached} --vae_path {vae_path} "
        f"--output_dir {tmp_path}/run --online_eval --no_metrics --eval_freq 1 --num_images 4 --num_iter 2 --cfg 3.0",
    )
    folders = sorted(
        path.name for path in (tmp_path / "run" / "online_eval").iterdir() if path.is_dir()
    )
    assert folders == [f"epoch000{epoch}-cfg{cfg}" for epoch in (0, 1) for cfg in (1, 3)]
    assert sampler.all("cfg") == [1, 3, 1, 3] and {call["num_iter"] for call in sampler.calls} == {
        2
    }
    assert all(call["labels"].tolist() == [0, 1, 2, 3] for call in sampler.calls)
    averages = [
        torch.load(tmp_path / "run" / f"checkpoint-last{age}.pth", weights_only=True)["model_ema"][
            "mask_token"
        ]
        for age in (".1", "")
    ]
    for call, epoch in zip(sampler.calls, (0, 0, 1, 1), strict=True):
        assert torch.equal(call["mask_token"], averages[epoch])


@pytest.mark.parametrize("flag", ["", "--no_ema"])
def test_measurements_during_training_are_of_that_epochs_averages_or_weights(
    train, tmp_path, vae_path, trace, flag
):
    online = f"--online_eval --no_metrics --num_images 4 --num_iter 2 --cfg 3 1 --vae_path {vae_path} {flag}"
    for seed in (
        (2,) if flag else (1, 2)
    ):  # pictures of another run in the same folder are not taken for this one's
        trace.clear()
        (tmp_path / "run" / "checkpoint-last.pth").unlink(
            missing_ok=True
        )  # or the second would not start
        folder = train("run", f"--epochs 3 --eval_freq 2 --ema_rate 0.5 --seed {seed} {online}")
        content, pictures = (
            load(folder),
            sorted(path.name for path in (folder / "online_eval").iterdir() if path.is_dir()),
        )
        assert pictures == [f"epoch000{epoch}-cfg{cfg}" for epoch in (1, 2) for cfg in (1, 3)]
        assert [sampled["cfg"] for sampled in trace.sampled] == [1.0, 3.0, 1.0, 3.0]
        weights = [sampled["class_emb"] for sampled in trace.sampled]
        assert torch.equal(
            weights[3], content["model" if flag else "model_ema"]["class_emb.weight"]
        )
        assert not torch.equal(weights[1], weights[3])
        assert all(batch["training"] for batch in trace.batches)


def test_online_metrics_go_to_tensorboard(
    run, images, vae_path, quick_inception, fid_stats, tmp_path, monkeypatch, sampler
):
    monkeypatch.setattr(
        "util.metrics.compute.compute_metrics",
        lambda *_: {
            "frechet_inception_distance": 5.0,
            "inception_score_mean": 2.0,
            "precision": 10 * sampler.calls[-1]["cfg"],
        },
    )
    run(
        "main_tokenbridge",
        f"{TINY} --data_path {images} --vae_path {vae_path} --epochs 1 --online_eval --num_images 4 --num_iter 2 "
        f"--cfg 2.5 --fid_stats {fid_stats[0]} {quick_inception.flag} --output_dir {tmp_path}/run",
    )
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    for name, cfg in {"cfg1": 1, "cfg2.5": 2.5}.items():
        assert [
            event.value for event in log.Scalars(f"eval/frechet_inception_distance-{name}")
        ] == [5.0]
        events = log.Scalars(f"eval/precision-{name}")
        assert [(event.step, event.value) for event in events] == [(4, 10 * cfg)]
    assert not [
        path for path in (tmp_path / "run" / "online_eval").iterdir() if path.is_dir()
    ]  # measured, removed
