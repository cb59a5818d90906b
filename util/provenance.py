"""What a result or a run was made with: versions of packages, the project's commit, the command line."""

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

from util.files import write_json

ARGS_NAME = "args.json"


def provenance() -> dict[str, str]:
    """Versions of packages and the project's commit, to be kept with results."""
    packages = ("torch", "torchvision", "torch-fidelity", "numpy", "timm")
    versions = {f"{name}_version": importlib.metadata.version(name) for name in packages}
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        commit = "unknown"
    return {**versions, "commit": commit}


def write_args(output_dir: str | Path, args: argparse.Namespace) -> None:
    """Writes the flags of a training, its command line and :func:`provenance` to ``output_dir/args.json``."""
    write_json(Path(output_dir) / ARGS_NAME, {"args": vars(args), "command": sys.argv, **provenance()})
