"""Training throughput of several processes of one thread each, against one, and against as many runs of their own."""

import statistics
import tempfile
from pathlib import Path

from benchmarks.common import benchmark_parser, finish, logged, machine, parse, start_training
from benchmarks.loader import write_cache
from models.tokenbridge import MODELS


def images_per_second(runs: int, processes: int, batch: int, flags: str) -> float:
    """What trainings do together, ``runs`` at a time of ``processes`` each; the log's first look is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / str(number) for number in range(runs)]
        started = [
            start_training(processes, f"{flags} --batch_size {batch}", each) for each in folders
        ]
        speeds = [
            logged(*each, "speed/images_per_second") for each in zip(started, folders, strict=True)
        ]
    return sum(statistics.median(list(speed.values())[1:]) for speed in speeds)


def main() -> None:
    """Runs the command line."""
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument(
        "--model", choices=MODELS, default="tokenbridge_tiny", help="size of the model"
    )
    parser.add_argument(
        "--img_size", type=int, default=64, help="of the images whose latents are trained on"
    )
    parser.add_argument("--processes", type=int, default=2, help="compared with one")
    parser.add_argument("--batch", type=int, default=16, help="images of a step in one process")
    parser.add_argument(
        "--steps",
        type=int,
        default=60,
        help="of the processes together; other runs see as many images",
    )
    args = parse(parser)
    hardware, several = machine(args.device), args.processes
    ways = {  # runs, processes of each, images of a step in each process
        "one process": (1, 1, args.batch),
        "runs of their own": (several, 1, args.batch),
        "same batch a process": (1, several, args.batch),
        "same whole batch": (1, several, args.batch // several),
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as cache:
        write_cache(Path(cache), args.steps * several * args.batch, args.img_size // 16)
        flags = f"--model {args.model} --img_size {args.img_size} --class_num 10 --num_workers 0 --epochs 1"
        flags += f" --use_cached --cached_path {cache} --device {args.device.type}"
        for _ in range(args.repeats):  # ways take turns, as everywhere
            for way, how in ways.items():
                speeds[way].append(images_per_second(*how, flags))
    rows, alone = [], statistics.median(speeds["one process"])
    for way, (runs, processes, batch) in ways.items():
        middle = statistics.median(speeds[way])
        row = {
            "way": way,
            "model": args.model,
            "runs": runs,
            "processes": processes,
            "batch": batch,
        }
        row |= {
            "images_per_s": middle,
            "min": min(speeds[way]),
            "max": max(speeds[way]),
            "ratio": middle / alone,
        }
        rows.append(row)
    finish("ranks", rows, hardware, args.json)


if __name__ == "__main__":
    main()
