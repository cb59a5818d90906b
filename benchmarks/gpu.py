"""Run the CUDA tests and all CUDA benchmarks, the most important first: ``make gpu``.

Every benchmark writes its results when it ends. What does not start in time is listed with its
command.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time

from util import errors
from util.args import check_positive, new_parser
from util.devices import find_device

RESULTS = "benchmarks/results/cuda-{}.json"
LARGE = "--model tokenbridge_large --device cuda"
#: Name of the results, and arguments of Python.
COMMANDS = {
    "training": f"-m benchmarks.training {LARGE} --batch 64 --ways bf16 --compile --vary_masks "
    "--repeats 10",
    "sampling": f"-m benchmarks.sampling {LARGE} --batch 64 --num_iter 64 --ways bf16 --compile "
    "--repeats 1",
    "tests": "-m pytest -q tests/scripts/test_cuda.py",
    "head_speed": f"-m benchmarks.head_speed {LARGE} --compile",
    "tokenizer": "-m benchmarks.tokenizer --batch 64 --device cuda",
    "training-segments": f"-m benchmarks.training {LARGE} --batch 64 --heads ar --ways bf16 "
    "--vary_masks --repeats 10",
    "quantizer": "-m benchmarks.quantizer --device cuda",
    "loader": "-m benchmarks.loader --workers 0 8 --device cuda",
}
#: Variables of the environment: without expandable segments, an allocator that fragments more.
ENVIRONMENT = {
    "training": "expandable_segments:True",
    "training-segments": "expandable_segments:False",
}


def command_of(name: str) -> list[str]:
    """Return the arguments of Python for one of :data:`COMMANDS`."""
    results = [] if name == "tests" else ["--json", RESULTS.format(name)]
    return [*shlex.split(COMMANDS[name]), *results]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the command line of this module."""
    parser = new_parser(__doc__, "benchmarks.gpu")
    text = "minutes after which nothing is started, and what is running is stopped"
    parser.add_argument("--minutes", type=float, default=9.0, help=text)
    return parser


def run_all(minutes: float) -> dict[str, str]:
    """Run the commands in order; return the outcome of each by name."""
    end = time.monotonic() + 60 * minutes
    outcomes = {}
    for name in COMMANDS:
        left = end - time.monotonic()
        if left <= 0:
            outcomes[name] = "not started"
            continue
        words, start = [sys.executable, *command_of(name)], time.monotonic()
        settings = ENVIRONMENT.get(name)
        environment = {**os.environ, **({"PYTORCH_CUDA_ALLOC_CONF": settings} if settings else {})}
        print(f"{name}: {shlex.join(words[1:])}", flush=True)
        try:
            status = subprocess.run(words, env=environment, timeout=left, check=False).returncode
            outcomes[name] = "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            outcomes[name] = "stopped"
        outcomes[name] += f" after {time.monotonic() - start:.0f} s"
    return outcomes


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    check_positive(args, "minutes")
    _, problem = find_device("cuda")
    if problem:
        raise errors.UserError(problem)
    outcomes = run_all(args.minutes)
    for name, outcome in outcomes.items():
        remedy = "" if outcome.startswith("done") else f": python {shlex.join(command_of(name))}"
        print(f"{name}: {outcome}{remedy}")
    if any(outcome.startswith("failed") for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    errors.run(main)
