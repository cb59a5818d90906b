"""Measures images against held-out ones, and held-out likelihoods in continuous space (plain python)."""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics

from experiments.features import load_net
from models.posterior import DiagonalGaussianDistribution
from models.quantizer import ScalarQuantizer, build_quantizer
from util import checkpoint, errors, misc
from util.args import add_device_arg, check_positive, new_parser
from util.files import read_json, write_json
from util.metrics import NEIGHBOURS, PlainImages, check_number, frechet_distance
from util.model_config import ModelConfig
from util.packed import open_cache
from util.provenance import provenance
from util.rng import numbered_draws

DENSITY_NEIGHBOURS = 5  # of density and coverage (Naeem et al. 2020)
SIDE = 8  # pixels that images are reduced to, each way

# --------------------------------------------------------------------------------------------------------------------
# Images.


def pixels(images: Tensor, gray: bool) -> Tensor:
    """Byte images ``[N, 3, H, W]`` reduced to 8x8 by averaging, values of 0 to 16: ``[N, 192]``, or ``[N, 64]``.

    Args:
        gray: average over the colours, too.
    """
    small = F.adaptive_avg_pool2d(images.double(), SIDE) * (16 / 255)
    return (small.mean(1) if gray else small).flatten(1)


def radii(points: Tensor, neighbours: int) -> Tensor:
    """Distance ``[N]`` of each of ``points [N, D]`` to its nearest ``neighbours``-th other."""
    return torch.cdist(points, points).kthvalue(neighbours + 1, dim=1).values  # the first is the point itself


def neighbourhoods(made: Tensor, real: Tensor) -> dict[str, float]:
    """``precision`` and ``recall`` (Kynkaanniemi et al. 2019), ``density`` and ``coverage`` (Naeem et al. 2020).

    Args:
        made, real: points ``[M, D]`` and ``[N, D]``.
    """
    distances = torch.cdist(real, made)  # [N, M]
    ball, wide = (radii(real, count)[:, None] for count in (NEIGHBOURS, DENSITY_NEIGHBOURS))
    return {
        "precision": (distances <= ball).any(0).double().mean().item(),
        "recall": (distances <= radii(made, NEIGHBOURS)).any(1).double().mean().item(),
        "density": (distances < wide).double().sum(0).mean().item() / DENSITY_NEIGHBOURS,
        "coverage": (distances.amin(1) < wide[:, 0]).double().mean().item(),
    }


def compare(made: Tensor, real: Tensor) -> dict[str, float]:
    """Frechet distance and :func:`neighbourhoods` of points ``[M, D]`` and ``[N, D]``."""
    for points in (made, real):
        misc.check_finite(points, "the network of --features", "fp32")
    statistics = [fid_features_to_statistics(points.double().cpu()) for points in (made, real)]
    return {"frechet": frechet_distance(*statistics), **neighbourhoods(made.double(), real.double())}


def all_images(path: str | Path, limit: int | None = None) -> Tensor:
    """The images of a folder and its subfolders, as bytes ``[N, 3, H, W]``; at most ``limit``, evenly spaced."""
    images = PlainImages(path)
    count = min(len(images), limit or len(images))
    return torch.stack([images[number * len(images) // count] for number in range(count)])


# --------------------------------------------------------------------------------------------------------------------
# Likelihood in continuous space.


def level_bits(quantizer: ScalarQuantizer, latents: Tensor) -> Tensor:
    """-log2 of the density that each of ``latents [..., C]`` has within its level: bits, of the same shape.

    A level's density is uniform between its thresholds. The two outermost levels have but one: from there theirs
    falls exponentially, with the mean at the level's value, so that all latents, however far out, have a density.
    """
    low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in quantizer.bounds())
    scale = (high - low) / (2 * quantizer.std_range)  # of normalized values, Eq. 5
    limits, values = quantizer.thresholds.double(), quantizer.reconstruction_values.double()
    normalized = (latents.double() - low) / scale - quantizer.std_range  # Eq. 1, not clipped
    index = torch.bucketize(normalized, limits)
    widths = torch.cat([limits[:1] - values[:1], limits.diff(), values[-1:] - limits[-1:]])
    beyond = torch.maximum(limits[0] - normalized, normalized - limits[-1]).clamp(min=0)  # 0 in the inner levels
    return (widths[index] * scale).log2() + beyond / widths[index] / math.log(2)


def held_out_latents(cached_val_path: str, latent_factor: float, seed: int = 0) -> Tensor:
    """Latents ``[N h w, C]`` of all held-out images, drawn as for ``--evaluate_nll``."""
    cache = open_cache(cached_val_path, mirror=False)
    cache.shape = tuple(cache[0][0].shape)
    posterior = DiagonalGaussianDistribution(torch.stack([cache[number][0] for number in range(len(cache))]).float())
    noise = numbered_draws(seed, range(len(cache))).normal(*posterior.mean.shape[1:])
    return (posterior.sample(noise) * latent_factor).movedim(1, -1).flatten(0, -2)


def likelihood(folder: Path, resume: str, cached_val_path: str) -> dict[str, float]:
    """Held-out likelihoods of the run ``resume``: that which ``folder/likelihood.json`` holds, and in continuous space.

    ``continuous_bits`` are bits a dimension of dequantized latents (:func:`level_bits`), each channel divided by its
    deviation over the held-out images, so that neither quantizer nor scale of the channels matters.
    """
    figures = read_json(folder / "likelihood.json")
    config = checkpoint.read_run(checkpoint.find(resume))["config"]
    quantizer = build_quantizer(ModelConfig.from_stored({**config, "patch_size": 1, "channel_order": None}))
    latents = held_out_latents(cached_val_path, config["latent_factor"])
    bits = figures["bits_per_dim"] + (level_bits(quantizer, latents) - latents.double().std(0).log2()).mean().item()
    return {"nats": figures["nats_per_dim"], "continuous_bits": bits}


# --------------------------------------------------------------------------------------------------------------------
# The command.


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    parser = new_parser(__doc__, "experiments.measures")
    parser.add_argument("--images", default="", help="folder of images, or of samples*/ or */recon/ that hold them")
    parser.add_argument("--limit", type=int, help="measure this many of them, evenly spaced; by default all")
    parser.add_argument("--reference", default="", help="folder of held-out images")
    parser.add_argument("--features", default="", help="what experiments.features wrote")
    parser.add_argument("--gray", action="store_true", help="compare the mean of the colours, not each")
    parser.add_argument("--resume", default="", help="run whose likelihood --evaluate_nll wrote to --images, if it did")
    parser.add_argument("--cached_val_path", default="", help="cache of held-out images, for --resume")
    add_device_arg(parser)
    parser.add_argument("--json", default="", help="file to write the figures to")
    return parser


def image_folders(path: Path) -> dict[str, Path]:
    """The folders to measure by what is told of them: samples by their guidance scale, others by ``images``."""
    samples = [folder for folder in sorted(path.glob("samples*")) if folder.is_dir()]
    if samples:
        settings = [read_json(folder.with_name(f"{folder.name}.json"))["settings"] for folder in samples]
        return {f"{each['cfg']:g}": folder for each, folder in zip(settings, samples, strict=True)}
    return {"images": next(iter(path.glob("*/recon")), path)}


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What is measured: ``images`` by the names of :func:`image_folders`, and likelihoods where they were asked for."""
    net, real = load_net(args.features, device), all_images(args.reference).to(device)
    spaces = {"pixels": lambda images: pixels(images, args.gray), "features": net.features}
    found: dict[str, Any] = {"images": {}}
    check_number(len(real), "reference images", DENSITY_NEIGHBOURS)
    for name, folder in image_folders(Path(args.images)).items():
        made = all_images(folder, args.limit).to(device)
        check_number(len(made), f"images in {folder}", NEIGHBOURS)
        figures = {space: compare(of(made), of(real)) for space, of in spaces.items()}
        found["images"][name] = {"count": len(made), **figures}
    if args.resume and (Path(args.images) / "likelihood.json").exists():
        found |= likelihood(Path(args.images), args.resume, args.cached_val_path)
    results = next(Path(args.images).glob("*/results.json"), None)  # of a reconstruction
    if results is not None:
        found["psnr_db"] = read_json(results)["psnr_db"]
    return found


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with misc.processes(args.device) as device:
        for name in ("images", "reference", "features", "json"):
            if not getattr(args, name):
                raise errors.UserError(f"--{name} is missing; see --help")
        if args.limit is not None:
            check_positive(args, "limit")
        write_json(args.json, {**measure(args, device), **provenance()})


if __name__ == "__main__":
    errors.run(main)
