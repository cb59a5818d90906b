"""Commands started with an interpreter that lacks the packages, and packages of another project."""

import importlib.util
import re
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


def import_error(code, folder, *options):
    """Return the message of the ImportError that ``code`` raises in ``folder``."""
    ran = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=folder, capture_output=True, text=True
    )
    kind, message = ran.stderr.splitlines()[-1].split(": ", 1)
    assert kind == "ImportError"
    return message


def test_a_package_util_of_another_project_is_named(tmp_path):
    (tmp_path / "util").mkdir()
    (tmp_path / "util" / "misc.py").touch()
    code = f"import sys, util.misc; sys.path.insert(0, {str(ROOT)!r}); import models"
    # Isolated from the environment, in which this project is installed
    message = import_error(code, tmp_path, "-S")
    assert message.startswith(f"TokenBridge in {ROOT} needs its own package util, but util was")
    assert f"imported from {tmp_path / 'util'}, another project's" in message


INSTALLED = pytest.mark.skipif(
    importlib.util.find_spec("__editable___tokenbridge_0_1_0_finder") is None,
    reason="the project is not installed",
)


@INSTALLED
def test_no_module_that_needs_those_which_mar_has_is_mixed(tmp_path):
    for name in ("models/vae.py", "util/crop.py", "util/lr_sched.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("AutoencoderKL = center_crop_arr = learning_rate = None")
    folders = [ROOT / name for name in ("models", "util", "tools")]
    files = [file for folder in folders for file in sorted(folder.rglob("[!_]*.py"))]
    files = [file for file in files if not (tmp_path / file.relative_to(ROOT)).exists()]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    code = f"""
import importlib, sys
for name in {names!r}:
    try:
        importlib.import_module(name)
        print(name)
    except ImportError:
        pass
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    mixed = r"(from|import) (util\.(crop|lr_sched|errors)|models\.(vae|location))\b"
    for name, file in zip(names, files, strict=True):
        if re.search(mixed, file.read_text()):
            assert name not in ran.stdout.split(), name


@INSTALLED
@pytest.mark.parametrize("module", ["pipeline", "tokenbridge", "tokenizer", "quantizer"])
def test_the_installed_project_is_not_mixed_with_folders_of_the_same_names(tmp_path, module):
    for name in ("models/vae.py", "util/lr_sched.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    message = import_error(f"import models.{module}", tmp_path)
    assert f"needs its own package models, but models was imported from {tmp_path}" in message
    (tmp_path / "models" / "vae.py").unlink()
    (tmp_path / "models").rmdir()
    message = import_error(f"import models.{module}", tmp_path)
    assert f"needs its own package util, but util was imported from {tmp_path}" in message
