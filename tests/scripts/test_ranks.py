"""Processes that see other files or flags than the main one: they follow it, or all end with one line."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import main_tokenbridge
from engine_tokenbridge import Trainer
from models.vae import AutoencoderKL
from tests.conftest import load, same
from tests.processes import run_two
from tests.scripts.conftest import BASE
from util import distributed
from util.checkpoint import runs
from util.checkpoint.files import locate
from util.files import read_json


def elsewhere() -> bool:
    """Whether this process is not the main one."""
    return os.environ.get("RANK", "0") != "0"


@pytest.fixture
def command(cached, tmp_path):
    return f"{BASE} --use_cached --cached_path {cached} --batch_size 2 --output_dir {tmp_path}/run"


@pytest.fixture
def error(capfd):
    """What two processes say, on one line, before both end with status 2."""

    def error(command: str, script: str = "main_tokenbridge") -> str:
        run_two(script, command, status=2)
        lines = [
            line
            for line in capfd.readouterr().err.replace("\r", "\n").splitlines()
            if "error:" in line
        ]
        assert len(lines) == 1 and lines[0].startswith("error:")
        return lines[0]

    return error


def hidden(*names: str):
    """``Path.is_file``, to which files of these names exist on the main process's machine only."""
    is_file = Path.is_file
    return lambda path: is_file(path) and not (elsewhere() and path.name in names)


@pytest.mark.parametrize(
    "flag", ["--resume", "--finetune", "--evaluate_nll --cached_val_path {cached} --resume"]
)
def test_a_checkpoint_on_the_main_process_machine_is_everyones(
    command, train, cached, tmp_path, monkeypatch, flag
):
    weights, ends = train("weights"), []
    for name in ("shared", "local"):
        shutil.copytree(weights, tmp_path / name)
        if name == "local":
            monkeypatch.setattr(Path, "is_file", hidden("checkpoint-last.pth"))
        flags = f"{flag.format(cached=cached)} {tmp_path}/{name} --output_dir {tmp_path}/{name}-end"
        run_two("main_tokenbridge", f"{command} {flags} --epochs 2")
        end = tmp_path / f"{name}-end"
        content = load(end) if "nll" not in flag else read_json(end / "likelihood.json")
        ends.append(
            {
                name: content.get(name)
                for name in ("model", "model_ema", "optimizer", "epoch", "nats_per_dim")
            }
        )
    assert same(*ends)


def test_a_newer_checkpoint_elsewhere_is_not_passed_over(
    command, error, train, tmp_path, monkeypatch
):
    folder = train("run")
    located, asked = locate, []

    def lagging(path: str, names: tuple[str, ...]) -> Path:
        asked.append(path)
        return (
            tmp_path / "nowhere"
            if not elsewhere() and len(asked) <= behind
            else located(path, names)
        )

    monkeypatch.setattr(runs, "locate", lagging)
    monkeypatch.setattr(distributed, "is_local_main_process", lambda: True)
    monkeypatch.setattr(runs, "PAUSE", 0.0)
    behind = 100
    assert f"has a newer checkpoint in {folder}" in error(f"{command} --epochs 2 --resume {folder}")
    assert load(folder)["epoch"] == 0
    behind = 2  # a network's disk that shows it later
    run_two("main_tokenbridge", f"{command} --epochs 2 --resume {folder}")
    assert load(folder)["epoch"] == 1


def test_flags_that_differ_end_the_run(command, error, monkeypatch):
    check_same_flags = main_tokenbridge.check_same_flags

    def typed(args, device) -> None:
        args.lr, args.num_workers = (
            0.5 + elsewhere(),
            int(elsewhere()),
        )  # the latter is the machine's own business
        check_same_flags(args, device)

    monkeypatch.setattr(main_tokenbridge, "check_same_flags", typed)
    assert "--lr is 0.5 on rank 0, but 1.5 on rank 1" in error(command)


def test_images_that_differ_end_the_run(command, error, monkeypatch):
    load_data = main_tokenbridge.load_data

    def found(*args):
        dataset = load_data(*args)
        if elsewhere():
            dataset.samples[3], dataset.samples[4] = dataset.samples[4], dataset.samples[3]
        return dataset

    monkeypatch.setattr(main_tokenbridge, "load_data", found)
    assert "the list of images in train is 16 images" in error(command)


@pytest.mark.parametrize(
    "script, flags",
    [
        ("main_tokenbridge", f"{BASE} --data_path {{data}} --output_dir {{out}}"),
        ("main_cache", "--img_size 16 --data_path {data} --cached_path {out}"),
        ("reconstruction", "--img_size 16 --image_dir {data} --output_dir {out} --no_metrics"),
    ],
)
def test_tokenizers_that_differ_end_the_run(
    error, images, vae_path, tmp_path, monkeypatch, script, flags
):
    from_pretrained = AutoencoderKL.from_pretrained

    def read(path: str):
        vae, factor = from_pretrained(path)
        if elsewhere():
            with torch.no_grad():
                next(vae.parameters()).view(-1)[7] *= 1 + 2**-20
        return vae, factor

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", read)
    command = flags.format(data=images, out=tmp_path / "run")
    assert "the tokenizer's checksum is" in error(
        f"{command} --vae_path {vae_path} --num_workers 0", script
    )


def test_a_checkpoint_that_cannot_be_read_ends_all_with_one_line(command, error, train):
    folder = train("run")
    (folder / "checkpoint-last.pth").write_bytes(b"nothing")
    assert "checkpoint-last.pth is damaged" in error(f"{command} --epochs 2 --resume {folder}")


@pytest.mark.parametrize(
    "flags, saved", [("--save_every_steps 1", 2), ("", 0)], ids=["during a run", "at its end"]
)
def test_weights_that_differ_end_the_run_and_are_not_saved(
    command, error, tmp_path, monkeypatch, flags, saved
):
    take_step = Trainer.clip_and_step

    def diverging(trainer, *args):
        take_step(trainer, *args)
        state = trainer.state
        if state.steps_done == 3 and elsewhere():
            with torch.no_grad():
                next(state.model.parameters()).mul_(1.5)

    monkeypatch.setattr(Trainer, "clip_and_step", diverging)
    monkeypatch.setattr("socket.gethostname", lambda: f"node{os.environ.get('RANK')}")
    line = error(f"{command} --epochs 2 {flags}")  # of 4 steps
    assert "the weights of 1 of 2 ranks differ from the others': 1 on node1" in line
    assert ("start again" in line) == (not saved) and ("continue from it" in line) == bool(saved)
    path = tmp_path / "run" / "checkpoint-last.pth"
    assert load(path.parent)["step"] == saved if saved else not path.exists()


def test_bad_steps_end_all_processes_with_one_line(command, error, monkeypatch):
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(torch.nan))
    assert "epoch 0, step 0: not finite" in error(f"{command} --epochs 1")
