"""Quantizing a batch of latents: bucketized thresholds against the argmin over all levels."""

from functools import partial

import torch

from benchmarks.baselines import argmin_over_levels
from benchmarks.common import benchmark_parser, finish, machine, parse_flags, timings
from models.quantizer import GaussianQuantizer

#: Bytes read and written per latent: the latent (4), its index (8) and its value (4).
BYTES_PER_LATENT = 16


def main() -> None:
    """Run the command line."""
    args = parse_flags(benchmark_parser(__doc__, repeats=20))
    hardware = machine(args.device)
    rows = []
    for batch in (16, 256):
        latents = torch.randn(batch, 256, 16, device=args.device)
        gigabytes = BYTES_PER_LATENT * latents.numel() / 1e9
        for levels in (16, 64, 512):
            quantizer = GaussianQuantizer(levels).to(args.device)
            functions = {"bucketize": partial(quantizer, latents)}
            if batch * levels <= 256 * 64:  # above this, the distances to all levels take gigabytes
                argmin = partial(argmin_over_levels, quantizer, latents)
                functions = {"argmin over all levels": argmin, **functions}
            times = timings(functions, args.repeats, args.device)
            baseline = times.get("argmin over all levels")
            for name, seconds in times.items():
                row = {"way": name, "batch": batch, "levels": levels, **seconds}
                row["gb_per_s"] = gigabytes / seconds["median_s"]
                ratio = baseline["median_s"] / seconds["median_s"] if baseline else None
                rows.append({**row, "ratio": ratio})
    finish("quantizer", rows, hardware, args.json)


if __name__ == "__main__":
    main()
