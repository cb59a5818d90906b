"""What all benchmarks share: timing, the machine's own peaks, rows of results, their table."""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.tokenbridge import MODELS
from util import misc
from util.args import new_parser
from util.files import write_json
from util.metrics import provenance
from util.tables import markdown


def parse(description: str, repeats: int, add: Callable[[argparse.ArgumentParser], None] | None = None):
    """Arguments of a benchmark: device, repeats, threads, ``--json``, and its own."""
    parser = new_parser(description)
    parser.add_argument("--device", help="cuda, cuda:N or cpu; by default cuda where there is one")
    parser.add_argument("--repeats", type=int, default=repeats, help="measured runs of each, after one that warms up")
    parser.add_argument("--threads", type=int, help="of the CPU; by default torch's choice")
    parser.add_argument("--json", help="also write the results to this file")
    if add is not None:
        add(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return args


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Times of ``repeats`` runs, after one that warms up."""
    return alternating({"": work}, repeats, device)[""]


def alternating(works: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Times of several pieces of work taken in turns, so that a machine's moods fall on all of them."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(repeats):
        for name, work in works.items():
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return times


def in_own_process(work: Callable[..., Any], *args) -> Any:
    """What ``work(*args)`` returns in a process of its own: its memory, its allocator, no traces of others."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


def add_ways(parser: argparse.ArgumentParser, batch: int, what: str) -> None:
    """What :func:`compare_ways` needs: model, batch, ways, and whether ours are compiled."""
    parser.add_argument("--model", choices=MODELS, default="tokenbridge_base")
    parser.add_argument("--batch", type=int, default=batch, help=what)
    parser.add_argument("--ways", nargs="+", default=["release", "fp32", "bf16"], help="or fp16")
    parser.add_argument("--compile", action="store_true", help="of our ways")


def prepare_way(args: argparse.Namespace, way: str) -> str:
    """Sets up a process for one way, ``release`` or a precision of ours; the precision of its autocast."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if way == "release":
        return "fp32"
    if args.device.type == "cpu":
        misc.keep_freed_memory()  # as every script does
    return way


def compare_ways(name: str, measure: Callable[..., tuple], args: argparse.Namespace, **columns: Any) -> None:
    """Measures each of ``args.ways`` in a process of its own, and finishes with a row for each.

    Args:
        measure: takes the arguments and a way; gives times, peak memory in GiB, operations, and the matrix peak.
        columns: shown in every row.
    """
    about, rows, slow = machine(args.device), [], None
    for way in args.ways:
        times, memory, work, peak = in_own_process(measure, args, way)
        figures = spread(times)
        slow = figures["median_s"] if way == "release" else slow
        row = {"way": "the release's, fp32" if way == "release" else f"ours, {way}", "model": args.model}
        row |= {"batch": args.batch, **columns, **figures, "images_per_s": args.batch / figures["median_s"]}
        row |= {"tflop": work / 1e12, "utilization": work / figures["median_s"] / peak, "peak_memory_gib": memory}
        rows.append({**row, "ratio": slow / figures["median_s"] if slow and way != "release" else None})
    finish(name, rows, about, args.json)


def spread(times: list[float]) -> dict[str, float]:
    """Median, fastest and slowest of ``times``, in seconds."""
    return {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), 4, device))


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on, and its peaks now: matrix products in TFLOP/s, copies in GB/s."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    precisions = ("fp32", "bf16")
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "matmul_tflops": {p: round(misc.matmul_flops(device, p) / 1e12, 3) for p in precisions},
        "copy_gb_per_s": round(bandwidth(device) / 1e9, 1),
        **provenance(),
    }


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def finish(name: str, rows: list[dict[str, Any]], about: dict[str, Any], path: str | None) -> None:
    """Prints rows as a table, with what they were measured on, and writes them to ``path``."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    print(markdown(header, [[row.get(key) for key in header] for row in rows]))
    print(json.dumps({key: about[key] for key in ("device", "threads", "matmul_tflops", "copy_gb_per_s")}))
    if path:
        write_json(path, {"benchmark": name, "machine": about, "rows": rows})
