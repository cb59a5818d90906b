"""What a result or a run was made with: versions of packages, the project's commit, the command line."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util.files import write_json

ARGS_NAME = "args.json"


def provenance() -> dict[str, str]:
    """Versions of packages and the project's commit, to be kept with results."""
    packages = ("torch", "torchvision", "torch-fidelity", "numpy", "timm")
    versions = {}
    for name in packages:
        try:
            versions[f"{name}_version"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # it was built without metadata
            versions[f"{name}_version"] = "unknown"
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(
            git, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()
    except (
        OSError,
        subprocess.SubprocessError,
    ):  # not a checkout, or on a disk that does not answer
        commit = "unknown"
    return {**versions, "commit": commit}


def write_args(output_dir: str | Path, args: Mapping[str, Any]) -> None:
    """Write the flags of a training run, its command line and :func:`provenance` to ``output_dir/args.json``."""
    content = {"args": dict(args), "command": sys.argv, **provenance()}
    write_json(Path(output_dir) / ARGS_NAME, content)
