"""Quantizing a batch of latents: bucketized thresholds against the argmin over all levels."""

import torch

from benchmarks.baselines import argmin_over_levels
from benchmarks.common import alternating, finish, machine, parse, spread
from models.quantizer import GaussianQuantizer


def main() -> None:
    """Runs the command line."""
    args = parse(__doc__, repeats=20)
    about = machine(args.device)
    rows = []
    for batch in (16, 256):
        latents = torch.randn(batch, 256, 16, device=args.device)
        for levels in (16, 64, 512):
            quantizer = GaussianQuantizer(levels).to(args.device)
            works = {
                "argmin over all levels": lambda q=quantizer, x=latents: argmin_over_levels(q, x),
                "bucketize": lambda q=quantizer, x=latents: q(x),
            }
            if batch * levels > 256 * 64:
                works.pop("argmin over all levels")  # an array of gigabytes
            times = alternating(works, args.repeats, args.device)
            slow = None
            for name, taken in times.items():
                figures = spread(taken)
                slow = slow or figures["median_s"]
                moved = 4 * latents.numel() * 4 / figures["median_s"] / 1e9  # in, indices (8 bytes), out
                row = {"way": name, "batch": batch, "levels": levels, **figures, "gb_per_s": moved}
                rows.append({**row, "ratio": slow / figures["median_s"] if len(works) > 1 else None})
    finish("quantizer", rows, about, args.json)


if __name__ == "__main__":
    main()
