"""Orders the channels of cached latents by their share of low-frequency energy (section 3.2; torchrun or python)."""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from models.tokenizer import CachedMoments
from util import distributed, errors
from util.args import add_run_args, check_positive, check_range, new_parser
from util.checkpoint.vae_files import tokenizer_config
from util.data.loaders import evenly_spaced, loader_of_all
from util.data.packed import open_cache
from util.files import write_json
from util.log import log, progress_bar
from util.metrics.plots import save_figure
from util.precision import double
from util.process_group import process_group
from util.provenance import provenance
from util.tables import markdown


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = new_parser(__doc__, "tools.channel_order")
    parser.add_argument("--cached_path", default="", help="a cache of main_cache.py or tools.pack")
    parser.add_argument(
        "--patch_size", type=int, default=1, help="side of a token in latent positions"
    )
    text = "up to which share of the highest (Nyquist's) frequency one counts as low"
    parser.add_argument("--cutoff", type=float, default=0.5, help=text)
    parser.add_argument("--num_images", type=int, default=10000, help="at most, evenly spaced")
    parser.add_argument(
        "--output_dir", default="./output_dir", help="for channel_order.json and channel_order.png"
    )
    add_run_args(parser, batch_size=64, seed=0, precision="fp32")
    return parser


def low_frequencies(height: int, width: int, cutoff: float) -> Tensor:
    """Which coefficients of ``fft2`` have a frequency of at most ``cutoff`` times Nyquist's: bool ``[h, w]``."""
    rows, columns = (
        torch.fft.fftfreq(height),
        torch.fft.fftfreq(width),
    )  # in cycles a position, Nyquist's is 1/2
    return (rows[:, None] ** 2 + columns**2).sqrt() <= cutoff / 2


def energies(maps: Tensor, low: Tensor) -> Tensor:
    """Sums ``[4, C]`` over maps ``[N, C, h, w]``, from which :func:`low_shares` computes shares.

    These are the energy at the ``low [h, w]`` frequencies without zero, that at all frequencies without zero, and the
    sum and the sum of squares of the coefficients at frequency zero.
    """
    maps = double(maps)
    spectrum = torch.fft.fft2(maps)
    zero = spectrum[..., 0, 0].real
    energy = spectrum.abs() ** 2
    energy[..., 0, 0] = 0
    low_energy = (energy * low.to(maps.device)).sum(dim=(0, 2, 3))
    return torch.stack(
        [low_energy, energy.sum(dim=(0, 2, 3)), zero.sum(dim=0), (zero**2).sum(dim=0)]
    )


def low_shares(sums: Tensor, images: int) -> Tensor:
    """Shares ``[C]`` of energy at low frequencies, from :func:`energies` summed over all images.

    Frequency zero counts by its variation over images: an offset that all images share carries no information.
    """
    low, total, first, second = sums
    zero = (second - first**2 / images).clamp(min=0)
    return (low + zero) / (total + zero).clamp(min=1e-300)


def frequency_order(shares: Tensor) -> list[int]:
    """Channels by their ``shares [C]`` of low-frequency energy, the highest first; equal ones by number."""
    return shares.argsort(descending=True, stable=True).tolist()


def plot(shares: Tensor, order: list[int], cutoff: float) -> Figure:
    """A bar for each channel's share, in generation order."""
    figure = Figure(figsize=(max(4.0, 0.45 * len(order)), 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(order)), shares[order].tolist())
    axes.set_xticks(range(len(order)), order)
    axes.set(
        xlabel="channel, in generation order",
        ylabel=f"energy below {cutoff:g} of Nyquist",
        ylim=(0, 1),
    )
    axes.grid(axis="y", alpha=0.3)
    return figure


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device, args.deterministic, args.precision) as device:
        check_positive(args, "patch_size", "num_images", "batch_size", "cutoff")
        check_range(args, 0, 1, "cutoff")
        check_range(args, 0, math.inf, "num_workers", "seed")
        if not args.cached_path:
            raise errors.UserError(
                "--cached_path is missing: name the folder that main_cache.py wrote"
            )
        cache = open_cache(args.cached_path, mirror=False)
        vae, _ = tokenizer_config(cache.metadata, args.cached_path)
        encoder = CachedMoments(1.0, vae.get("deterministic", False))
        cache.shape = tuple(cache[0][0].shape)
        _, channels, height, width = encoder.encode(cache[0][0][None]).shape
        p = args.patch_size
        if height % p or width % p or height // p < 4 or width // p < 4:
            few = f"with --patch_size {p} too few for frequencies"
            raise errors.UserError(f"{args.cached_path} holds latents of {height}x{width}: {few}")
        chosen = evenly_spaced(cache, args.num_images)
        loader = loader_of_all(chosen, device, args)
        low = low_frequencies(height // p, width // p, args.cutoff)
        sums = double(torch.zeros(4, channels * p * p, device=device))
        with progress_bar(loader, unit="batch", desc="measuring") as batches:
            for moments, _ in batches:
                latents = encoder.encode(moments.to(device)).mode()
                # A map for each channel of a token; pixel_unshuffle orders them as the model's patchify does.
                sums += energies(torch.nn.functional.pixel_unshuffle(latents, p), low)
        shares = low_shares(
            distributed.all_reduce_mean(sums).cpu() * distributed.get_world_size(), len(chosen)
        )
        order = frequency_order(shares)
        if distributed.is_main_process():
            log.info(
                "%s",
                markdown(
                    ["channel", "low-frequency share"], [[c, shares[c].item()] for c in order]
                ),
            )
            log.info("--channel_order %s", ",".join(map(str, order)))
            out = Path(args.output_dir)
            settings = {
                "images": len(chosen),
                "cutoff": args.cutoff,
                "patch_size": p,
                "cached_path": args.cached_path,
            }
            content = {"order": order, "shares": shares.tolist(), **settings, **provenance()}
            write_json(out / "channel_order.json", content)
            save_figure(plot(shares, order, args.cutoff), out / "channel_order.png")
            log.info("wrote %s/channel_order.json and channel_order.png", out)
        distributed.barrier()


if __name__ == "__main__":
    errors.run(main)
