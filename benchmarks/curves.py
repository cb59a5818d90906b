"""Loss curves at one whole batch: several processes and accumulation, beside seeds of one process.

The trainings are the demo's, on the cache of digits that ``make demo`` leaves.
"""

import argparse
import math
import statistics
import tempfile
from itertools import groupby
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import t

from benchmarks.common import finish, logged, machine, start_training
from util.args import new_parser
from util.metrics.plots import save_figure

NAME = "processes x batch x accumulation"
#: The products are the whole batch.
DIVISIONS = ((2, 32, 1), (4, 16, 1), (2, 16, 2), (1, 16, 4))


def curve(division: tuple[int, int, int], seed: int, args: argparse.Namespace) -> list[float]:
    """The mean training loss of every epoch."""
    processes, batch, accum = division
    flags = (
        "--model tokenbridge_tiny --img_size 16 --class_num 10 --buffer_size 8 --quant_bits 5 --no_mirror "
        "--num_workers 0 --warmup_epochs 3 --lr 2e-3 --attn_dropout 0 --proj_dropout 0 --precision fp32 "
        f"--use_cached --cached_path {args.cached_path} --epochs {args.epochs} --seed {seed} "
        f"--batch_size {batch} --accum_iter {accum} --device {args.device}"
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        losses = logged(start_training(processes, flags, out), out, "train/loss")
    steps = max(losses) // args.epochs  # of an epoch
    weighted, before = [], 0  # a look's loss is the mean since the one before
    for step, loss in losses.items():
        weighted.append(((step - 1) // steps, step - before, loss))
        before = step
    return [
        sum(n * loss for _, n, loss in looks) / steps
        for _, looks in groupby(weighted, key=lambda look: look[0])
    ]


def plot(curves: dict[str, list[float]], seeds: list[list[float]], path: Path) -> None:
    """Draws the curves, and their differences from the mean of the seeds, to ``path``, a PNG."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    whole, difference = figure.subplots(1, 2)
    epochs, mean = (
        range(1, len(seeds[0]) + 1),
        [statistics.mean(each) for each in zip(*seeds, strict=True)],
    )
    for number, seed in enumerate(seeds):
        label = {"label": f"one process, {len(seeds)} seeds"} if not number else {}
        difference.plot(
            epochs, [a - b for a, b in zip(seed, mean, strict=True)], color="0.7", lw=1, **label
        )
        whole.plot(epochs, seed, color="0.7", lw=1, **label)
    for name, values in curves.items():
        whole.plot(epochs, values, lw=1, label=name)
        difference.plot(
            epochs, [a - b for a, b in zip(values, mean, strict=True)], lw=1.2, label=name
        )
    whole.set(xlabel="epoch", ylabel="training loss (nats a channel)", title="Loss")
    difference.set(
        xlabel="epoch", ylabel="nats a channel", title="Difference from the mean of the seeds"
    )
    whole.legend(title=NAME, fontsize=8, title_fontsize=8)
    for axes in (whole, difference):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of all runs")
    parser.add_argument("--cached_path", default="output/demo/cache", help="the demo's cache")
    parser.add_argument("--epochs", type=int, default=6, help="of each run")
    parser.add_argument("--seeds", type=int, default=5, help="of one process, two or more")
    parser.add_argument("--json", help="file to write the results to; a picture goes beside it")
    args = parser.parse_args()
    hardware = machine(torch.device(args.device))
    with ThreadPool(2) as pool:  # nothing is timed
        runs = [((1, 64, 1), seed, args) for seed in range(1, args.seeds + 1)]
        runs += [(division, 1, args) for division in DIVISIONS]
        every = pool.starmap(curve, runs, chunksize=1)
    ends = [statistics.mean(losses[-len(losses) // 4 :]) for losses in every]
    mean, deviation = statistics.mean(ends[: args.seeds]), statistics.stdev(ends[: args.seeds])
    # Where another seed's run would end in 95 of 100 cases.
    expected = t.ppf(0.975, args.seeds - 1) * deviation * math.sqrt(1 + 1 / args.seeds)
    rows = [
        {
            NAME: " x ".join(map(str, division)),
            "seed": seed,
            "loss_at_end": end,
            "off_the_mean": end - mean,
        }
        | {"another_seed_within": expected}
        for (division, seed, _), end in zip(runs, ends, strict=True)
    ]
    finish("curves", rows, hardware, args.json)
    if args.json:
        names = [row[NAME] for row in rows[args.seeds :]]
        plot(
            dict(zip(names, every[args.seeds :], strict=True)),
            every[: args.seeds],
            Path(args.json).with_suffix(".png"),
        )


if __name__ == "__main__":
    main()
