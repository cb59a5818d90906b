"""Reconstruction by the tokenizer, continuous and quantized (section 4.2; torchrun or plain python)."""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from engine_tokenbridge import channel_statistics
from models.quantizer import QUANTIZERS, ScalarQuantizer, calibrated_bounds
from models.vae import AutoencoderKL
from util import errors, misc
from util.args import add_quantizer_args, add_run_args, add_vae_arg, check_bits, check_positive, new_parser
from util.config import check_stride
from util.datasets import loader_of_all
from util.files import write_json
from util.images import empty_of_images, psnr, save_grid, save_png, ssim, to_uint8
from util.loader import ImageFolderWithFilename, existing_folder, image_transform
from util.metrics import (
    Evaluator,
    compute_metrics,
    frechet_distance,
    gather_features,
    provenance,
    statistics,
    warn_if_few,
)
from util.rng import numbered_draws
from util.tables import markdown, write_text

PICTURE_ROWS = 8


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = new_parser(__doc__)
    add_vae_arg(parser)
    parser.add_argument(
        "--image_dir", default="./data/imagenet/train", help="folder of class folders, or one that holds train/"
    )
    parser.add_argument(
        "--output_dir", default="quantization_results", help="results go to a folder of their own in it"
    )
    parser.add_argument("--img_size", type=int, default=256, help="height and width of the images in pixels")
    parser.add_argument("--bits", type=int, default=6, help="2^bits levels a channel; -1 for continuous latents")
    parser.add_argument("--range", type=float, default=5.0, help="latents are clipped to [-range, range]")
    add_quantizer_args(parser, default="gaussian")
    parser.add_argument("--images_per_class", type=int, default=50, help="the first of each class, sorted by name")
    parser.add_argument("--sweep", action="store_true", help="the paper's Table 1: all its levels and ranges")
    parser.add_argument("--fid_stats", help=".npz with mu and sigma of the reference, for rFID against it")
    parser.add_argument("--inception_weights", help="torch-fidelity's Inception; by default where it is downloaded to")
    parser.add_argument("--no_metrics", action="store_true", help="without rFID and Inception Score")
    add_run_args(parser, batch_size=16, seed=0, precision="fp32")
    return parser


@lru_cache
def _quantizer(kind: str, *options) -> ScalarQuantizer:
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
    """Latents to levels and back (Eq. 1 to 5).

    Args:
        x: scaled latents, any shape; with channels' statistics ``[B, C, h, w]``.
        bits: 1 to 9, for 2^bits levels; negative for continuous latents.
        min_range, max_range: clipped to.
        std_range: half-width of the normalized range.
        quantizer: ``"gaussian"`` or ``"linear"``.
        channel_mean, channel_std: calibrate each channel, in place of the bounds.

    Returns:
        indices (int64) and dequantized latents (float32), shaped like ``x``; None and ``x`` itself if ``bits < 0``.

    Raises:
        ValueError: bits, ranges or statistics outside the above.
    """
    if bits < 0:
        return None, x
    channels = [None if values is None else tuple(values) for values in (channel_mean, channel_std)]
    levels = _quantizer(quantizer, 2**bits, min_range, max_range, std_range, *channels).to(x.device)
    if not levels.calibrated:
        return levels(x)
    indices, quantized = levels(x.movedim(1, -1))  # its channels come last
    return indices.movedim(-1, 1), quantized.movedim(-1, 1)


# --------------------------------------------------------------------------------------------------------------------
# The script.


def first_of_each_class(dataset: ImageFolderWithFilename, images_per_class: int) -> Subset:
    """The first images of each class, in the data set's sorted order."""
    seen: dict[int, int] = {}
    chosen = []
    for index, label in enumerate(dataset.targets):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= images_per_class:
            chosen.append(index)
    return Subset(dataset, chosen)


class Setting(NamedTuple):
    """One quantizer: its bits (-1 for none) and range."""

    bits: int
    range: float

    @property
    def levels(self) -> int:
        """Levels a channel, 0 for continuous latents."""
        return 2**self.bits if self.bits > 0 else 0

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.levels} levels, range {self.range:g}" if self.levels else "continuous"


#: The paper's Table 1: rFID and Inception Score of each setting.
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
#: Figure 5 compares tokenizers, Figure 6 levels; after the original.
FIGURE_5 = [Setting(-1, 5.0), Setting(6, 5.0)]
FIGURE_6 = [Setting(6, 5.0), Setting(5, 5.0), Setting(4, 5.0), Setting(3, 5.0)]


class ReconstructionStats:
    """What one setting does to images and latents: sums over images, and over processes at the end."""

    def __init__(self, setting: Setting, channels: int, device: torch.device):
        self.setting = setting
        names = ("images", "psnr", "ssim", "elements", "outside", "squared_error")
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
        self.counts = torch.zeros(channels, setting.levels, dtype=torch.int64, device=device)
        self.features: list[tuple[Tensor, ...]] = []  # Inception's, of the reconstructions

    def add(
        self,
        real: Tensor,
        recon: Tensor,
        latents: Tensor,
        indices: Tensor | None,
        quantized: Tensor,
        outside: Tensor,
    ) -> None:
        """One batch: byte images, scaled latents ``[B, C, h, w]``, what the quantizer makes of them and clips."""
        self.sums["images"] += len(real)
        self.sums["psnr"] += psnr(real, recon).sum()
        self.sums["ssim"] += ssim(real, recon).sum()
        self.sums["elements"] += latents.numel()
        self.sums["outside"] += outside.sum()
        self.sums["squared_error"] += ((latents - quantized).double() ** 2).sum()
        if indices is not None:
            levels = self.setting.levels
            offset = levels * torch.arange(indices.shape[1], device=indices.device)[:, None, None]
            flat = (indices + offset).flatten()
            self.counts += torch.bincount(flat, minlength=self.counts.numel()).view_as(self.counts)

    def results(self) -> dict[str, Any]:
        """The figures, over all processes."""
        world = misc.get_world_size()
        sums = {name: misc.all_reduce_mean(value).item() * world for name, value in self.sums.items()}
        figures = {
            "images": round(sums["images"]),
            "psnr_db": sums["psnr"] / sums["images"],
            "ssim": sums["ssim"] / sums["images"],
            "latent_mse": sums["squared_error"] / sums["elements"],
            "out_of_range_share": sums["outside"] / sums["elements"],
        }
        if self.setting.levels:
            share = misc.all_reduce_mean(self.counts.double())
            share = share / share.sum(dim=1, keepdim=True)
            figures |= {
                "levels": self.setting.levels,
                "levels_used": (share > 0).sum(dim=1).tolist(),
                "entropy_bits": torch.special.entr(share).sum(dim=1).div(math.log(2)).tolist(),
            }
        return figures


@torch.no_grad()
def reconstruct(
    vae: AutoencoderKL,
    latent_factor: float,
    loader: DataLoader,
    settings: Sequence[Setting],
    evaluator: Evaluator | None,
    save: Callable[[str, int, Tensor], None],
    device: torch.device,
    args: argparse.Namespace,
    calibration: dict[str, list[float]],
) -> tuple[dict[str, list[Tensor]], list[tuple[Tensor, ...]], list[ReconstructionStats]]:
    """Reconstructs this process's images under every setting, from one posterior sample of each.

    Args:
        save: takes ``"real"`` or ``"recon"``, an image's number, and the image.
        calibration: ``channel_mean`` and ``channel_std``, or nothing.

    Returns:
        some pictures to show by title (the original, the continuous reconstruction, every setting's), Inception's
        features of all originals, and the settings' stats_of_settings.
    """
    stats_of_settings = [ReconstructionStats(setting, vae.embed_dim, device) for setting in settings]
    rank, world, done = misc.get_rank(), misc.get_world_size(), 0
    share = len(loader.sampler)  # shown are the main process's images, evenly spaced
    shown = {rank + world * (i * share // PICTURE_ROWS) for i in range(PICTURE_ROWS)}
    pictures = {title: [] for title in ("original", "continuous", *(setting.title for setting in settings))}
    features = []
    with misc.progress(loader, unit="batch", desc="reconstructing") as batches:
        for images, _, _ in batches:
            numbers = [rank + world * (done + i) for i in range(len(images))]  # as RankSampler deals them
            picked = [i for i, number in enumerate(numbers) if number in shown]
            done += len(images)
            images = images.to(device)
            real = to_uint8(images)
            pictures["original"] += real[picked].cpu()
            features += [] if evaluator is None else [evaluator.inception(real)]
            for number, image in zip(numbers, real, strict=True):
                save("real", number, image)
            with misc.autocast(device, args.precision):
                posterior = vae.encode(images)
                noise = numbered_draws(args.seed, numbers).normal(*posterior.mean.shape[1:]).to(device)
                latents = posterior.sample(noise).float() * latent_factor
                if picked and all(setting.levels for setting in settings):
                    pictures["continuous"] += to_uint8(vae.decode(latents[picked] / latent_factor)).cpu()
            for stats in stats_of_settings:
                bits, bound = stats.setting
                low, high = -bound, bound
                if calibration:
                    low, high = (b.to(device)[:, None, None] for b in calibrated_bounds(**calibration, std_range=3.0))
                options = {"quantizer": args.quantizer, **calibration}
                indices, quantized = post_training_quantize(latents, bits, -bound, bound, **options)
                with misc.autocast(device, args.precision):
                    recon = to_uint8(vae.decode(quantized / latent_factor))
                stats.add(real, recon, latents, indices, quantized, (latents < low) | (latents > high))
                stats.features += [] if evaluator is None else [evaluator.inception(recon)]
                pictures[stats.setting.title] += recon[picked].cpu()
                for number, image in zip(numbers, recon, strict=True):
                    save("recon", number, image)
    return pictures, features, stats_of_settings


def measure(
    stats: ReconstructionStats, evaluator: Evaluator | None, real: dict[str, Any] | None, total: int
) -> dict[str, Any]:
    """A setting's figures; with an evaluator also rFID against ``--fid_stats`` and the originals, and Inception Score.

    Args:
        real: statistics of the originals, on the main process.
    """
    figures = {"bits": stats.setting.bits, "range": stats.setting.range, **stats.results()}
    if evaluator is not None:
        recon = gather_features(stats.features, total, evaluator.device)
        if misc.is_main_process():
            figures |= compute_metrics(recon, evaluator.stats)
            to_originals = frechet_distance(statistics(recon), real)
            figures["frechet_inception_distance_to_originals"] = to_originals
    return figures


# --------------------------------------------------------------------------------------------------------------------
# Results.

ROWS = {
    "frechet_inception_distance": "rFID, to the statistics",
    "frechet_inception_distance_to_originals": "rFID, to the originals",
    "inception_score_mean": "Inception Score",
    "psnr_db": "PSNR (dB)",
    "ssim": "SSIM",
    "latent_mse": "latent mean squared error",
    "out_of_range_share": "latents out of range",
    "levels_used": "levels used, least to most by channel",
    "entropy_bits": "entropy (bits), least to most by channel",
}


def summary(figures: dict[str, Any]) -> dict[str, str | float]:
    """Figures by title; those of each channel as least to most."""
    shown = {title: figures[name] for name, title in ROWS.items() if name in figures}
    return {t: f"{min(v):.4g} to {max(v):.4g}" if isinstance(v, list) else v for t, v in shown.items()}


def report(setting: Setting, figures: dict[str, Any]) -> str:
    """A setting's figures as lines for the terminal."""
    lines = [f"{figures['images']} images, {setting.title}"]
    for title, value in summary(figures).items():
        lines.append(f"{title:<42}{value if isinstance(value, str) else f'{value:.5g}':>16}")
    return "\n".join(lines)


def write_sweep(
    results: list[dict[str, Any]],
    pictures: dict[str, list[Tensor]],
    stats_of_settings: list[ReconstructionStats],
    folder: Path,
) -> None:
    """Table 1 beside the paper's figures, as Markdown and JSON, and the pictures of Figures 5 and 6."""
    titles = [title for name, title in ROWS.items() if any(name in figures for figures in results)]
    rows = []
    for stats, figures in zip(stats_of_settings, results, strict=True):
        values = summary(figures)
        rows.append([stats.setting.title, *TABLE_1[stats.setting], *(values.get(title) for title in titles)])
        figures |= dict(zip(("paper_rfid", "paper_inception_score"), TABLE_1[stats.setting], strict=True))
    header = ["tokenizer", "paper: rFID", "paper: Inception Score", *titles]
    write_text(folder / "table1.md", markdown(header, rows))
    write_json(folder / "table1.json", {"rows": results, **provenance()})
    for name, settings in {"figure5.png": FIGURE_5, "figure6.png": FIGURE_6}.items():
        titles = ["original", *(setting.title for setting in settings)]
        write_picture(folder / name, {title: pictures[title] for title in titles})


def write_picture(path: Path, pictures: dict[str, list[Tensor]]) -> None:
    """Views of the same images side by side, one title a column."""
    rows = [torch.stack(views) for views in zip(*pictures.values(), strict=True)]
    save_grid(torch.cat(rows), path, columns=len(pictures), titles=list(pictures), min_size=128)


def make_evaluator(args: argparse.Namespace, device: torch.device) -> Evaluator | None:
    """What rFID and Inception Score need; None without Inception's weights, where nobody asked for them by flag.

    Raises:
        UserError: something asked for is missing.
    """
    if args.no_metrics:
        return None
    try:
        return Evaluator(args.inception_weights, args.fid_stats, None, device, args.batch_size, args.num_workers)
    except errors.UserError as error:
        if args.fid_stats or args.inception_weights:
            raise
        misc.log.warning("without rFID and Inception Score: %s", error)
        return None


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with misc.processes(args.device) as device:
        check_bits(args.bits, "--bits", continuous=True)
        check_positive(args, "range", "images_per_class", "img_size", "batch_size")
        if args.sweep and (args.quantizer != "gaussian" or args.quant_calibrate):
            raise errors.UserError("--sweep is Table 1, Gaussian levels on given ranges: leave out the other flags")
        image_dir = existing_folder(args.image_dir, "image folder")
        root = image_dir / "train" if (image_dir / "train").is_dir() else image_dir
        dataset = ImageFolderWithFilename(root, image_transform(args.img_size))
        chosen = first_of_each_class(dataset, args.images_per_class)
        vae, latent_factor = AutoencoderKL.from_pretrained(args.vae_path)
        check_stride(args.img_size, vae.stride)
        evaluator = make_evaluator(args, device)
        if evaluator is not None:
            warn_if_few(len(chosen), "images")

        settings = list(TABLE_1) if args.sweep else [Setting(args.bits, args.range)]
        name = f"sweep_n{args.images_per_class}"
        if not args.sweep:
            bound = "calibrated" if args.quant_calibrate else f"r{args.range}"
            kind = "quant" if args.quantizer == "gaussian" else args.quantizer
            name = f"{kind}_b{args.bits}_{bound}_n{args.images_per_class}"
        folder = Path(args.output_dir) / name
        for part in ("", "real", "recon"):
            empty_of_images(folder / part)

        def save(part: str, number: int, image: Tensor) -> None:
            if not args.sweep:  # a sweep has eight reconstructions of each image
                save_png(image, folder / part / f"{number:05d}.png")

        loader = loader_of_all(chosen, device, args)
        vae, calibration = vae.to(device), {}
        if args.quant_calibrate:
            measured = channel_statistics(vae, loader, vae.embed_dim, latent_factor, device, args.precision)
            calibration = dict(zip(("channel_mean", "channel_std"), measured, strict=True))
        pictures, features, stats_of_settings = reconstruct(
            vae, latent_factor, loader, settings, evaluator, save, device, args, calibration
        )
        real = None
        if evaluator is not None:
            gathered = gather_features(features, len(chosen), device)
            real = statistics(gathered) if misc.is_main_process() else None
        results = [measure(stats, evaluator, real, len(chosen)) for stats in stats_of_settings]
        if misc.is_main_process():
            for stats, figures in zip(stats_of_settings, results, strict=True):
                misc.log.info("%s\n", report(stats.setting, figures))
            if args.sweep:
                write_sweep(results, pictures, stats_of_settings, folder)
            else:
                write_picture(folder / "reconstruction.png", pictures)
                write_json(
                    folder / "results.json",
                    {**results[0], **calibration, "seed": args.seed, "args": vars(args), **provenance()},
                )
            misc.log.info("wrote %s", folder)
        misc.barrier()


if __name__ == "__main__":
    errors.run(main)
