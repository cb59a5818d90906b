"""What ``make`` does before the first test or demo: it finds a Python, makes ``.venv``, installs; by a fake Python."""

import os
import shutil
import subprocess
import tomllib

import pytest
import yaml

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")

#: Lists its arguments in ``calls``, reports its version, and copies itself into the environments that it creates.
PYTHON = """#!/bin/sh
echo "$@" >> calls
case "$*" in
    *version_info*) echo {version};;
    *sound*) echo sound;;
    "-m venv "*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python";;
esac
"""


@pytest.fixture
def make(tmp_path):
    """``make("demo", "3.12")`` returns status, standard error and the arguments of all calls of this Python."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)

    def make(target: str, version: str) -> tuple[int, str, list[str]]:
        python = tmp_path / "fake-python"
        python.write_text(PYTHON.format(version=version))
        python.chmod(0o755)
        (tmp_path / "calls").write_text("")
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("MAKE")
        }
        command = ["make", target, f"PYTHON={python}"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
        )
        return done.returncode, done.stderr.strip(), (tmp_path / "calls").read_text().splitlines()

    return make


def test_an_old_python_is_refused_in_one_line_before_anything_is_made(make, tmp_path):
    status, said, _ = make("demo", "3.10")
    assert status == 2 and len(said.splitlines()) == 1
    assert f"Python 3.11 or newer is needed, {tmp_path}/fake-python is 3.10:" in said
    assert not (tmp_path / ".venv").exists()


def test_a_new_python_makes_the_environment_once(make, tmp_path):
    status, _, calls = make("demo", "3.12")
    assert status == 0 and (tmp_path / ".venv" / ".installed").exists()
    done = [call for call in calls if not call.startswith("-c")]
    assert done[0] == "-m venv --clear .venv"
    assert "pip install" in done[1] and done[1].endswith("-r requirements.lock")
    assert "pip install" in done[2] and done[2].endswith("--editable .")
    assert done[3:] == ["demo/demo.py"]
    status, _, calls = make("demo", "3.12")
    assert status == 0 and [call for call in calls if not call.startswith("-c")] == ["demo/demo.py"]
    # New pins are installed into the environment that exists.
    os.utime(tmp_path / ".venv" / ".installed", (0, 0))
    status, _, calls = make("demo", "3.12")
    assert status == 0 and any(call.endswith("-r requirements.lock") for call in calls)
    assert not any("venv --clear" in call for call in calls)


def test_clean_keeps_results(make, tmp_path):
    for name in (".venv", "output"):
        (tmp_path / name).mkdir()
    assert make("clean", "3.12")[0] == 0
    assert not (tmp_path / ".venv").exists() and (tmp_path / "output").exists()


def test_conda_installs_the_project_in_the_versions_that_make_lock_wrote(make, tmp_path):
    make("lock", "3.11")
    constraints = (ROOT / "constraints.txt").read_text()
    assert (tmp_path / "constraints.txt").read_text() == constraints
    pinned = {line.partition("==")[0] for line in constraints.splitlines()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {
        dependency.partition(">=")[0].replace("_", "-").lower()
        for dependency in project["dependencies"]
    }
    assert needed <= pinned
    conda = yaml.safe_load((ROOT / "environment.yaml").read_text())["dependencies"]
    assert conda[-1] == {"pip": ["-c constraints.txt", "-e ."]}
