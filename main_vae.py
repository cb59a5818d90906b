"""Trains a small KL tokenizer on a folder of images (torchrun or plain python)."""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.tensorboard import SummaryWriter

from models.vae import AutoencoderKL
from util import errors, misc
from util.args import (
    DATA_PATH,
    add_column_args,
    add_mirror_arg,
    add_run_args,
    add_skip_arg,
    check_positive,
    check_same_flags,
    new_parser,
)
from util.checkpoint import save_vae
from util.config import check_stride
from util.datasets import check_same_inputs
from util.loader import BadImages, ImageFolder, image_transform, make_loader
from util.lr_sched import adjust_learning_rate
from util.rng import seed_everything
from util.sources import open_images

VAE_NAME = "vae.ckpt"


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = new_parser(__doc__)
    parser.add_argument("--data_path", default="./data/imagenet", help=DATA_PATH)
    parser.add_argument("--img_size", type=int, default=256, help="height and width of the images in pixels")
    parser.add_argument("--output_dir", default="./output_dir", help=f"where {VAE_NAME} and TensorBoard's logs go")
    parser.add_argument("--vae_embed_dim", type=int, default=16, help="latent channels")
    parser.add_argument("--ch", type=int, default=128, help="base width")
    widths = "width of each resolution in units of --ch; each but the last halves the image"
    parser.add_argument("--ch_mult", type=int, nargs="+", default=[1, 1, 2, 2, 4], help=widths)
    parser.add_argument("--num_res_blocks", type=int, default=2, help="residual blocks a resolution")
    parser.add_argument(
        "--kl_weight", type=float, default=1e-6, help="weight of the KL divergence; the L1 error's is 1"
    )
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    parser.add_argument("--min_lr", type=float, default=0.0, help="learning rate at the end")
    parser.add_argument("--warmup_epochs", type=float, default=1.0)
    parser.add_argument("--lr_schedule", choices=["cosine", "constant"], default="cosine")
    parser.add_argument("--grad_clip", type=float, default=1.0, help="largest gradient norm; 0 for no limit")
    add_mirror_arg(parser)
    add_skip_arg(parser)
    add_column_args(parser)
    add_run_args(parser, batch_size=16, seed=1, precision="bf16")
    return parser


def losses(vae: nn.Module, images: Tensor, kl_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Means over the batch: the loss, the absolute error of a pixel value, the KL divergence of an image in nats.

    Args:
        vae: returns the reconstruction and the posterior of ``images [B, 3, H, W]`` in [-1, 1].
    """
    reconstruction, posterior = vae(images)
    error = (reconstruction.float() - images).abs()
    kl = posterior.kl().mean()
    return error.flatten(1).sum(1).mean() + kl_weight * kl, error.mean(), kl


def train(vae: AutoencoderKL, loader: DataLoader, device: torch.device, args: argparse.Namespace) -> None:
    """Trains ``vae`` in place with Adam for ``args.epochs``.

    Raises:
        UserError: the loss is not finite.
    """
    model = DistributedDataParallel(vae) if misc.get_world_size() > 1 else vae
    optimizer = torch.optim.Adam(vae.parameters(), lr=args.lr, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    writer = SummaryWriter(str(Path(args.output_dir) / "tokenizer_log")) if misc.is_main_process() else None
    with misc.progress(total=args.epochs * len(loader), unit="step", desc="training the tokenizer") as bar:
        for epoch in range(args.epochs):
            loader.sampler.set_epoch(epoch)
            for step, (images, _) in enumerate(loader):
                lr = adjust_learning_rate(optimizer, epoch + step / len(loader), args)
                images = images.to(device, non_blocking=True)
                with misc.autocast(device, args.precision):
                    loss, error, kl = losses(model, images, args.kl_weight)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(vae.parameters(), args.grad_clip or math.inf)
                if not torch.isfinite(loss if scaler.is_enabled() else norm):
                    where = f"at epoch {epoch}, step {step}"
                    raise errors.UserError(f"loss {loss.item():.4g} {where} is not finite; lower --lr")
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                bar.update()
            bar.set_postfix_str(f"epoch {epoch} error {error.item():.4f} kl {kl.item():.1f} nats lr {lr:.1e}")
            if writer is not None:
                for tag, value in {"error": error.item(), "kl": kl.item(), "lr": lr, "grad_norm": norm.item()}.items():
                    writer.add_scalar(f"tokenizer/{tag}", value, (epoch + 1) * len(loader))
    if writer is not None:
        writer.close()


@torch.no_grad()
def measure_latent_factor(vae: AutoencoderKL, loader: DataLoader, device: torch.device) -> float:
    """The factor that gives posterior samples unit deviation over the loader's images, of all processes."""
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # count, sum, sum of squares
    for images, _ in loader:
        latents = vae.encode(images.to(device)).sample().double()
        sums += torch.stack([torch.tensor(float(latents.numel()), device=device), latents.sum(), (latents**2).sum()])
    count, total, squares = misc.all_reduce_mean(sums)
    return 1 / (squares / count - (total / count) ** 2).sqrt().item()


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with misc.processes(args.device, args.deterministic) as device:
        check_positive(args, "img_size", "batch_size", "vae_embed_dim", "ch", "epochs", "num_res_blocks", "lr")
        check_stride(args.img_size, 2 ** (len(args.ch_mult) - 1))
        check_same_flags(args)
        seed_everything(args.seed + misc.get_rank())
        bad_images = BadImages(args.output_dir) if args.skip_bad_images else None
        source = open_images(args.data_path, "train", args.image_column, args.label_column)
        dataset = ImageFolder(source, image_transform(args.img_size), mirror=args.mirror, bad_images=bad_images)
        check_same_inputs({"train": dataset}, None)
        sampler = DistributedSampler(dataset, misc.get_world_size(), misc.get_rank(), seed=args.seed)
        loader = make_loader(dataset, args, device, sampler=sampler, drop_last=True)
        if not len(loader):
            raise errors.UserError(
                f"{len(dataset)} images do not fill a batch of {args.batch_size}; lower --batch_size"
            )
        vae = AutoencoderKL(args.vae_embed_dim, args.ch_mult, ch=args.ch, num_res_blocks=args.num_res_blocks).to(device)
        millions = sum(p.numel() for p in vae.parameters()) / 1e6
        misc.log.info("tokenizer: stride %d, %.2fM parameters", vae.stride, millions)
        train(vae, loader, device, args)
        latent_factor = measure_latent_factor(vae.eval(), loader, device)
        path = Path(args.output_dir) / VAE_NAME
        if bad_images is not None:
            bad_images.count()
        if misc.is_main_process():
            save_vae(path, vae, latent_factor)
        misc.log.info("latent factor %.4f; wrote %s", latent_factor, path)


if __name__ == "__main__":
    errors.run(main)
