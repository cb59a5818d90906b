"""Reconstruction by the tokenizer, continuous and quantized (section 4.2; torchrun or plain python)."""

import argparse
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from models.quantizer import GaussianQuantizer
from models.vae import AutoencoderKL
from util import errors, misc
from util.args import Share, add_run_args, add_vae_arg, check_bits, check_positive, make_loader, new_parser
from util.files import write_json
from util.images import empty_of_images, psnr, save_grid, save_png, to_uint8
from util.loader import ImageFolderWithFilename, existing_folder, image_transform

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
    parser.add_argument("--images_per_class", type=int, default=50, help="the first of each class, sorted by name")
    add_run_args(parser, batch_size=16, seed=0, precision="fp32")
    return parser


@lru_cache
def _quantizer(levels: int, min_range: float, max_range: float, std_range: float) -> GaussianQuantizer:
    return GaussianQuantizer(levels, min_range, max_range, std_range)


def post_training_quantize(
    x: Tensor, bits: int, min_range: float, max_range: float, std_range: float = 3.0
) -> tuple[Tensor | None, Tensor]:
    """Latents to levels and back (Eq. 1 to 5).

    Args:
        x: scaled latents, any shape.
        bits: 1 to 9, for 2^bits levels; negative for continuous latents.
        min_range, max_range: clipped to.
        std_range: half-width of the normalized range.

    Returns:
        indices (int64) and dequantized latents (float32), shaped like ``x``; None and ``x`` itself if ``bits < 0``.

    Raises:
        ValueError: bits or ranges outside the above.
    """
    if bits < 0:
        return None, x
    return _quantizer(2**bits, min_range, max_range, std_range).to(x.device)(x)


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


class Tally:
    """Sums over images, and over processes at the end."""

    def __init__(self, channels: int, levels: int, device: torch.device):
        self.sums = {
            name: torch.zeros((), dtype=torch.float64, device=device)
            for name in ("images", "psnr", "elements", "outside", "squared_error")
        }
        self.counts = torch.zeros(channels, levels, dtype=torch.int64, device=device)  # of each level in each channel

    def add(
        self, images: Tensor, recon: Tensor, latents: Tensor, indices: Tensor | None, quantized: Tensor, bound: float
    ):
        """One batch: byte images, scaled latents ``[B, C, h, w]`` and what the quantizer made of them."""
        self.sums["images"] += len(images)
        self.sums["psnr"] += psnr(images, recon).sum()
        self.sums["elements"] += latents.numel()
        self.sums["outside"] += (latents.abs() > bound).sum()
        self.sums["squared_error"] += ((latents - quantized).double() ** 2).sum()
        if indices is not None:
            levels = self.counts.shape[1]
            offset = levels * torch.arange(indices.shape[1], device=indices.device)[:, None, None]
            flat = (indices + offset).flatten()
            self.counts += torch.bincount(flat, minlength=self.counts.numel()).view_as(self.counts)

    def results(self) -> dict[str, float]:
        """The figures, over all processes."""
        world = misc.get_world_size()
        sums = {name: misc.all_reduce_mean(value).item() * world for name, value in self.sums.items()}
        used = (misc.all_reduce_mean(self.counts.double()) > 0).sum(dim=1)
        figures = {
            "images": round(sums["images"]),
            "psnr_db": sums["psnr"] / sums["images"],
            "latent_mse": sums["squared_error"] / sums["elements"],
            "out_of_range_share": sums["outside"] / sums["elements"],
        }
        if self.counts.shape[1]:
            figures |= {"levels": self.counts.shape[1], "levels_used": used.tolist()}
        return figures


def numbered_noise(shape: torch.Size, seed: int, numbers: list[int]) -> Tensor:
    """Standard normal ``[N, *shape]``; each image's follows from ``seed`` and its number alone.

    So results depend neither on the batch size nor on the number of processes.
    """
    generators = [torch.Generator().manual_seed(2**20 * seed + number) for number in numbers]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.no_grad()
def reconstruct(
    vae: AutoencoderKL,
    latent_factor: float,
    loader: DataLoader,
    folder: Path,
    device: torch.device,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Writes ``real/`` and ``recon/`` under ``folder``, and ``reconstruction.png``; returns the figures."""
    tally = Tally(vae.embed_dim, 2**args.bits if args.bits > 0 else 0, device)
    rank, world, done, rows = misc.get_rank(), misc.get_world_size(), 0, []
    with misc.progress(loader, unit="batch", desc="reconstructing") as batches:
        for images, _, _ in batches:
            numbers = [rank + world * (done + i) for i in range(len(images))]  # as Share deals them
            done += len(images)
            images = images.to(device)
            with misc.autocast(device, args.precision):
                posterior = vae.encode(images)
                noise = numbered_noise(posterior.mean.shape[1:], args.seed, numbers).to(device)
                latents = posterior.sample(noise).float() * latent_factor
                indices, quantized = post_training_quantize(latents, args.bits, -args.range, args.range)
                views = {"real": to_uint8(images), "recon": to_uint8(vae.decode(quantized / latent_factor))}
                missing = PICTURE_ROWS - len(rows) if misc.is_main_process() else 0
                if missing > 0:
                    continuous = to_uint8(vae.decode(latents[:missing] / latent_factor))
                    picture = [views["real"][:missing], continuous, views["recon"][:missing]]
                    rows += torch.stack(picture[: 2 if args.bits < 0 else 3], dim=1)  # [rows, views, 3, H, W]
            tally.add(views["real"], views["recon"], latents, indices, quantized, args.range)
            for name, pictures in views.items():
                for number, image in zip(numbers, pictures, strict=True):
                    save_png(image, folder / name / f"{number:05d}.png")
    if misc.is_main_process():
        titles = ["original", "continuous"] + [f"{2**args.bits} levels"] * (args.bits > 0)
        save_grid(torch.cat(rows), folder / "reconstruction.png", columns=len(titles), titles=titles, min_size=96)
    return tally.results()


def report(figures: dict, args: argparse.Namespace) -> str:
    """The figures as a few lines for the terminal."""
    kind = "continuous latents" if args.bits < 0 else f"{figures['levels']} levels"
    lines = [
        f"{figures['images']} images, {kind}",
        f"PSNR                 {figures['psnr_db']:.2f} dB",
        f"latent squared error {figures['latent_mse']:.6f}",
        f"outside +-{args.range:g}         {figures['out_of_range_share']:.4%} of latent values",
    ]
    if "levels_used" in figures:
        used = figures["levels_used"]
        lines.append(f"levels used          {min(used)} to {max(used)} of {figures['levels']}, by channel")
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with misc.processes(args.device) as device:
        check_bits(args.bits, "--bits", continuous=True)
        check_positive(args, "range", "images_per_class", "img_size", "batch_size")
        image_dir = existing_folder(args.image_dir, "image folder")
        root = image_dir / "train" if (image_dir / "train").is_dir() else image_dir
        dataset = ImageFolderWithFilename(root, image_transform(args.img_size))
        chosen = first_of_each_class(dataset, args.images_per_class)
        vae, latent_factor = AutoencoderKL.from_pretrained(args.vae_path)
        misc.check_stride(args.img_size, vae.stride)
        loader = make_loader(chosen, args, device, sampler=Share(len(chosen), misc.get_rank(), misc.get_world_size()))
        folder = Path(args.output_dir) / f"quant_b{args.bits}_r{args.range}_n{args.images_per_class}"
        for part in ("real", "recon"):
            empty_of_images(folder / part)
        figures = reconstruct(vae.to(device), latent_factor, loader, folder, device, args)
        misc.barrier()
        if misc.is_main_process():
            write_json(folder / "results.json", {**vars(args), **figures})
            misc.log.info("%s\nwrote %s", report(figures, args), folder)


if __name__ == "__main__":
    errors.run(main)
