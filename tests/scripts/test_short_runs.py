"""Short runs on little data: what would have gone wrong in silence is told, in one line."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.tokenbridge import TokenBridge
from tests.conftest import SHORT, TINY, damaged, filled, load, variant
from tests.scripts.conftest import BASE
from util.errors import UserError
from util.files import read_json
from util.lr_sched import log_learning_rates
from util.training_state import EMA_WARMUP

RATES = {"lr": 1e-3, "min_lr": 0.0, "warmup_epochs": 1.0, "epochs": 10, "lr_schedule": "cosine"}

# --------------------------------------------------------------------------------------------------------------------
# The average and the learning rate.


def test_at_the_end_of_the_published_recipe_the_warm_up_of_the_average_is_forgotten():
    steps, rate = 400 * 1_281_167 // 2048, 0.9999
    ends = EMA_WARMUP["warmup_gamma"] * rate / (1 - rate)
    assert rate ** (steps - ends) < torch.finfo(torch.float32).eps * 3 < 1e-6


@pytest.mark.parametrize(
    ("flags", "steps", "words"),
    [
        ({}, 5, ""),
        ({"warmup_epochs": 100, "epochs": 3}, 1000, "never leaves its warm-up of 100"),
        ({"lr": 1e-6}, 5, "add up to 2.5e-05"),
        ({"lr": 1e-6}, 5000, ""),
        ({"lr": 0.0}, 5, ""),  # on purpose
    ],
)
def test_rates_that_teach_nothing_are_told(caplog, flags, steps, words):
    with caplog.at_level("INFO", logger="tokenbridge"):
        log_learning_rates(Namespace(**RATES | flags), steps)
    assert f"{steps * (RATES | flags)['epochs']} steps, {steps} in each" in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(words) and all(words in warning for warning in warnings)


# --------------------------------------------------------------------------------------------------------------------
# A folder that holds a run.


def test_a_new_run_does_not_replace_a_finished_one(refused, train, cached):
    folder = train("run")
    before = (folder / "checkpoint-last.pth").read_bytes()
    for start in ("", f"--finetune {folder}"):
        line = refused(
            "main_tokenbridge",
            f"{BASE} --epochs 1 --use_cached --cached_path {cached} --output_dir {folder} {start}",
        )
        assert f"--resume {folder}" in line and "another --output_dir" in line
    assert (folder / "checkpoint-last.pth").read_bytes() == before
    assert load(train("run", f"--epochs 2 --resume {folder}"))["epoch"] == 1


def test_a_dry_run_tells_what_a_run_needs_and_writes_nothing(train, caplog):
    with caplog.at_level("INFO", logger="tokenbridge"):
        folder = train("run", "--epochs 3 --dry_run --skip_bad_images")
    assert (
        "12 steps, 4 in each of 3 epochs" in caplog.text and "seconds for 12 steps" in caplog.text
    )
    assert "GiB for each checkpoint; nothing was written" in caplog.text and not folder.exists()


def test_a_dry_run_writes_nothing_though_images_are_bad(run, images, vae_path, tmp_path, caplog):
    for path in images.glob("train/*/[1-3].png"):
        damaged(path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "bad_images-rank0.txt").write_text("of a run")
    command = (
        f"{BASE} --data_path {images} --vae_path {vae_path} --epochs 1 --dry_run --skip_bad_images"
    )
    run("main_tokenbridge", f"{command} --output_dir {tmp_path}/run")
    assert "skipped" in caplog.text
    assert [path.read_text() for path in (tmp_path / "run").iterdir()] == ["of a run"]


def test_a_dry_run_whose_loss_is_not_finite_is_refused(refused, cached, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(torch.nan))
    command = f"{BASE} --use_cached --cached_path {cached} --epochs 1 --dry_run --output_dir {tmp_path}/run"
    assert "not finite, a run would end" in refused("main_tokenbridge", command)


def test_a_run_tells_what_it_was_made_with(train):
    content = json.loads((train("run", "--epochs 1 --seed 7") / "args.json").read_text())
    assert content["args"]["seed"] == 7 and torch.__version__.startswith(content["torch_version"])
    assert content["command"] and content["commit"]


def test_pictures_while_it_trains_need_neither_inception_nor_a_number_for_each_class(
    train, vae_path
):
    online = f"--epochs 2 --eval_freq 1 --online_eval --no_metrics --vae_path {vae_path} --num_images 6 --num_iter 2"
    log = EventAccumulator(str(train("run", f"{online} --cfg 2"))).Reload()
    assert log.Tags()["images"] == ["samples/cfg1", "samples/cfg2"]
    first, second = log.Images("samples/cfg2")
    assert (first.step, second.step) == (4, 8) and first.width > 16 and first.height >= 16


# --------------------------------------------------------------------------------------------------------------------
# Tokenizers.


def test_a_tokenizer_that_is_not_the_caches_is_refused(refused, cached, vae_path, tmp_path):
    content = load(vae_path.parent, vae_path.name)
    content["model"] = {name: value + 0.01 for name, value in content["model"].items()}
    torch.save(content, tmp_path / "other.ckpt")
    use = f"{BASE} --epochs 1 --use_cached --cached_path {cached} --output_dir {tmp_path}/new"
    line = refused("main_tokenbridge", f"{use} --vae_path {tmp_path}/other.ckpt")
    assert "was made with another tokenizer than" in line and "weights differ" in line


@pytest.fixture
def other_tokenizer(vae_path, tmp_path) -> Path:
    """A tokenizer of the same sizes and factor."""
    content = load(vae_path.parent, vae_path.name)
    content["model"]["quant_conv.bias"] += 1
    torch.save(content, tmp_path / "other.ckpt")
    return tmp_path / "other.ckpt"


def test_a_tokenizer_of_other_weights_than_the_checkpoints_is_refused(
    run, refused, trained, cached, images, vae_path, other_tokenizer, tmp_path
):
    (images / "val").symlink_to(images / "train")
    run(
        "main_cache",
        f"--img_size 16 --vae_path {other_tokenizer} --data_path {images} --cached_path {tmp_path}/other",
    )
    resume = f"{TINY} --resume {trained} --output_dir {tmp_path}/new --num_images 4 --no_metrics --num_iter 2"
    data, cache = f"--data_path {images}", f"--use_cached --cached_path {tmp_path}/other"
    for flags in (
        f"--evaluate --vae_path {other_tokenizer}",
        f"--evaluate_nll --vae_path {other_tokenizer} {data}",
        f"--evaluate_nll {cache} --cached_val_path {tmp_path}/other",
        f"--vae_path {other_tokenizer} {data} --epochs 3",
        f"{cache} --epochs 3",
    ):
        line = refused("main_tokenbridge", f"{resume} {flags}")
        sides = f"{trained}/checkpoint-last.pth was trained with another tokenizer than {tmp_path}/other"
        assert sides in line and "in the checkpoint, " in line and "--vae_path" in line, flags
    use = f"{TINY} --epochs 1 --online_nll --output_dir {tmp_path}/new --use_cached --cached_path {cached}"
    assert "weights differ" in refused(
        "main_tokenbridge", f"{use} --cached_val_path {tmp_path}/other"
    )
    # Those that are unknown pass, and what was known is not forgotten.
    about = read_json(cached / "cache.json")
    (cached / "cache.json").write_text(
        json.dumps({k: v for k, v in about.items() if k != "vae_sha256"})
    )
    run("main_tokenbridge", f"{resume} --use_cached --cached_path {cached} --epochs 3 {SHORT}")
    assert load(tmp_path / "new")["config"]["vae_sha256"] == about["vae_sha256"]


def test_the_calibration_of_another_tokenizer_is_not_adopted(
    run, train, images, vae_path, other_tokenizer, tmp_path
):
    first = train("first", "--epochs 1 --quant_calibrate")
    fine = f"{BASE} --epochs 1 --finetune {first} --data_path {images}"
    for name, path in {"same": vae_path, "other": other_tokenizer}.items():
        run("main_tokenbridge", f"{fine} --vae_path {path} --output_dir {tmp_path}/{name}")
    calibration = [
        load(tmp_path / name)["config"]["channel_std"] for name in ("first", "same", "other")
    ]
    assert calibration[0] == calibration[1] and calibration[2] is None


def test_weights_that_know_another_tokenizer_than_kl16_ask_for_it(refused, trained, tmp_path):
    line = refused(
        "main_tokenbridge",
        f"{TINY} --evaluate --no_metrics --resume {trained} --output_dir {tmp_path}/new",
    )
    assert "another tokenizer than KL-16" in line and "--vae_path" in line


# --------------------------------------------------------------------------------------------------------------------
# Python.


def test_labels_may_be_a_list():
    model = variant()
    options = {"num_iter": 2, "seeds": [1, 2]}
    a, b = (
        model.sample_tokens(2, labels=labels, **options)
        for labels in ([0, 3], torch.tensor([0, 3]))
    )
    assert torch.equal(a, b)


def test_a_misspelt_folder_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled(variant()).save_pretrained("output/model")
    with pytest.raises(UserError, match="did you mean output/model"):
        TokenBridge.from_pretrained("output/modle")


def test_more_steps_than_tokens_are_told_once(run, trained, vae_path, tmp_path, caplog):
    command = f"{TINY} --evaluate --no_metrics --resume {trained} --vae_path {vae_path} --num_images 4 --eval_bsz 2"
    with caplog.at_level("INFO", logger="tokenbridge"):
        run("main_tokenbridge", f"{command} --output_dir {tmp_path}/new --num_iter 100")
    assert caplog.text.count("--num_iter 100 is reduced to the number of tokens, 16") == 1


# --------------------------------------------------------------------------------------------------------------------
# Held-out images.


def test_held_out_classes_are_those_that_were_trained(
    refused, run, cached, trained, tmp_path, caplog
):
    shutil.copytree(cached, tmp_path / "val")
    command = f"{TINY} --evaluate_nll --use_cached --resume {trained} --output_dir {tmp_path}/nll --cached_val_path"
    (tmp_path / "val" / "class1").rename(
        tmp_path / "val" / "class9"
    )  # sorts elsewhere: labels would move
    line = refused("main_tokenbridge", f"{command} {tmp_path}/val")
    assert "other classes than the training images: it lacks class1; also has class9" in line
    train = f"{BASE} --epochs 1 --online_nll --use_cached --cached_path {cached} --cached_val_path {tmp_path}/val"
    assert "lacks class1" in refused("main_tokenbridge", f"{train} --output_dir {tmp_path}/new")
    with caplog.at_level("WARNING", logger="tokenbridge"):
        run("main_tokenbridge", f"{command} {cached}")
    assert f"{cached} is a cache of training images" in caplog.text
