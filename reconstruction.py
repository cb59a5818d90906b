"""Reconstruction by the tokenizer, continuous and quantized (section 4.2; torchrun or plain python)."""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

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
from util.files import check_shared, write_json
from util.log import log, progress_bar, warn
from util.metrics.compute import (
    Evaluator,
    check_number,
    compute_metrics,
    frechet_distance,
    statistics,
    warn_if_few,
)
from util.metrics.inception import gather_features
from util.metrics.sample_folder import SampleFolder, check_own, read_results
from util.metrics.tables import default_statistics
from util.precision import autocast, check_finite, double, extremes
from util.process_group import process_group
from util.provenance import provenance
from util.rng import numbered_draws
from util.tables import markdown, write_text

PICTURE_ROWS = 8  # images shown in pictures
RESULTS = "results.json"  # of one setting; until it is measured, the number of images that are written beside it


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = new_parser(__doc__)
    add_vae_arg(parser)
    parser.add_argument("--image_dir", default="./data/imagenet/train", help=DATA_PATH)
    parser.add_argument(
        "--output_dir",
        default="quantization_results",
        help="each call's results go to a folder in it",
    )
    parser.add_argument(
        "--img_size", type=int, default=256, help="height and width of the images in pixels"
    )
    parser.add_argument(
        "--bits", type=int, default=6, help="2^bits levels a channel; -1 for continuous latents"
    )
    parser.add_argument(
        "--range", type=float, default=5.0, help="latents are clipped to [-range, range]"
    )
    add_quantizer_args(parser, QUANTIZERS, default="gaussian")
    parser.add_argument(
        "--images_per_class", type=int, default=50, help="takes the first of each, by name"
    )
    text = "of decoded values to bytes; down: as the paper's Table 1 was measured"
    parser.add_argument("--rounding", choices=["nearest", "down"], default="nearest", help=text)
    parser.add_argument(
        "--sweep", action="store_true", help="all levels and ranges of the paper's Table 1"
    )
    text = ".npz with mu and sigma of the reference, for rFID against it; by default, for ImageNet 256, ADM's"
    parser.add_argument("--fid_stats", help=text)
    parser.add_argument(
        "--inception_weights",
        help="torch-fidelity's Inception; by default where it is downloaded to",
    )
    parser.add_argument(
        "--no_metrics", action="store_true", help="measure no rFID and no Inception Score"
    )
    add_column_args(parser)
    add_run_args(parser, batch_size=16, seed=0, precision="fp32")
    return parser


@lru_cache
def cached_quantizer(kind: str, *options) -> ScalarQuantizer:
    """The quantizer of these ``options``: its tables take longer to make than a batch takes to quantize."""
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
    """Quantizes latents and dequantizes them (Eq. 1 to 5).

    Args:
        x: scaled latents of any shape; calibrated ones ``[B, C, h, w]``.
        bits: 1 to 9, for 2^bits levels; negative for continuous latents.
        min_range, max_range: bounds that the latents are clipped to.
        std_range: half-width of the normalized range, in standard deviations.
        quantizer: ``"gaussian"`` or ``"linear"``.
        channel_mean, channel_std: ``C`` numbers each, which set each channel's bounds in place of the two above.

    Returns:
        indices (int64) and dequantized latents (float32), shaped like ``x``; None and ``x`` itself if ``bits < 0``.

    Raises:
        ValueError: bits, ranges or statistics outside the above.
    """
    if bits < 0:
        return None, x
    channels = (None if values is None else tuple(values) for values in (channel_mean, channel_std))
    levels = cached_quantizer(quantizer, 2**bits, min_range, max_range, std_range, *channels).to(
        x.device
    )
    if not levels.calibrated:
        return levels(x)
    indices, quantized = levels(x.movedim(1, -1))  # a calibrated quantizer takes channels last
    return indices.movedim(-1, 1), quantized.movedim(-1, 1)


# --------------------------------------------------------------------------------------------------------------------
# The settings that are compared.


class Setting(NamedTuple):
    """A quantizer's bits, -1 for continuous latents, and range."""

    bits: int
    range: float

    @property
    def levels(self) -> int:
        """Levels of each channel; 0 for continuous latents."""
        return 2**self.bits if self.bits > 0 else 0

    @property
    def title(self) -> str:
        """The setting's name in tables and pictures."""
        return f"{self.levels} levels, range {self.range:g}" if self.levels else "continuous"


#: Table 1 of the paper: rFID and Inception Score of each setting.
TABLE_1 = {
    Setting(-1, 5.0): (1.11, 306.1),
    Setting(3, 5.0): (3.69, 250.3),
    Setting(4, 5.0): (1.33, 296.8),
    Setting(5, 5.0): (1.12, 303.8),
    Setting(6, 5.0): (1.11, 305.4),
    Setting(6, 2.0): (2.26, 267.9),
    Setting(6, 3.0): (1.22, 299.7),
    Setting(6, 4.0): (1.13, 305.3),
}
PAPER_IMAGES = (50_000, 1000, 256)  # images, classes and pixels that Table 1 is measured on
#: The settings in the columns of Figure 5 (continuous against discrete) and Figure 6 (numbers of levels).
FIGURES = {
    "figure5.png": [Setting(-1, 5.0), Setting(6, 5.0)],
    "figure6.png": [Setting(6, 5.0), Setting(5, 5.0), Setting(4, 5.0), Setting(3, 5.0)],
}

# --------------------------------------------------------------------------------------------------------------------
# Reconstruction.

MEANS = ("psnr_db", "ssim", "latent_mse", "out_of_range_share")  # over images


class ReconstructionStats:
    """What one setting does to this process's images and their latents, as sums over the images.

    Attributes:
        features: Inception's of the reconstructions, batch by batch; empty without an evaluator.
    """

    def __init__(self, setting: Setting, channels: int, device: torch.device):
        self.setting = setting
        self.sums = double(torch.zeros(len(MEANS), device=device))
        self.counts = torch.zeros(
            channels, setting.levels, dtype=torch.int64, device=device
        )  # uses of each level
        self.features: list[tuple[Tensor, ...]] = []

    def add(
        self,
        real: Tensor,
        recon: Tensor,
        indices: Tensor | None,
        squared_error: Tensor,
        outside: Tensor,
    ) -> None:
        """Adds a batch: byte images ``[B, 3, H, W]``, and of each latent ``[B, C, h, w]`` its level, its squared
        quantization error, and whether it was out of range."""
        of_latents = [double(values).flatten(1).mean(1) for values in (squared_error, outside)]
        self.sums += torch.stack([psnr(real, recon), ssim(real, recon), *of_latents]).sum(1)
        for channel, used in enumerate(
            indices.transpose(0, 1).flatten(1) if indices is not None else ()
        ):
            self.counts[channel] += torch.bincount(used, minlength=self.setting.levels)

    def figures(self, images: int) -> dict[str, Any]:
        """The setting's means and use of levels, over all processes' ``images``."""
        means = distributed.all_reduce_mean(self.sums) * distributed.get_world_size() / images
        figures = {"images": images, **dict(zip(MEANS, means.tolist(), strict=True))}
        if self.setting.levels:
            share = distributed.all_reduce_mean(double(self.counts))
            share = share / share.sum(dim=1, keepdim=True)
            figures["levels"] = self.setting.levels
            figures["levels_used"] = (share > 0).sum(dim=1).tolist()
            figures["entropy_bits"] = torch.special.entr(share).sum(dim=1).div(math.log(2)).tolist()
        return {"bits": self.setting.bits, "range": self.setting.range, **figures}


@torch.no_grad()
def reconstruct(
    tokenizer: Tokenizer,
    loader: DataLoader,
    settings: Sequence[Setting],
    calibration: dict[str, list[float]],
    evaluator: Evaluator | None,
    folder: Path | None,
    args: argparse.Namespace,
) -> tuple[dict[str, list[Tensor]], list[tuple[Tensor, ...]], list[ReconstructionStats]]:
    """Reconstructs this process's images under every setting, from one posterior sample of each image.

    Args:
        calibration: ``channel_mean`` and ``channel_std``, or nothing.
        folder: where every image is written, to ``real/`` and ``recon/``; None writes none.
        args: ``seed``, ``quantizer``, ``precision`` and ``rounding``.

    Raises:
        NotFinite: the tokenizer's encoder or decoder overflows.

    Returns:
        by column title, :data:`PICTURE_ROWS` images to show; Inception's features of the originals, batch by batch; and
        the statistics of each setting.
    """
    device = next(tokenizer.vae.parameters()).device
    all_stats = [ReconstructionStats(setting, tokenizer.embed_dim, device) for setting in settings]
    rank, world, share = distributed.get_rank(), distributed.get_world_size(), len(loader.sampler)
    shown = {
        rank + world * (i * share // PICTURE_ROWS) for i in range(PICTURE_ROWS)
    }  # evenly spaced
    pictures = {
        title: [] for title in ("original", "continuous", *(setting.title for setting in settings))
    }
    features, numbers, bounds = [], range(rank, rank), None
    if calibration:
        bounds = [
            b.to(device)[:, None, None] for b in calibrated_bounds(**calibration, std_range=3.0)
        ]

    def decode(latents: Tensor) -> Tensor:
        with autocast(device, args.precision):
            images = tokenizer.decode(latents)
        check_finite(extremes(images), "the tokenizer's decoder", args.precision)
        return to_uint8(images, args.rounding)

    def save(part: str, images: Tensor) -> None:
        if folder:
            SampleFolder(folder / part).save(images, numbers)

    with progress_bar(loader, unit="batch", desc="reconstructing") as batches:
        for images, _, _ in batches:
            numbers = range(
                numbers.stop, numbers.stop + world * len(images), world
            )  # as RankSampler deals them
            picked = [i for i, number in enumerate(numbers) if number in shown]
            images = images.to(device)
            real = to_uint8(images)
            with autocast(device, args.precision):
                posterior = tokenizer.encode(images)
                noise = numbered_draws(args.seed, numbers).normal(*posterior.shape[1:]).to(device)
                latents = posterior.sample(noise)
            check_finite(extremes(latents), "the tokenizer's encoder", args.precision)
            features += [] if evaluator is None else [evaluator.inception(real)]
            save("real", real)
            pictures["original"] += real[picked].cpu()
            if picked and all(setting.levels for setting in settings):
                pictures["continuous"] += decode(latents[picked]).cpu()
            for stats in all_stats:
                bits, bound = stats.setting
                indices, quantized = post_training_quantize(
                    latents, bits, -bound, bound, quantizer=args.quantizer, **calibration
                )
                recon = decode(quantized)
                low, high = bounds or (-bound, bound)
                squared_error = double(latents - quantized) ** 2
                stats.add(real, recon, indices, squared_error, (latents < low) | (latents > high))
                stats.features += [] if evaluator is None else [evaluator.inception(recon)]
                pictures[stats.setting.title] += recon[picked].cpu()
                save("recon", recon)
    return pictures, features, all_stats


def add_metrics(
    results: list[dict[str, Any]],
    all_stats: list[ReconstructionStats],
    features: list,
    evaluator: Evaluator,
) -> None:
    """Adds each setting's rFID and Inception Score to its figures in ``results``, on the main process.

    rFID is measured against the originals, and against ``--fid_stats`` where there are any.

    Args:
        features: Inception's of this process's originals, batch by batch.
    """
    total = results[0]["images"]
    originals = gather_features(features, total, evaluator.device)
    real = statistics(originals) if distributed.is_main_process() else None
    for figures, stats in zip(results, all_stats, strict=True):
        recon = gather_features(stats.features, total, evaluator.device)
        if distributed.is_main_process():
            figures |= compute_metrics(recon, evaluator.stats)
            figures["frechet_inception_distance_to_originals"] = frechet_distance(
                statistics(recon), real
            )


# --------------------------------------------------------------------------------------------------------------------
# Reports.

TITLES = {
    "frechet_inception_distance": "rFID, to the statistics",
    "paper_rfid": "paper: rFID, to the statistics",
    "frechet_inception_distance_to_originals": "rFID, to the originals",
    "inception_score_mean": "Inception Score",
    "paper_inception_score": "paper: Inception Score",
    "psnr_db": "PSNR (dB)",
    "ssim": "SSIM",
    "latent_mse": "latent mean squared error",
    "out_of_range_share": "latents out of range",
    "levels_used": "levels used, least to most by channel",
    "entropy_bits": "entropy (bits), least to most by channel",
}


def summary(figures: dict[str, Any]) -> dict[str, str | float]:
    """Figures by their titles; of those that each channel has, the least and the most."""
    shown = {title: figures[name] for name, title in TITLES.items() if name in figures}
    return {
        t: f"{min(v):.4g} to {max(v):.4g}" if isinstance(v, list) else v for t, v in shown.items()
    }


def write_sweep(
    results: list[dict[str, Any]],
    pictures: dict[str, list[Tensor]],
    folder: Path,
    images: str,
    same: bool,
) -> None:
    """Write Table 1, with the paper's numbers beside the metrics that they are of, and Figures 5 and 6.

    Args:
        results: the figures of each setting of :data:`TABLE_1`.
        images: describes what they are measured on.
        same: whether these are as many images and classes, of the same size, as the paper's.
    """
    for (rfid, score), figures in zip(TABLE_1.values(), results, strict=True):
        if "frechet_inception_distance" in figures:
            figures["paper_rfid"] = rfid
        if "inception_score_mean" in figures:
            figures["paper_inception_score"] = score
    titles = [
        title for name, title in TITLES.items() if any(name in figures for figures in results)
    ]
    shown = [
        (setting.title, summary(figures)) for setting, figures in zip(TABLE_1, results, strict=True)
    ]
    rows = [[name, *(figures.get(title) for title in titles)] for name, figures in shown]
    text = markdown(["tokenizer", *titles], rows) + f"\nMeasured on {images}.\n"
    text += "The paper: on 50,000 images of ImageNet's 1,000 classes, 256 pixels, to ADM's statistics, rounded down.\n"
    text += (
        "" if same else "These images are others than the paper's: do not compare the numbers.\n"
    )
    write_text(folder / "table1.md", text)
    write_json(folder / "table1.json", {"rows": results, **provenance()})
    for name, settings in FIGURES.items():
        titles = ["original", *(setting.title for setting in settings)]
        write_picture(folder / name, {title: pictures[title] for title in titles})


def write_picture(path: Path, pictures: dict[str, list[Tensor]]) -> None:
    """Writes a picture with a row for each image, and a column of its reconstructions under each title."""
    rows = [torch.stack(views) for views in zip(*pictures.values(), strict=True)]
    save_grid(torch.cat(rows), path, columns=len(pictures), titles=list(pictures), min_size=128)


# --------------------------------------------------------------------------------------------------------------------
# The script.


def replace_images(folder: Path, planned: dict[str, Any]) -> None:
    """Remove the images of an earlier run from ``folder``, after a check that they are; note what is ``planned`` there.

    Raises:
        UserError: there are images that this project has not made.
    """
    parts, count = [SampleFolder(folder / part) for part in ("real", "recon")], 0
    before = read_results(folder / RESULTS)
    if "args" in before and isinstance(before.get("images"), int):
        count = before["images"]
    check_own(parts, folder / RESULTS, count)
    for part in parts:
        part.remove(count)
    write_json(folder / RESULTS, planned)


def first_of_each_class(samples: Sequence[tuple[str, int]], count: int) -> list[int]:
    """Indices of the first ``count`` of each label's ``samples``."""
    seen, chosen = Counter(), []
    for index, (_, label) in enumerate(samples):
        seen[label] += 1
        chosen += [index] * (seen[label] <= count)
    return chosen


def load_inputs(args: argparse.Namespace) -> tuple[ImageFolderWithFilename, Tokenizer]:
    """Check the flags; return all images and the tokenizer.

    Raises:
        UserError: a flag is out of range, or the images or the tokenizer cannot be read or do not fit.
    """
    check_bits(args.bits, "--bits", continuous=True)
    check_positive(args, "range", "images_per_class", "img_size", "batch_size")
    if args.sweep and (args.quantizer != "gaussian" or args.quant_calibrate):
        raise errors.UserError(
            "--sweep is Table 1, Gaussian levels on given ranges: leave out the other flags"
        )
    source = open_images(args.image_dir, "train", args.image_column, args.label_column)
    tokenizer = Tokenizer.from_pretrained(args.vae_path)
    check_stride(args.img_size, tokenizer.stride)
    return ImageFolderWithFilename(source, image_transform(args.img_size)), tokenizer


def find_statistics(img_size: int, classes: int) -> str | None:
    """Return the default ``--fid_stats``; None, with a warning, where the file is missing."""
    path = default_statistics(img_size, classes)
    if path is None or Path(path).is_file():
        return path
    text = "no FID statistics at %s: rFID to the originals alone, which Table 1 does not have; python -m tools.download"
    warn(f"{text} fid_stats fetches them", path)
    return None


def make_evaluator(
    args: argparse.Namespace, classes: int, count: int, device: torch.device
) -> Evaluator | None:
    """What rFID and Inception Score of ``count`` images need; None with ``--no_metrics``, or where it is missing and no
    flag names it.

    All processes have it or none. ``args.fid_stats`` is set to its default for images of so many ``classes``.

    Raises:
        UserError: a file that a flag names is missing or damaged, or there are too few images.
    """
    if args.no_metrics:
        return None
    named = args.fid_stats or args.inception_weights
    if args.fid_stats is None:
        args.fid_stats = distributed.on_rank_0(lambda: find_statistics(args.img_size, classes))
    try:
        distributed.on_all_ranks(lambda: check_number(count, "images"))
        how = device, args.batch_size, args.num_workers, count
        return Evaluator(args.inception_weights, args.fid_stats, None, *how)
    except errors.UserError as error:
        if named:
            raise
        warn("without rFID and Inception Score: %s", error)
        return None


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device, args.deterministic, args.precision) as device:
        check_same_flags(args, device)
        dataset, tokenizer = distributed.on_all_ranks(lambda: load_inputs(args))
        check_same_inputs({"the folder": dataset}, tokenizer.vae)
        n = args.images_per_class
        chosen = Subset(dataset, first_of_each_class(dataset.samples, n))
        evaluator = make_evaluator(args, len(dataset.classes), len(chosen), device)
        if evaluator is not None:
            warn_if_few(len(chosen), "images")
        kind = "quant" if args.quantizer == "gaussian" else args.quantizer
        bound = "calibrated" if args.quant_calibrate else f"r{args.range}"
        name = "sweep" if args.sweep else f"{kind}_b{args.bits}_{bound}"
        folder = Path(args.output_dir) / f"{name}_n{n}"
        images_to = (
            None if args.sweep else folder
        )  # a sweep has eight reconstructions of each image
        if images_to is not None:
            check_shared(folder)
            distributed.on_rank_0(
                lambda: replace_images(folder, {"images": len(chosen), "args": vars(args)})
            )

        loader = loader_of_all(chosen, device, args)
        distributed.on_all_ranks(lambda: tokenizer.to(device))
        calibration = {}
        if args.quant_calibrate:
            measured = channel_statistics(
                tokenizer, loader, tokenizer.embed_dim, device, args.precision
            )
            calibration = dict(zip(("channel_mean", "channel_std"), measured, strict=True))
        settings = list(TABLE_1) if args.sweep else [Setting(args.bits, args.range)]
        pictures, features, all_stats = reconstruct(
            tokenizer, loader, settings, calibration, evaluator, images_to, args
        )
        results = [stats.figures(len(chosen)) for stats in all_stats]
        if evaluator is not None:
            add_metrics(results, all_stats, features, evaluator)
        if distributed.is_main_process():
            for setting, figures in zip(settings, results, strict=True):
                shown = {"images": figures["images"], **summary(figures)}
                log.info("\n%s", markdown(["", setting.title], list(shown.items())))
            if args.sweep:
                count, classes, size = measured = len(chosen), len(dataset.classes), args.img_size
                text = f"{count} images of {classes} classes in {dataset.root}, {size} pixels"
                text += f", to {args.fid_stats or 'no statistics'}, rounded {args.rounding}"
                write_sweep(results, pictures, folder, text, measured == PAPER_IMAGES)
            else:
                write_picture(folder / "reconstruction.png", pictures)
                made_with = {"seed": args.seed, "args": vars(args), **provenance()}
                write_json(folder / RESULTS, {**results[0], **calibration, **made_with})
            log.info("wrote %s", folder)
        distributed.barrier()


if __name__ == "__main__":
    errors.run(main)
