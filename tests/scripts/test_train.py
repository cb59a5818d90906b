"""What a run does around the model: order, mirror images, rates, averages, saving, resuming, and several processes."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.tokenbridge import TokenBridge
from tests.conftest import ROOT, TINY, write_images
from tests.scripts.trace import Trace
from util import misc

FACTOR = 0.5  # of the small tokenizer
#: A head of steps in milliseconds, and fp32, which every CPU computes alike.
QUICK = f"{TINY} --head_dim 32 --head_depth 1 --head_heads 2 --precision fp32 --device cpu"
#: 4 steps an epoch.
BASE = f"{QUICK} --warmup_epochs 0 --lr 1e-3"


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    """Nothing is measured, and the peak that utilization is told against is known."""
    monkeypatch.setattr(misc, "matmul_flops", lambda device, precision: 1e9)


@pytest.fixture
def train(run, cached, tmp_path):
    """``train("name", "--flag value")`` trains on the cache into a folder of that name, which it returns."""

    def train(name: str, flags: str = "--epochs 1") -> Path:
        run("main_tokenbridge", f"{BASE} --use_cached --cached_path {cached} --output_dir {tmp_path}/{name} {flags}")
        return tmp_path / name

    return train


def load(folder: Path, name: str = "checkpoint-last.pth") -> dict:
    return torch.load(folder / name, weights_only=True)


def change(folder: Path, **entries) -> dict:
    """Rewrites a run's checkpoint; entries that are None are taken out."""
    content = load(folder) | entries
    content = {name: value for name, value in content.items() if value is not None}
    torch.save(content, folder / "checkpoint-last.pth")
    return content


def learned(content: dict, key: str) -> dict[str, torch.Tensor]:
    """The learned entries of a checkpoint's ``model`` or ``model_ema``."""
    return {name: content[key][name] for name in content["model_ema"]}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


def expected_average(trace: Trace, content: dict) -> torch.Tensor:
    """What rate 0.5 makes of a run's class embeddings, one batch a step, from its start to its end."""
    average, *weights = [batch["class_emb"] for batch in trace.batches]
    for weight in [*weights, content["model"]["class_emb.weight"]]:
        average = average.lerp(weight, 0.5)
    return average


def scalars(folder: Path, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in EventAccumulator(str(folder)).Reload().Scalars(tag)}


class Views:
    """Tells a cache's items, or a folder's images, by their values."""

    def __init__(self, cache: Path):
        self.known = {}
        for path in sorted(cache.glob("*/*.npz")):
            with np.load(path) as arrays:
                for name in ("moments", "moments_flip"):
                    self.known[arrays[name].tobytes()] = (f"{path.parent.name}/{path.stem}", name == "moments_flip")

    def of(self, rows: torch.Tensor) -> list[tuple[str, bool]]:
        """Name of each, and whether it is the mirror image."""
        return [self.known[row.numpy().tobytes()] for row in rows]


def seen(trace: Trace, cache: Path, each: int = 16) -> list[list[tuple[str, bool]]]:
    """What each epoch of a traced run on a cache saw."""
    views = Views(cache)
    rows = [view for drawn in trace.drawn for view in views.of(drawn["moments"])]
    return [rows[i : i + each] for i in range(0, len(rows), each)]


# --------------------------------------------------------------------------------------------------------------------
# What the model sees.


def test_each_epoch_and_each_seed_has_its_own_order_mirror_images_and_masks(train, cached, trace):
    train("one", "--epochs 3 --seed 1")
    labels = [label for batch in trace.batches for label in batch["labels"].tolist()]
    epochs = seen(trace, cached)
    assert len(epochs) == 3
    assert [int(name[5]) for epoch in epochs for name, _ in epoch] == labels  # class0/1.png
    assert not any(batch["gradients"] for batch in trace.batches)  # of the step before
    train("two", "--epochs 1 --seed 7")
    epochs = seen(trace, cached)
    assert all(len({name for name, _ in epoch}) == 16 for epoch in epochs)
    assert len({tuple(name for name, _ in epoch) for epoch in epochs}) == 4
    assert len({frozenset(name for name, mirrored in epoch if mirrored) for epoch in epochs}) == 4
    assert len({batch["order"].numpy().tobytes() for batch in trace.batches}) == 16
    first = epochs[0]
    trace.clear()
    train("again", "--epochs 1 --seed 1")
    assert seen(trace, cached) == [first]


@pytest.mark.parametrize("source", ["cache", "images"])
def test_training_sees_scaled_samples_of_either_view_or_of_the_plain_one(
    run, cached, images, vae_path, tmp_path, trace, source
):
    data = (
        f"--use_cached --cached_path {cached}" if source == "cache" else f"--data_path {images} --vae_path {vae_path}"
    )
    views = {}
    for flag in ("", "--no_mirror"):
        trace.clear()
        run("main_tokenbridge", f"{BASE} --epochs 3 {data} --output_dir {tmp_path}/run {flag}")
        inputs = [drawn["moments"] for drawn in trace.drawn] if source == "cache" else trace.images
        rows = [row.numpy().tobytes() for batch in inputs for row in batch]
        assert all(len(set(rows[i : i + 16])) == 16 for i in (0, 16, 32))
        views[flag] = set(rows)
    assert len(views["--no_mirror"]) == 16 and 16 < len(views[""]) <= 32
    assert len(views[""] | views["--no_mirror"]) <= 32
    noise = []
    for batch, drawn in zip(trace.batches, trace.drawn, strict=True):
        mean, logvar = drawn["moments"].chunk(2, dim=1)
        assert torch.equal(batch["latents"], FACTOR * drawn["latents"])
        noise.append((drawn["latents"] - mean) / (0.5 * logvar).exp())
    assert torch.stack(noise).std().item() == pytest.approx(1, abs=0.05)
    assert len({row.numpy().tobytes() for batch in noise for row in batch}) == 48


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


def test_batches_that_do_not_fill_a_step_are_left_out(train, trace):
    content = load(train("three", "--epochs 1 --batch_size 3 --accum_iter 2"))  # 16 images: five batches, two steps
    assert [len(batch["labels"]) for batch in trace.batches] == [3] * 4 and len(trace.steps) == 2
    assert content["steps_per_epoch"] == 2


# --------------------------------------------------------------------------------------------------------------------
# Flags.


def test_flags_of_the_model_are_its_own_and_evaluation_takes_them_from_the_weights(run, train, vae_path, trace):
    expected = {
        "patch_size": 2, "buffer_size": 3, "quant_min": -4.0, "quant_max": 3.0, "mask_ratio_min": 0.5,
        "label_drop_prob": 0.3, "attn_dropout": 0.2, "proj_dropout": 0.05,
    }  # fmt: skip
    flags = " ".join(f"--{name} {value}" for name, value in expected.items())
    folder = train("run", f"--epochs 1 --weight_decay 0.3 --checkpoint_blocks head encoder --quant_bits 4 {flags}")
    content = load(folder)
    assert {name: content["config"][name] for name in expected} == expected
    assert content["config"]["grad_checkpointing"] == ["head", "encoder"]
    assert [group["weight_decay"] for group in content["optimizer"]["param_groups"]] == [0.0, 0.3]
    assert all(group["betas"] == (0.9, 0.95) for group in content["optimizer"]["param_groups"])
    bare = (
        f"--num_workers 0 --precision fp32 --device cpu --vae_path {vae_path} --resume {folder} --output_dir {folder}"
    )
    run("main_tokenbridge", f"{bare} --evaluate --no_metrics --num_images 4 --num_iter 2")
    (sampled,) = trace.sampled
    same = {*expected, "quant_levels", "img_size", "class_num"} - {
        "mask_ratio_min", "label_drop_prob", "attn_dropout", "proj_dropout",
    }  # fmt: skip
    assert {name: sampled["config"][name] for name in same} == {name: content["config"][name] for name in same}


def test_values_out_of_range_are_refused_by_name_before_anything_is_read(refused, tmp_path):
    bad = {
        "quant_bits": 0, "img_size": 0, "batch_size": 0, "epochs": 0, "accum_iter": 0, "class_num": 0, "eval_bsz": 0,
        "num_iter": 0, "save_last_freq": 0, "keep_last": 0, "eval_freq": 0, "vae_embed_dim": 0, "vae_stride": 0,
        "patch_size": 0, "attn_dropout": 1.5, "proj_dropout": -0.1, "label_drop_prob": 2, "mask_ratio_min": -1,
        "ema_rate": 1.01, "grad_clip": -1, "weight_decay": -1, "warmup_epochs": -1, "start_epoch": -1,
        "num_workers": -1, "min_lr": -1, "save_every_steps": -1, "max_bad_steps": -1, "channels_per_group": 0,
        "head_dim": 0, "head_depth": -1, "head_heads": 0, "confidence_noise": -1, "gen_seed": -1, "seed": -1,
        "temperature": -0.5,
    }  # fmt: skip
    nowhere = f"--output_dir {tmp_path}/new --use_cached --cached_path {tmp_path}/nowhere"
    for name, value in bad.items():
        assert f"--{name} {value}" in refused("main_tokenbridge", f"{TINY} {nowhere} --{name} {value}")
    online = f"{TINY} {nowhere} --num_images 6 --online_eval"
    assert "--num_images 6 cannot be shared" in refused("main_tokenbridge", online)
    needs = "--evaluate_nll needs --resume"
    assert needs in refused("main_tokenbridge", f"{TINY} {nowhere} --evaluate_nll --cached_val_path x")
    assert not (tmp_path / "new").exists()


def test_rates_and_losses_in_the_log_are_those_of_the_steps(run, vae_path, tmp_path, trace):
    data = write_images(tmp_path / "more", each=12)
    common = f"--data_path {data} --vae_path {vae_path}"
    flags = "--batch_size 2 --epochs 2 --warmup_epochs 1 --min_lr 1e-4 --grad_clip 0.01"
    run("main_tokenbridge", f"{BASE} {common} {flags} --output_dir {tmp_path}/run")  # 24 steps an epoch
    losses = [batch["loss"] for batch in trace.batches]
    # Every 20 steps and at an epoch's end: each the mean of the steps since the last.
    means = {20: losses[:20], 24: losses[20:24], 44: losses[24:44], 48: losses[44:]}
    found = scalars(tmp_path / "run", "train/loss")
    assert found == pytest.approx({step: sum(part) / len(part) for step, part in means.items()}, rel=1e-5)
    last = 1e-4 + 9e-4 * (1 + math.cos(math.pi * 23 / 24)) / 2
    middle = 1e-4 + 9e-4 * (1 + math.cos(math.pi * 19 / 24)) / 2
    rates = {20: 1e-3 * 19 / 24, 24: 1e-3 * 23 / 24, 44: middle, 48: last}
    assert scalars(tmp_path / "run", "train/lr") == pytest.approx(rates, rel=1e-5)
    assert min(scalars(tmp_path / "run", "train/grad_norm").values()) > 0.1  # before they are clipped
    # Utilization and images a second are of one time: their ratio is what an image takes.
    images, used = (
        scalars(tmp_path / "run", f"speed/{tag}") for tag in ("images_per_second", "model_flops_utilization")
    )
    model = TokenBridge.from_config(load(tmp_path / "run")["config"])
    assert 1e9 * used[48] / images[48] == pytest.approx(model.training_flops(), rel=1e-3)


# --------------------------------------------------------------------------------------------------------------------
# Saving and measuring.


def test_checkpoints_come_every_so_many_epochs_or_steps_and_at_the_end(train, trace):
    cases = {
        "--epochs 5 --save_last_freq 2 --batch_size 16": [(1, 0), (3, 0), (4, 0)],
        "--epochs 3 --save_last_freq 100 --save_every_steps 2 --batch_size 8": [(0, 0), (1, 0), (2, 0)],
        "--epochs 2 --save_last_freq 100 --save_every_steps 3": [(-1, 3), (0, 2), (1, 0)],
    }
    for number, (flags, expected) in enumerate(cases.items()):
        trace.clear()
        folder = train(f"run{number}", f"{flags} --keep_last 3")
        assert [(entry["epoch"], entry["step"]) for entry in trace.saved] == expected, flags
        names = ["checkpoint-last.2.pth", "checkpoint-last.1.pth", "checkpoint-last.pth"]
        assert [(load(folder, name)["epoch"], load(folder, name)["step"]) for name in names] == expected


def test_what_killed_runs_left_half_written_is_removed(run, train, cached, images, vae_path, tmp_path):
    left = [tmp_path / "run" / ".checkpoint-last.pth.1.part", cached / "class1" / ".1.png.npz.1.part"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    train("run")
    cache = f"--data_path {images} --cached_path {cached} --num_workers 0 --device cpu"
    run("main_cache", f"--img_size 16 --vae_path {vae_path} {cache}")
    assert not any(path.exists() for path in left)


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


# --------------------------------------------------------------------------------------------------------------------
# Starting and resuming.


def test_weights_start_from_the_seed_or_from_another_runs_averages_or_weights(train):
    stay = "--epochs 1 --lr 0"
    starts = [learned(load(train(f"seed{i}", f"{stay} --seed {seed}")), "model") for i, seed in enumerate((1, 1, 2))]
    assert equal(starts[0], starts[1]) and not torch.equal(starts[0]["mask_token"], starts[2]["mask_token"])
    other = train("other", "--epochs 1 --ema_rate 0.5 --quant_min -4 --quant_max 3")
    for flag, key in {"": "model_ema", "--no_ema": "model"}.items():
        content = load(train(f"from-{key}", f"{stay} --finetune {other} {flag}"))
        assert equal(learned(content, "model"), learned(load(other), key)), key
        assert equal(content["model_ema"], learned(content, "model"))
        assert (content["config"]["quant_min"], content["config"]["quant_max"]) == (-4, 3)


def test_the_average_is_of_the_weights_after_each_step(train, trace):
    content = load(train("run", "--epochs 1 --ema_rate 0.5"))
    assert torch.allclose(content["model_ema"]["class_emb.weight"], expected_average(trace, content), atol=1e-7)


def test_without_averages_in_the_checkpoint_they_start_from_its_weights(train):
    folder = train("run")
    before = change(folder, model_ema=None)
    after = load(train("run", f"--epochs 2 --ema_rate 1 --resume {folder}"))
    assert after["epoch"] == 1
    assert equal(after["model_ema"], before["model"])
    assert not torch.equal(after["model"]["class_emb.weight"], before["model"]["class_emb.weight"])


def test_a_resumed_run_has_the_checkpoints_averages_and_its_own_settings(train):
    folder = train("run", "--epochs 1 --ema_rate 0.5 --weight_decay 0.5")
    before = load(folder)
    after = load(train("run", f"--epochs 2 --ema_rate 1 --weight_decay 0.25 --resume {folder}"))
    assert equal(after["model_ema"], before["model_ema"])
    assert [group["weight_decay"] for group in after["optimizer"]["param_groups"]] == [0.0, 0.25]
    assert after["args"]["ema_rate"] == 1


def test_fp16_clips_unscaled_gradients_and_resumes_with_its_scale(train):
    def norm(content: dict) -> float:
        moments = [state["exp_avg"].norm() ** 2 for state in content["optimizer"]["state"].values()]
        return math.sqrt(sum(moments)) / 0.1  # of the only gradient

    one = "--precision fp16 --batch_size 16 --grad_clip 0.01"
    folder = train("run", f"{one} --epochs 1")
    assert norm(load(folder)) == pytest.approx(0.01, rel=1e-2)
    change(folder, scaler=load(folder)["scaler"] | {"scale": 512.0, "_growth_tracker": 3})
    scaler = load(train("run", f"{one} --epochs 3 --resume {folder}"))["scaler"]  # two more steps
    assert scaler["scale"] == 512 and scaler["_growth_tracker"] == 5


def test_a_bad_step_of_a_resumed_epoch_lists_its_own_files(train, cached, trace, monkeypatch):
    folder = train("run", "--epochs 1")
    change(folder, epoch=-1, step=2)
    trace.clear()
    forward = TokenBridge.forward
    losses = iter([1.0, math.nan])
    monkeypatch.setattr(TokenBridge, "forward", lambda *args: forward(*args) * next(losses))
    train("run", f"--epochs 1 --resume {folder} --max_bad_steps 1")
    (row,) = [json.loads(line) for line in (folder / "bad_steps-rank0.jsonl").read_text().splitlines()]
    assert (row["epoch"], row["step"]) == (0, 3)
    names = [name for name, _ in Views(cached).of(trace.drawn[1]["moments"])]
    assert [f"{Path(path).parent.name}/{Path(path).stem}" for path in row["files"]] == names
    # The figures are of the other step.
    assert scalars(folder, "train/loss")[4] == pytest.approx(trace.batches[0]["loss"], rel=1e-5)


def test_evaluation_never_takes_an_older_checkpoint_for_the_newest(refused, train, vae_path):
    folder = train("run", "--epochs 2 --save_last_freq 1")
    (folder / "checkpoint-last.pth").write_bytes(b"damaged")
    measure = f"{BASE} --evaluate --no_metrics --num_images 4 --resume {folder} --output_dir {folder}"
    assert "checkpoint-last.pth" in refused("main_tokenbridge", f"{measure} --vae_path {vae_path}")


def test_all_caches_of_a_run_are_of_one_tokenizer(refused, cached, vae_path, tmp_path):
    shutil.copytree(cached, tmp_path / "val")
    about = json.loads((cached / "cache.json").read_text())
    (tmp_path / "val" / "cache.json").write_text(json.dumps({**about, "latent_factor": 0.7}))
    use = f"{BASE} --epochs 1 --output_dir {tmp_path}/new --use_cached"
    val = f"--cached_path {cached} --cached_val_path {tmp_path}/val --online_nll"
    assert "latent factors differ" in refused("main_tokenbridge", f"{use} {val}")
    online = f"--cached_path {tmp_path}/val --online_eval --no_metrics --num_images 4 --vae_path {vae_path}"
    assert "latent factors differ" in refused("main_tokenbridge", f"{use} {online}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("call, place", [(2, (-1, 2)), (4, (0, 0))], ids=["amid an epoch", "at its end"])
def test_a_signal_saves_after_its_step_and_handlers_are_put_back(train, trace, monkeypatch, tmp_path, call, place):
    before = signal.signal(signal.SIGUSR1, lambda *_: None)  # lest a missing handler end pytest
    try:
        own = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
        forward = TokenBridge.forward

        def signalled(*args):
            if len(trace.batches) + 1 == call:
                signal.raise_signal(signal.SIGUSR1)
            return forward(*args)

        monkeypatch.setattr(TokenBridge, "forward", signalled)
        with pytest.raises(SystemExit) as stop:
            train("run", "--epochs 3 --ema_rate 0.5")
        assert stop.value.code == 75
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == own
    finally:
        signal.signal(signal.SIGUSR1, before)
    content = load(tmp_path / "run")
    assert (content["epoch"], content["step"]) == place and len(trace.steps) == call
    assert {int(state["step"]) for state in content["optimizer"]["state"].values()} == {call}
    assert torch.allclose(content["model_ema"]["class_emb.weight"], expected_average(trace, content), atol=1e-7)


def test_a_second_interrupt_ends_a_run_at_once(train, trace, monkeypatch):
    forward = TokenBridge.forward

    def interrupted(*args):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        return forward(*args)

    monkeypatch.setattr(TokenBridge, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("run", "--epochs 3")
    assert not trace.steps and not trace.saved


def test_the_cache_of_a_split_is_of_its_images(run, refused, images, vae_path, tmp_path):
    (images / "train").rename(images / "val")
    cache = f"--img_size 16 --vae_path {vae_path} --data_path {images} --num_workers 0 --device cpu"
    assert "train" in refused("main_cache", f"{cache} --cached_path {tmp_path}/train")
    run("main_cache", f"{cache} --cached_path {tmp_path}/val --split val")
    assert len(list((tmp_path / "val").glob("*/*.npz"))) == 16


def test_calibration_is_of_the_same_latents_from_images_as_from_their_cache(run, images, vae_path, train, tmp_path):
    cached = load(train("cached", "--epochs 1 --quant_calibrate --no_mirror"))["config"]
    data = f"--data_path {images} --vae_path {vae_path} --output_dir {tmp_path}/images"
    run("main_tokenbridge", f"{BASE} --epochs 1 --quant_calibrate --no_mirror {data}")
    config = load(tmp_path / "images")["config"]
    for name in ("channel_mean", "channel_std"):
        assert config[name] == pytest.approx(cached[name], abs=1e-4), name


# --------------------------------------------------------------------------------------------------------------------
# The tokenizer.

SMALL_VAE = "--img_size 16 --ch 8 --ch_mult 1 2 --num_res_blocks 1 --vae_embed_dim 4 --num_workers 0 --precision fp32"


def test_the_tokenizer_sees_every_epoch_in_its_own_order_and_follows_its_flags(run, images, tmp_path, trace):
    common = f"{SMALL_VAE} --device cpu --data_path {images} --batch_size 8 --output_dir {tmp_path}"
    orders, finals = {}, {}
    for name, flags in {
        "one": "--epochs 2 --no_mirror --lr 1e-3 --min_lr 1e-4 --warmup_epochs 0",
        "two": "--epochs 1 --no_mirror --seed 7 --lr_schedule constant --lr 2e-3 --warmup_epochs 0",
        "kl": "--epochs 2 --no_mirror --lr 1e-3 --min_lr 1e-4 --warmup_epochs 0 --kl_weight 1e4",
        "mirrored": "--epochs 2",
    }.items():
        trace.clear()
        run("main_vae", f"{common}/{name} {flags}")
        orders[name] = [row.numpy().tobytes() for batch in trace.images for row in batch]
        finals[name] = {tag: scalars(tmp_path / name / "tokenizer_log", f"tokenizer/{tag}") for tag in ("kl", "lr")}
    one, two = orders["one"], orders["two"]
    assert len({tuple(one[:16]), tuple(one[16:32]), tuple(two[:16])}) == 3
    assert len(set(one)) == 16 < len(set(orders["mirrored"]))
    assert finals["one"]["lr"][4] == pytest.approx(1e-4 + 9e-4 * (1 + math.cos(math.pi * 0.75)) / 2)
    assert finals["two"]["lr"] == pytest.approx({2: 2e-3})
    assert finals["kl"]["kl"][4] < 0.98 * finals["one"]["kl"][4]


# --------------------------------------------------------------------------------------------------------------------
# Two processes.


def two_processes(tmp_path: Path, script: str, flags: str, **variables: str) -> tuple[list[dict], list[str], list[int]]:
    """Runs a script in two processes, started as torchrun starts them; their traces, messages and exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in ("0", "1"):
        command = [sys.executable, ROOT / "tests/scripts/trace.py", tmp_path / f"trace{rank}.pt", script]
        environment = {**os.environ, **shared, **variables, "RANK": rank, "LOCAL_RANK": rank}
        started.append(
            subprocess.Popen(
                [*command, *flags.split(), "--device", "cpu"],
                cwd=ROOT,
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=200)[1] for process in started]
    statuses = [process.returncode for process in started]
    assert all((tmp_path / f"trace{rank}.pt").exists() for rank in range(2)), said
    return [torch.load(tmp_path / f"trace{rank}.pt", weights_only=True) for rank in range(2)], said, statuses


def test_two_processes_share_data_and_gradients_but_no_draws(run, cached, tmp_path):
    common = f"{QUICK} --use_cached --cached_path {cached} --no_mirror --quant_calibrate"
    flags = f"{common} --batch_size 2 --accum_iter 2 --epochs 2 --warmup_epochs 0 --lr_schedule constant --blr 0.032"
    traces, said, statuses = two_processes(tmp_path, "main_tokenbridge", f"{flags} --output_dir {tmp_path}/run")
    assert statuses == [0, 0], said
    # 8 images a step, 4 of each process; every image once an epoch.
    content = load(tmp_path / "run")
    assert (content["world_size"], content["steps_per_epoch"]) == (2, 2)
    assert content["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.032 * 8 / 256)
    views = Views(cached)
    rows = [[name for drawn in trace["drawn"] for name, _ in views.of(drawn["moments"])] for trace in traces]
    assert [len({*rows[0][part], *rows[1][part]}) for part in (slice(8), slice(8, 16))] == [16, 16]
    assert rows[0][:8] != rows[0][8:]
    orders = {batch["order"].numpy().tobytes() for trace in traces for batch in trace["batches"]}
    assert len(orders) == 2 * len(traces[0]["batches"]) == 16
    # Of equal weights all along, each step's gradients are those of both.
    assert len(traces[0]["steps"]) == 4
    assert all(torch.equal(a, b) for a, b in zip(traces[0]["steps"], traces[1]["steps"], strict=True))
    losses = [sum(batch["loss"] for batch in trace["batches"][-4:]) / 4 for trace in traces]
    assert scalars(tmp_path / "run", "train/loss")[4] == pytest.approx(sum(losses) / 2, rel=1e-5)
    # The first alone writes and speaks.
    assert traces[0]["saved"] and not traces[1]["saved"]
    assert len(list((tmp_path / "run").glob("events.*"))) == 1
    assert "whole batch 8" in said[0] and "whole batch" not in said[1]
    run("main_tokenbridge", f"{common} --epochs 1 --lr 0 --output_dir {tmp_path}/alone")
    alone = load(tmp_path / "alone")["config"]
    for name in ("channel_mean", "channel_std"):
        assert content["config"][name] == pytest.approx(alone[name], rel=1e-4), name


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(cached, tmp_path):
    flags = f"{BASE} --batch_size 2 --epochs 3 --use_cached --cached_path {cached} --output_dir {tmp_path}/run"
    traces, said, statuses = two_processes(tmp_path, "main_tokenbridge", flags, SIGNAL_RANK="1")
    assert statuses == [75, 75]
    content = load(tmp_path / "run")
    assert len(traces[0]["steps"]) == len(traces[1]["steps"]) == content["step"] < 4
    assert torch.equal(traces[0]["steps"][-1], traces[1]["steps"][-1])
    assert "by SIGUSR1" in said[1] and "another process" in said[0]


@pytest.mark.slow
def test_two_processes_train_one_tokenizer(images, tmp_path):
    flags = f"{SMALL_VAE} --data_path {images} --output_dir {tmp_path}/vae --batch_size 4 --epochs 2 --no_mirror"
    traces, said, statuses = two_processes(tmp_path, "main_vae", flags)
    assert statuses == [0, 0], said
    rows = [[row.numpy().tobytes() for batch in trace["images"] for row in batch] for trace in traces]
    assert len({*rows[0][:8], *rows[1][:8]}) == 16
    assert len(traces[0]["steps"]) == 4 and torch.equal(traces[0]["steps"][-1], traces[1]["steps"][-1])
    assert traces[0]["saved"] and not traces[1]["saved"]
