"""Commands started with an interpreter that lacks the packages, and packages of another project."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

COMMANDS = [
    "main_tokenbridge.py",
    "main_cache.py",
    "main_vae.py",
    "main_metrics.py",
    "reconstruction.py",
    "generate.py",
    "demo/demo.py",
    "demo/web.py",
    "experiments/run.py",
    "-m tools.download",
    "-m benchmarks.table",
    "-m experiments.report",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interpreter_without_the_packages_is_told_which_environment_to_activate(command):
    # Without the module site, the environment's packages are not found
    ran = subprocess.run(
        [sys.executable, "-S", *command.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert f"error: {sys.executable} has no PyTorch: activate" in ran.stderr
    assert "source .venv/bin/activate" in ran.stderr


def test_a_package_util_of_another_project_is_named(tmp_path):
    (tmp_path / "util").mkdir()
    (tmp_path / "util" / "misc.py").touch()
    code = f"import sys, util.misc; sys.path.insert(0, {str(ROOT)!r}); import models"
    # Isolated from the environment, in which this project is installed
    ran = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    line = ran.stderr.splitlines()[-1]
    assert line.startswith(f"ImportError: the package models of {ROOT} needs the package util")
    assert f"was imported from {tmp_path / 'util'}, another project's" in line
