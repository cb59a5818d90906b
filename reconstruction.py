"""Measure reconstructions from continuous and quantized latents (section 4.2).

Runs with torchrun or plain python.
"""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import util.interpreter  # noqa: F401, before all packages

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from engine_tokenbridge import channel_statistics
from models.quantizer import QUANTIZERS, ScalarQuantizer, calibrated_bounds
from models.tokenizer import Tokenizer
from util import distributed, errors
from util.args import (
    DATA_PATH,
    add_column_args,
    add_features_args,
    add_quantizer_args,
    add_run_args,
    add_vae_arg,
    check_bits,
    check_positive,
    check_same_flags,
    new_parser,
)
from util.config import check_stride
from util.data.datasets import ImageFolderWithFilename, image_transform
from util.data.images import psnr, save_grid, ssim, to_uint8
from util.data.loaders import check_same_inputs, loader_of_all
from util.data.sources import open_images
from util.files import FileWriter, check_shared, write_json
from util.log import log, progress_bar, warn
from util.metrics.compute import (
    Evaluator,
    check_number,
    compute_metrics,
    frechet_distance,
    statistics,
    warn_if_few,
)
from util.metrics.networks import LOGITS, Features, gather_features, map_distance
from util.metrics.sample_folder import SampleFolder, check_own, read_results
from util.metrics.tables import FEATURES, default_statistics, metric_names, metric_titles
from util.precision import autocast, check_finite, double, extremes
from util.process_group import process_group
from util.provenance import provenance
from util.rng import numbered_draws
from util.tables import markdown, write_text

PICTURE_ROWS = 8  # images shown in a figure
#: Metrics of one setting. Until they are measured, it stores the number of images in its folder.
RESULTS_NAME = "results.json"

# --------------------------------------------------------------------------------------------------
# Command line


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    add_vae_arg(parser)
    parser.add_argument("--image_dir", default="./data/imagenet/train", help=DATA_PATH)
    parser.add_argument(
        "--output_dir",
        default="quantization_results",
        help="folder to write to; each setting gets a subfolder",
    )
    parser.add_argument(
        "--img_size", type=int, default=256, help="height and width of the images in pixels"
    )
    parser.add_argument(
        "--bits", type=int, default=6, help="2^bits levels per channel; -1 for continuous latents"
    )
    parser.add_argument(
        "--range", type=float, default=5.0, help="latents are clipped to [-range, range]"
    )
    add_quantizer_args(parser, QUANTIZERS, default="gaussian")
    parser.add_argument(
        "--images_per_class",
        type=int,
        default=50,
        help="images of each class, the first ones by name",
    )
    parser.add_argument(
        "--rounding",
        choices=["nearest", "down"],
        default="nearest",
        help="rounding of decoded pixels to bytes; the paper's Table 1 was measured with down",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="measure all numbers of levels and ranges of the paper's Table 1",
    )
    parser.add_argument(
        "--fid_stats",
        help=".npz with mu and sigma of the reference for rFID; "
        "by default ADM's for ImageNet at 256 pixels",
    )
    add_features_args(parser)
    parser.add_argument(
        "--no_metrics", action="store_true", help="do not measure what needs --features"
    )
    add_column_args(parser)
    add_run_args(parser, batch_size=16, seed=0, precision="fp32")
    return parser


# --------------------------------------------------------------------------------------------------
# Post-training quantization


@lru_cache
def cached_quantizer(kind: str, *options) -> ScalarQuantizer:
    """Return the quantizer with these ``options``.

    Cached because computing its tables takes longer than quantizing a batch.
    """
    return QUANTIZERS[kind](*options)


def post_training_quantize(
    x: Tensor,
    bits: int,
    min_range: float,
    max_range: float,
    std_range: float = 3.0,
    quantizer: str = "gaussian",
    channel_mean: Sequence[float] | None = None,
    channel_std: Sequence[float] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Quantize and dequantize latents (Eq. 1 to 5).

    Args:
        x: scaled latents of any shape; ``[B, C, h, w]`` with ``channel_mean``.
        bits: 1 to 9, for 2^bits levels; negative for continuous latents.
        min_range, max_range: bounds that the latents are clipped to.
        std_range: half-width of the normalized range, in standard deviations.
        quantizer: a name in :data:`models.quantizer.QUANTIZERS`.
        channel_mean, channel_std: ``C`` numbers each. They replace the bounds by bounds of each
            channel.

    Returns:
        indices (int64) and dequantized latents (float32), shaped like ``x``; None and ``x`` itself
        if ``bits < 0``.

    Raises:
        ValueError: bits, ranges or channel statistics are out of range.
    """
    if bits < 0:
        return None, x
    mean = None if channel_mean is None else tuple(channel_mean)
    std = None if channel_std is None else tuple(channel_std)
    levels = cached_quantizer(quantizer, 2**bits, min_range, max_range, std_range, mean, std)
    levels = levels.to(x.device)
    if not levels.calibrated:
        return levels(x)
    indices, quantized = levels(x.movedim(1, -1))  # a calibrated quantizer takes channels last
    return indices.movedim(-1, 1), quantized.movedim(-1, 1)


# --------------------------------------------------------------------------------------------------
# Settings to compare


class QuantizerSetting(NamedTuple):
    """Bits and range of a quantizer."""

    bits: int  # -1 for continuous latents
    range: float
    calibrated: bool = False  # the range is that of --quant_calibrate

    @property
    def levels(self) -> int:
        """Return the number of levels of each channel; 0 for continuous latents."""
        return 2**self.bits if self.bits > 0 else 0

    @property
    def title(self) -> str:
        """Return the name of the setting in tables and figures."""
        if not self.levels:
            return "continuous"
        bounds = "calibrated" if self.calibrated else f"range {self.range:g}"
        return f"{self.levels} levels, {bounds}"


#: Table 1 of the paper: rFID and Inception Score of each setting.
TABLE_1 = {
    QuantizerSetting(-1, 5.0): (1.11, 306.1),
    QuantizerSetting(3, 5.0): (3.69, 250.3),
    QuantizerSetting(4, 5.0): (1.33, 296.8),
    QuantizerSetting(5, 5.0): (1.12, 303.8),
    QuantizerSetting(6, 5.0): (1.11, 305.4),
    QuantizerSetting(6, 2.0): (2.26, 267.9),
    QuantizerSetting(6, 3.0): (1.22, 299.7),
    QuantizerSetting(6, 4.0): (1.13, 305.3),
}
PAPER_IMAGES = (50_000, 1000, 256)  # images, classes and pixels that Table 1 is measured on
#: Columns of Figure 5 (continuous and quantized latents) and Figure 6 (numbers of levels).
FIGURE_SETTINGS = {
    "figure5.png": [QuantizerSetting(-1, 5.0), QuantizerSetting(6, 5.0)],
    "figure6.png": [QuantizerSetting(bits, 5.0) for bits in (6, 5, 4, 3)],
}

# --------------------------------------------------------------------------------------------------
# Reconstruction

MEAN_METRICS = ("psnr_db", "ssim", "latent_mse", "out_of_range_share")  # means over images


class ReconstructionStats:
    """Sums of metrics over the images of this rank, under one setting.

    Attributes:
        features: features and logits of the reconstructions, by batch; empty without a network.
    """

    def __init__(self, setting: QuantizerSetting, channels: int, device: torch.device):
        self.setting = setting
        self.sums = double(torch.zeros(len(MEAN_METRICS), device=device))
        # How often each channel takes each level
        self.counts = torch.zeros(channels, setting.levels, dtype=torch.int64, device=device)
        self.features: list[tuple[Tensor, Tensor]] = []
        self.map_distance = double(torch.zeros((), device=device))  # sum over images

    def add(
        self,
        real: Tensor,
        recon: Tensor,
        indices: Tensor | None,
        squared_error: Tensor,
        outside: Tensor,
    ) -> None:
        """Add a batch.

        Args:
            real, recon: images and their reconstructions (uint8 ``[B, 3, H, W]``).
            indices: level of each latent ``[B, C, h, w]``; None for continuous latents.
            squared_error: squared quantization error of each latent ``[B, C, h, w]``.
            outside: whether each latent is out of range (bool ``[B, C, h, w]``).
        """
        latent_mse = double(squared_error).flatten(1).mean(1)
        outside_share = double(outside).flatten(1).mean(1)
        metrics = [psnr(real, recon), ssim(real, recon), latent_mse, outside_share]
        self.sums += torch.stack(metrics).sum(1)
        if indices is not None:
            for channel, levels in enumerate(indices.transpose(0, 1).flatten(1)):
                self.counts[channel] += torch.bincount(levels, minlength=self.setting.levels)

    def add_features(self, real: Features, recon: Features) -> None:
        """Add the features of a batch of images and their reconstructions."""
        self.features.append(recon[:2])
        if recon.maps:
            self.map_distance += double(map_distance(real, recon)).sum()

    def metrics(self, images: int) -> dict[str, Any]:
        """Return the setting, its mean metrics and its use of levels.

        Args:
            images: number of images of all ranks.
        """
        means = distributed.all_reduce_mean(self.sums) * distributed.get_world_size() / images
        metrics: dict[str, Any] = {
            "bits": self.setting.bits,
            "range": None if self.setting.calibrated else self.setting.range,
            "images": images,
            **dict(zip(MEAN_METRICS, means.tolist(), strict=True)),
        }
        if self.setting.levels:
            share = distributed.all_reduce_mean(double(self.counts))
            share = share / share.sum(dim=1, keepdim=True)
            metrics["levels"] = self.setting.levels
            metrics["levels_used"] = (share > 0).sum(dim=1).tolist()
            metrics["entropy_bits"] = torch.special.entr(share).sum(dim=1).div(math.log(2)).tolist()
        return metrics


@torch.no_grad()
def reconstruct(
    tokenizer: Tokenizer,
    loader: DataLoader,
    settings: Sequence[QuantizerSetting],
    calibration: dict[str, list[float]],
    evaluator: Evaluator | None,
    folder: Path | None,
    args: argparse.Namespace,
) -> tuple[dict[str, list[Tensor]], list[tuple[Tensor, Tensor]], list[ReconstructionStats]]:
    """Reconstruct this rank's images under every setting, from one posterior sample of each image.

    Args:
        calibration: ``channel_mean`` and ``channel_std``, or empty.
        folder: every image is written to its ``real/`` and ``recon/``; None writes no images.
        args: ``seed``, ``quantizer``, ``precision`` and ``rounding``.

    Returns:
        :data:`PICTURE_ROWS` images to show, by column title; features and logits of the originals,
        by batch; and the statistics of each setting.

    Raises:
        NotFinite: the tokenizer's encoder or decoder overflows.
    """
    device = next(tokenizer.vae.parameters()).device
    network = evaluator.network if evaluator else None
    all_stats = [ReconstructionStats(setting, tokenizer.embed_dim, device) for setting in settings]
    rank = distributed.get_rank()
    world = distributed.get_world_size()

    # Numbers of the images to show, evenly spaced over this rank's images
    sampler: Any = loader.sampler
    shown = {rank + world * (i * len(sampler) // PICTURE_ROWS) for i in range(PICTURE_ROWS)}
    titles = ("original", "continuous", *(setting.title for setting in settings))
    pictures: dict[str, list[Tensor]] = {title: [] for title in titles}
    features: list[tuple[Tensor, Tensor]] = []
    numbers = range(rank, rank)  # of the images of a batch; first an empty range
    channel_bounds = None
    if calibration:
        bounds = calibrated_bounds(**calibration, std_range=3.0)
        channel_bounds = [bound.to(device)[:, None, None] for bound in bounds]

    def decode(latents: Tensor) -> Tensor:
        with autocast(device, args.precision):
            images = tokenizer.decode(latents)
        check_finite(extremes(images), "the tokenizer's decoder", args.precision)
        return to_uint8(images, args.rounding)

    def save(part: str, images: Tensor) -> None:
        if folder:
            SampleFolder(folder / part).save(writer, images.cpu(), numbers)

    writer = FileWriter()
    with progress_bar(loader, unit="batch", desc="reconstructing") as batches, writer:
        for images, _, _ in batches:
            # RankSampler gives every world-th image to this rank
            numbers = range(numbers.stop, numbers.stop + world * len(images), world)
            picked = [i for i, number in enumerate(numbers) if number in shown]

            # Encode
            images = images.to(device)
            real = to_uint8(images)
            with autocast(device, args.precision):
                posterior = tokenizer.encode(images)
                noise = numbered_draws(args.seed, numbers).normal(*posterior.shape[1:]).to(device)
                latents = posterior.sample(noise)
            check_finite(extremes(latents), "the tokenizer's encoder", args.precision)
            if network is not None:
                real_features = network(real)
                features.append(real_features[:2])
            writer.finish()  # the images of the previous batch
            save("real", real)
            pictures["original"] += real[picked].cpu()
            if picked and all(setting.levels for setting in settings):
                pictures["continuous"] += decode(latents[picked]).cpu()

            # Quantize and decode
            for stats in all_stats:
                bits, bound, _ = stats.setting
                indices, quantized = post_training_quantize(
                    latents,
                    bits,
                    -bound,
                    bound,
                    quantizer=args.quantizer,
                    channel_mean=calibration.get("channel_mean"),
                    channel_std=calibration.get("channel_std"),
                )
                recon = decode(quantized)
                low, high = channel_bounds or (-bound, bound)
                squared_error = double(latents - quantized) ** 2
                stats.add(real, recon, indices, squared_error, (latents < low) | (latents > high))
                if network is not None:
                    stats.add_features(real_features, network(recon))
                pictures[stats.setting.title] += recon[picked].cpu()
                save("recon", recon)
        writer.finish()
    return pictures, features, all_stats


def add_metrics(
    results: list[dict[str, Any]],
    all_stats: list[ReconstructionStats],
    features: list[tuple[Tensor, Tensor]],
    evaluator: Evaluator,
) -> None:
    """Add the metrics of features and classes to those of each setting in ``results``, on rank 0.

    The Frechet distance (rFID) is measured against the originals, and against ``--fid_stats`` if
    they are given.

    Args:
        features: features and logits of this rank's originals, by batch.
    """
    total, network, world = results[0]["images"], evaluator.network, distributed.get_world_size()
    originals = gather_features(features, network, total, evaluator.device)
    original_stats = statistics(originals) if distributed.is_main_process() else {}
    for metrics, stats in zip(results, all_stats, strict=True):
        recon = gather_features(stats.features, network, total, evaluator.device)
        distances = world * distributed.all_reduce_mean(stats.map_distance)
        if distributed.is_main_process():
            metrics |= compute_metrics(recon, evaluator.stats, network=network.name)
            distance = frechet_distance(statistics(recon), original_stats)
            metrics[f"{metric_names(network.name)['frechet']}_to_originals"] = distance
            if distances > 0:  # the network has maps
                metrics[f"{network.name}_map_distance"] = distances.item() / total
            if network.widths[LOGITS]:
                same = originals[LOGITS].argmax(1) == recon[LOGITS].argmax(1)
                metrics[f"{network.name}_same_class_share"] = double(same).mean().item()


# --------------------------------------------------------------------------------------------------
# Tables and figures


def feature_titles(features: str) -> dict[str, str]:
    """Return titles of the metrics of a network's features, by name."""
    names, titles, network = metric_names(features), metric_titles(features), FEATURES[features]
    distance = "rFID" if features == "inception" else titles[names["frechet"]]
    return {
        names["frechet"]: f"{distance}, to the statistics",
        f"{names['frechet']}_to_originals": f"{distance}, to the originals",
        names["score"]: titles[names["score"]],
        f"{features}_map_distance": f"distance of feature maps ({network})",
        f"{features}_same_class_share": f"same predicted class ({network})",
    }


#: The paper's numbers, and the metrics that they stand beside.
PAPER_TITLES = {
    "frechet_inception_distance": {"paper_rfid": "paper: rFID, to the statistics"},
    "inception_score_mean": {"paper_inception_score": "paper: Inception Score"},
}
RECONSTRUCTION_TITLES = {
    name: title
    for features in FEATURES
    for metric, own_title in feature_titles(features).items()
    for name, title in {metric: own_title, **PAPER_TITLES.get(metric, {})}.items()
} | {
    "psnr_db": "PSNR (dB)",
    "ssim": "SSIM",
    "latent_mse": "latent mean squared error",
    "out_of_range_share": "latents out of range",
    "levels_used": "levels used, least to most by channel",
    "entropy_bits": "entropy (bits), least to most by channel",
}


def titled_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return metrics by their titles, and the range of those that each channel has."""
    titled: dict[str, Any] = {}
    for name, title in RECONSTRUCTION_TITLES.items():
        value = metrics.get(name)
        if isinstance(value, list):
            value = f"{min(value):.4g} to {max(value):.4g}"
        if name in metrics:
            titled[title] = value
    return titled


def write_sweep(
    results: list[dict[str, Any]],
    pictures: dict[str, list[Tensor]],
    folder: Path,
    images: str,
    same: bool,
) -> None:
    """Write Table 1, with the paper's numbers beside the measured ones, and Figures 5 and 6.

    Args:
        results: metrics of each setting of :data:`TABLE_1`.
        images: describes the measured images.
        same: whether number, classes and size of the images equal the paper's.
    """
    for (rfid, score), metrics in zip(TABLE_1.values(), results, strict=True):
        if "frechet_inception_distance" in metrics:
            metrics["paper_rfid"] = rfid
        if "inception_score_mean" in metrics:
            metrics["paper_inception_score"] = score

    # Table
    names = [name for name in RECONSTRUCTION_TITLES if any(name in row for row in results)]
    titles = [RECONSTRUCTION_TITLES[name] for name in names]
    rows = []
    for setting, metrics in zip(TABLE_1, results, strict=True):
        titled = titled_metrics(metrics)
        rows.append([setting.title, *(titled.get(title) for title in titles)])
    text = markdown(["tokenizer", *titles], rows) + f"\nMeasured on {images}.\n"
    text += (
        "The paper's numbers: 50,000 images of ImageNet's 1,000 classes, 256 pixels, against ADM's "
        "statistics, rounded down.\n"
    )
    if not same:
        text += "These images differ from the paper's: do not compare the numbers.\n"
    write_text(folder / "table1.md", text)
    write_json(folder / "table1.json", {"rows": results, **provenance()})

    # Figures
    for name, settings in FIGURE_SETTINGS.items():
        titles = ["original", *(setting.title for setting in settings)]
        write_picture(folder / name, {title: pictures[title] for title in titles})


def write_picture(path: Path, pictures: dict[str, list[Tensor]]) -> None:
    """Write a figure with a row for each image, and a column of reconstructions for each title."""
    rows = [torch.stack(views) for views in zip(*pictures.values(), strict=True)]
    save_grid(torch.cat(rows), path, columns=len(pictures), titles=list(pictures), min_size=128)


# --------------------------------------------------------------------------------------------------
# Files and images


def replace_images(folder: Path, plan: dict[str, Any]) -> None:
    """Remove the images of an earlier run from ``folder``, and write the ``plan`` of this run.

    Raises:
        UserError: the folder holds images that this project has not written.
    """
    parts = [SampleFolder(folder / part) for part in ("real", "recon")]
    earlier = read_results(folder / RESULTS_NAME)
    is_own = "args" in earlier and isinstance(earlier.get("images"), int)
    count = earlier["images"] if is_own else 0
    check_own(parts, folder / RESULTS_NAME, count)
    for part in parts:
        part.remove(count)
    write_json(folder / RESULTS_NAME, plan)


def first_of_each_class(samples: Sequence[tuple[str, int]], count: int) -> list[int]:
    """Return the indices of the first ``count`` samples of each label.

    Args:
        samples: files and labels.
    """
    counts: Counter[int] = Counter()
    indices = []
    for index, (_, label) in enumerate(samples):
        counts[label] += 1
        if counts[label] <= count:
            indices.append(index)
    return indices


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for impossible flags, before files are read or written."""
    check_bits(args.bits, "--bits", continuous=True)
    check_positive(args, "range", "images_per_class", "img_size", "batch_size")
    if args.sweep and (args.quantizer != "gaussian" or args.quant_calibrate):
        raise errors.UserError(
            "--sweep is Table 1, with Gaussian levels on given ranges: "
            "remove --quantizer and --quant_calibrate"
        )


def load_images_and_tokenizer(
    args: argparse.Namespace,
) -> tuple[ImageFolderWithFilename, Tokenizer]:
    """Return all images and the tokenizer.

    Raises:
        UserError: the images or the tokenizer cannot be read, or do not fit each other.
    """
    source = open_images(args.image_dir, "train", args.image_column, args.label_column)
    tokenizer = Tokenizer.from_pretrained(args.vae_path)
    check_stride(args.img_size, tokenizer.stride)
    return ImageFolderWithFilename(source, image_transform(args.img_size)), tokenizer


def find_statistics(img_size: int, classes: int, features: str) -> str | None:
    """Return the default ``--fid_stats``; None, with a warning, if the file is missing."""
    path = default_statistics(img_size, classes, features)
    if path is None or Path(path).is_file():
        return path
    warn(
        "no FID statistics at %s: rFID is measured against the originals only, unlike Table 1. "
        "To download the statistics: python -m tools.download fid_stats",
        path,
    )
    return None


def make_rfid_evaluator(
    args: argparse.Namespace, classes: int, count: int, device: torch.device
) -> Evaluator | None:
    """Return network and reference for rFID and Inception Score of ``count`` images.

    ``args.fid_stats`` is set to its default for images of ``classes`` classes.

    Returns:
        None, on all ranks, with ``--no_metrics``, or if a file is missing that no flag names.

    Raises:
        UserError: a file that a flag names is missing or damaged, or there are too few images.
    """
    if args.no_metrics:
        return None
    named = args.fid_stats or args.feature_weights or args.features != "inception"
    if args.fid_stats is None:
        args.fid_stats = distributed.on_rank_0(
            lambda: find_statistics(args.img_size, classes, args.features)
        )
    try:
        distributed.on_all_ranks(lambda: check_number(count, "images"))
        return Evaluator(
            args.features,
            args.feature_weights,
            args.fid_stats,
            None,
            device,
            args.batch_size,
            args.num_workers,
            count,
        )
    except errors.UserError as error:
        if named:
            raise
        warn("rFID and Inception Score are not measured: %s", error)
        return None


# --------------------------------------------------------------------------------------------------
# Main


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device, args.deterministic, args.precision) as device:
        check_same_flags(args, device)
        distributed.on_all_ranks(lambda: check_args(args))

        # Images, tokenizer and metrics
        dataset, tokenizer = distributed.on_all_ranks(lambda: load_images_and_tokenizer(args))
        check_same_inputs({"the folder": dataset}, tokenizer.vae)
        n = args.images_per_class
        images = Subset(dataset, first_of_each_class(dataset.samples, n))
        if len(images) < len(dataset):
            log.info("measuring the first %d images of each class (--images_per_class)", n)
        evaluator = make_rfid_evaluator(args, len(dataset.classes), len(images), device)
        if evaluator is not None:
            warn_if_few(len(images), "images", evaluator.network)

        # Output folder
        kind = "quant" if args.quantizer == "gaussian" else args.quantizer
        bound = "calibrated" if args.quant_calibrate else f"r{args.range}"
        name = "sweep" if args.sweep else f"{kind}_b{args.bits}_{bound}"
        folder = Path(args.output_dir) / f"{name}_n{n}"
        # A sweep keeps no images: it has eight reconstructions of each
        image_folder = None if args.sweep else folder
        if image_folder is not None:
            check_shared(folder)
            plan = {"images": len(images), "args": vars(args)}
            distributed.on_rank_0(lambda: replace_images(folder, plan))

        # Reconstruct and measure
        loader = loader_of_all(images, device, args)
        channels_last = {"memory_format": torch.channels_last}
        distributed.on_all_ranks(lambda: tokenizer.to(device, **channels_last))
        calibration: dict[str, list[float]] = {}
        if args.quant_calibrate:
            mean, std = channel_statistics(
                tokenizer, loader, tokenizer.embed_dim, device, args.precision
            )
            calibration = {"channel_mean": mean, "channel_std": std}
        setting = QuantizerSetting(args.bits, args.range, args.quant_calibrate)
        settings = list(TABLE_1) if args.sweep else [setting]
        pictures, features, all_stats = reconstruct(
            tokenizer, loader, settings, calibration, evaluator, image_folder, args
        )
        results = [stats.metrics(len(images)) for stats in all_stats]
        if evaluator is not None:
            add_metrics(results, all_stats, features, evaluator)

        # Write
        if distributed.is_main_process():
            for setting, metrics in zip(settings, results, strict=True):
                rows = {"images": metrics["images"], **titled_metrics(metrics)}
                log.info("\n%s", markdown(["", setting.title], list(rows.items())))
            if args.sweep:
                count = len(images)
                classes = len(dataset.classes)
                size = args.img_size
                text = f"{count} images of {classes} classes in {dataset.root}, {size} pixels, "
                text += f"against {args.fid_stats or 'no statistics'}, rounded {args.rounding}"
                same = (count, classes, size) == PAPER_IMAGES
                write_sweep(results, pictures, folder, text, same)
            else:
                write_picture(folder / "reconstruction.png", pictures)
                origin = {"seed": args.seed, "args": vars(args), **provenance()}
                write_json(folder / RESULTS_NAME, {**results[0], **calibration, **origin})
            log.info("wrote %s", folder)
        distributed.barrier()


if __name__ == "__main__":
    errors.run(main)
