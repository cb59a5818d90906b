"""Order the channels of cached latents by their share of low-frequency energy (section 3.2).

Runs with torchrun or plain python.
"""

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
    """Return the parser of the command line."""
    parser = new_parser(__doc__, "tools.channel_order")
    parser.add_argument("--cached_path", default="", help="cache of main_cache.py or tools.pack")
    parser.add_argument(
        "--patch_size", type=int, default=1, help="side of a token in latent positions"
    )
    parser.add_argument(
        "--cutoff",
        type=float,
        default=0.5,
        help="frequencies up to this fraction of the Nyquist frequency count as low",
    )
    parser.add_argument(
        "--num_images", type=int, default=10000, help="images to read, at most, evenly spaced"
    )
    parser.add_argument(
        "--output_dir",
        default="./output_dir",
        help="folder of channel_order.json and channel_order.png",
    )
    add_run_args(parser, batch_size=64, seed=0, precision="fp32")
    return parser


def low_frequencies(height: int, width: int, cutoff: float) -> Tensor:
    """Return a mask of the low frequencies, up to ``cutoff`` times the Nyquist frequency.

    Returns:
        bool ``[h, w]``, for the coefficients of ``torch.fft.fft2``.
    """
    # In cycles per position; the Nyquist frequency is 1/2
    rows = torch.fft.fftfreq(height)
    columns = torch.fft.fftfreq(width)
    return (rows[:, None] ** 2 + columns**2).sqrt() <= cutoff / 2


def energies(maps: Tensor, low: Tensor) -> Tensor:
    """Sum the energies of maps, for :func:`low_shares`.

    Args:
        maps: ``[N, C, h, w]``.
        low: mask of the low frequencies ``[h, w]``.

    Returns:
        four sums for each channel, ``[4, C]``: the energy at low frequencies except zero, the
        energy at all frequencies except zero, the coefficients at frequency zero, and their
        squares.
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
    """Return each channel's share of energy at low frequencies, ``[C]``.

    At frequency zero, only the variation over images counts: an offset that all images share
    carries no information.

    Args:
        sums: :func:`energies`, summed over all ``images``.
    """
    low, total, zero_sum, zero_squares = sums
    zero = (zero_squares - zero_sum**2 / images).clamp(min=0)
    return (low + zero) / (total + zero).clamp(min=1e-300)


def frequency_order(shares: Tensor) -> list[int]:
    """Return the channels, ordered by their ``shares [C]`` of low-frequency energy.

    The highest share is first. Channels of equal shares are ordered by number.
    """
    return shares.argsort(descending=True, stable=True).tolist()


def plot_shares(shares: Tensor, order: list[int], cutoff: float) -> Figure:
    """Plot a bar for each channel's share, in generation order."""
    figure = Figure(figsize=(max(4.0, 0.45 * len(order)), 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(order)), shares[order].tolist())
    axes.set_xticks(range(len(order)), [str(channel) for channel in order])
    axes.set(
        xlabel="channel, in generation order",
        ylabel=f"energy below {cutoff:g} of Nyquist",
        ylim=(0, 1),
    )
    axes.grid(axis="y", alpha=0.3)
    return figure


def main() -> None:
    """Run the command line."""
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
            raise errors.UserError(
                f"{args.cached_path} holds latents of {height}x{width}: with --patch_size {p} too "
                "few for frequencies, which need 4x4 tokens"
            )

        # Measure
        images = evenly_spaced(cache, args.num_images)
        loader = loader_of_all(images, device, args)
        low = low_frequencies(height // p, width // p, args.cutoff)
        sums = double(torch.zeros(4, channels * p * p, device=device))
        with progress_bar(loader, unit="batch", desc="measuring") as batches:
            for moments, _ in batches:
                latents = encoder.encode(moments.to(device)).mode()
                # A map for each channel of a token, in the order of the model's patchify
                maps = torch.nn.functional.pixel_unshuffle(latents, p)
                sums += energies(maps, low)
        sums = distributed.all_reduce_mean(sums).cpu() * distributed.get_world_size()
        shares = low_shares(sums, len(images))
        order = frequency_order(shares)

        # Write
        if distributed.is_main_process():
            rows = [[channel, shares[channel].item()] for channel in order]
            log.info("%s", markdown(["channel", "low-frequency share"], rows))
            log.info("to train in this order: --channel_order %s", ",".join(map(str, order)))
            folder = Path(args.output_dir)
            results = {
                "order": order,
                "shares": shares.tolist(),
                "images": len(images),
                "cutoff": args.cutoff,
                "patch_size": p,
                "cached_path": args.cached_path,
                **provenance(),
            }
            write_json(folder / "channel_order.json", results)
            save_figure(plot_shares(shares, order, args.cutoff), folder / "channel_order.png")
            log.info("wrote %s/channel_order.json and channel_order.png", folder)
        distributed.barrier()


if __name__ == "__main__":
    errors.run(main)
