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

#: The benchmarks for CUDA, by the name of their results, as arguments of ``python -m``.
COMMANDS = {
    "quantizer": "benchmarks.quantizer",
    "head_speed": "benchmarks.head_speed --model tokenbridge_large --compile",
    "sampling": "benchmarks.sampling --model tokenbridge_large --batch 64 --num_iter 64 "
    "--ways bf16 --compile --repeats 1",
    "training": "benchmarks.training --model tokenbridge_large --batch 64 --compile --ways bf16",
    "training-varied": "benchmarks.training --model tokenbridge_large --batch 64 --compile "
    "--ways bf16 --vary_masks --repeats 10",
    "training-segments": "benchmarks.training --model tokenbridge_large --batch 64 --heads ar "
    "--ways bf16 --vary_masks --repeats 10",
    "tokenizer": "benchmarks.tokenizer --batch 64",
    "loader": "benchmarks.loader --workers 0 8",
    "ranks": "benchmarks.ranks --model tokenbridge_large --img_size 256 --processes 8 --batch 64",
    "curves": "benchmarks.curves",
}
TESTS = "tests"
#: What this command runs, the most important first: not those that need several GPUs or hours.
RUN_ORDER = (
    "training-varied",
    "sampling",
    TESTS,
    "head_speed",
    "tokenizer",
    "training-segments",
    "quantizer",
    "loader",
)
#: Settings of PyTorch's allocator: without expandable segments, it fragments more.
ALLOCATORS = {
    "training-varied": "expandable_segments:True",
    "training-segments": "expandable_segments:False",
}


def command_of(name: str, device: str = "cuda") -> list[str]:
    """Return the arguments of Python for one of :data:`COMMANDS`, or for :data:`TESTS`.

    On the CPU, benchmarks run with their default flags.
    """
    if name == TESTS:
        return shlex.split("-m pytest -q tests/scripts/test_cuda.py")
    module, *flags = shlex.split(COMMANDS[name])
    flags = flags if device == "cuda" else []
    results = f"benchmarks/results/{device}-{name}.json"
    return ["-m", module, *flags, "--device", device, "--json", results]


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
    for name in RUN_ORDER:
        left = end - time.monotonic()
        if left <= 0:
            outcomes[name] = "not started"
            continue
        words, start = [sys.executable, *command_of(name)], time.monotonic()
        settings = ALLOCATORS.get(name)
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
