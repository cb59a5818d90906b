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


@pytest.mark.parametrize("error", ["UserError('text')", "ReportedByRank0('text')", "Preempted()"])
def test_a_failed_rank_ends_without_the_exit_of_python(tmp_path, error):
    # There, gloo's threads may abort the process; this function does so always.
    code = f"""
import atexit, os
import torch.distributed as dist
from util.errors import Preempted, ReportedByRank0, UserError, run
def main():
    dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
    atexit.register(os.abort)
    raise {error}
run(main)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == (75 if "Preempted" in error else 2), ended.stderr
    assert ("text" in ended.stderr) == error.startswith("User")


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
