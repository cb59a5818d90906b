"""Shared by the benchmarks: flags, timing, peak rates of the machine, result tables, trainings."""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine_tokenbridge import Trainer
from models.tokenbridge import MODELS, TokenBridge
from util.args import add_device_arg, new_parser
from util.devices import find_device, keep_freed_memory, matmul_flops, memory_in_use
from util.files import write_json
from util.metrics.run_log import logged_scalars
from util.provenance import provenance
from util.tables import markdown
from util.training_settings import TrainingSettings

ROOT = Path(__file__).resolve().parent.parent
#: Column titles that differ from the keys in the JSON files.
COLUMN_TITLES = {"way": "variant"}

Key = TypeVar("Key", bound=Hashable)

# --------------------------------------------------------------------------------------------------
# Command line.


def benchmark_parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the flags of every benchmark."""
    parser = new_parser(description)
    add_device_arg(parser)
    text = "timed runs, after one warm-up run"
    parser.add_argument("--repeats", type=int, default=repeats, help=text)
    parser.add_argument("--threads", type=int, help="CPU threads; by default PyTorch decides")
    parser.add_argument("--json", help="file to write the results to")
    return parser


def add_variant_flags(parser: argparse.ArgumentParser, batch: int, batch_help: str) -> None:
    """Add the flags of :func:`compare_variants`."""
    text = "size of the model"
    parser.add_argument("--model", choices=MODELS, default="tokenbridge_base", help=text)
    parser.add_argument("--batch", type=int, default=batch, help=batch_help)
    text = "release: the released implementation in fp32; fp32, bf16, fp16: this code"
    parser.add_argument("--ways", nargs="+", default=["release", "fp32", "bf16"], help=text)
    heads = ["ar", "masked"]
    text = "heads of this code to measure"
    parser.add_argument("--heads", nargs="+", choices=heads, default=heads, help=text)
    text = "also measure this code with torch.compile"
    parser.add_argument("--compile", action="store_true", help=text)


def parse_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, convert ``device`` to a torch.device and apply ``--threads``."""
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device, problem = find_device(args.device)
    if problem:
        parser.error(problem)
    return args


# --------------------------------------------------------------------------------------------------
# Timing.


def timings(
    functions: Mapping[Key, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[Key, dict[str, float]]:
    """Return median, minimum and maximum seconds of ``repeats`` calls, after one warm-up call.

    The functions take turns, so that a machine that slows down affects all of them equally.
    """
    on_cuda = device.type == "cuda"
    synchronize = partial(torch.cuda.synchronize, device) if on_cuda else lambda: None
    seconds: dict[Key, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}
        for name, values in seconds.items()
    }


def measure_variant(prepare: Callable, args: argparse.Namespace, variant: str) -> dict[str, float]:
    """Return seconds, images per second, FLOPs, utilization and peak memory of one variant.

    See :func:`compare_variants`.
    """
    release = variant == "release"
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.type == "cpu" and not release:
        keep_freed_memory()  # as our scripts do
    torch.manual_seed(0)
    precision = "fp32" if release else variant
    function, flops = prepare(args, release, precision)
    times = timings({variant: function}, args.repeats, args.device)[variant]
    memory = memory_in_use(args.device)  # read before matmul_flops allocates matrices
    return {
        **times,
        "images_per_s": args.batch / times["median_s"],
        "tflop": flops / 1e12,
        "utilization": flops / times["median_s"] / matmul_flops(args.device, precision),
        "peak_memory_gib": memory,
    }


def compare_variants(
    name: str, prepare: Callable, args: argparse.Namespace, **flags: Sequence
) -> None:
    """Measure every combination of ``args.ways``, ``args.heads`` and ``args.compile``, and report.

    Args:
        name: the benchmark's name.
        prepare: takes ``args`` (with ``head`` and ``compile`` of one variant), whether to run the
            released implementation, and the precision. Returns the function to time and its FLOPs.
            Must be a module-level function, since spawned processes import it.
        flags: values of further flags in ``args`` to measure; each flag becomes a column.
    """
    hardware, rows, release_seconds = machine(args.device), [], None
    variants = [
        (variant, head)
        for variant in args.ways
        for head in (["ar"] if variant == "release" else args.heads)
    ]
    compiled = [False, True] if args.compile else [False]
    settings = [dict(zip(flags, values, strict=True)) for values in product(*flags.values())]
    for setting, (variant, args.head), args.compile in product(settings, variants, compiled):
        vars(args).update(setting)
        release = variant == "release"
        if release and args.compile:
            continue
        # Peak memory is a property of the process, so that each variant needs its own.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            metrics = pool.apply(measure_variant, (prepare, args, variant))
        if release:
            release_seconds = metrics["median_s"]
            label, ratio = "release, fp32", None
        else:
            head_label = "masked head, " if args.head == "masked" else ""
            label = f"ours, {head_label}{variant}{', compiled' * args.compile}"
            ratio = release_seconds / metrics["median_s"] if release_seconds else None
        row = {"way": label, "model": args.model, "batch": args.batch}
        rows.append({**row, **setting, **metrics, "ratio": ratio})
    finish(name, rows, hardware, args.json)


# --------------------------------------------------------------------------------------------------
# Machine and results.


def machine(device: torch.device) -> dict[str, Any]:
    """Return device, software versions and current peak rates: matrix products and memory copies.

    A copy counts bytes read plus bytes written. Other load on the machine lowers the rates, and
    the measurements with them.
    """
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds = timings({"copy": lambda: target.copy_(source)}, 4, device)["copy"]["min_s"]
    matmul = {p: round(matmul_flops(device, p) / 1e12, 3) for p in ("fp32", "bf16")}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "matmul_tflops": matmul,
        "copy_gb_per_s": round(2 * size / copy_seconds / 1e9, 1),
        **provenance(),
    }


def cpu_name() -> str:
    """Return the model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table with a column for every key."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    titles = [COLUMN_TITLES.get(key, key) for key in keys]
    return markdown(titles, [[row.get(key) for key in keys] for row in rows])


def finish(
    name: str, rows: list[dict[str, Any]], hardware: dict[str, Any], path: str | None
) -> None:
    """Print the rows and their :func:`machine`, and write both to ``path`` as JSON."""
    print(table(rows))
    shown = ("device", "threads", "matmul_tflops", "copy_gb_per_s")
    print(json.dumps({key: hardware[key] for key in shown}))
    if path:
        write_json(path, {"benchmark": name, "machine": hardware, "rows": rows})


# --------------------------------------------------------------------------------------------------
# Trainings.


def start_training(ranks: int, flags: str, folder: Path) -> subprocess.Popen:
    """Start main_tokenbridge.py under torchrun, one thread per rank, with output in ``folder``."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["main_tokenbridge.py", *flags.split(), "--output_dir", str(folder)]
    folder.mkdir(parents=True)
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(
            [*torchrun, f"--nproc_per_node={ranks}", *script],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def scalars_of(training: subprocess.Popen, folder: Path, tag: str) -> dict[int, float]:
    """Wait for the training of :func:`start_training`; return its TensorBoard scalars by step.

    Raises:
        RuntimeError: the training failed. The message is the end of its log.
    """
    if training.wait():
        raise RuntimeError((folder / "log.txt").read_text()[-2000:])
    return logged_scalars(folder, tag)


def new_trainer(model: TokenBridge, precision: str, compiled: bool = False) -> Trainer:
    """Return a training run of ``model`` with one step per epoch and the paper's settings."""
    settings = TrainingSettings(
        output_dir="unused", epochs=1, batch_size=1, lr=1e-4, precision=precision, compile=compiled
    )
    loader: Any = [None]
    return Trainer(model, settings, loader)
