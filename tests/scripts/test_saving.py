"""Checkpoints written while training goes on."""

import io
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

import engine_tokenbridge
from engine_tokenbridge import Trainer
from models.tokenbridge import TokenBridge
from tests.conftest import SMALL, described, load, new_trainer, same
from tests.scripts.conftest import BASE
from util.checkpoint import saver
from util.checkpoint.runs import read_run
from util.signals import StopSignals

WAIT = 60  # seconds until what should have come is given up


def take_step(trainer: Trainer) -> None:
    loss = trainer.state.model(torch.randn(2, 16, 4, 4), torch.tensor([0, 1]))
    trainer.state.scaler.scale(loss).backward()
    trainer.clip_and_step(loss.detach(), 1e-3)
    trainer.finish_step()


@pytest.fixture
def slow_disk(monkeypatch):
    """Files wait for it once they are written, not yet under their name, each for a release of its own."""
    disk, came, write = threading.Semaphore(0), [], torch.save

    def slow(content, file):
        write(content, file)
        came.append(disk.acquire(timeout=WAIT))

    monkeypatch.setattr(torch, "save", slow)
    disk.came = came
    return disk


# --------------------------------------------------------------------------------------------------------------------
# The file.


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_file_is_of_its_step_though_training_goes_on(tmp_path, monkeypatch, precision):
    trainer = new_trainer(described(), precision=precision, output_dir=tmp_path, keep_last=1)
    at_once, written, write = io.BytesIO(), [], torch.save
    save, go = saver.Saver.save, threading.Event()

    def both(self, path, content, *others):
        write(content, at_once)
        save(self, path, content, *others)

    monkeypatch.setattr(saver.Saver, "save", both)
    monkeypatch.setattr(torch, "save", lambda *args: written.append(go.wait(WAIT)) or write(*args))
    state = trainer.state
    take_step(trainer)
    state.save()
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    for _ in range(2):
        take_step(trainer)
    go.set()
    state.saver.finish()
    assert not all(map(torch.equal, before.values(), state.model.state_dict().values()))
    assert (
        written == [True] and (tmp_path / "checkpoint-last.pth").read_bytes() == at_once.getvalue()
    )


def test_a_snapshot_copies_each_storage_once():
    whole = torch.arange(12.0).view(3, 4)
    content = {
        "whole": whole,
        "list": [whole.T, whole[1:, ::2]],
        "empty": torch.zeros(0),
        "half": whole.half(),
        "n": 1,
    }
    result = saver.snapshot({"weights": TokenBridge(**SMALL).state_dict(), **content})
    assert result.pop("weights")._metadata and same(result, content)
    assert [t.stride() for t in result["list"]] == [(1, 4), (4, 2)]
    assert {t.untyped_storage().data_ptr() for t in result["list"]} == {result["whole"].data_ptr()}
    assert (
        result["whole"].data_ptr() != whole.data_ptr()
        and result["half"].data_ptr() != content["half"].data_ptr()
    )


# --------------------------------------------------------------------------------------------------------------------
# Runs on slow and full disks.


def test_training_goes_on_while_a_checkpoint_is_written(train, slow_disk, monkeypatch):
    step = Trainer.clip_and_step

    def take_step(
        trainer, *args
    ):  # of the next epoch, whose loader's processes were forked meanwhile
        step(trainer, *args)
        if trainer.state.steps_done == 6:
            slow_disk.release(2)

    monkeypatch.setattr(Trainer, "clip_and_step", take_step)
    folder = train("run", "--epochs 2 --save_last_freq 1 --num_workers 2")
    assert slow_disk.came == [True, True]
    assert [load(folder, f"checkpoint-last{age}.pth")["epoch"] for age in (".1", "")] == [0, 1]


def test_a_save_waits_for_the_one_before_and_says_so_once(slow_disk, monkeypatch, tmp_path):
    trainer, said = new_trainer(described(), output_dir=tmp_path, keep_last=3), []
    monkeypatch.setattr(
        saver.log, "warning", lambda message: said.append(message) or slow_disk.release()
    )
    for number in range(3):
        take_step(trainer)
        if number == 2:
            threading.Timer(0.5, slow_disk.release).start()
        trainer.state.save()
    slow_disk.release()
    trainer.state.saver.finish()
    assert (
        slow_disk.came == [True] * 3 and len(said) == 1 and "training waits for the disk" in said[0]
    )
    names = ["checkpoint-last.2.pth", "checkpoint-last.1.pth", "checkpoint-last.pth"]
    assert [load(tmp_path, name)["step"] for name in names] == [1, 2, 3]


@pytest.fixture
def full_disk(monkeypatch):
    """Files cannot be written from then on; lists the attempts."""
    attempts = []

    def full(number):
        attempts.append(number)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        "util.provenance.write_json", lambda *_: None
    )  # so that checkpoints are the first to fail
    monkeypatch.setattr(os, "fsync", full)
    return attempts


@pytest.mark.parametrize("end", ["later save", "end", "signal"])
def test_a_full_disk_ends_a_run_with_one_line_at_its_end(
    refused, cached, monkeypatch, tmp_path, full_disk, end
):
    steps, step = [], Trainer.clip_and_step

    def take_step(*args):
        steps.append(step(*args))
        if end == "signal":
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(Trainer, "clip_and_step", take_step)
    often = "--save_every_steps 2" if end == "later save" else ""
    folder = f"--use_cached --cached_path {cached} --output_dir {tmp_path}/run"
    line = refused("main_tokenbridge", f"{BASE} {folder} --epochs 2 --save_last_freq 9 {often}")
    assert line.endswith(
        "checkpoint-last.pth: No space left on device; free space or choose another folder"
    )
    assert len(steps) == (1 if end == "signal" else 8) and len(full_disk) == (
        4 if end == "later save" else 1
    )
    assert not list((tmp_path / "run").glob("*.pt*"))


def test_a_full_disk_does_not_hide_why_a_run_ended(train, monkeypatch, full_disk, caplog):
    step = Trainer.clip_and_step

    def take_step(trainer, *args):
        step(trainer, *args)
        if trainer.state.steps_done == 3:
            raise RuntimeError("something else")

    monkeypatch.setattr(Trainer, "clip_and_step", take_step)
    with pytest.raises(RuntimeError, match="something else"):
        train("run", "--epochs 1 --save_every_steps 2")
    assert (
        "No space left on device" in caplog.records[-1].getMessage()
        and caplog.records[-1].levelname == "ERROR"
    )


def test_a_run_warns_at_once_of_a_full_disk_and_writes_when_there_is_space_again(
    train, monkeypatch, caplog
):
    monkeypatch.setattr("util.provenance.write_json", lambda *_: None)
    monkeypatch.setattr(saver, "PAUSE", 0.01)
    fsync, step, attempts, written = os.fsync, Trainer.clip_and_step, [], threading.Event()

    def full_at_first(number):
        attempts.append(number)
        if len(attempts) < 3:
            raise OSError(28, "No space left on device")
        fsync(number)
        written.set()

    def take_step(trainer, *args):  # the step after the save
        if trainer.state.steps_done == 2:
            assert written.wait(WAIT)
        step(trainer, *args)

    monkeypatch.setattr(os, "fsync", full_at_first)
    monkeypatch.setattr(Trainer, "clip_and_step", take_step)
    folder = train("run", "--epochs 1 --save_every_steps 2")
    assert [load(folder, f"checkpoint-last{age}.pth")["step"] for age in (".1", "")] == [2, 0]
    warnings = [
        record.getMessage() for record in caplog.records if "is retried in" in record.getMessage()
    ]
    assert len(warnings) == 2 and all("No space left on device" in warning for warning in warnings)


@pytest.mark.parametrize("stopped", [False, True])
def test_no_process_leaves_before_the_file_is_there(
    run_two, cached, monkeypatch, tmp_path, stopped
):
    path, write = tmp_path / "run" / "checkpoint-last.pth", torch.save
    monkeypatch.setattr(torch, "save", lambda *args: time.sleep(1) or write(*args))
    if stopped:
        monkeypatch.setattr(StopSignals, "agreed", lambda self: True)
        monkeypatch.setattr(
            engine_tokenbridge, "Preempted", lambda _: SystemExit(0 if path.exists() else 1)
        )
    else:
        monkeypatch.setattr(
            dist, "destroy_process_group", lambda: os._exit(0 if path.exists() else 1)
        )
    common = f"{BASE} --epochs 1 --use_cached --cached_path {cached}"
    run_two("main_tokenbridge", f"{common} --output_dir {path.parent}")
    assert load(path.parent)["step"] == (1 if stopped else 0)


# --------------------------------------------------------------------------------------------------------------------
# Killed.


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_or_a_second_interrupt_amid_a_file_leaves_the_one_before(
    train, monkeypatch, tmp_path, number
):
    fork, write, hear, files = (
        multiprocessing.get_context("fork"),
        torch.save,
        StopSignals._hear,
        [],
    )
    writing, heard = fork.Event(), fork.Event()

    def save(content, file):
        files.append(file)
        if len(files) == 2:
            file.write(b"half")
            file.flush()
            writing.set()
            time.sleep(10 * WAIT)
        write(content, file)

    def start():
        torch.set_num_threads(1)  # the threads of the process that was forked are not there
        train("run", "--epochs 99 --save_last_freq 1")

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(StopSignals, "SAME", 0.5)
    monkeypatch.setattr(StopSignals, "_hear", lambda *args: hear(*args) or heard.set())
    run = fork.Process(target=start)
    run.start()
    try:
        assert writing.wait(WAIT)
        if number == signal.SIGINT:
            os.kill(run.pid, number)
            assert heard.wait(WAIT)
            os.kill(run.pid, number)  # too soon: the same one
            time.sleep(2)
            assert run.is_alive()
        os.kill(run.pid, number)
        run.join(WAIT)
        assert run.exitcode == -number
    finally:
        run.kill()
    assert read_run(tmp_path / "run" / "checkpoint-last.pth")["epoch"] == 0
    assert len(list((tmp_path / "run").glob(".checkpoint-last.pth.*.part"))) == 1
