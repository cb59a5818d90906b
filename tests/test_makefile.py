"""What ``make`` does before the first test or demo: it finds a Python, makes ``.venv``, installs. Pythons are fake."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")

#: Notes its arguments; tells its version; makes environments of which it is the Python; fails on what ``broken`` names.
PYTHON = """#!/bin/sh
echo "$@" >> {folder}/calls
case "$*" in
    *version_info*) echo {version};;
    *sound*) echo sound;;
    "-m venv "*) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python";;
esac
case "$*" in *{broken}*) exit 1;; esac
"""


class Checkout:
    """A folder with the project's Makefile, and fake Pythons in it."""

    def __init__(self, folder: Path):
        self.folder, self.venv = folder, folder / ".venv"
        for name in ("Makefile", "pyproject.toml", "requirements.lock"):
            shutil.copy(ROOT / name, folder)

    def python(self, version: str, broken: str = "nothing") -> Path:
        path = self.folder / "fake-python"
        path.write_text(PYTHON.format(folder=self.folder, version=version, broken=broken))
        path.chmod(0o755)
        return path

    def make(self, *words: str) -> tuple[int, str, list[str]]:
        """Status, what was printed on standard error, and what Python was asked to do."""
        (self.folder / "calls").write_text("")
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("MAKE")
        }
        command = ["make", *words]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, stderr=subprocess.PIPE, text=True
        )
        return (
            done.returncode,
            done.stderr.strip(),
            (self.folder / "calls").read_text().splitlines(),
        )


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("version", ["3.9", "3.10", "2.7"])
def test_an_old_python_is_refused_in_one_line_before_anything_is_made(checkout, version):
    status, said, _ = checkout.make("demo", f"PYTHON={checkout.python(version)}")
    assert status == 2 and len(said.splitlines()) == 1
    assert f"Python 3.11 or newer is needed, {checkout.folder}/fake-python is {version}:" in said
    assert not checkout.venv.exists()


def test_a_python_that_is_not_there_is_refused_in_one_line(checkout):
    status, said, _ = checkout.make("test", "PYTHON=python3.99")
    assert status == 2 and len(said.splitlines()) == 1
    assert "Python 3.11 or newer is needed, python3.99 is not there:" in said


@pytest.mark.parametrize("version", ["3.11", "3.12", "4.0"])
def test_a_new_python_makes_the_environment_once(checkout, version):
    status, _, calls = checkout.make("demo", f"PYTHON={checkout.python(version)}")
    assert status == 0 and (checkout.venv / ".installed").exists()
    done = [call for call in calls if not call.startswith("-c")]
    assert done[0] == "-m venv --clear .venv"
    assert "pip install" in done[1] and done[1].endswith("-r requirements.lock")
    assert "pip install" in done[2] and done[2].endswith("--editable .")
    assert done[3:] == ["demo/demo.py"]
    # Afterwards no other Python is asked for.
    status, _, calls = checkout.make("demo", "PYTHON=python3.99")
    assert status == 0 and [call for call in calls if not call.startswith("-c")] == ["demo/demo.py"]


def test_a_half_installed_environment_is_made_anew(checkout):
    status, _, _ = checkout.make("demo", f"PYTHON={checkout.python('3.12', broken='--editable')}")
    assert status == 2 and checkout.venv.exists()
    (checkout.venv / "left").touch()
    status, _, calls = checkout.make("demo", f"PYTHON={checkout.python('3.12')}")
    assert (
        status == 0 and "-m venv --clear .venv" in calls and not (checkout.venv / "left").exists()
    )


def test_an_environment_whose_python_is_gone_is_made_anew(checkout):
    python = checkout.python("3.12")
    checkout.make("demo", f"PYTHON={python}")
    (checkout.venv / "bin" / "python").unlink()
    (checkout.venv / "bin" / "python").symlink_to("/nowhere/python")
    status, _, calls = checkout.make("demo", f"PYTHON={python}")
    assert status == 0 and "-m venv --clear .venv" in calls and "demo/demo.py" in calls


def test_new_pins_are_installed_into_the_environment_that_is_there(checkout):
    checkout.make("demo", f"PYTHON={checkout.python('3.12')}")
    os.utime(checkout.venv / ".installed", (0, 0))
    status, _, calls = checkout.make("demo", "PYTHON=python3.99")
    assert status == 0 and any(call.endswith("-r requirements.lock") for call in calls)
    assert not any("venv" in call for call in calls)
    # An installation that breaks off leaves no environment that looks whole.
    os.utime(checkout.venv / ".installed", (0, 0))
    checkout.python("3.12", broken="requirements.lock")
    shutil.copy(checkout.folder / "fake-python", checkout.venv / "bin" / "python")
    assert checkout.make("demo")[0] == 2 and not (checkout.venv / ".installed").exists()


def test_the_page_needs_the_demos_model(checkout):
    status, said, _ = checkout.make("web", f"PYTHON={checkout.python('3.12')}")
    assert (
        status == 2 and said.splitlines()[0] == "error: no model of digits yet: make demo trains it"
    )
    (checkout.folder / "output" / "demo").mkdir(parents=True)
    (checkout.folder / "output" / "demo" / "checkpoint-last.pth").touch()
    status, _, calls = checkout.make("web")
    assert status == 0 and calls[-1] == "demo/web.py --resume output/demo"


def test_clean_keeps_results(checkout):
    for name in (".venv", "output"):
        (checkout.folder / name).mkdir()
    assert checkout.make("clean")[0] == 0
    assert not checkout.venv.exists() and (checkout.folder / "output").exists()


def test_conda_installs_the_project_in_the_versions_that_make_lock_wrote(checkout):
    checkout.make("lock", f"PYTHON={checkout.python('3.11')}")
    constraints = (ROOT / "constraints.txt").read_text()
    assert (checkout.folder / "constraints.txt").read_text() == constraints
    pinned = {line.partition("==")[0] for line in constraints.splitlines()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {
        dependency.partition(">=")[0].replace("_", "-").lower()
        for dependency in project["dependencies"]
    }
    assert needed <= pinned
    conda = yaml.safe_load((ROOT / "environment.yaml").read_text())["dependencies"]
    assert conda[-1] == {"pip": ["-c constraints.txt", "-e ."]}
