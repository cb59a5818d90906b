"""Notes for processes that torchrun starts again, and what these do."""

import os

import pytest

from tests.processes import attempt, forked
from util import distributed, errors, launcher
from util.process_group import process_group


@pytest.mark.parametrize("kind, status", [(errors.UserError, 2), (errors.Preempted, 75)])
def test_restarted_processes_end_as_before_without_starting_and_say_it_once(
    monkeypatch, tmp_path, capfd, kind, status
):
    started = tmp_path / "started"

    def main() -> None:
        with process_group("cpu"):
            with started.open("a") as file:
                file.write("x")
            distributed.barrier()
            if distributed.get_rank() == 1:
                raise kind("for this reason")
            raise SystemExit(1)

    for count in range(3):
        attempt(monkeypatch, tmp_path, count)
        answers = forked(2, lambda rank: errors.run(main))[1]
        assert answers == ([1, status] if count == 0 else [status, status])
        assert capfd.readouterr().err.count("for this reason") == 1
    assert started.read_text() == "xx"


def test_what_goes_on_after_a_machine_has_joined_does_not_end_as_before(monkeypatch, tmp_path):
    attempt(monkeypatch, tmp_path, 0)
    launcher.note_end(75, "by SIGTERM")
    assert launcher.end_before() is None  # the same attempt
    attempt(monkeypatch, tmp_path, 1)
    assert launcher.end_before() == [75, "by SIGTERM"]


@pytest.mark.parametrize("error_file", ["", "/dev/null", "elsewhere/error.json"])
def test_other_launchers_are_left_alone(monkeypatch, tmp_path, error_file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error_file)
    launcher.note_end(2, "text")
    launcher.note_saved("file")
    assert launcher.end_before() is None and launcher.saved_before() is None
    assert not os.listdir(tmp_path)
