"""What the benchmarks share: flags, timing, the machine's peak rates, tables of results."""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.tokenbridge import MODELS, TokenBridge
from util import misc
from util.args import add_device_arg, new_parser
from util.devices import find_device
from util.files import write_json
from util.model_config import ModelConfig
from util.provenance import provenance
from util.tables import markdown
from util.training_state import TrainingState

ROOT = Path(__file__).resolve().parent.parent


def benchmark_parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark."""
    parser = new_parser(description)
    add_device_arg(parser)
    parser.add_argument("--repeats", type=int, default=repeats, help="measured runs, after one that warms up")
    parser.add_argument("--threads", type=int, help="threads of the CPU; by default torch's choice")
    parser.add_argument("--json", help="file to write the results to")
    return parser


def add_ways(parser: argparse.ArgumentParser, batch: int, what: str) -> None:
    """Adds the flags of :func:`compare_ways`."""
    parser.add_argument("--model", choices=MODELS, default="tokenbridge_base", help="size of the model")
    parser.add_argument("--batch", type=int, default=batch, help=what)
    ways = "the release's way, and precisions of ours: fp32, bf16, fp16"
    parser.add_argument("--ways", nargs="+", default=["release", "fp32", "bf16"], help=ways)
    parser.add_argument("--heads", nargs="+", choices=("ar", "masked"), default=["ar", "masked"], help="of our models")
    parser.add_argument("--compile", action="store_true", help="also measure our models compiled")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's arguments, ``device`` as a torch.device; ``--threads`` takes effect."""
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device, problem = find_device(args.device)
    if problem:
        parser.error(problem)
    return args


def timings(works: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Median, fastest and slowest of ``repeats`` runs of each function in seconds, after one run that warms up.

    The functions take turns: a machine that slows down meanwhile slows all of them down, and ratios stay fair.
    """
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(repeats):
        for name, work in works.items():
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            times[name].append(time.perf_counter() - start)
    return {
        name: {"median_s": statistics.median(taken), "min_s": min(taken), "max_s": max(taken)}
        for name, taken in times.items()
    }


def measure_way(prepare: Callable, args: argparse.Namespace, way: str) -> dict[str, float]:
    """Times, images a second, operations, utilization and peak memory of one way; see :func:`compare_ways`."""
    release = way == "release"
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.type == "cpu" and not release:
        misc.keep_freed_memory()  # as our scripts do
    torch.manual_seed(0)
    precision = "fp32" if release else way
    work, operations = prepare(args, release, precision)
    times = timings({way: work}, args.repeats, args.device)[way]
    memory = misc.memory_in_use(args.device)  # before the matrix products below
    return {
        **times,
        "images_per_s": args.batch / times["median_s"],
        "tflop": operations / 1e12,
        "utilization": operations / times["median_s"] / misc.matmul_flops(args.device, precision),
        "peak_memory_gib": memory,
    }


def compare_ways(name: str, prepare: Callable, args: argparse.Namespace, **columns: Any) -> None:
    """Measures each of ``args.ways``, ``release`` or a precision of ours with each of ``args.heads``: a row for each.

    Args:
        prepare: takes ``args`` with the row's ``head`` and ``compile``, whether the way is the release's, and the
            precision; returns the function to measure and its number of floating-point operations. Must be a module's
            function: other processes import it.
        columns: shown in every row.
    """
    hardware, rows, slow = machine(args.device), [], None
    runs = [(way, head) for way in args.ways for head in (["ar"] if way == "release" else args.heads)]
    compiled = [False, True] if args.compile else [False]
    for (way, args.head), args.compile in product(runs, compiled):
        if way == "release" and args.compile:
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process has one peak of memory
            figures = pool.apply(measure_way, (prepare, args, way))
        release = way == "release"
        slow = figures["median_s"] if release else slow
        kind = "" if args.head == ModelConfig.head else f"{args.head} head, "
        ours = f"ours, {kind}{way}{', compiled' * args.compile}"
        row = {"way": "the release's, fp32" if release else ours, "model": args.model, "batch": args.batch}
        row |= {**columns, **figures, "ratio": slow / figures["median_s"] if slow and not release else None}
        rows.append(row)
    finish(name, rows, hardware, args.json)


def machine(device: torch.device) -> dict[str, Any]:
    """The device and software of a measurement, and the rates reached now: matrix products, and copies (read + write).

    Other programs on the machine lower the rates, and the measurements with them.
    """
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timings({"copy": lambda: target.copy_(source)}, 4, device)["copy"]["min_s"]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "matmul_tflops": {p: round(misc.matmul_flops(device, p) / 1e12, 3) for p in ("fp32", "bf16")},
        "copy_gb_per_s": round(2 * size / copy / 1e9, 1),
        **provenance(),
    }


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table, with a column for every key."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    return markdown(header, [[row.get(key) for key in header] for row in rows])


def finish(name: str, rows: list[dict[str, Any]], hardware: dict[str, Any], path: str | None) -> None:
    """Prints the rows and the :func:`machine` they were measured on, and writes both to ``path`` as JSON."""
    print(table(rows))
    print(json.dumps({key: hardware[key] for key in ("device", "threads", "matmul_tflops", "copy_gb_per_s")}))
    if path:
        write_json(path, {"benchmark": name, "machine": hardware, "rows": rows})


# --------------------------------------------------------------------------------------------------------------------
# Whole trainings.


def start_training(processes: int, flags: str, folder: Path) -> subprocess.Popen:
    """Starts main_tokenbridge.py under torchrun, in processes of one thread each; all it writes goes to ``folder``."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, "main_tokenbridge.py", *flags.split(), "--output_dir", str(folder)]
    folder.mkdir(parents=True)
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT
        )


def logged(training: subprocess.Popen, folder: Path, tag: str) -> dict[int, float]:
    """Waits for a training that :func:`start_training` started; what it logged under ``tag``, by step.

    Raises:
        RuntimeError: it failed; its last words.
    """
    if training.wait():
        raise RuntimeError((folder / "log.txt").read_text()[-2000:])
    return {event.step: event.value for event in EventAccumulator(str(folder)).Reload().Scalars(tag)}


def training_state(model: TokenBridge, precision: str, compiled: bool = False) -> TrainingState:
    """Return the state of a run of ``model`` with one step per epoch and the settings of the paper's training."""
    flags = {
        "ema_rate": 0.9999,
        "no_ema_warmup": False,
        "weight_decay": 0.02,
        "lr": 1e-4,
        "grad_clip": 1.0,
        "start_epoch": 0,
    }
    return TrainingState(model, argparse.Namespace(**flags, precision=precision, compile=compiled), steps_per_epoch=1)
