"""Measure images against held-out images, and likelihoods of held-out latents."""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics

from experiments.features import FeatureNet, load_net
from models.quantizer import ScalarQuantizer, build_quantizer
from models.tokenizer import CachedMoments
from util import errors
from util.args import add_device_arg, check_positive, new_parser
from util.checkpoint.runs import find_checkpoint, read_run
from util.checkpoint.vae_files import tokenizer_config
from util.data.datasets import PlainImages
from util.data.packed import open_cache
from util.files import read_json, write_json
from util.metrics.compute import NEIGHBORS, check_number, frechet_distance
from util.model_config import ModelConfig
from util.precision import check_finite
from util.process_group import process_group
from util.provenance import provenance
from util.rng import numbered_draws

DENSITY_NEIGHBORS = 5  # k of density and coverage (Naeem et al. 2020)
#: Metrics of reconstruction.py that results contain.
RECONSTRUCTION_METRICS = (
    "psnr_db",
    "ssim",
    "efficientnet_map_distance",
    "efficientnet_same_class_share",
    "frechet_efficientnet_distance_to_originals",
    "efficientnet_score_mean",
)
SIDE = 8  # images are reduced to SIDE x SIDE pixels

# --------------------------------------------------------------------------------------------------
# Images.


def pixels(images: Tensor, gray: bool) -> Tensor:
    """Return uint8 images ``[N, 3, H, W]`` averaged to 8x8 pixels with values from 0 to 16.

    The shape is ``[N, 192]``, or ``[N, 64]`` if ``gray`` averages the color channels, too.
    """
    small = F.adaptive_avg_pool2d(images.double(), SIDE) * (16 / 255)
    return (small.mean(1) if gray else small).flatten(1)


def radii(points: Tensor, k: int) -> Tensor:
    """Return the distance ``[N]`` of each of ``points [N, D]`` to its k-th nearest neighbor."""
    distances = torch.cdist(points, points)
    return distances.kthvalue(k + 1, dim=1).values  # the nearest point is the point itself


def neighborhood_metrics(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Return precision and recall, density and coverage of points ``[M, D]`` and ``[N, D]``.

    Sources: Kynkaanniemi et al. 2019; Naeem et al. 2020.
    """
    distances = torch.cdist(real, generated)  # [N, M]
    real_radii, density_radii = (radii(real, k)[:, None] for k in (NEIGHBORS, DENSITY_NEIGHBORS))
    generated_radii = radii(generated, NEIGHBORS)
    neighbors = (distances < density_radii).double().sum(0)  # [M]
    return {
        "precision": (distances <= real_radii).any(0).double().mean().item(),
        "recall": (distances <= generated_radii).any(1).double().mean().item(),
        "density": neighbors.mean().item() / DENSITY_NEIGHBORS,
        "coverage": (distances.amin(1) < density_radii[:, 0]).double().mean().item(),
    }


def feature_statistics(points: Tensor) -> dict[str, Any]:
    """Return mean and covariance of points ``[N, D]``, in float64."""
    return fid_features_to_statistics(points.double().cpu())


def compare(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Return Frechet distance and :func:`neighborhood_metrics` of ``[M, D]`` and ``[N, D]``."""
    for points in (generated, real):
        check_finite(points, "the network of --features", "fp32")
    distance = frechet_distance(feature_statistics(generated), feature_statistics(real))
    return {"frechet": distance, **neighborhood_metrics(generated.double(), real.double())}


def all_images(path: str | Path, limit: int | None = None) -> Tensor:
    """Return the images of a folder and its subfolders ``[N, 3, H, W]`` (uint8).

    With a limit, at most that many, evenly spaced.
    """
    images = PlainImages(path)
    count = min(len(images), limit or len(images))
    return torch.stack([images[number * len(images) // count] for number in range(count)])


# --------------------------------------------------------------------------------------------------
# Likelihood in continuous space.


def level_bits(quantizer: ScalarQuantizer, latents: Tensor) -> Tensor:
    """Return -log2 of the density of each of ``latents [..., C]`` within its level, in bits.

    An inner level has uniform density between its thresholds. An outermost level has a single
    threshold: its density decays exponentially beyond it, with the level's value as mean, so that
    every latent has a positive density.
    """
    low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in quantizer.bounds())
    scale = (high - low) / (2 * quantizer.std_range)  # of normalized values, Eq. 5
    limits, values = quantizer.thresholds.double(), quantizer.reconstruction_values.double()
    normalized = (latents.double() - low) / scale - quantizer.std_range  # Eq. 1, not clipped
    index = torch.bucketize(normalized, limits)
    widths = torch.cat([limits[:1] - values[:1], limits.diff(), values[-1:] - limits[-1:]])
    outside = torch.maximum(limits[0] - normalized, normalized - limits[-1])
    outside = outside.clamp(min=0)  # 0 in inner levels
    return (widths[index] * scale).log2() + outside / widths[index] / math.log(2)


def held_out_latents(cached_val_path: str, latent_factor: float, seed: int = 0) -> Tensor:
    """Sample latents ``[N h w, C]`` of all held-out images, as ``--evaluate_nll`` does."""
    cache = open_cache(cached_val_path, mirror=False)
    cache.shape = tuple(cache[0][0].shape)
    moments = torch.stack([cache[number][0] for number in range(len(cache))]).float()
    vae, _ = tokenizer_config(cache.metadata, cached_val_path)
    posterior = CachedMoments(latent_factor, vae.get("deterministic", False)).encode(moments)
    noise = numbered_draws(seed, range(len(cache))).normal(*posterior.shape[1:])
    return posterior.sample(noise).movedim(1, -1).flatten(0, -2)


def likelihood(folder: Path, resume: str, cached_val_path: str) -> dict[str, float]:
    """Return the nats per dimension of ``folder/likelihood.json``, and the continuous bits.

    ``continuous_bits`` are bits per dimension of dequantized latents (:func:`level_bits`). Each
    channel is divided by its std over the held-out images, so that models with different
    quantizers or channel scales are comparable.

    Args:
        resume: the run that was evaluated.
    """
    discrete = read_json(folder / "likelihood.json")
    config = read_run(find_checkpoint(resume))["config"]
    quantizer = build_quantizer(
        ModelConfig.from_stored({**config, "patch_size": 1, "channel_order": None})
    )
    latents = held_out_latents(cached_val_path, config["latent_factor"])
    bits = level_bits(quantizer, latents) - latents.double().std(0).log2()
    continuous_bits = discrete["bits_per_dim"] + bits.mean().item()
    return {"nats": discrete["nats_per_dim"], "continuous_bits": continuous_bits}


# --------------------------------------------------------------------------------------------------
# Command line.


def get_args_parser() -> argparse.ArgumentParser:
    """Return the command line of this module."""
    parser = new_parser(__doc__, "experiments.measures")
    text = "folder of images, or a folder that has samples*/ or */recon/"
    parser.add_argument("--images", default="", help=text)
    text = "measure at most this many images, evenly spaced; by default all"
    parser.add_argument("--limit", type=int, help=text)
    text = "folder of held-out images; without it, only the results of reconstruction.py are read"
    parser.add_argument("--reference", default="", help=text)
    parser.add_argument("--features", default="", help="weights saved by experiments.features")
    parser.add_argument("--gray", action="store_true", help="average the color channels")
    text = "run whose likelihood to measure, if --evaluate_nll wrote likelihood.json to --images"
    parser.add_argument("--resume", default="", help=text)
    text = "cache of held-out images, for --resume"
    parser.add_argument("--cached_val_path", default="", help=text)
    add_device_arg(parser)
    parser.add_argument("--json", default="", help="file to write the results to")
    return parser


def image_folders(path: Path) -> dict[str, Path]:
    """Return the folders to measure: samples by guidance scale, other images as ``images``."""
    sample_folders = [folder for folder in sorted(path.glob("samples*")) if folder.is_dir()]
    if not sample_folders:
        return {"images": next(iter(path.glob("*/recon")), path)}
    folders = {}
    for folder in sample_folders:
        settings = read_json(folder.with_name(f"{folder.name}.json"))["settings"]
        folders[f"{settings['cfg']:g}"] = folder
    return folders


def share_recognized(net: FeatureNet, images: Tensor) -> float | None:
    """Return the share of images ``[N, 3, H, W]`` that the classifier assigns to their class.

    They are in the order of their classes, equally many of each, as scripts write them. Returns
    None if N is not a multiple of the number of classes.
    """
    classes = net.last.out_features
    if len(images) % classes:
        return None
    labels = torch.arange(classes, device=images.device).repeat_interleave(len(images) // classes)
    return net.accuracy(images, labels)


def measure_images(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the metrics of all :func:`image_folders`."""
    net = load_net(args.features, device)
    real = all_images(args.reference).to(device)
    check_number(len(real), "reference images", DENSITY_NEIGHBORS)
    path, metrics = Path(args.images), {}
    for name, folder in image_folders(path).items():
        generated = all_images(folder, args.limit).to(device)
        check_number(len(generated), f"images in {folder}", NEIGHBORS)
        metrics[name] = {
            "count": len(generated),
            "pixels": compare(pixels(generated, args.gray), pixels(real, args.gray)),
            "features": compare(net.features(generated), net.features(real)),
        }
        if folder != path:  # images that our scripts have written
            metrics[name]["recognized"] = share_recognized(net, generated)
    return metrics


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return metrics of images, if there is a reference, and of likelihoods and reconstructions."""
    folder = Path(args.images)
    metrics: dict[str, Any] = {"images": {"images": {}}}
    if args.reference:
        metrics["images"] = measure_images(args, device)
    if args.resume and (folder / "likelihood.json").exists():
        metrics |= likelihood(folder, args.resume, args.cached_val_path)
    reconstruction = next(folder.glob("*/results.json"), None)
    if reconstruction is not None:
        content = read_json(reconstruction)
        metrics |= {name: content[name] for name in RECONSTRUCTION_METRICS if name in content}
    return metrics


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device) as device:
        required = ["images", "json", *(["features"] if args.reference else [])]
        for name in required:
            if not getattr(args, name):
                raise errors.UserError(f"--{name} is missing; see --help")
        if args.limit is not None:
            check_positive(args, "limit")
        write_json(args.json, {**measure(args, device), **provenance()})


if __name__ == "__main__":
    errors.run(main)
