"""Quantizing a batch of latents: bucketized thresholds against the argmin over all levels."""

from functools import partial

import torch

from benchmarks.baselines import argmin_over_levels
from benchmarks.common import benchmark_parser, finish, machine, parse, timings
from models.quantizer import GaussianQuantizer


def main() -> None:
    """Runs the command line."""
    args = parse(benchmark_parser(__doc__, repeats=20))
    hardware = machine(args.device)
    rows = []
    for batch in (16, 256):
        latents = torch.randn(batch, 256, 16, device=args.device)
        for levels in (16, 64, 512):
            quantizer = GaussianQuantizer(levels).to(args.device)
            works = {"bucketize": partial(quantizer, latents)}
            if batch * levels <= 256 * 64:  # with more, the array of all distances takes gigabytes
                works = {
                    "argmin over all levels": partial(argmin_over_levels, quantizer, latents),
                    **works,
                }
            times = timings(works, args.repeats, args.device)
            slow = times.get("argmin over all levels")
            for name, figures in times.items():
                # Moved are, for each latent, itself (4 bytes), its index (8) and its value (4).
                gigabytes = 16 * latents.numel() / 1e9
                row = {"way": name, "batch": batch, "levels": levels, **figures}
                row["gb_per_s"] = gigabytes / figures["median_s"]
                rows.append({**row, "ratio": slow and slow["median_s"] / figures["median_s"]})
    finish("quantizer", rows, hardware, args.json)


if __name__ == "__main__":
    main()
