"""Loss curves at one global batch size: several ranks or accumulation, against seeds of one rank.

Trains the demo's model on the cache of digits that ``make demo`` writes.
"""

import argparse
import math
import statistics
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import t

from benchmarks.common import finish, machine, scalars_of, start_training
from util.args import new_parser
from util.metrics.plots import save_figure
from util.metrics.run_log import epoch_means

#: Ranks, batch size per rank, accumulation steps: ways to divide one global batch.
DIVISIONS = ((2, 32, 1), (4, 16, 1), (2, 16, 2), (1, 16, 4))
UNDIVIDED = (1, 64, 1)
TITLE = "ranks x batch x accumulation"


def loss_curve(division: tuple[int, int, int], seed: int, args: argparse.Namespace) -> list[float]:
    """Train, and return the mean training loss of every epoch."""
    ranks, batch, accumulation = division
    flags = (
        "--model tokenbridge_tiny --img_size 16 --class_num 10 --buffer_size 8 --quant_bits 5 "
        "--no_mirror --num_workers 0 --warmup_epochs 3 --lr 2e-3 --attn_dropout 0 --proj_dropout 0 "
        f"--precision fp32 --use_cached --cached_path {args.cached_path} --epochs {args.epochs} "
        f"--seed {seed} --batch_size {batch} --accum_iter {accumulation} --device {args.device}"
    )
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        losses = scalars_of(start_training(ranks, flags, folder), folder, "train/loss")
    epoch_steps = max(losses) // args.epochs
    return epoch_means(losses, epoch_steps)


def plot_curves(curves: dict[str, list[float]], seed_curves: list[list[float]], path: Path) -> None:
    """Save a PNG of the curves and of their differences from the mean over seeds."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(seed_curves[0]) + 1)
    means = [statistics.mean(losses) for losses in zip(*seed_curves, strict=True)]

    def draw(losses: list[float], **style) -> None:
        left.plot(epochs, losses, **style)
        differences = [loss - mean for loss, mean in zip(losses, means, strict=True)]
        right.plot(epochs, differences, **style)

    for number, losses in enumerate(seed_curves):
        label = None if number else f"one rank, {len(seed_curves)} seeds"
        draw(losses, color="0.7", lw=1, label=label)
    for name, losses in curves.items():
        draw(losses, lw=1, label=name)
    left.set(xlabel="epoch", ylabel="training loss (nats per channel)", title="Loss")
    right.set(
        xlabel="epoch", ylabel="nats per channel", title="Difference from the mean over seeds"
    )
    left.legend(title=TITLE, fontsize=8, title_fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def main() -> None:
    """Run the command line."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device to train on"
    )
    parser.add_argument("--cached_path", default="output/demo/cache", help="cache of the demo")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each run")
    parser.add_argument("--seeds", type=int, default=5, help="one-rank runs, at least 2")
    parser.add_argument(
        "--json", help="file to write the results to; the plot is written beside it"
    )
    args = parser.parse_args()
    hardware = machine(torch.device(args.device))
    runs = [(UNDIVIDED, seed, args) for seed in range(1, args.seeds + 1)]
    runs += [(division, 1, args) for division in DIVISIONS]
    with ThreadPool(2) as pool:  # two at a time, since nothing is timed
        curves = pool.starmap(loss_curve, runs, chunksize=1)
    end_losses = [statistics.mean(losses[-len(losses) // 4 :]) for losses in curves]
    seed_ends = end_losses[: args.seeds]
    mean = statistics.mean(seed_ends)
    # 95% prediction interval for one more seed (Student's t).
    half_width = t.ppf(0.975, args.seeds - 1) * statistics.stdev(seed_ends)
    half_width *= math.sqrt(1 + 1 / args.seeds)
    names = [" x ".join(map(str, division)) for division, _, _ in runs]
    rows = [
        {
            TITLE: name,
            "seed": seed,
            "loss_at_end": loss,
            "difference_from_mean": loss - mean,
            "interval_half_width": half_width,
        }
        for name, (_, seed, _), loss in zip(names, runs, end_losses, strict=True)
    ]
    finish("curves", rows, hardware, args.json)
    if args.json:
        divided = dict(zip(names[args.seeds :], curves[args.seeds :], strict=True))
        plot_curves(divided, curves[: args.seeds], Path(args.json).with_suffix(".png"))


if __name__ == "__main__":
    main()
