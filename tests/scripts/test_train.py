"""What main_tokenbridge.py does in training: order, rates, averages, saving, resuming, signals, and what it refuses."""

import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models import backbone
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tests.conftest import SHORT, TINY, filled, load, scalars, torchrun, write_images
from tests.scripts.conftest import BASE, FACTOR, QUICK, Views, seen
from tests.scripts.trace import traced_two
from util.checkpoint.vae_files import save_vae
from util.precision import PRECISIONS, effective_precision


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


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
        f"--use_cached --cached_path {cached}"
        if source == "cache"
        else f"--data_path {images} --vae_path {vae_path}"
    )
    views = {}
    for flag in ("", "--no_mirror"):
        trace.clear()
        run(
            "main_tokenbridge", f"{BASE} --epochs 3 {data} --output_dir {tmp_path}/run{flag} {flag}"
        )
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


def test_batches_that_do_not_fill_a_step_are_left_out(train, trace):
    content = load(
        train("three", "--epochs 1 --batch_size 3 --accum_iter 2")
    )  # 16 images: five batches, two steps
    assert [len(batch["labels"]) for batch in trace.batches] == [3] * 4 and len(trace.steps) == 2
    assert content["steps_per_epoch"] == 2


# --------------------------------------------------------------------------------------------------------------------
# Flags.


def test_flags_of_the_model_are_its_own_and_evaluation_takes_them_from_the_weights(
    run, train, vae_path, trace
):
    expected = {
        "patch_size": 2, "buffer_size": 3, "quant_min": -4.0, "quant_max": 3.0, "mask_ratio_min": 0.5,
        "label_drop_prob": 0.3, "attn_dropout": 0.2, "proj_dropout": 0.05,
    }  # fmt: skip
    flags = " ".join(f"--{name} {value}" for name, value in expected.items())
    folder = train(
        "run",
        f"--epochs 1 --weight_decay 0.3 --checkpoint_blocks head encoder --quant_bits 4 {flags}",
    )
    content = load(folder)
    assert {name: content["config"][name] for name in expected} == expected
    assert content["config"]["grad_checkpointing"] == ["head", "encoder"]
    assert [group["weight_decay"] for group in content["optimizer"]["param_groups"]] == [0.0, 0.3]
    assert all(group["betas"] == (0.9, 0.95) for group in content["optimizer"]["param_groups"])
    bare = f"--num_workers 0 --precision fp32 --device cpu --vae_path {vae_path} --resume {folder} --output_dir {folder}"
    run("main_tokenbridge", f"{bare} --evaluate --no_metrics --num_images 4 --num_iter 2")
    (sampled,) = trace.sampled
    same = {*expected, "quant_levels", "img_size", "class_num"} - {
        "mask_ratio_min", "label_drop_prob", "attn_dropout", "proj_dropout",
    }  # fmt: skip
    assert {name: sampled["config"][name] for name in same} == {
        name: content["config"][name] for name in same
    }


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
        assert f"--{name} {value}" in refused(
            "main_tokenbridge", f"{TINY} {nowhere} --{name} {value}"
        )
    online = f"{TINY} {nowhere} --num_images 6 --online_eval"
    assert "--num_images 6 cannot be shared" in refused("main_tokenbridge", online)
    needs = "--evaluate_nll needs --resume"
    assert needs in refused(
        "main_tokenbridge", f"{TINY} {nowhere} --evaluate_nll --cached_val_path x"
    )
    assert not (tmp_path / "new").exists()


def test_rates_and_losses_in_the_log_are_those_of_the_steps(run, vae_path, tmp_path, trace):
    data = write_images(tmp_path / "more", each=12)
    common = f"--data_path {data} --vae_path {vae_path}"
    flags = "--batch_size 2 --epochs 2 --warmup_epochs 1 --min_lr 1e-4 --grad_clip 0.01"
    run(
        "main_tokenbridge", f"{BASE} {common} {flags} --output_dir {tmp_path}/run"
    )  # 24 steps an epoch
    losses = [batch["loss"] for batch in trace.batches]
    # Every 20 steps and at an epoch's end: each the mean of the steps since the last.
    means = {20: losses[:20], 24: losses[20:24], 44: losses[24:44], 48: losses[44:]}
    found = scalars(tmp_path / "run", "train/loss")
    assert found == pytest.approx(
        {step: sum(part) / len(part) for step, part in means.items()}, rel=1e-5
    )
    last = 1e-4 + 9e-4 * (1 + math.cos(math.pi * 23 / 24)) / 2
    middle = 1e-4 + 9e-4 * (1 + math.cos(math.pi * 19 / 24)) / 2
    rates = {20: 1e-3 * 19 / 24, 24: 1e-3 * 23 / 24, 44: middle, 48: last}
    assert scalars(tmp_path / "run", "train/lr") == pytest.approx(rates, rel=1e-5)
    assert (
        min(scalars(tmp_path / "run", "train/grad_norm").values()) > 0.1
    )  # before they are clipped
    # Utilization and images a second are of one time: their ratio is what an image takes.
    images, used = (
        scalars(tmp_path / "run", f"speed/{tag}")
        for tag in ("images_per_second", "model_flops_utilization")
    )
    model = TokenBridge.from_config(load(tmp_path / "run")["config"])
    assert 1e9 * used[48] / images[48] == pytest.approx(model.training_flops(), rel=1e-3)


# --------------------------------------------------------------------------------------------------------------------
# Saving and measuring.


def test_checkpoints_come_every_so_many_epochs_or_steps_and_at_the_end(train, trace):
    cases = {
        "--epochs 5 --save_last_freq 2 --batch_size 16": [(1, 0), (3, 0), (4, 0)],
        "--epochs 3 --save_last_freq 100 --save_every_steps 2 --batch_size 8": [
            (0, 0),
            (1, 0),
            (2, 0),
        ],
        "--epochs 2 --save_last_freq 100 --save_every_steps 3": [(-1, 3), (0, 2), (1, 0)],
    }
    for number, (flags, expected) in enumerate(cases.items()):
        trace.clear()
        folder = train(f"run{number}", f"{flags} --keep_last 3")
        assert [(entry["epoch"], entry["step"]) for entry in trace.saved] == expected, flags
        names = ["checkpoint-last.2.pth", "checkpoint-last.1.pth", "checkpoint-last.pth"]
        assert [
            (load(folder, name)["epoch"], load(folder, name)["step"]) for name in names
        ] == expected


def test_what_killed_runs_left_half_written_is_removed(
    run, train, cached, images, vae_path, tmp_path
):
    left = [
        tmp_path / "run" / ".checkpoint-last.pth.1.part",
        cached / "class1" / ".1.png.npz.1.part",
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    train("run")
    cache = f"--data_path {images} --cached_path {cached} --num_workers 0 --device cpu"
    run("main_cache", f"--img_size 16 --vae_path {vae_path} {cache}")
    assert not any(path.exists() for path in left)


# --------------------------------------------------------------------------------------------------------------------
# Two processes.


def test_two_processes_share_data_and_gradients_but_no_draws(run, cached, tmp_path):
    common = f"{QUICK} --use_cached --cached_path {cached} --no_mirror --quant_calibrate"
    flags = f"{common} --batch_size 2 --accum_iter 2 --epochs 2 --warmup_epochs 0 --lr_schedule constant --blr 0.032"
    traces, said, statuses = traced_two(
        tmp_path, "main_tokenbridge", f"{flags} --output_dir {tmp_path}/run"
    )
    assert statuses == [0, 0], said
    # 8 images a step, 4 of each process; every image once an epoch.
    content = load(tmp_path / "run")
    assert (content["world_size"], content["steps_per_epoch"]) == (2, 2)
    assert content["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.032 * 8 / 256)
    views = Views(cached)
    rows = [
        [name for drawn in trace["drawn"] for name, _ in views.of(drawn["moments"])]
        for trace in traces
    ]
    assert [len({*rows[0][part], *rows[1][part]}) for part in (slice(8), slice(8, 16))] == [16, 16]
    assert rows[0][:8] != rows[0][8:]
    orders = {batch["order"].numpy().tobytes() for trace in traces for batch in trace["batches"]}
    assert len(orders) == 2 * len(traces[0]["batches"]) == 16
    # Of equal weights all along, each step's gradients are those of both.
    assert len(traces[0]["steps"]) == 4
    assert all(
        torch.equal(a, b) for a, b in zip(traces[0]["steps"], traces[1]["steps"], strict=True)
    )
    losses = [sum(batch["loss"] for batch in trace["batches"][-4:]) / 4 for trace in traces]
    assert scalars(tmp_path / "run", "train/loss")[4] == pytest.approx(sum(losses) / 2, rel=1e-5)
    # The first alone writes and speaks.
    assert traces[0]["saved"] and not traces[1]["saved"]
    assert len(list((tmp_path / "run").glob("events.*"))) == 1
    assert "global batch size 8" in said[0] and "global batch size" not in said[1]
    run("main_tokenbridge", f"{common} --epochs 1 --lr 0 --output_dir {tmp_path}/alone")
    alone = load(tmp_path / "alone")["config"]
    for name in ("channel_mean", "channel_std"):
        assert content["config"][name] == pytest.approx(alone[name], rel=1e-4), name


def test_a_signal_to_one_process_stops_both_after_the_same_step(cached, tmp_path):
    flags = f"{BASE} --batch_size 2 --epochs 3 --use_cached --cached_path {cached} --output_dir {tmp_path}/run"
    traces, said, statuses = traced_two(tmp_path, "main_tokenbridge", flags, signaled=1)
    assert statuses == [75, 75]
    content = load(tmp_path / "run")
    assert len(traces[0]["steps"]) == len(traces[1]["steps"]) == content["step"] < 4
    assert torch.equal(traces[0]["steps"][-1], traces[1]["steps"][-1])
    assert "by SIGUSR1" in said[1] and "another rank" in said[0]


# --------------------------------------------------------------------------------------------------------------------
# What a run writes and takes from its flags.


def test_training_writes_a_whole_checkpoint_and_log(trained):
    content = load(trained)
    assert content["epoch"] == 1 and "scaler" not in content
    assert set(content["model_ema"]) == set(content["model"]) - {
        "channel_mask",
        "boundaries",
        "reconstruction_values",
    }
    assert content["config"]["latent_factor"] == 0.5 and content["config"]["vae_stride"] == 4
    assert [group["weight_decay"] for group in content["optimizer"]["param_groups"]] == [0.0, 0.02]
    assert not [name for name in os.listdir(trained) if name.endswith(".part")]
    log = EventAccumulator(str(trained)).Reload()
    tags = {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "speed/images_per_second",
        "speed/memory_gib",
    }
    assert tags | {"speed/model_flops_utilization"} <= set(log.Tags()["scalars"])
    assert [event.step for event in log.Scalars("train/loss")] == [4, 8]


def test_checkpoints_of_some_epochs_are_kept(run, cached, tmp_path):
    common = f"{TINY} --use_cached --cached_path {cached} --batch_size 8 --epochs 5 --keep_last 1"
    run("main_tokenbridge", f"{common} --keep_every 2 --output_dir {tmp_path}/run")
    kept = sorted(path.name for path in (tmp_path / "run").glob("*.pth"))
    assert kept == ["checkpoint-epoch0002.pth", "checkpoint-epoch0004.pth", "checkpoint-last.pth"]
    files = [torch.load(tmp_path / "run" / name, weights_only=True) for name in kept]
    assert [content["epoch"] for content in files] == [1, 3, 4]
    assert all(content["step"] == 0 for content in files)


def test_losses_of_guessing_are_reported(run, cached, tmp_path, caplog):
    common = f"{TINY} --quant_bits 3 --use_cached --cached_path {cached} --batch_size 16 --epochs 1"
    run("main_tokenbridge", f"{common} --output_dir {tmp_path}/run")
    uniform, frequencies = (
        float(record.getMessage().rsplit(" ", 1)[1])
        for record in caplog.records
        if record.getMessage().startswith("loss of guessing")
    )
    assert uniform == pytest.approx(math.log(8), abs=1e-3) and 0.5 < frequencies < uniform
    assert [*scalars(tmp_path / "run", "train/loss_of_uniform_guessing").values()] == [
        pytest.approx(math.log(8))
    ]


def test_the_average_of_a_short_run_is_of_its_weights_not_of_the_drawn_ones(run, cached, tmp_path):
    common = f"{TINY} --warmup_epochs 0 --lr 1e-3 --use_cached --cached_path {cached} --batch_size 16 --epochs 1"
    run("main_tokenbridge", f"{common} --output_dir {tmp_path}/run")  # one step
    content = load(tmp_path / "run")
    assert all(
        torch.equal(value, content["model"][name]) for name, value in content["model_ema"].items()
    )


def test_learning_rates_follow_the_flags(run, cached, tmp_path):
    common = f"{TINY} --use_cached --cached_path {cached} --save_last_freq 1"
    cases = {
        # 8 images a step: blr x 8 / 256, at 3/4 of the first of two warm-up epochs.
        "--blr 0.32 --batch_size 4 --accum_iter 2 --warmup_epochs 2 --epochs 1": 0.01 * 0.5 / 2,
        "--lr 0.02 --warmup_epochs 0 --epochs 1 --min_lr 0.01": 0.01
        + 0.01 * (1 + math.cos(math.pi * 0.75)) / 2,
        "--lr 0.02 --warmup_epochs 0 --epochs 2 --start_epoch 1 --lr_schedule constant": 0.02,
    }
    for number, (flags, rate) in enumerate(cases.items()):
        run("main_tokenbridge", f"{common} {flags} --output_dir {tmp_path}/{number}")
        assert load(tmp_path / str(number))["optimizer"]["param_groups"][0]["lr"] == pytest.approx(
            rate
        ), flags


def test_gradients_are_clipped(run, cached, tmp_path):
    common = f"{TINY} --use_cached --cached_path {cached} --batch_size 16 --epochs 1 --warmup_epochs 0 --lr 1e-3"
    norms = {}
    for clip in ("0", "0.01"):
        run("main_tokenbridge", f"{common} --grad_clip {clip} --output_dir {tmp_path}/{clip}")
        states = load(tmp_path / clip)["optimizer"]["state"].values()
        norms[clip] = (
            math.sqrt(sum(state["exp_avg"].norm() ** 2 for state in states)) / 0.1
        )  # of the only gradient
    assert norms["0.01"] == pytest.approx(0.01, rel=1e-2) and norms["0"] > 0.1


def test_accumulation_makes_one_step_of_several_batches(run, cached, tmp_path):
    common = f"{TINY} {SHORT} --epochs 1 --use_cached --cached_path {cached}"
    run("main_tokenbridge", f"{common} --accum_iter 2 --output_dir {tmp_path}/accumulated")
    assert {
        int(s["step"]) for s in load(tmp_path / "accumulated")["optimizer"]["state"].values()
    } == {2}


@pytest.mark.parametrize(
    "flags",
    [
        "--grad_checkpointing", "--precision fp16", "--precision fp32 --accum_iter 2",
        "--lr_schedule constant --epochs 2",
    ],
)  # fmt: skip
def test_uncached_training_and_other_flags(
    run, images, vae_path, tmp_path, trace, monkeypatch, flags
):
    recomputed = []
    original = backbone.checkpoint
    monkeypatch.setattr(
        backbone,
        "checkpoint",
        lambda *args, **options: recomputed.append(1) or original(*args, **options),
    )
    run(
        "main_tokenbridge",
        f"{TINY} {SHORT} --epochs 1 --data_path {images} --vae_path {vae_path} --output_dir {tmp_path}/run {flags}",
    )
    content = load(tmp_path / "run")
    assert ("scaler" in content) == ("fp16" in flags)
    assert content["config"]["vae_embed_dim"] == 8 and content["config"]["latent_factor"] == 0.5
    # 16 images, 4 at once.
    epochs, parts = 1 + ("epochs 2" in flags), 1 + ("accum_iter 2" in flags)
    assert len(trace.batches) == 4 * epochs and len(trace.steps) == 4 * epochs / parts
    assert (content["epoch"], content["steps_per_epoch"]) == (epochs - 1, 4 / parts)
    precision = next(
        (name for name in PRECISIONS if name in flags), effective_precision("cpu", "bf16")
    )
    assert {batch["autocast"] for batch in trace.batches} == {PRECISIONS[precision]}
    assert (
        bool(recomputed)
        == ("grad_checkpointing" in flags)
        == (content["config"]["grad_checkpointing"] is True)
    )
    # Amid the warm-up, or after it at the peak.
    rate = 1e-3 if "constant" in flags else 1e-3 * (1 - parts / 4)
    assert content["optimizer"]["param_groups"][0]["lr"] == pytest.approx(rate)


# --------------------------------------------------------------------------------------------------------------------
# Learning.


def photographs(root, classes: int, each: int, size: int):
    """Crops of the two photographs that scikit-learn brings, every fifth grey: ``root/train/<class>/<image>.jpg``."""
    crops = np.random.RandomState(0)
    for label in range(classes):
        folder = root / "train" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(each):
            photograph = load_sample_images().images[(label + number) % 2]
            top, left = (crops.randint(0, side - size) for side in photograph.shape[:2])
            image = Image.fromarray(photograph[top : top + size, left : left + size + 30])
            image = image.convert("L") if (label * each + number) % 5 == 4 else image
            image.save(folder / f"{number}.JPEG", quality=95)
    return root


def test_loss_falls_when_a_small_model_overfits_eight_photographs(run, tmp_path):
    data = photographs(tmp_path / "data", classes=8, each=1, size=96)
    vae = AutoencoderKL(
        16, (1, 1, 2, 2, 4), use_variational=False, ch=8
    )  # without noise that cannot be learned
    save_vae(tmp_path / "vae.ckpt", filled(vae), 0.5)
    common = "--img_size 64 --num_workers 0"
    run(
        "main_cache",
        f"{common} --vae_path {tmp_path}/vae.ckpt --data_path {data} --cached_path {tmp_path}/cache",
    )
    run(
        "main_tokenbridge",
        f"{common} --model tokenbridge_tiny --class_num 8 --buffer_size 4 --quant_bits 4 --use_cached --no_mirror "
        f"--cached_path {tmp_path}/cache --output_dir {tmp_path}/run --batch_size 8 --epochs 40 --warmup_epochs 10 "
        "--lr 3e-3 --attn_dropout 0 --proj_dropout 0 --label_drop_prob 0 --save_last_freq 1000",
    )
    losses = [
        event.value
        for event in EventAccumulator(str(tmp_path / "run")).Reload().Scalars("train/loss")
    ]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_photographs_through_full_size_kl16_and_base(run, tmp_path):
    data = photographs(tmp_path / "data", classes=4, each=2, size=280)
    vae = AutoencoderKL(16, (1, 1, 2, 2, 4))
    torch.save({"model": vae.state_dict()}, tmp_path / "kl16.ckpt")
    run(
        "main_cache",
        f"--img_size 256 --vae_path {tmp_path}/kl16.ckpt --vae_embed_dim 16 --batch_size 4 --num_workers 2 "
        f"--data_path {data} --cached_path {tmp_path}/cache",
    )
    run(
        "main_tokenbridge",
        f"--model tokenbridge_base --class_num 4 --use_cached --cached_path {tmp_path}/cache --batch_size 4 --epochs 1 "
        f"--num_workers 2 --output_dir {tmp_path}/run",
    )
    content = torch.load(tmp_path / "run" / "checkpoint-last.pth", weights_only=True)
    assert {int(state["step"]) for state in content["optimizer"]["state"].values()} == {2}
    assert content["config"]["latent_factor"] == 0.2325 and content["config"]["quant_levels"] == 64


# --------------------------------------------------------------------------------------------------------------------
# All scripts, one after the other, in two processes.


def test_two_processes_cache_and_train(run_two, images, vae_path, cached, tmp_path, capfd):
    small = "--img_size 16 --ch 8 --ch_mult 1 2 --num_res_blocks 1 --batch_size 4 --epochs 1 --num_workers 0"
    run_two("main_vae", f"{small} --data_path {images} --output_dir {tmp_path}/vae2")
    assert AutoencoderKL.from_pretrained(tmp_path / "vae2" / "vae.ckpt")[0].stride == 2
    # 16 images, 4 for each of two: one log, of two steps.
    assert len(list((tmp_path / "vae2" / "tokenizer_log").glob("events.*"))) == 1
    log = EventAccumulator(str(tmp_path / "vae2" / "tokenizer_log")).Reload()
    assert [event.step for event in log.Scalars("tokenizer/error")] == [2]

    shared = f"--img_size 16 --num_workers 0 --data_path {images} --vae_path {vae_path}"
    capfd.readouterr()
    run_two("main_cache", f"{shared} --cached_path {tmp_path}/cache2 --batch_size 3")
    said = capfd.readouterr().err
    for path in sorted(cached.rglob("*.npz")):
        with np.load(path) as one, np.load(tmp_path / "cache2" / path.relative_to(cached)) as two:
            assert all(
                np.allclose(one[name], two[name], atol=1e-5) for name in ("moments", "moments_flip")
            )
    assert len(list((tmp_path / "cache2").rglob("*.npz"))) == 16
    assert said.count("cached 16 images") == 1
    assert "0 were already cached, 16 are new, 0 replace" in said
    abouts = [
        json.loads((folder / "cache.json").read_text()) for folder in (cached, tmp_path / "cache2")
    ]
    assert abouts[0] == abouts[1] and abouts[0]["complete"]

    # The one training under torchrun itself.
    train = f"main_tokenbridge.py {TINY} {SHORT} --epochs 1 --use_cached --cached_path {cached} --device cpu"
    result = torchrun(f"{train} --output_dir {tmp_path}/run2")
    assert result.returncode == 0, result.stderr
    content = load(tmp_path / "run2")
    assert {int(s["step"]) for s in content["optimizer"]["state"].values()} == {
        2
    }  # 16 images, 4 for each of two
    assert result.stderr.count("global batch size 8") == 1
    assert (content["world_size"], content["steps_per_epoch"], content["epoch"]) == (2, 2, 0)
    assert content["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-3 / 2)
    assert len(list((tmp_path / "run2").glob("events.*"))) == 1
    log = EventAccumulator(str(tmp_path / "run2")).Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [2]

    out = f"--vae_path {vae_path} --evaluate --no_metrics --num_images 8 --num_iter 3 --eval_bsz 3"
    out += f" --resume {tmp_path}/run2"
    run_two("main_tokenbridge", f"{TINY} {out} --output_dir {tmp_path}/eval2")
    assert sorted(os.listdir(tmp_path / "eval2" / "samples")) == [f"{i:05d}.png" for i in range(8)]
    assert len({path.read_bytes() for path in (tmp_path / "eval2" / "samples").iterdir()}) == 8
    assert (
        json.loads((tmp_path / "eval2" / "samples.json").read_text())["settings"]["num_images"] == 8
    )
