"""main_tokenbridge.py taken up again: starts, checkpoints, interruptions, signals, damage, bad steps."""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from engine_tokenbridge import Trainer
from models.tokenbridge import TokenBridge
from tests.conftest import (
    ROOT,
    SHORT,
    TINY,
    load,
    new_trainer,
    processes_of,
    scalars,
    torchrun,
    training_state,
    variant,
)
from tests.processes import attempt
from tests.scripts.conftest import BASE, Views
from tests.scripts.test_main_vae import SMALL_VAE
from tests.scripts.trace import Trace
from tools import checkpoint as commands
from util.data.caches import CachedFolder
from util.data.loaders import ShuffledRankSampler


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


def expected_average(
    trace: Trace, content: dict, warmup: bool = True, start: torch.Tensor | None = None
) -> torch.Tensor:
    """What rate 0.1 makes of a run's class embeddings, one batch a step, from ``start`` or its start to its end."""
    average, *weights = [batch["class_emb"] for batch in trace.batches]
    average = average if start is None else start
    for step, weight in enumerate([*weights, content["model"]["class_emb.weight"]]):
        average = average.lerp(weight, 1 - (min(0.1, step / (step + 10)) if warmup else 0.1))
    return average


# --------------------------------------------------------------------------------------------------------------------
# Starting and resuming.


def test_weights_start_from_the_seed_or_from_another_runs_averages_or_weights(train):
    stay = "--epochs 1 --lr 0"
    starts = [
        learned(load(train(f"seed{i}", f"{stay} --seed {seed}")), "model")
        for i, seed in enumerate((1, 1, 2))
    ]
    assert equal(starts[0], starts[1]) and not torch.equal(
        starts[0]["mask_token"], starts[2]["mask_token"]
    )
    other = train("other", "--epochs 1 --ema_rate 0.5 --quant_min -4 --quant_max 3")
    for flag, key in {"": "model_ema", "--no_ema": "model"}.items():
        content = load(train(f"from-{key}", f"{stay} --finetune {other} {flag}"))
        assert equal(learned(content, "model"), learned(load(other), key)), key
        assert equal(content["model_ema"], learned(content, "model"))
        assert (content["config"]["quant_min"], content["config"]["quant_max"]) == (-4, 3)


def test_the_average_is_of_the_weights_after_each_step(train, trace):
    content = load(train("run", "--epochs 1 --ema_rate 0.1"))
    assert (
        content["average_steps"] == content["steps_per_epoch"] > 2
    )  # the third has the whole rate
    assert torch.allclose(
        content["model_ema"]["class_emb.weight"], expected_average(trace, content), atol=1e-7
    )


@pytest.mark.parametrize("flag", ["--no_ema_warmup", ""])
def test_a_constant_rate_of_the_average_is_the_papers_and_stays_with_the_run(train, trace, flag):
    content = load(folder := train("run", "--epochs 1 --ema_rate 0.1 --no_ema_warmup"))
    expected = expected_average(trace, content, warmup=False)
    assert torch.allclose(content["model_ema"]["class_emb.weight"], expected, atol=1e-7)
    trace.clear()
    after = load(train("run", f"--epochs 2 --ema_rate 0.1 {flag} --resume {folder}"))
    expected = expected_average(trace, after, warmup=False, start=expected)
    assert torch.allclose(after["model_ema"]["class_emb.weight"], expected, atol=1e-7)
    assert not content["ema_warmup"] and not after["ema_warmup"]


def test_a_run_whose_average_warmed_up_does_not_go_on_without(refused, train, cached):
    folder = train("run")
    assert load(folder)["ema_warmup"]
    common = f"{BASE} --epochs 2 --use_cached --cached_path {cached} --output_dir {folder} --resume {folder}"
    assert "trained with a warm-up of the EMA" in refused(
        "main_tokenbridge", f"{common} --no_ema_warmup"
    )


def test_the_releases_checkpoints_go_on_at_their_constant_rate(train, trace, caplog):
    folder = train("run", "--epochs 1 --ema_rate 0.1")
    ours = ("config", "step", "steps_per_epoch", "world_size", "average_steps", "ema_warmup")
    before = change(folder, **dict.fromkeys(ours))
    trace.clear()
    with caplog.at_level("INFO", logger="tokenbridge"):
        after = load(train("run", f"--epochs 2 --ema_rate 0.1 --resume {folder}"))
    assert "EMA with the constant rate 0.1" in caplog.text and not after["ema_warmup"]
    expected = expected_average(
        trace, after, warmup=False, start=before["model_ema"]["class_emb.weight"]
    )
    assert torch.allclose(after["model_ema"]["class_emb.weight"], expected, atol=1e-7)


def test_without_averages_in_the_checkpoint_they_start_from_its_weights(train):
    folder = train("run")
    before = change(folder, model_ema=None)
    after = load(train("run", f"--epochs 2 --lr 0 --resume {folder}"))
    assert after["average_steps"] == after["steps_per_epoch"]
    assert equal(after["model_ema"], before["model"])


def test_a_resumed_run_has_the_checkpoints_averages_and_its_own_settings(train, caplog):
    folder = train("run", "--epochs 1 --weight_decay 0.5")
    before = change(folder, average_steps=10**9)
    after = load(train("run", f"--epochs 2 --ema_rate 1 --weight_decay 0.25 --resume {folder}"))
    assert all(
        torch.allclose(value, before["model_ema"][name])
        for name, value in after["model_ema"].items()
    )
    assert after["average_steps"] == 10**9 + after["steps_per_epoch"]
    assert [group["weight_decay"] for group in after["optimizer"]["param_groups"]] == [0.0, 0.25]
    assert after["args"]["ema_rate"] == 1
    line = next(text for text in caplog.messages if text.startswith("flags of the run that wrote"))
    differing = {
        "--epochs 1 (now 2)",
        "--ema_rate 0.9999 (now 1.0)",
        "--weight_decay 0.5 (now 0.25)",
    }
    assert set(line.partition(": ")[2].split(", ")) == differing


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
    (row,) = [
        json.loads(line) for line in (folder / "bad_steps-rank0.jsonl").read_text().splitlines()
    ]
    assert (row["epoch"], row["step"]) == (0, 3)
    names = [name for name, _ in Views(cached).of(trace.drawn[1]["moments"])]
    assert [f"{Path(path).parent.name}/{Path(path).stem}" for path in row["files"]] == names
    # The figures are of the other step.
    assert scalars(folder, "train/loss")[4] == pytest.approx(trace.batches[0]["loss"], rel=1e-5)


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


@pytest.mark.parametrize(
    "call, place", [(2, (-1, 2)), (4, (0, 0))], ids=["amid an epoch", "at its end"]
)
def test_a_signal_saves_after_its_step_and_handlers_are_put_back(
    train, trace, monkeypatch, tmp_path, call, place
):
    before = signal.signal(signal.SIGUSR1, lambda *_: None)  # lest a missing handler end pytest
    try:
        own = [
            signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        ]
        forward = TokenBridge.forward

        def signalled(*args):
            if len(trace.batches) + 1 == call:
                signal.raise_signal(signal.SIGUSR1)
            return forward(*args)

        monkeypatch.setattr(TokenBridge, "forward", signalled)
        with pytest.raises(SystemExit) as stop:
            train("run", "--epochs 3 --ema_rate 0.1")
        assert stop.value.code == 75
        assert [
            signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        ] == own
    finally:
        signal.signal(signal.SIGUSR1, before)
    content = load(tmp_path / "run")
    assert (content["epoch"], content["step"]) == place and len(trace.steps) == call
    assert {int(state["step"]) for state in content["optimizer"]["state"].values()} == {call}
    assert torch.allclose(
        content["model_ema"]["class_emb.weight"], expected_average(trace, content), atol=1e-7
    )


def test_calibration_is_of_the_same_latents_from_images_as_from_their_cache(
    run, images, vae_path, train, tmp_path
):
    cached = load(train("cached", "--epochs 1 --quant_calibrate --no_mirror"))["config"]
    data = f"--data_path {images} --vae_path {vae_path} --output_dir {tmp_path}/images"
    run("main_tokenbridge", f"{BASE} --epochs 1 --quant_calibrate --no_mirror {data}")
    config = load(tmp_path / "images")["config"]
    for name in ("channel_mean", "channel_std"):
        assert config[name] == pytest.approx(cached[name], abs=1e-4), name


# --------------------------------------------------------------------------------------------------------------------
# Interrupted, damaged, taken up again.


def same_weights(a, b) -> bool:
    a, b = load(a), load(b)
    return a["epoch"] == b["epoch"] and all(
        torch.equal(value, b[key][name])
        for key in ("model", "model_ema")
        for name, value in a[key].items()
    )


@pytest.mark.parametrize("data", ["cached, no workers", "cached, 2 workers", "images, 2 workers"])
def test_a_run_interrupted_anywhere_ends_as_one_never_interrupted(
    run, images, vae_path, cached, tmp_path, monkeypatch, data
):
    source = (
        f"--use_cached --cached_path {cached}"
        if "cached" in data
        else f"--data_path {images} --vae_path {vae_path}"
    )
    tiny = TINY.replace("--num_workers 0", f"--num_workers {2 * ('2' in data)}")
    tiny = tiny.replace("--batch_size 4", "--batch_size 2")
    common = f"{tiny} {source} --epochs 2 --warmup_epochs 1 --lr 1e-3 --accum_iter 2 --save_every_steps 3"
    run("main_tokenbridge", f"{common} --output_dir {tmp_path}/whole")  # 4 steps an epoch

    def stop_at(step: int) -> None:
        left = [step]

        def take_step(*args):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(Trainer, "clip_and_step", take_step)

    original = Trainer.clip_and_step
    for steps in (
        4,
        3,
    ):  # into the second epoch, saved at step 3; from there past the save at step 6
        stop_at(steps)
        with pytest.raises(SystemExit):
            run(
                "main_tokenbridge",
                f"{common} --output_dir {tmp_path}/parts --resume {tmp_path}/parts",
            )
    assert (load(tmp_path / "parts")["epoch"], load(tmp_path / "parts")["step"]) == (0, 2)
    monkeypatch.setattr(Trainer, "clip_and_step", original)
    run("main_tokenbridge", f"{common} --output_dir {tmp_path}/parts --resume {tmp_path}/parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def wait_for(path, process) -> None:
    while process.poll() is None and not path.exists():
        time.sleep(0.01)
    assert path.exists()


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_ends_a_run_after_its_step_and_saves(cached, tmp_path, name):
    tiny = TINY.replace("--num_workers 0", "--num_workers 2")
    common = f"main_tokenbridge.py {tiny} --use_cached --cached_path {cached} --lr 1e-3 --warmup_epochs 1 --epochs 100"
    command = [
        sys.executable,
        *f"{common} --save_last_freq 1 --output_dir {tmp_path}/run --device cpu".split(),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(tmp_path / "run" / "checkpoint-last.pth", process)
    os.killpg(process.pid, getattr(signal, name))  # to the loader's workers, too, as schedulers do
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75 and f"stopped: by {name}, saved at epoch" in said
    content = load(tmp_path / "run")
    assert 0 <= content["epoch"] < 99
    steps = {int(state["step"]) for state in content["optimizer"]["state"].values()}
    assert steps == {4 * (content["epoch"] + 1) + content["step"]}


@pytest.mark.parametrize("saved", [False, True])
def test_a_restarted_run_begins_from_scratch_only_if_it_had_not_saved(
    run, refused, cached, monkeypatch, tmp_path, caplog, saved
):
    caplog.set_level("INFO")
    attempt(monkeypatch, tmp_path, 0)
    command = f"{BASE} --use_cached --cached_path {cached} --epochs 1 --output_dir {tmp_path}/run"
    command += f" --resume {tmp_path}/run"
    if saved:
        run("main_tokenbridge", command)
        (tmp_path / "run" / "checkpoint-last.pth").unlink()
    attempt(monkeypatch, tmp_path, 1)
    if saved:
        line = refused("main_tokenbridge", command)
        assert f"it had written {tmp_path}/run/checkpoint-last.pth" in line
    else:
        run("main_tokenbridge", command)
        assert "restarted before the first checkpoint" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "signalled", "killed, and the checkpoint is lost"])
def test_the_launcher_restarts_what_failed_and_nothing_else(cached, tmp_path, end):
    common = f"main_tokenbridge.py {TINY} --use_cached --cached_path {cached} --epochs 30 --lr 1e-3 --warmup_epochs 1"
    common += " --batch_size 2 --save_last_freq 3 --device cpu"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max_restarts=2",
    ]
    process = subprocess.Popen(
        [*launcher, *f"{common} --output_dir {tmp_path}/cut --resume {tmp_path}/cut".split()],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    path = tmp_path / "cut" / "checkpoint-last.pth"
    wait_for(path, process)
    workers = processes_of(tmp_path / "cut")
    for worker in workers:
        os.kill(worker, signal.SIGUSR1 if end == "signalled" else signal.SIGSTOP)
    if end != "signalled":
        if "lost" in end:
            shutil.rmtree(tmp_path / "cut")
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    if end == "killed":
        assert process.returncode == 0, said
        assert said.count("resumed from") == 1
        assert torchrun(f"{common} --output_dir {tmp_path}/whole").returncode == 0
        assert same_weights(tmp_path / "whole", tmp_path / "cut")
    elif end == "signalled":
        assert process.returncode == 1 and said.count("resumed from") == 0
        assert said.count("saved at epoch") == 2 + 2  # both, then process 0 in each of two restarts
    else:
        assert process.returncode == 1 and not path.exists()
        assert (
            said.count("error: this run was restarted and begins from scratch, but it had written")
            == 2
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_to_the_launcher_saves_and_leaves_no_process(cached, tmp_path, name):
    command = f"main_tokenbridge.py {TINY} --use_cached --cached_path {cached} --epochs 1000 --lr 1e-3 --warmup_epochs 1"
    command += f" --batch_size 2 --save_last_freq 1 --device cpu --output_dir {tmp_path}/run"
    flags = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout=600"]
    if any(flag.split("=")[0] not in get_args_parser().format_help() for flag in flags):
        pytest.skip("this torch's launcher has no such flags")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launcher, *command.split()], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "run" / "checkpoint-last.pth", process)
    workers = processes_of(tmp_path / "run")
    assert len(workers) == 2
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and said.count("saved at epoch") == 2, said
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    content = load(tmp_path / "run")
    steps = {int(state["step"]) for state in content["optimizer"]["state"].values()}
    assert steps == {4 * (content["epoch"] + 1) + content["step"]}


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    run, refused, cached, trained, tmp_path, caplog
):
    common = f"{TINY} {SHORT} --use_cached --cached_path {cached}"
    assert sorted(path.name for path in trained.glob("*.pth")) == [
        "checkpoint-last.1.pth",
        "checkpoint-last.pth",
    ]
    before = torch.load(trained / "checkpoint-last.1.pth", weights_only=True)
    assert (before["epoch"], load(trained)["epoch"]) == (0, 1)
    path = trained / "checkpoint-last.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    run(
        "main_tokenbridge",
        f"{common} --epochs 3 --keep_last 3 --output_dir {trained} --resume {trained}",
    )
    assert "continuing from the previous checkpoint" in caplog.text and load(trained)["epoch"] == 2
    names = [f"checkpoint-last{age}.pth" for age in (".1", ".2", "")]
    assert sorted(path.name for path in trained.glob("*.pth")) == names
    for name in names:
        (trained / name).write_bytes(b"damaged")
    assert "checkpoint-last.pth" in refused(
        "main_tokenbridge", f"{common} --output_dir {trained} --resume {trained}"
    )


def test_a_full_disk_after_damage_leaves_the_checkpoint_that_the_run_went_on_from(
    run, refused, cached, trained, monkeypatch
):
    common = f"{TINY} {SHORT} --use_cached --cached_path {cached} --output_dir {trained} --resume {trained}"
    (trained / "checkpoint-last.pth").write_bytes(b"damaged")

    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("util.provenance.write_json", lambda *_: None)
        patch.setattr(os, "fsync", full)
        assert "No space left on device" in refused("main_tokenbridge", f"{common} --epochs 2")
    assert load(trained, "checkpoint-last.1.pth")["epoch"] == 0
    run("main_tokenbridge", f"{common} --epochs 2")
    assert [load(trained, f"checkpoint-last{age}.pth")["epoch"] for age in ("", ".1")] == [1, 0]


def test_a_run_whose_newest_checkpoint_is_gone_goes_on_from_the_one_before(
    run, cached, trained, caplog
):
    common = f"{TINY} {SHORT} --epochs 2 --use_cached --cached_path {cached} --output_dir {trained}"
    (trained / "checkpoint-last.pth").unlink()
    caplog.set_level("INFO")
    run("main_tokenbridge", f"{common} --resume {trained}")
    assert (
        "continuing at epoch 1, step 0" in caplog.text
        and load(trained, "checkpoint-last.1.pth")["epoch"] == 0
    )


def test_a_run_goes_on_with_its_own_classes_only(run, refused, images, vae_path, tmp_path):
    common = f"{TINY} {SHORT} --data_path {images} --vae_path {vae_path}"
    command = f"{common} --output_dir {tmp_path}/run --resume {tmp_path}/run"
    run("main_tokenbridge", f"{command} --epochs 1")
    before = (tmp_path / "run" / "checkpoint-last.pth").read_bytes()
    (images / "train" / "class0").rename(images / "train" / "zebra")
    line = refused("main_tokenbridge", f"{command} --epochs 2")
    assert "it lacks class0; also has zebra" in line and "--finetune" in line
    for label in (1, 2, 3):  # no name in common
        (images / "train" / f"class{label}").rename(images / "train" / f"other{label}")
    assert "lacks class0, class1, class2, class3;" in refused(
        "main_tokenbridge", f"{command} --epochs 2"
    )
    assert (tmp_path / "run" / "checkpoint-last.pth").read_bytes() == before
    # Files without names cannot be compared.
    content = load(tmp_path / "run")
    del content["config"]["class_names"]
    torch.save(content, tmp_path / "run" / "checkpoint-last.pth")
    run("main_tokenbridge", f"{command} --epochs 2")
    # A fine-tuned run starts again by its own command.
    tuned = f"{common} --output_dir {tmp_path}/tuned --resume {tmp_path}/tuned --finetune {tmp_path}/run"
    (images / "train" / "zebra").rename(images / "train" / "ant")
    run("main_tokenbridge", f"{tuned} --epochs 1")
    run("main_tokenbridge", f"{tuned} --epochs 2")
    assert (
        load(tmp_path / "tuned")["epoch"] == 1
        and load(tmp_path / "tuned")["config"]["class_names"][0] == "ant"
    )


def test_a_runs_own_folder_may_hold_safetensors(run, cached, trained, caplog):
    caplog.set_level("INFO")
    commands.convert(trained / "checkpoint-last.pth", trained / "checkpoint-last.safetensors")
    (trained / "checkpoint-last.pth").unlink()
    common = f"{TINY} {SHORT} --epochs 3 --use_cached --cached_path {cached}"
    run("main_tokenbridge", f"{common} --output_dir {trained} --resume {trained}")
    assert "checkpoint-last.safetensors, continuing at epoch 2, step 0" in caplog.text
    assert load(trained)["epoch"] == 2


def test_another_number_of_steps_continues_at_the_same_place(
    run, cached, trained, tmp_path, caplog
):
    content = load(trained)
    content |= {"epoch": 0, "step": 2, "world_size": 4}  # of 4 steps
    torch.save(content, trained / "checkpoint-last.pth")
    caplog.set_level("INFO")
    common = f"{TINY.replace('--batch_size 4', '--batch_size 2')} {SHORT} --use_cached --cached_path {cached} --epochs 2"
    run("main_tokenbridge", f"{common} --resume {trained} --output_dir {tmp_path}/more")
    assert "written by 4 ranks with 4 steps per epoch, this run has 1 with 8" in caplog.text
    assert "continuing at epoch 1, step 4 of 8" in caplog.text


@pytest.mark.parametrize(
    "step, steps, place",
    [
        (3, 2, (3, 1)),
        (1, 2, (3, 0)),
        (4, 2, (4, 0)),
        (3, 1, (3, 0)),
        (3, 9, (3, 6)),
        (4, 9, (4, 0)),
        (0, 9, (3, 0)),
    ],
)
def test_the_epoch_and_its_part_stay_with_other_steps_an_epoch(step, steps, place):
    state = training_state(variant(), steps_per_epoch=steps)
    content = {"epoch": 2, "step": step, "steps_per_epoch": 4}
    state._load_epoch_and_step(content, Path("checkpoint-last.pth"))
    assert (state.epoch, state.step) == place


@pytest.mark.parametrize("script", ["main_tokenbridge", "main_vae"])
def test_a_run_that_goes_on_with_fewer_steps_an_epoch_trains_all_that_is_left(
    run, run_two, cached, images, tmp_path, caplog, script
):
    if script == "main_vae":
        command, name = f"{SMALL_VAE} --batch_size 4 --data_path {images}", "vae-last.pth"
    else:
        command, name = f"{BASE} --use_cached --cached_path {cached}", "checkpoint-last.pth"
    command += f" --output_dir {tmp_path}/run --epochs"
    run(script, f"{command} 1")
    content = load(tmp_path / "run", name) | {"epoch": -1, "step": 3}  # of 4 steps
    torch.save(content, tmp_path / "run" / name)
    run_two(script, f"{command} 3 --resume {tmp_path}/run")
    after = load(tmp_path / "run", name)
    assert (after["epoch"], after["step"], after["steps_per_epoch"]) == (2, 0, 2)
    steps = {int(state["step"]) for state in after["optimizer"]["state"].values()}
    assert steps == {int(content["optimizer"]["state"][0]["step"]) + 1 + 2 * 2}


def test_a_finished_run_trains_nothing_and_what_it_reports_is_there(
    train, refused, cached, tmp_path, caplog
):
    caplog.set_level("INFO")
    folder = train("run", "--epochs 2")
    before = {path: path.read_bytes() for path in folder.glob("*.[pj]*")}
    train("run", f"--epochs 1 --resume {folder}")
    assert "2 epochs are done, --epochs is 1: nothing to train" in caplog.text
    assert {path: path.read_bytes() for path in folder.glob("*.[pj]*")} == before
    other = train("other", f"--epochs 2 --resume {folder}")
    assert f"trained 2 epochs: {other}/checkpoint-last.pth" in caplog.text
    assert same_weights(folder, other)
    command = f"{BASE} --use_cached --cached_path {cached} --output_dir {tmp_path}/new"
    line = refused("main_tokenbridge", f"{command} --epochs 2 --start_epoch 2")
    assert "--start_epoch 2 with --epochs 2" in line and not (tmp_path / "new").exists()


def test_data_that_end_too_early_end_the_run(refused, cached, monkeypatch, tmp_path):
    indices = ShuffledRankSampler.__iter__
    monkeypatch.setattr(
        ShuffledRankSampler, "__iter__", lambda self: islice(indices(self), 8)
    )  # of 16
    line = refused(
        "main_tokenbridge",
        f"{BASE} --use_cached --cached_path {cached} --epochs 1 --output_dir {tmp_path}/run",
    )
    assert "the data of epoch 0 ended at step 2 of 4" in line and not list(
        (tmp_path / "run").glob("*.pth")
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_continues_from_a_released_checkpoint(run, cached, trained, tmp_path, precision):
    content = load(trained)
    for group in content["optimizer"]["param_groups"]:
        group["fused"] = None  # as the release's optimizer leaves it
    released = {name: content[name] for name in ("model", "model_ema", "optimizer", "epoch")}
    torch.save(
        {**released, "args": argparse.Namespace(model="tokenbridge_large")},
        trained / "checkpoint-last.pth",
    )
    run(
        "main_tokenbridge",
        f"{TINY} {SHORT} --epochs 3 --use_cached --cached_path {cached} --precision {precision} "
        f"--resume {trained} --output_dir {tmp_path}/more",
    )
    more = load(tmp_path / "more")
    assert more["epoch"] == 2
    # fp16 may skip a first step whose gradients overflow.
    assert {int(state["step"]) for state in more["optimizer"]["state"].values()} <= set(
        range(9, 13)
    )


# --------------------------------------------------------------------------------------------------------------------
# Steps that are not finite.


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_steps_that_are_not_finite_are_left_out_and_written_down(
    run, refused, cached, tmp_path, monkeypatch, caplog, precision
):
    original, calls = Trainer.backward, []

    def backward(trainer, batches):
        loss = original(trainer, batches)
        calls.append(loss)
        if len(calls) in (2, 5):
            next(trainer.state.model.parameters()).grad.fill_(torch.nan)
            loss = loss * torch.nan
        return loss

    monkeypatch.setattr(Trainer, "backward", backward)
    common = (
        f"{TINY} {SHORT} --use_cached --cached_path {cached} --epochs 2 --precision {precision}"
    )
    run("main_tokenbridge", f"{common} --max_bad_steps 2 --output_dir {tmp_path}/allowed")
    content = load(tmp_path / "allowed")
    for key in ("model", "model_ema"):
        assert all(not value.isnan().any() for value in content[key].values())
    assert len(calls) == 8 and "1 of 2 allowed" in caplog.text and "2 of 2 allowed" in caplog.text
    if precision == "fp32":  # fp16's scaler may leave out others
        assert {int(state["step"]) for state in content["optimizer"]["state"].values()} == {6}
    rows = [
        json.loads(line)
        for line in (tmp_path / "allowed" / "bad_steps-rank0.jsonl").read_text().splitlines()
    ]
    assert [(row["epoch"], row["step"], row["rank"]) for row in rows] == [(0, 1, 0), (1, 0, 0)]
    assert all(
        len(row["files"]) == 4 and Path(row["files"][0]).is_file() and row["lr"] >= 0
        for row in rows
    )

    calls.clear()
    line = refused("main_tokenbridge", f"{common} --output_dir {tmp_path}/stopped")
    assert "epoch 0, step 1: not finite" in line and "bad_steps-rank0.jsonl" in line
    assert not (tmp_path / "stopped" / "checkpoint-last.pth").exists()


def test_the_files_of_a_step_are_those_the_loader_gave(cached):
    dataset = CachedFolder(cached)
    sampler = ShuffledRankSampler(dataset, 1, 0, shuffle=True, seed=1)
    sampler.start = 4
    dataset.samples = [
        (path, index) for index, (path, _) in enumerate(dataset.samples)
    ]  # labels tell the item
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, sampler=sampler)
    labels = [label for _, labels in loader for label in labels.tolist()]
    expected = [dataset.samples[label][0] for label in labels[4:8]]
    trainer = new_trainer(variant(), loader, batch_size=4)
    assert trainer.files_of_step(1) == expected


# --------------------------------------------------------------------------------------------------------------------
# Bits that are the same in every run.


def test_nothing_in_training_and_sampling_is_refused_as_not_deterministic(train, vae_path):
    try:
        sample = (
            f"--online_eval --no_metrics --num_images 4 --num_iter 2 --cfg 2 --vae_path {vae_path}"
        )
        folder = train("run", f"--epochs 1 --deterministic {sample}")
        assert torch.get_deterministic_debug_mode() == 2
    finally:
        torch.use_deterministic_algorithms(False)
    assert list((folder / "online_eval").iterdir())


def test_a_run_that_goes_on_in_another_precision_says_so(train, tmp_path, instructions, caplog):
    instructions("bf16")
    train("run", "--epochs 1 --precision bf16")
    instructions()  # on a CPU of another kind
    train("run", f"--epochs 2 --precision bf16 --resume {tmp_path}/run")
    assert "was written by a run in bf16, this run computes in fp32" in caplog.text
    caplog.clear()
    train("run", f"--epochs 3 --precision bf16 --resume {tmp_path}/run")
    assert "was written" not in caplog.text
