"""Train a small KL tokenizer on a folder of images (torchrun or plain python)."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import util.interpreter  # noqa: F401, before all packages

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from engine_tokenbridge import Trainer, channel_statistics, train
from models.tokenizer import CachedMoments
from models.vae import AutoencoderKL
from models.vae_losses import VAELosses, perceptual_distance
from tools.channel_order import energies, low_frequencies, low_shares
from util import distributed, errors
from util.args import (
    DATA_PATH,
    add_column_args,
    add_mirror_arg,
    add_run_args,
    add_skip_arg,
    add_training_args,
    check_positive,
    check_range,
    check_same_flags,
    new_parser,
)
from util.checkpoint.runs import (
    check_folder_is_free,
    check_newest_checkpoint,
    find_checkpoint_to_resume,
    read_newest_checkpoint,
)
from util.checkpoint.vae_files import save_vae
from util.config import check_stride
from util.dashboards import RunLog, check_dashboard
from util.data.datasets import BadImages, ImageFolder, image_transform
from util.data.images import psnr, to_uint8
from util.data.loaders import check_same_inputs, evenly_spaced, loader_of_all, training_loader
from util.data.sources import NO_LABELS, NoSplit, open_images
from util.files import remove_parts, write_json
from util.log import log, warn
from util.precision import autocast, check_finite, double, extremes
from util.process_group import process_group
from util.provenance import provenance
from util.rng import seed_everything
from util.signals import StopSignals
from util.training_settings import TrainingSettings
from util.training_state import TrainingState

VAE_NAME = "vae.ckpt"  # the exported tokenizer
STATE_NAME = "vae-last.pth"  # the checkpoint of the run
METRICS_NAME = "vae.json"  # metrics of the exported tokenizer
SHOWN_IMAGES = 8  # images that TensorBoard shows, from each rank's first batch
MEASURED_IMAGES = 256  # images that reconstructions are measured on, at most, evenly spaced
LATENT_IMAGES = 10_000  # images that latents are measured on, at most, evenly spaced
LOW_FREQUENCIES = 0.5  # frequencies up to this fraction of the Nyquist frequency are low

# --------------------------------------------------------------------------------------------------
# Command line


def add_vae_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of losses and training."""
    loss = parser.add_argument_group("losses, in addition to the absolute error of weight 1")
    loss.add_argument(
        "--kl_weight",
        type=float,
        default=1e-6,
        help="weight of the KL divergence of an image, in nats",
    )
    loss.add_argument(
        "--perceptual_weight",
        type=float,
        default=0.0,
        help="weight of the distance between VGG-16 features",
    )
    loss.add_argument(
        "--vgg_weights",
        help="file of torchvision's VGG-16; by default the one in the cache of torch.hub",
    )
    loss.add_argument(
        "--disc_weight", type=float, default=0.0, help="weight of the patch discriminator's loss"
    )
    loss.add_argument(
        "--disc_start", type=int, default=0, help="step at which the discriminator starts"
    )
    train = parser.add_argument_group("training")
    train.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    train.add_argument(
        "--no_ema",
        action="store_true",
        help="measure and export the trained weights instead of their EMA",
    )
    defaults = {"epochs": 100, "warmup_epochs": 1.0, "ema_rate": 0.999, "eval_freq": 1}
    without = ("weight_decay", "compile", "start_epoch")
    add_training_args(train, TrainingSettings, without, **defaults)


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--data_path", default="./data/imagenet", help=DATA_PATH)
    parser.add_argument(
        "--img_size", type=int, default=256, help="height and width of the images in pixels"
    )
    parser.add_argument(
        "--output_dir",
        default="./output_dir",
        help=f"folder of {VAE_NAME}, checkpoints and TensorBoard logs",
    )
    parser.add_argument(
        "--resume", default="", help=f"{STATE_NAME} to continue from, or its folder"
    )
    parser.add_argument("--vae_embed_dim", type=int, default=16, help="latent channels")
    parser.add_argument("--ch", type=int, default=128, help="base width")
    parser.add_argument(
        "--ch_mult",
        type=int,
        nargs="+",
        default=[1, 1, 2, 2, 4],
        help="width of each resolution in units of --ch; each but the last halves the image",
    )
    parser.add_argument(
        "--num_res_blocks", type=int, default=2, help="residual blocks per resolution"
    )
    add_vae_training_flags(parser)
    add_mirror_arg(parser)
    add_skip_arg(parser)
    add_column_args(parser)
    add_run_args(parser, batch_size=16, seed=1, precision="bf16")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for impossible flags, before files are read or written."""
    check_positive(
        args, "img_size", "batch_size", "vae_embed_dim", "ch", "epochs", "num_res_blocks", "lr"
    )
    check_positive(args, "accum_iter", "save_last_freq", "eval_freq", "keep_last")
    check_range(args, 0, 1, "ema_rate")
    weights = ("kl_weight", "perceptual_weight", "disc_weight", "disc_start", "grad_clip", "min_lr")
    check_range(args, 0, math.inf, *weights)
    counts = (
        "warmup_epochs",
        "save_every_steps",
        "keep_every",
        "max_bad_steps",
        "num_workers",
        "seed",
    )
    check_range(args, 0, math.inf, *counts)
    check_dashboard(args.log)
    check_stride(args.img_size, 2 ** (len(args.ch_mult) - 1))
    if args.disc_weight > 0 and args.img_size < 16:
        raise errors.UserError(
            "--disc_weight needs images of 16 pixels or more: "
            "lower --disc_weight to 0, or raise --img_size"
        )


# --------------------------------------------------------------------------------------------------
# Checkpoint, images and losses


def open_vae_checkpoint(args: argparse.Namespace) -> tuple[dict, Path | None]:
    """Return content and path of the checkpoint that ``--resume`` names.

    Only rank 0 reads it: the content is empty on other ranks. A fresh start has no content and no
    path.

    Raises:
        UserError: the checkpoint is missing or damaged, or ``--output_dir`` holds another run.
    """
    content: dict = {}

    def read() -> Path | None:
        for name in (STATE_NAME, VAE_NAME):
            check_folder_is_free(args.output_dir, args.resume, name)
        if not args.resume:
            return None
        path = find_checkpoint_to_resume(args.resume, args.output_dir, (STATE_NAME,))
        if path is not None:
            checkpoint, path = read_newest_checkpoint(path)
            content.update(checkpoint)
        return path

    if args.resume:
        check_newest_checkpoint(args.resume, (STATE_NAME,))
    return content, distributed.on_rank_0(read)


def load_images(args: argparse.Namespace) -> tuple[ImageFolder, ImageFolder]:
    """Return the training images, and the images that reconstructions are measured on.

    The latter are those of ``val``, or unmirrored training images if there is no ``val``.

    Raises:
        UserError: there are no training images.
    """
    transform = image_transform(args.img_size)
    bad_images = BadImages(None if args.dry_run else args.output_dir, args.skip_bad_images)
    label_column = args.label_column or NO_LABELS  # a tokenizer learns no classes
    source = open_images(args.data_path, "train", args.image_column, label_column)
    training = ImageFolder(source, transform, mirror=args.mirror, bad_images=bad_images)
    try:
        source = open_images(args.data_path, "val", args.image_column, label_column)
    except NoSplit:
        log.info(
            "no val images in %s: reconstructions are measured on training images", args.data_path
        )
    return training, ImageFolder(source, transform, bad_images=bad_images)


def build_losses(args: argparse.Namespace, device: torch.device) -> VAELosses:
    """Return the randomly initialized tokenizer with its losses, on ``device``.

    Raises:
        UserError: sizes do not fit each other, or the weights of VGG-16 are missing.
    """
    perceptual = None
    if args.perceptual_weight > 0:
        perceptual = distributed.on_all_ranks(lambda: perceptual_distance(args.vgg_weights, device))
    vae = AutoencoderKL(
        args.vae_embed_dim, args.ch_mult, ch=args.ch, num_res_blocks=args.num_res_blocks
    )
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    log.info("tokenizer: stride %d, %.2fM parameters", vae.stride, parameters / 1e6)
    losses = VAELosses(
        vae,
        args.img_size,
        args.kl_weight,
        perceptual,
        args.perceptual_weight,
        args.disc_weight,
        args.disc_start,
    )
    return distributed.on_all_ranks(lambda: losses.to(device))


def resume(state: TrainingState, content: dict, path: Path) -> None:
    """Load a checkpoint into ``state``, and empty ``content``.

    Raises:
        UserError: it is damaged, or of another tokenizer than the flags describe.
    """

    def check_config() -> None:
        stored = content.get("config", {})
        differences = [
            f"{name} is {stored.get(name)} in the checkpoint, {value} in this run"
            for name, value in state.model.config.items()
            if stored.get(name) != value
        ]
        if differences:
            raise errors.UserError(
                f"{path} is not of the run that the flags describe: {'; '.join(differences)}"
            )

    distributed.on_rank_0(check_config)
    state.load(content, path)
    content.clear()


# --------------------------------------------------------------------------------------------------
# Measure reconstructions and latents


@torch.no_grad()
def measure_reconstructions(
    vae: AutoencoderKL, loader: DataLoader, device: torch.device, precision: str
) -> tuple[float, Tensor]:
    """Measure the reconstructions of the loader's images, from the mode of the posterior.

    Returns:
        the mean PSNR over all ranks in dB; and a grid (uint8 ``[3, H, W]``) of this rank's first
        images above their reconstructions.

    Raises:
        NotFinite: encoder or decoder overflows.
    """
    from torchvision.utils import make_grid  # loads torch._dynamo, which --help must not

    # PSNR, images, extremes of latents, extremes of pixels
    sums = double(torch.zeros(6, device=device))
    rows: list[Tensor] = []
    for images, _ in loader:
        with autocast(device, precision):
            latents = vae.encode(images.to(device)).mode()
            decoded = vae.decode(latents)
        original = to_uint8(images.to(device))
        recon = to_uint8(decoded)
        ratios = psnr(original, recon).clamp(max=100.0)  # equal images have an infinite PSNR
        counted = torch.stack([ratios.sum(), torch.ones_like(ratios).sum()])
        sums += torch.cat([counted, extremes(latents), extremes(decoded)])
        rows = rows or [original[:SHOWN_IMAGES].cpu(), recon[:SHOWN_IMAGES].cpu()]
    means = distributed.all_reduce_mean(sums).cpu()

    def check() -> None:
        check_finite(means[2:4], "the tokenizer's encoder", precision)
        check_finite(means[4:], "the tokenizer's decoder", precision)

    distributed.on_rank_0(check)
    total, count = means[:2].tolist()
    grid = torch.zeros(3, 1, 1).byte()  # for a rank without images
    if rows:
        grid = make_grid(torch.cat(rows), nrow=len(rows[0]), padding=2)
    return total / count, grid


@torch.no_grad()
def measure_latents(
    vae: AutoencoderKL, loader: DataLoader, images: int, side: int, device: torch.device
) -> dict:
    """Return statistics of the latents of ``images`` images, summed over all ranks.

    Args:
        loader: yields this rank's images, and labels.
        images: number of images of all ranks.
        side: rows and columns of the latents.

    Returns:
        ``latent_factor``: the factor that gives latents unit std over all channels;
        ``channel_deviations``: the std of each channel, with that factor;
        ``low_frequency_shares``: share of each channel's energy at frequencies up to half of the
        Nyquist frequency, or None for latents of fewer than 4x4 positions; and ``images``.
    """
    low = low_frequencies(side, side, LOW_FREQUENCIES)
    sums = double(torch.zeros(4, vae.embed_dim, device=device))

    def moments() -> Iterator[tuple[Tensor]]:
        for batch, _ in loader:
            posterior = vae.encode(batch.to(device))
            sums.add_(energies(posterior.mode(), low))
            yield (posterior.parameters,)

    unscaled = CachedMoments(1.0)
    means, stds = channel_statistics(unscaled, moments(), vae.embed_dim, device, "fp32")
    mean = torch.tensor(means, dtype=torch.float64)
    std = torch.tensor(stds, dtype=torch.float64)
    # Variance over all channels: mean square minus squared mean
    factor = 1 / ((std**2 + mean**2).mean() - mean.mean() ** 2).sqrt().item()
    totals = distributed.all_reduce_mean(sums).cpu() * distributed.get_world_size()
    return {
        "latent_factor": factor,
        "channel_deviations": (factor * std).tolist(),
        "low_frequency_shares": low_shares(totals, images).tolist() if side >= 4 else None,
        "images": images,
    }


# --------------------------------------------------------------------------------------------------
# Train and export


def train_vae(
    losses: VAELosses,
    loader: DataLoader,
    measured: DataLoader,
    start: tuple[dict, Path | None],
    args: argparse.Namespace,
) -> AutoencoderKL:
    """Train from the epoch and step of ``start``, saving and measuring.

    Args:
        loader: yields training images.
        measured: yields the images that reconstructions are measured on.
        start: content and path of a checkpoint (:func:`open_vae_checkpoint`).

    Returns:
        the VAE to export: the EMA, or the trained weights with ``--no_ema``.
    """
    if distributed.is_main_process() and not args.dry_run:
        remove_parts(Path(args.output_dir).glob(".*.part"))
    trainer = Trainer(
        losses,
        TrainingSettings.from_args(args),
        loader,
        checkpoint_name=STATE_NAME,
        parts=losses.optimizer_parts(),
        log_dir=Path(args.output_dir) / "tokenizer_log",
    )
    state = trainer.state
    content, path = start
    if path is not None:
        resume(state, content, path)
    if distributed.get_world_size() > 2:
        trainer.order_gradients((args.batch_size, 3, args.img_size, args.img_size))
        losses.read_metrics()
    # Only now, because the order of gradients must not depend on --disc_start
    losses.steps_done = lambda: state.steps_done
    vae = (losses if args.no_ema else state.ema_model).vae

    def measure(epoch: int, writer: RunLog | None, _: StopSignals) -> None:
        # Mean losses since the last measurement
        mean_losses = losses.read_metrics()
        scalars: dict[str, float] = {}
        if mean_losses:
            means = distributed.all_reduce_mean(torch.stack([*mean_losses.values()])).tolist()
            scalars = dict(zip(mean_losses, means, strict=True))

        # Reconstructions
        grid = None
        try:
            scalars["psnr"], grid = measure_reconstructions(
                vae, measured, state.device, args.precision
            )
            log.info("epoch %d: PSNR %.2f dB", epoch, scalars["psnr"])
        except errors.NotFinite as error:
            warn("NOT MEASURED after epoch %d: %s. Training continues", epoch, error)

        if writer is not None:
            tagged = {f"tokenizer/{name}": value for name, value in scalars.items()}
            writer.add_scalars(tagged, state.steps_done)
            if grid is not None:
                picture = grid.permute(1, 2, 0).numpy()
                title = "tokenizer/originals over reconstructions"
                writer.add_image(title, picture, state.steps_done)

    train(trainer, measure)
    return vae


def export_vae(vae: AutoencoderKL, metrics: dict, output_dir: Path) -> None:
    """Write the tokenizer and its ``metrics``, on rank 0; log the metrics.

    Raises:
        UserError: a file cannot be written, for example because the disk is full.
    """

    def write() -> None:
        save_vae(output_dir / VAE_NAME, vae, metrics["latent_factor"])
        write_json(output_dir / METRICS_NAME, {**metrics, **provenance()})

    distributed.on_rank_0(write)
    for name, title in (
        ("channel_deviations", "standard deviations of channels"),
        ("low_frequency_shares", "low-frequency shares of channels"),
    ):
        log.info("%s: %s", title, " ".join(f"{value:.2f}" for value in metrics[name] or ()))
    log.info(
        "PSNR %.2f dB, latent factor %.4f; wrote %s",
        *(metrics["psnr"], metrics["latent_factor"], output_dir / VAE_NAME),
    )


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device, args.deterministic, args.precision) as device:
        check_same_flags(args, device)
        distributed.on_all_ranks(lambda: check_args(args))
        start = open_vae_checkpoint(args)

        # Data
        seed_everything(args.seed + distributed.get_rank())
        images, held_out = distributed.on_all_ranks(lambda: load_images(args))
        check_same_inputs({"train": images, "val": held_out}, None)
        loader = distributed.on_all_ranks(lambda: training_loader(images, device, args))
        measured = loader_of_all(
            evenly_spaced(held_out, MEASURED_IMAGES), device, args, persistent_workers=False
        )

        # Train
        vae = train_vae(build_losses(args, device), loader, measured, start, args)
        if args.dry_run:
            return

        # Measure and export
        ratio, _ = measure_reconstructions(vae, measured, device, args.precision)
        images.set_draws(args.seed, 0)
        latent_images = evenly_spaced(images, LATENT_IMAGES)
        latent_loader = loader_of_all(latent_images, device, args, persistent_workers=False)
        side = args.img_size // vae.stride
        statistics = measure_latents(vae, latent_loader, len(latent_images), side, device)
        metrics = {"psnr": ratio, "psnr_of": Path(held_out.root).name, **statistics}
        export_vae(vae, metrics, Path(args.output_dir))


if __name__ == "__main__":
    errors.run(main)
