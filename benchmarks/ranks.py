"""Training throughput of several ranks with one thread each, against one rank.

Independent one-rank runs at the same time show what the machine gives without communication.
"""

import statistics
import tempfile
from pathlib import Path

from benchmarks.common import (
    benchmark_parser,
    finish,
    machine,
    parse_flags,
    scalars_of,
    start_training,
)
from benchmarks.loader import write_cache
from models.tokenbridge import MODELS


def images_per_second(runs: int, ranks: int, batch: int, flags: str) -> float:
    """Return the total throughput of ``runs`` simultaneous trainings of ``ranks`` ranks each.

    The first logged value of each training is dropped as warm-up.
    """
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / str(number) for number in range(runs)]
        flags = f"{flags} --batch_size {batch}"
        trainings = [start_training(ranks, flags, folder) for folder in folders]
        total = 0.0
        for training, folder in zip(trainings, folders, strict=True):
            speeds = scalars_of(training, folder, "speed/images_per_second")
            total += statistics.median(list(speeds.values())[1:])
    return total


def main() -> None:
    """Run the command line."""
    parser = benchmark_parser(__doc__, repeats=3)
    text = "size of the model"
    parser.add_argument("--model", choices=MODELS, default="tokenbridge_tiny", help=text)
    text = "image size in pixels; training uses random latents of this size"
    parser.add_argument("--img_size", type=int, default=64, help=text)
    parser.add_argument(
        "--processes", type=int, default=2, help="number of ranks to compare with one"
    )
    parser.add_argument("--batch", type=int, default=16, help="batch size of one rank")
    text = "steps of a run with several ranks; the other runs train on as many images"
    parser.add_argument("--steps", type=int, default=60, help=text)
    args = parse_flags(parser)
    hardware, several = machine(args.device), args.processes
    variants = {  # runs at the same time, ranks per run, batch size per rank
        "one process": (1, 1, args.batch),
        "independent runs": (several, 1, args.batch),
        "same batch size per process": (1, several, args.batch),
        "same global batch size": (1, several, args.batch // several),
    }
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as cache:
        write_cache(Path(cache), args.steps * several * args.batch, args.img_size // 16)
        flags = f"--model {args.model} --img_size {args.img_size} --class_num 10 --num_workers 0"
        flags += f" --epochs 1 --use_cached --cached_path {cache} --device {args.device.type}"
        for _ in range(args.repeats):  # variants take turns, as in `timings`
            for name, sizes in variants.items():
                speeds[name].append(images_per_second(*sizes, flags))
    rows, baseline = [], statistics.median(speeds["one process"])
    for name, (runs, ranks, batch) in variants.items():
        median = statistics.median(speeds[name])
        row = {"way": name, "model": args.model, "runs": runs, "processes": ranks, "batch": batch}
        row |= {"images_per_s": median, "min": min(speeds[name]), "max": max(speeds[name])}
        rows.append({**row, "ratio": median / baseline})
    finish("ranks", rows, hardware, args.json)


if __name__ == "__main__":
    main()
