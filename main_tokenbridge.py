"""Trains a TokenBridge, or samples from one (torchrun or plain python)."""

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.tensorboard import SummaryWriter

from engine_tokenbridge import (
    check_num_images,
    evaluate,
    latents_from,
    samples_grid,
    steps_per_epoch,
    train_one_epoch,
)
from models.tokenbridge import MODELS, TokenBridge
from models.vae import AutoencoderKL
from util import checkpoint, errors, misc
from util.args import add_mirror_arg, add_run_args, add_vae_arg, check_bits, check_positive, make_loader, new_parser
from util.loader import CachedFolder, ImageFolder, check_classes, image_transform

# --------------------------------------------------------------------------------------------------------------------
# The command line.


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = new_parser(__doc__)

    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, default="tokenbridge_large")
    model.add_argument("--img_size", type=int, default=256, help="height and width of the images in pixels")
    add_vae_arg(model)
    model.add_argument("--vae_embed_dim", type=int, default=16, help="latent channels; a file that tells its own wins")
    model.add_argument(
        "--vae_stride", type=int, default=16, help="pixels a latent covers; a file that tells its own wins"
    )
    model.add_argument("--patch_size", type=int, default=1, help="latent positions a token covers, each way")
    model.add_argument("--buffer_size", type=int, default=64, help="positions that hold the class embedding")
    model.add_argument("--class_num", type=int, default=1000)
    model.add_argument("--attn_dropout", type=float, default=0.1)
    model.add_argument("--proj_dropout", type=float, default=0.1)
    model.add_argument("--label_drop_prob", type=float, default=0.1, help="for classifier-free guidance")
    model.add_argument("--mask_ratio_min", type=float, default=0.7, help="lower end of the mask ratios")
    model.add_argument("--grad_checkpointing", action="store_true", help="recompute blocks to save memory")
    model.add_argument("--quant_bits", type=int, default=6, help="2^bits levels a channel")
    model.add_argument("--quant_min", type=float, default=-5.0, help="lower bound of the latents")
    model.add_argument("--quant_max", type=float, default=5.0, help="upper bound of the latents")

    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=int, default=400)
    train.add_argument("--accum_iter", type=int, default=1, help="batches whose gradients make one step")
    train.add_argument("--lr", type=float, help="peak learning rate; by default blr x whole batch / 256")
    train.add_argument("--blr", type=float, default=1e-4, help="base learning rate, for a batch of 256")
    train.add_argument("--min_lr", type=float, default=0.0, help="learning rate at the end of the cosine")
    train.add_argument("--lr_schedule", choices=["cosine", "constant"], default="cosine")
    train.add_argument("--warmup_epochs", type=float, default=100)
    train.add_argument("--weight_decay", type=float, default=0.02)
    train.add_argument(
        "--grad_clip", type=float, default=1.0, help="largest gradient norm; 0 for no limit (release: 3.0)"
    )
    train.add_argument("--ema_rate", type=float, default=0.9999)
    train.add_argument("--start_epoch", type=int, default=0, help="set by --resume where the checkpoint tells")
    train.add_argument("--save_last_freq", type=int, default=5, help="epochs between two checkpoints")

    sample = parser.add_argument_group("sampling and evaluation")
    sample.add_argument("--evaluate", action="store_true", help="sample from --resume's EMA weights, and stop")
    sample.add_argument("--online_eval", action="store_true", help="sample during training, too")
    sample.add_argument("--eval_freq", type=int, default=40, help="epochs between two online evaluations")
    sample.add_argument("--eval_bsz", type=int, default=64, help="images sampled at once on each device")
    sample.add_argument("--num_images", type=int, default=50000, help="over all classes evenly")
    sample.add_argument("--num_iter", type=int, default=256, help="autoregressive steps")
    sample.add_argument("--cfg", type=float, default=1.0, help="guidance scale")
    sample.add_argument("--cfg_schedule", choices=["linear", "constant"], default="linear")
    sample.add_argument("--temperature", type=float, default=1.0)
    sample.add_argument("--gen_seed", type=int, default=0, help="with an image's number, the seed of that image")

    files = parser.add_argument_group("files")
    files.add_argument("--data_path", default="./data/imagenet", help="folder that holds train/<class>/<image>")
    files.add_argument(
        "--use_cached", action="store_true", help="train on cached moments; needs no images, no tokenizer"
    )
    files.add_argument("--cached_path", default="", help="what main_cache.py wrote")
    files.add_argument("--output_dir", default="./output_dir", help="checkpoints, TensorBoard's logs, samples")
    files.add_argument("--resume", default="", help=f"folder that holds {checkpoint.CHECKPOINT_NAME}")
    add_mirror_arg(files)
    add_run_args(parser, batch_size=16, seed=1, precision="bf16")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for values that cannot work, before anything is read or written."""
    check_bits(args.quant_bits, "--quant_bits")
    check_positive(args, "img_size", "batch_size", "epochs", "accum_iter", "class_num", "eval_bsz", "num_iter")
    check_positive(args, "save_last_freq", "eval_freq", "vae_embed_dim", "vae_stride", "patch_size")
    if args.temperature < 0:
        raise errors.UserError(f"--temperature {args.temperature}: it must not be negative")
    if args.evaluate or args.online_eval:
        check_num_images(args.num_images, args.class_num)
    if args.evaluate and not args.resume:
        raise errors.UserError("--evaluate needs --resume, the folder that holds the weights to sample from")
    if args.use_cached and not args.cached_path:
        raise errors.UserError("--use_cached needs --cached_path, the folder that main_cache.py wrote")


# --------------------------------------------------------------------------------------------------------------------
# What a run is made of.


def training_data(args: argparse.Namespace) -> CachedFolder | ImageFolder:
    """Cached moments or images, as the flags say, checked against ``--class_num``."""
    if args.use_cached:
        root, dataset = args.cached_path, CachedFolder(args.cached_path, mirror=args.mirror)
    else:
        root = Path(args.data_path) / "train"
        dataset = ImageFolder(root, image_transform(args.img_size, mirror=args.mirror))
    check_classes(dataset.classes, args.class_num, root)
    return dataset


def adopt_tokenizer(args: argparse.Namespace, vae_config: dict, source: str) -> None:
    """Takes latent channels and stride from a tokenizer's or cache's own description."""
    stride = 2 ** (len(vae_config["ch_mult"]) - 1)
    args.vae_embed_dim = misc.check_told("vae_embed_dim", args.vae_embed_dim, 16, vae_config["embed_dim"], source)
    args.vae_stride = misc.check_told("vae_stride", args.vae_stride, 16, stride, source)


def tokenizer(
    args: argparse.Namespace, dataset: CachedFolder | ImageFolder | None
) -> tuple[AutoencoderKL | None, float]:
    """The tokenizer, None where the run does not need it, and its latent factor."""
    vae, latent_factor = None, None
    if args.evaluate or args.online_eval or not args.use_cached:
        vae, latent_factor = AutoencoderKL.from_pretrained(args.vae_path)
        adopt_tokenizer(args, vae.config, args.vae_path)
    if isinstance(dataset, CachedFolder):
        about = {"vae": checkpoint.KL16_CONFIG, "latent_factor": checkpoint.KL16_LATENT_FACTOR, **dataset.metadata}
        adopt_tokenizer(args, about["vae"], args.cached_path)
        if vae is not None and not math.isclose(latent_factor, about["latent_factor"], rel_tol=1e-6):
            raise errors.UserError(f"{args.cached_path} was made with another tokenizer than {args.vae_path}")
        latent_factor = about["latent_factor"]
        moments, side = dataset[0][0], args.img_size // args.vae_stride
        if moments.shape != (2 * args.vae_embed_dim, side, side):
            made = f"at --img_size {about['img_size']}" if "img_size" in about else f"of shape {list(moments.shape)}"
            raise errors.UserError(
                f"{args.cached_path} holds moments {made}, which --img_size {args.img_size} does not fit"
            )
    misc.check_stride(args.img_size, args.vae_stride * args.patch_size)
    return vae, latent_factor


def build_model(args: argparse.Namespace, config: dict[str, Any]) -> TokenBridge:
    """The model of the flags; a checkpoint's ``config`` adds what has no flag."""
    names = "img_size vae_stride patch_size vae_embed_dim mask_ratio_min label_drop_prob class_num attn_dropout"
    names += " proj_dropout buffer_size grad_checkpointing quant_min quant_max"
    kwargs = {name: getattr(args, name) for name in names.split()}
    try:
        return MODELS[args.model](quant_levels=2**args.quant_bits, channel_order=config.get("channel_order"), **kwargs)
    except ValueError as error:
        raise errors.UserError(str(error)) from error


def open_checkpoint(args: argparse.Namespace) -> tuple[dict[str, Any], Path | None]:
    """The checkpoint that ``--resume`` names; empty for a fresh start."""
    if not args.resume:
        return {}, None
    same = Path(args.resume).resolve() == Path(args.output_dir).resolve()
    if not args.evaluate and same and not (Path(args.resume) / checkpoint.CHECKPOINT_NAME).exists():
        misc.log.info("no %s in %s: starting afresh", checkpoint.CHECKPOINT_NAME, args.resume)
        return {}, None
    path = checkpoint.find(args.resume)
    return checkpoint.read(path), path


def sample(
    model: TokenBridge, vae: AutoencoderKL, latent_factor: float, folder: Path, cfg: float, device, args
) -> None:
    """Numbered pictures in ``folder``, and a grid of them beside it."""
    names = "num_images eval_bsz num_iter cfg_schedule temperature gen_seed precision"
    settings = {name: getattr(args, name) for name in names.split()}
    evaluate(model, vae, latent_factor, folder, cfg=cfg, device=device, **settings)
    if misc.is_main_process():
        grid = folder.with_name(folder.name + ".png")
        samples_grid(folder, grid, args.num_images)
        misc.log.info("wrote %d images to %s, and some of them to %s", args.num_images, folder, grid)


# --------------------------------------------------------------------------------------------------------------------
# Training.


def make_training_loader(dataset, device: torch.device, args: argparse.Namespace) -> DataLoader:
    """Shuffled whole batches, this process's share."""
    sampler = DistributedSampler(dataset, misc.get_world_size(), misc.get_rank(), shuffle=True, seed=args.seed)
    loader = make_loader(dataset, args, device, sampler=sampler, drop_last=True)
    if not steps_per_epoch(loader, args.accum_iter):
        whole = args.batch_size * args.accum_iter * misc.get_world_size()
        raise errors.UserError(
            f"{len(dataset)} images do not fill one step of {whole}; lower --batch_size or --accum_iter"
        )
    return loader


def resume(content: dict, path: Path | None, model, ema, optimizer, scaler, args: argparse.Namespace) -> None:
    """Takes up a checkpoint's weights, and its optimizer and epoch where it has them."""
    if not content:
        return
    checkpoint.load_weights(model, content, path, ema=False)
    ema.module.load_state_dict(model.state_dict())
    if "model_ema" in content:
        checkpoint.load_weights(ema.module, content, path, ema=True)
    if "optimizer" in content and "epoch" in content:
        try:
            optimizer.load_state_dict(content["optimizer"])
        except (ValueError, KeyError) as error:
            raise errors.UserError(f"{path}: its optimizer state does not fit this model ({error})") from error
        args.start_epoch = content["epoch"] + 1
    if scaler.is_enabled() and content.get("scaler"):
        scaler.load_state_dict(content["scaler"])
    misc.log.info("resumed from %s, continuing at epoch %d", path, args.start_epoch)


def save(model: TokenBridge, ema, optimizer, scaler, epoch: int, latent_factor: float, args) -> None:
    """Writes ``checkpoint-last.pth`` (README, section Files) from the main process."""
    if not misc.is_main_process():
        return
    averaged = ema.module.state_dict()
    content = {
        "model": model.state_dict(),
        "model_ema": {name: averaged[name] for name, _ in model.named_parameters()},
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "config": {**model.config, "model": args.model, "latent_factor": latent_factor},
        "args": vars(args),
    }
    if scaler.is_enabled():
        content["scaler"] = scaler.state_dict()
    checkpoint.save(Path(args.output_dir) / checkpoint.CHECKPOINT_NAME, content)


def train(
    model: TokenBridge,
    vae: AutoencoderKL | None,
    latent_factor: float,
    loader: DataLoader,
    content: dict,
    path: Path | None,
    device: torch.device,
    args: argparse.Namespace,
) -> None:
    """Trains ``model`` from ``content`` on, saving, and sampling where asked for."""
    ema = ModelEmaV3(model, decay=args.ema_rate, exclude_buffers=True)
    batch = args.batch_size * args.accum_iter * misc.get_world_size()
    if args.lr is None:
        args.lr = args.blr * batch / 256
    groups = misc.add_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    resume(content, path, model, ema, optimizer, scaler, args)
    content.clear()
    # Buffers are constant tables: nothing to broadcast.
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    wrapped = DistributedDataParallel(model, **options) if misc.get_world_size() > 1 else model
    peak = misc.matmul_flops(device, args.precision)
    misc.log.info("whole batch %d, learning rate %.3g, matrix products at %.2f TFLOP/s", batch, args.lr, peak / 1e12)

    steps = steps_per_epoch(loader, args.accum_iter)
    done = args.start_epoch * steps
    writer = SummaryWriter(args.output_dir) if misc.is_main_process() else None
    to_latents = partial(latents_from, vae=None if args.use_cached else vae, latent_factor=latent_factor)
    with misc.progress(total=args.epochs * steps, initial=done, unit="step", desc="training") as bar:
        for epoch in range(args.start_epoch, args.epochs):
            loader.sampler.set_epoch(epoch)
            # An epoch's draws follow from its number: resuming at one repeats what an unbroken run would have drawn.
            misc.seed_everything(args.seed, misc.get_rank(), epoch)
            train_one_epoch(wrapped, ema, optimizer, scaler, loader, epoch, to_latents, device, args, bar, writer, peak)
            last = epoch + 1 == args.epochs
            if last or (epoch + 1) % args.save_last_freq == 0:
                save(model, ema, optimizer, scaler, epoch, latent_factor, args)
            if args.online_eval and (last or (epoch + 1) % args.eval_freq == 0):
                for cfg in dict.fromkeys([1.0, args.cfg]):
                    folder = Path(args.output_dir) / "online_eval" / f"epoch{epoch:04d}-cfg{cfg:g}"
                    sample(ema.module, vae, latent_factor, folder, cfg, device, args)
    if writer is not None:
        writer.close()


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with misc.processes(args.device) as device:
        check_args(args)
        content, path = open_checkpoint(args)
        config = content.get("config", {})
        dataset = None if args.evaluate else training_data(args)
        vae, latent_factor = tokenizer(args, dataset)
        misc.seed_everything(args.seed + misc.get_rank())
        model = build_model(args, config)
        if path is not None:
            checkpoint.check_config(config, model, latent_factor, path)
        misc.log.info("%s: %.2fM parameters", args.model, sum(p.numel() for p in model.parameters()) / 1e6)
        model, vae = model.to(device), None if vae is None else vae.to(device)
        if args.evaluate:
            checkpoint.load_weights(model, content, path, ema=True)
            sample(model, vae, latent_factor, Path(args.output_dir) / "samples", args.cfg, device, args)
        else:
            loader = make_training_loader(dataset, device, args)
            train(model, vae, latent_factor, loader, content, path, device, args)


if __name__ == "__main__":
    errors.run(main)
