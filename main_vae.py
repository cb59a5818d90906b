"""Trains a small KL tokenizer on a folder of images (torchrun or plain python)."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from engine_tokenbridge import Trainer, channel_statistics, train
from models.tokenizer import CachedMoments
from models.vae import AutoencoderKL
from models.vae_losses import VAELosses, perceptual_distance
from tools.channel_order import energies, low_frequencies, low_shares
from util import distributed, errors
from util.args import (
    DATA_PATH,
    add_column_args,
    add_dry_run_arg,
    add_ema_args,
    add_mirror_arg,
    add_run_args,
    add_skip_arg,
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
from util.training_state import TrainingSettings, TrainingState

#: The result; what an interrupted run goes on from; what is measured of the result.
VAE_NAME, STATE_NAME, FIGURES_NAME = "vae.ckpt", "vae-last.pth", "vae.json"
SHOWN_IMAGES, MEASURED_IMAGES, LATENT_IMAGES = 8, 256, 10_000  # at most, evenly spaced
LOW_FREQUENCIES = 0.5  # up to this share of Nyquist's

# --------------------------------------------------------------------------------------------------------------------
# The command line.


def add_training_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of losses and training."""
    loss = parser.add_argument_group("losses, for an absolute error of weight 1")
    loss.add_argument(
        "--kl_weight", type=float, default=1e-6, help="of the KL divergence of an image, in nats"
    )
    loss.add_argument(
        "--perceptual_weight", type=float, default=0.0, help="of the distance in VGG-16's features"
    )
    loss.add_argument(
        "--vgg_weights", help="torchvision's VGG-16; by default where torch's hub keeps it"
    )
    loss.add_argument(
        "--disc_weight", type=float, default=0.0, help="of a discriminator of patches"
    )
    loss.add_argument(
        "--disc_start", type=int, default=0, help="step from which on there is a discriminator"
    )
    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=int, default=100, help="passes over the training images")
    train.add_argument(
        "--accum_iter", type=int, default=1, help="batches whose gradients make one step"
    )
    train.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    train.add_argument("--min_lr", type=float, default=0.0, help="learning rate at the end")
    text = "epochs over which the learning rate rises from 0"
    train.add_argument("--warmup_epochs", type=float, default=1.0, help=text)
    text = "learning rate after the warm-up: half a cosine down to --min_lr, or --lr throughout"
    train.add_argument("--lr_schedule", choices=["cosine", "constant"], default="cosine", help=text)
    train.add_argument(
        "--grad_clip", type=float, default=1.0, help="largest gradient norm; 0 for no limit"
    )
    add_ema_args(train, 0.999)
    train.add_argument(
        "--no_ema", action="store_true", help="measure and export the weights, not their average"
    )
    train.add_argument(
        "--eval_freq",
        type=int,
        default=1,
        help="epochs between two measurements of reconstructions",
    )
    train.add_argument(
        "--save_last_freq", type=int, default=5, help="epochs between two checkpoints"
    )
    train.add_argument(
        "--save_every_steps",
        type=int,
        default=0,
        help="steps between two checkpoints; 0 for epochs only",
    )
    train.add_argument(
        "--max_bad_steps",
        type=int,
        default=0,
        help="steps that may be left out for not being finite",
    )
    train.add_argument(
        "--keep_last", type=int, default=2, help="checkpoints kept, the newest included"
    )
    add_dry_run_arg(train)


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = new_parser(__doc__)
    parser.add_argument("--data_path", default="./data/imagenet", help=DATA_PATH)
    parser.add_argument(
        "--img_size", type=int, default=256, help="height and width of the images in pixels"
    )
    text = f"where {VAE_NAME}, checkpoints and TensorBoard's logs go"
    parser.add_argument("--output_dir", default="./output_dir", help=text)
    parser.add_argument(
        "--resume", default="", help=f"folder of a {STATE_NAME} to go on from, or the file"
    )
    parser.add_argument("--vae_embed_dim", type=int, default=16, help="latent channels")
    parser.add_argument("--ch", type=int, default=128, help="base width")
    widths = "width of each resolution in units of --ch; each but the last halves the image"
    parser.add_argument("--ch_mult", type=int, nargs="+", default=[1, 1, 2, 2, 4], help=widths)
    parser.add_argument(
        "--num_res_blocks", type=int, default=2, help="residual blocks a resolution"
    )
    add_training_args(parser)
    add_mirror_arg(parser)
    add_skip_arg(parser)
    add_column_args(parser)
    add_run_args(parser, batch_size=16, seed=1, precision="bf16")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for values that cannot work, before anything is read or written."""
    check_positive(
        args, "img_size", "batch_size", "vae_embed_dim", "ch", "epochs", "num_res_blocks", "lr"
    )
    check_positive(args, "accum_iter", "save_last_freq", "eval_freq", "keep_last")
    check_range(args, 0, 1, "ema_rate")
    check_range(
        args,
        0,
        math.inf,
        "kl_weight",
        "perceptual_weight",
        "disc_weight",
        "disc_start",
        "grad_clip",
        "min_lr",
    )
    check_range(
        args,
        0,
        math.inf,
        "warmup_epochs",
        "save_every_steps",
        "max_bad_steps",
        "num_workers",
        "seed",
    )
    check_stride(args.img_size, 2 ** (len(args.ch_mult) - 1))
    if args.disc_weight > 0 and args.img_size < 16:
        raise errors.UserError(
            "--disc_weight needs images of 16 pixels or more: lower --disc_weight to 0, or raise --img_size"
        )


# --------------------------------------------------------------------------------------------------------------------
# The parts of a run: what it goes on from, images, losses.


def open_start(args: argparse.Namespace) -> tuple[dict, Path | None]:
    """The checkpoint that ``--resume`` names, and its file; nothing and None for a fresh start.

    The main process reads it; others have the file's name alone.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or ``--output_dir`` holds another run.
    """
    content: dict = {}

    def read() -> Path | None:
        for name in (STATE_NAME, VAE_NAME):
            check_folder_is_free(args.output_dir, args.resume, name)
        path = (
            find_checkpoint_to_resume(args.resume, args.output_dir, (STATE_NAME,))
            if args.resume
            else None
        )
        if path is not None:
            found, path = read_newest_checkpoint(path)
            content.update(found)
        return path

    if args.resume:
        check_newest_checkpoint(args.resume, (STATE_NAME,))
    return content, distributed.on_rank_0(read)


def load_images(args: argparse.Namespace) -> tuple[ImageFolder, ImageFolder]:
    """The images to train on, and those that reconstructions are measured on: of ``val``, else training images.

    Raises:
        UserError: there are none to train on.
    """
    options = {
        "transform": image_transform(args.img_size),
        "bad_images": BadImages(None if args.dry_run else args.output_dir, args.skip_bad_images),
    }
    columns = args.image_column, args.label_column or NO_LABELS  # a tokenizer learns no classes
    source = open_images(args.data_path, "train", *columns)
    training = ImageFolder(source, mirror=args.mirror, **options)
    try:
        source = open_images(args.data_path, "val", *columns)
    except NoSplit:
        log.info(
            "no val images in %s: reconstructions are measured on training images", args.data_path
        )
    return training, ImageFolder(source, **options)


def build_losses(args: argparse.Namespace, device: torch.device) -> VAELosses:
    """The tokenizer with its losses, drawn from the seed.

    Raises:
        UserError: sizes that do not fit each other, or no weights for the perceptual distance.
    """
    perceptual = None
    if args.perceptual_weight > 0:
        perceptual = distributed.on_all_ranks(lambda: perceptual_distance(args.vgg_weights, device))
    vae = AutoencoderKL(
        args.vae_embed_dim, args.ch_mult, ch=args.ch, num_res_blocks=args.num_res_blocks
    )
    log.info(
        "tokenizer: stride %d, %.2fM parameters",
        vae.stride,
        sum(p.numel() for p in vae.parameters()) / 1e6,
    )
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
    """Takes over a checkpoint.

    Raises:
        UserError: it is damaged, or of another tokenizer than the flags describe.
    """

    def compare() -> None:
        there, here = content.get("config", {}), state.model.config
        names = [name for name in here if there.get(name) != here[name]]
        differing = [f"{name} is {there.get(name)} there, {here[name]} here" for name in names]
        if differing:
            raise errors.UserError(
                f"{path} is not of the run that the flags describe: {'; '.join(differing)}"
            )

    distributed.on_rank_0(compare)
    state.load(content, path)
    content.clear()


# --------------------------------------------------------------------------------------------------------------------
# Measuring.


@torch.no_grad()
def measure_reconstructions(
    vae: AutoencoderKL, loader: DataLoader, device: torch.device, precision: str
) -> tuple[float, Tensor]:
    """Mean PSNR in dB of the loader's images, by the most probable latents; and some over their reconstructions.

    The picture is bytes ``[3, H, W]``, of the process's first images.

    Raises:
        NotFinite: encoder or decoder overflows.
    """
    sums, rows = (
        double(torch.zeros(6, device=device)),
        [],
    )  # PSNR, images, limits of latents and pixels
    for images, _ in loader:
        with autocast(device, precision):
            latents = vae.encode(images.to(device)).mode()
            made = vae.decode(latents)
        pair = to_uint8(images.to(device)), to_uint8(made)
        ratios = psnr(*pair).clamp(max=100.0)  # equal ones have no finite one
        counted = torch.stack([ratios.sum(), torch.ones_like(ratios).sum()])
        sums += torch.cat([counted, extremes(latents), extremes(made)])
        rows = rows or [each[:SHOWN_IMAGES].cpu() for each in pair]
    found = distributed.all_reduce_mean(sums).cpu()

    def check() -> None:
        check_finite(found[2:4], "the tokenizer's encoder", precision)
        check_finite(found[4:], "the tokenizer's decoder", precision)

    distributed.on_rank_0(check)
    total, count = found[:2].tolist()
    from torchvision.utils import make_grid  # loads torch._dynamo: only when it is needed

    picture = (
        make_grid(torch.cat(rows), nrow=len(rows[0]), padding=2)
        if rows
        else torch.zeros(3, 1, 1).byte()
    )
    return total / count, picture


@torch.no_grad()
def measure_latents(
    vae: AutoencoderKL, loader: DataLoader, images: int, side: int, device: torch.device
) -> dict:
    """What is known of the latents over ``images`` images, those of all processes' loaders; they have ``side`` rows.

    Returns:
        ``latent_factor``, which gives latents unit deviation over all channels; ``channel_deviations`` with that
        factor; ``low_frequency_shares``, of a channel's energy up to half of Nyquist's frequency, None for latents of
        fewer than 4x4 positions; ``images``.
    """
    low = low_frequencies(side, side, LOW_FREQUENCIES)
    sums = double(torch.zeros(4, vae.embed_dim, device=device))

    def moments() -> Iterator[tuple[Tensor]]:
        for batch, _ in loader:
            posterior = vae.encode(batch.to(device))
            sums.add_(energies(posterior.mode(), low))
            yield (posterior.parameters,)

    means, deviations = channel_statistics(
        CachedMoments(1.0), moments(), vae.embed_dim, device, "fp32"
    )
    mean, deviation = (
        torch.tensor(means, dtype=torch.float64),
        torch.tensor(deviations, dtype=torch.float64),
    )
    factor = 1 / ((deviation**2 + mean**2).mean() - mean.mean() ** 2).sqrt().item()
    shares = low_shares(
        distributed.all_reduce_mean(sums).cpu() * distributed.get_world_size(), images
    ).tolist()
    figures = {"latent_factor": factor, "channel_deviations": (factor * deviation).tolist()}
    return {**figures, "low_frequency_shares": shares if side >= 4 else None, "images": images}


# --------------------------------------------------------------------------------------------------------------------
# Training.


def train_vae(
    losses: VAELosses,
    loader: DataLoader,
    measured: DataLoader,
    start: tuple[dict, Path | None],
    args: argparse.Namespace,
) -> AutoencoderKL:
    """Train from the epoch and step of ``start``, saving and measuring.

    Returns:
        the VAE to export: the EMA, or the weights themselves with ``--no_ema``.
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
        losses.read_figures()
    # After the gradients are ordered, which must not depend on --disc_start
    losses.steps_done = lambda: state.steps_done
    vae = (losses if args.no_ema else state.ema_model).vae

    def measure(epoch: int, writer: SummaryWriter | None, _: StopSignals) -> None:
        figures = losses.read_figures()
        means = (
            distributed.all_reduce_mean(torch.stack([*figures.values()])).tolist()
            if figures
            else []
        )
        scalars = dict(zip(figures, means, strict=True))
        try:
            scalars["psnr"], picture = measure_reconstructions(
                vae, measured, state.device, args.precision
            )
        except errors.NotFinite as error:
            picture = None
            warn("NOT MEASURED after epoch %d: %s. Training goes on", epoch, error)
        else:
            log.info("epoch %d: PSNR %.2f dB", epoch, scalars["psnr"])
        if writer is not None:
            for name, value in scalars.items():
                writer.add_scalar(f"tokenizer/{name}", value, state.steps_done)
            if picture is not None:
                writer.add_image(
                    "tokenizer/originals over reconstructions", picture, state.steps_done
                )

    train(trainer, measure)
    return vae


def export(vae: AutoencoderKL, figures: dict, output_dir: Path) -> None:
    """Writes the tokenizer, and its ``figures`` beside it, by the main process; UserError if the disk is full."""

    def write() -> None:
        save_vae(output_dir / VAE_NAME, vae, figures["latent_factor"])
        write_json(output_dir / FIGURES_NAME, {**figures, **provenance()})

    distributed.on_rank_0(write)
    for name in ("channel_deviations", "low_frequency_shares"):
        log.info(
            "%s: %s",
            name.replace("_", " "),
            " ".join(f"{value:.2f}" for value in figures[name] or ()),
        )
    text = "PSNR %.2f dB, latent factor %.4f; wrote %s"
    log.info(text, figures["psnr"], figures["latent_factor"], output_dir / VAE_NAME)


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device, args.deterministic, args.precision) as device:
        check_same_flags(args, device)
        distributed.on_all_ranks(lambda: check_args(args))
        start = open_start(args)
        seed_everything(args.seed + distributed.get_rank())
        images, others = distributed.on_all_ranks(lambda: load_images(args))
        check_same_inputs({"train": images, "val": others}, None)
        loader = distributed.on_all_ranks(lambda: training_loader(images, device, args))
        measured = loader_of_all(
            evenly_spaced(others, MEASURED_IMAGES), device, args, persistent_workers=False
        )
        vae = train_vae(build_losses(args, device), loader, measured, start, args)
        if args.dry_run:
            return
        ratio, _ = measure_reconstructions(vae, measured, device, args.precision)
        images.set_draws(args.seed, 0)
        chosen = evenly_spaced(images, LATENT_IMAGES)
        latents = loader_of_all(chosen, device, args, persistent_workers=False)
        figures = measure_latents(vae, latents, len(chosen), args.img_size // vae.stride, device)
        export(
            vae,
            {"psnr": ratio, "psnr_of": Path(others.root).name, **figures},
            Path(args.output_dir),
        )


if __name__ == "__main__":
    errors.run(main)
