"""A user's error is one line and a status."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from util.config import check_stride
from util.errors import UserError, run


def test_user_errors_are_one_line_also_from_workers(capsys):
    def worker():
        raise UserError(
            "Caught UserError in worker 0.\nTraceback:\n  x\nutil.errors.UserError: cannot read image x\n"
        )

    for main, line in {
        worker: "cannot read image x",
        lambda: check_stride(10, 4): "multiple",
    }.items():
        with pytest.raises(SystemExit) as stop:
            run(main)
        error = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and line in error
            and error.count("\n") == 1
            and error.startswith("error: ")
        )


def test_the_shell_sees_one_line_and_a_status(tmp_path):
    command = [
        sys.executable,
        "main_tokenbridge.py",
        "--use_cached",
        "--cached_path",
        str(tmp_path / "no"),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    log, error = result.stderr.splitlines()
    assert log.startswith("computing on ") and error.startswith("error: no cache at")


def test_ctrl_c_is_one_line_and_the_status_of_shells(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("output", ["/dev/full", "a pipe that nobody reads"])
def test_a_run_whose_messages_cannot_be_written_goes_on_to_its_own_status(output):
    code = (
        "import sys; from util import errors; from util.log import log, progress_bar, start_log\n"
    )
    code += "def main():\n start_log(); log.info('text')\n for _ in progress_bar(range(3)): pass\n"
    code += " raise errors.Preempted('text')\nerrors.run(main)"
    if output == "/dev/full":
        stderr = os.open(output, os.O_WRONLY)
    else:
        read, stderr = os.pipe()
        os.close(read)
    try:
        assert (
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=stderr).returncode == 75
        )
    finally:
        os.close(stderr)
