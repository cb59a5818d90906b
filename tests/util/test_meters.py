"""Logs that cannot be written, and TensorBoard's curve after a run went back."""

import builtins
import io
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import scalars
from util.dashboards import RunLog
from util.meters import BadSteps, StepResult


def full(monkeypatch) -> None:
    """Nothing can be written any more."""

    def open_full(path, mode="r", *args, **options):
        if "r" not in mode:
            raise OSError(28, "No space left on device")
        return open_file(path, mode, *args, **options)

    open_file = builtins.open
    monkeypatch.setattr(builtins, "open", open_full)
    monkeypatch.setattr(io, "open", open_full)


def write(log: RunLog, steps: range) -> None:
    """Gives the log's thread time for each value."""
    for step in steps:
        log.add_scalars({"loss": 1.0}, step)
        time.sleep(0.05)


@pytest.mark.parametrize("when", ["from the start", "later"])
def test_a_log_that_cannot_be_written_is_told_once_and_goes_on_when_there_is_space(
    tmp_path, monkeypatch, caplog, capfd, when
):
    monkeypatch.setattr(RunLog, "PAUSE", 0.0)
    with monkeypatch.context() as patch:
        if when == "from the start":
            full(patch)
        log = RunLog("tensorboard", tmp_path, 0, 5)
        if when == "later":
            log.add_scalars({"loss": 1.0}, 1)
            log.dashboard.writer.flush()
            full(patch)
        write(log, range(2, 7))
    time.sleep(1)  # TensorBoard orders files by their second
    write(log, range(50, 55))  # the first may be lost with the thread that failed
    log.close()
    assert caplog.text.count("No space left on device") == 1
    found = scalars(tmp_path, "loss")
    assert 54 in found and set(found) <= {1, *range(50, 55)}
    assert "Exception in thread" not in capfd.readouterr().err


def test_steps_that_a_run_takes_once_more_are_shown_once(tmp_path):
    for start, value in ((0, 1.0), (3, 2.0)):
        with RunLog("tensorboard", tmp_path, start, steps_per_epoch=2) as log:
            for step in range(start + 1, 6):
                log.add_scalars({"loss": value}, step)
    assert scalars(tmp_path, "epoch") == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0, 5: 2.5}
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
    ]


def test_a_list_of_bad_steps_that_cannot_be_written_does_not_end_a_run(tmp_path, caplog):
    (tmp_path / "file").touch()
    bad_steps, nan = BadSteps(1, tmp_path / "file" / "folder"), torch.tensor(torch.nan)
    bad_steps.add(StepResult(nan, nan, 1e-3, 0, 0), ["a.png", "b.png"])
    assert "a.png, b.png" in caplog.text and "1 of 1 allowed" in caplog.text
