"""Provenance of results and runs: versions of packages, the project's commit, the command line."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util.files import write_json

ARGS_NAME = "args.json"


def provenance() -> dict[str, str]:
    """Return versions of packages and the project's commit, to be saved with results."""
    packages = ("torch", "torchvision", "torch-fidelity", "numpy", "timm")
    versions = {}
    for name in packages:
        try:
            versions[f"{name}_version"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # the package was built without metadata
            versions[f"{name}_version"] = "unknown"
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        commit = git.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"  # not a checkout, or on a disk that does not respond
    return {**versions, "commit": commit}


def write_args(output_dir: str | Path, args: Mapping[str, Any]) -> None:
    """Write a training run's flags, command line and :func:`provenance` to ``args.json``."""
    content = {"args": dict(args), "command": sys.argv, **provenance()}
    write_json(Path(output_dir) / ARGS_NAME, content)
