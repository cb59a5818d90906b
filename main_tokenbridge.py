"""Trains a TokenBridge, or samples from one (torchrun or plain python)."""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from engine_tokenbridge import (
    BadSteps,
    Sampling,
    channel_statistics,
    check_num_images,
    confidence_folder,
    evaluate,
    export_npz,
    held_out_likelihood,
    latents_from,
    read_results,
    remove_images,
    results_path,
    same_run,
    sampled_images,
    samples_grid,
    steps_per_epoch,
    train_one_epoch,
)
from models.tokenbridge import CHECKPOINTED, KL16_CHANNEL_ORDER, MODELS, TokenBridge
from models.vae import AutoencoderKL
from util import checkpoint, errors, misc
from util.args import (
    add_metrics_args,
    add_mirror_arg,
    add_quantizer_args,
    add_run_args,
    add_sampling_args,
    add_skip_arg,
    add_vae_arg,
    check_bits,
    check_positive,
    check_range,
    new_parser,
)
from util.checkpoint import finetune
from util.checkpoint.load import load_optimizer, load_scaler, load_weights
from util.files import remove_parts, write_json
from util.loader import (
    BadImages,
    CachedFolder,
    ImageFolder,
    RankSampler,
    ShuffledRankSampler,
    check_classes,
    evenly_spaced,
    image_transform,
    make_loader,
)
from util.metrics import TITLES, Evaluator, provenance, table
from util.packed import PackedCache, open_cache
from util.plots import write_search

# --------------------------------------------------------------------------------------------------------------------
# The command line.


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """What is trained or loaded."""
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
    model.add_argument(
        "--checkpoint_blocks",
        nargs="+",
        choices=CHECKPOINTED,
        help="which of them --grad_checkpointing recomputes; by default all",
    )
    model.add_argument("--quant_bits", type=int, default=6, help="2^bits levels a channel")
    model.add_argument("--quant_min", type=float, default=-5.0, help="lower bound of the latents")
    model.add_argument("--quant_max", type=float, default=5.0, help="upper bound of the latents")
    # What follows is by default as in the checkpoint, if there is one, and else the paper's final configuration.
    add_quantizer_args(model, default=None)
    model.add_argument("--head", choices=["ar", "parallel"], help="channels one after the other, or independently")
    model.add_argument(
        "--channel_order",
        help="order of predictions: frequency (KL-16's), sequential, 8,1,10,..., or a file of tools.channel_order",
    )
    model.add_argument("--channels_per_group", type=int, help="channels predicted jointly, levels^group classes")
    model.add_argument("--head_dim", type=int, help="width of the head; by default the model's")
    model.add_argument("--head_depth", type=int, help="blocks of the head; by default the model's")
    model.add_argument("--head_heads", type=int, help="attention heads of the head; by default the model's")


def add_training_args(parser: argparse.ArgumentParser) -> None:
    """How it is trained."""
    train = parser.add_argument_group("training")
    train.add_argument(
        "--finetune",
        default="",
        help="start from these weights (file, folder, hf://owner/repo/path) as far as they fit",
    )
    train.add_argument(
        "--freeze", nargs="+", default=[], metavar="PATTERN", help="parameters that stay: encoder_blocks.*, class_emb.*"
    )
    train.add_argument("--epochs", type=int, default=400)
    train.add_argument("--accum_iter", type=int, default=1, help="batches whose gradients make one step")
    train.add_argument("--lr", type=float, help="peak learning rate; by default blr x whole batch / 256")
    train.add_argument("--blr", type=float, default=1e-4, help="base learning rate, for a batch of 256")
    train.add_argument("--min_lr", type=float, default=0.0, help="learning rate at the end of the cosine")
    train.add_argument("--lr_schedule", choices=["cosine", "constant"], default="cosine")
    train.add_argument("--warmup_epochs", type=float, default=100)
    train.add_argument("--compile", action="store_true", help="torch.compile the blocks; minutes before the first step")
    train.add_argument("--weight_decay", type=float, default=0.02)
    train.add_argument(
        "--grad_clip", type=float, default=1.0, help="largest gradient norm; 0 for no limit (release: 3.0)"
    )
    train.add_argument("--ema_rate", type=float, default=0.9999)
    train.add_argument("--start_epoch", type=int, default=0, help="set by --resume where the checkpoint tells")
    train.add_argument("--save_last_freq", type=int, default=5, help="epochs between two checkpoints")
    train.add_argument(
        "--save_every_steps", type=int, default=0, help="steps between two checkpoints; 0 for epochs only"
    )
    train.add_argument("--max_bad_steps", type=int, default=0, help="steps that may be left out for not being finite")
    train.add_argument("--keep_last", type=int, default=2, help="checkpoints kept, the newest included")


def add_evaluation_args(parser: argparse.ArgumentParser) -> None:
    """How it is sampled and measured."""
    sample = parser.add_argument_group("sampling and evaluation")
    sample.add_argument("--evaluate", action="store_true", help="sample from --resume's weights, measure, and stop")
    sample.add_argument("--online_eval", action="store_true", help="sample and measure during training, too")
    sample.add_argument("--evaluate_nll", action="store_true", help="measure --resume's held-out likelihood, and stop")
    sample.add_argument("--online_nll", action="store_true", help="measure it during training, too")
    sample.add_argument("--eval_freq", type=int, default=40, help="epochs between two measurements during training")
    sample.add_argument("--eval_bsz", type=int, default=64, help="images sampled at once on each device")
    sample.add_argument("--num_images", type=int, default=50000, help="over all classes evenly")
    add_sampling_args(sample)
    sample.add_argument("--cfg", type=float, nargs="+", default=1.0, help="guidance scale, or several to search")
    sample.add_argument("--temperature", type=float, nargs="+", default=1.0, help="or several to search")
    sample.add_argument("--gen_seed", type=int, default=0, help="with an image's number, the seed of that image")
    sample.add_argument("--no_ema", action="store_true", help="evaluate the weights themselves, not their average")
    sample.add_argument("--no_metrics", action="store_true", help="pictures alone")
    sample.add_argument("--keep_images", action="store_true", help="keep the images once they are measured")
    sample.add_argument("--vae_precision", choices=misc.PRECISIONS, help="of decoding; by default --precision")
    sample.add_argument("--save_confidence", action="store_true", help="also picture each token's confidence")
    sample.add_argument("--save_npz", action="store_true", help="also write the images as ADM's evaluator reads them")
    add_metrics_args(sample)


def add_file_args(parser: argparse.ArgumentParser) -> None:
    """Where everything lies."""
    files = parser.add_argument_group("files")
    files.add_argument("--data_path", default="./data/imagenet", help="folder of train/<class>/<image>, val/ likewise")
    files.add_argument(
        "--use_cached", action="store_true", help="train on cached moments; needs no images, no tokenizer"
    )
    files.add_argument("--cached_path", default="", help="what main_cache.py or tools.pack wrote")
    files.add_argument("--cached_val_path", default="", help="what main_cache.py --split val wrote, for likelihoods")
    files.add_argument("--output_dir", default="./output_dir", help="checkpoints, TensorBoard's logs, samples")
    files.add_argument("--resume", default="", help=f"folder that holds {checkpoint.CHECKPOINT_NAME}")
    add_mirror_arg(files)
    add_skip_arg(files)


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = new_parser(__doc__)
    add_model_args(parser)
    add_training_args(parser)
    add_evaluation_args(parser)
    add_file_args(parser)
    add_run_args(parser, batch_size=16, seed=1, precision="bf16")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for values that cannot work, before anything is read or written."""
    check_bits(args.quant_bits, "--quant_bits")
    check_positive(args, "img_size", "batch_size", "epochs", "accum_iter", "class_num", "eval_bsz", "num_iter")
    check_positive(args, "save_last_freq", "keep_last", "eval_freq", "vae_embed_dim", "vae_stride", "patch_size")
    check_range(args, 0, 1, "attn_dropout", "proj_dropout", "label_drop_prob", "mask_ratio_min", "ema_rate")
    check_range(args, 0, math.inf, "grad_clip", "weight_decay", "warmup_epochs", "start_epoch", "num_workers", "min_lr")
    check_range(args, 0, math.inf, "save_every_steps", "max_bad_steps")
    args.cfg, args.temperature = (v if isinstance(v, list) else [v] for v in (args.cfg, args.temperature))
    for name in ("channels_per_group", "head_dim", "head_depth", "head_heads"):
        if getattr(args, name) is not None:
            check_positive(args, name)
    check_range(args, 0, math.inf, "confidence_noise", "gen_seed", "seed")
    if min(args.temperature) < 0:
        raise errors.UserError(f"--temperature {min(args.temperature)}: it must not be negative")
    if args.evaluate or args.online_eval:
        check_num_images(args.num_images, args.class_num)
    if (args.evaluate or args.evaluate_nll) and not args.resume:
        flag = "--evaluate" if args.evaluate else "--evaluate_nll"
        raise errors.UserError(f"{flag} needs --resume, the folder that holds the weights to measure")
    if args.finetune and (args.evaluate or args.evaluate_nll):
        raise errors.UserError("--finetune is for training: name the weights to measure with --resume")
    if args.use_cached and not args.cached_path and not args.evaluate and not args.evaluate_nll:
        raise errors.UserError("--use_cached needs --cached_path, the folder that main_cache.py wrote")
    if args.use_cached and not args.cached_val_path and (args.evaluate_nll or args.online_nll):
        raise errors.UserError("likelihoods from a cache need --cached_val_path, what main_cache.py --split val wrote")


# --------------------------------------------------------------------------------------------------------------------
# What a run is made of.


def load_data(args: argparse.Namespace, split: str) -> CachedFolder | PackedCache | ImageFolder:
    """Cached moments or images of ``train`` or ``val``, as the flags say, checked against ``--class_num``."""
    mirror = args.mirror and split == "train"
    if args.use_cached:
        root = args.cached_path if split == "train" else args.cached_val_path
        dataset = open_cache(root, mirror=mirror)
    else:
        root = Path(args.data_path) / split
        # Measurements are of all images or none.
        bad_images = BadImages(args.output_dir) if args.skip_bad_images and split == "train" else None
        dataset = ImageFolder(root, image_transform(args.img_size), mirror=mirror, bad_images=bad_images)
    check_classes(dataset.classes, args.class_num, root)
    return dataset


def adopt_tokenizer(args: argparse.Namespace, vae_config: dict, source: str) -> None:
    """Takes latent channels and stride from a tokenizer's or cache's own description."""
    stride = 2 ** (len(vae_config["ch_mult"]) - 1)
    args.vae_embed_dim = misc.check_told("vae_embed_dim", args.vae_embed_dim, 16, vae_config["embed_dim"], source)
    args.vae_stride = misc.check_told("vae_stride", args.vae_stride, 16, stride, source)


def load_tokenizer(
    args: argparse.Namespace, datasets: Sequence[CachedFolder | PackedCache | ImageFolder]
) -> tuple[AutoencoderKL | None, float, bool]:
    """The tokenizer, None where the run does not need it; its latent factor; whether it is built as the published."""
    vae, latent_factor, vae_config = None, None, {}
    if args.evaluate or args.online_eval or not args.use_cached:
        vae, latent_factor = AutoencoderKL.from_pretrained(args.vae_path)
        vae_config = vae.config
        adopt_tokenizer(args, vae_config, args.vae_path)
    for dataset in datasets if args.use_cached else ():
        vae_config, cached_factor = checkpoint.tokenizer_of(dataset.metadata, dataset.root)
        adopt_tokenizer(args, vae_config, dataset.root)
        if latent_factor is not None and not math.isclose(latent_factor, cached_factor, rel_tol=1e-6):
            raise errors.UserError(
                f"{dataset.root} was made with another tokenizer than the run's: latent factors differ"
            )
        latent_factor = cached_factor
        moments, side = dataset[0][0], args.img_size // args.vae_stride
        dataset.shape = (2 * args.vae_embed_dim, side, side)
        if moments.shape != dataset.shape:
            size = dataset.metadata.get("img_size")
            made = f"of shape {list(moments.shape)}" if size is None else f"at --img_size {size}"
            raise errors.UserError(
                f"{dataset.root} holds moments {made}, which --img_size {args.img_size} does not fit"
            )
    misc.check_stride(args.img_size, args.vae_stride * args.patch_size)
    same = {name: vae_config[name] for name in checkpoint.KL16_CONFIG} == checkpoint.KL16_CONFIG
    kl16 = same and math.isclose(latent_factor, checkpoint.KL16_LATENT_FACTOR, rel_tol=1e-6)
    return vae, latent_factor, kl16


def read_channel_order(text: str, channels: int, kl16: bool) -> list[int]:
    """The order that ``--channel_order`` asks for.

    Args:
        channels: of a token.
        kl16: whether the latents are the published tokenizer's.

    Raises:
        UserError: it is no permutation of them, or an order by frequency of latents of which none is known.
    """
    if text == "sequential":
        return list(range(channels))
    if text == "frequency":
        if not kl16 or channels != len(KL16_CHANNEL_ORDER):
            raise errors.UserError(
                "--channel_order frequency is known for the published KL-16 tokenizer and --patch_size 1 only: measure "
                "this one's with tools.channel_order, and pass the file that it writes"
            )
        return list(KL16_CHANNEL_ORDER)
    try:
        order = json.loads(Path(text).read_text())["order"] if text.endswith(".json") else text.split(",")
        order = [int(channel) for channel in order]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise errors.UserError(
            f"--channel_order {text}: neither frequency, sequential, numbers between commas, nor a file of "
            f"channel_order.py ({str(error) or type(error).__name__})"
        ) from error
    if sorted(order) != list(range(channels)):
        raise errors.UserError(f"--channel_order {text}: it must hold each of 0 to {channels - 1} once")
    return order


def build_model(args: argparse.Namespace, config: dict[str, Any], kl16: bool, calibration: dict) -> TokenBridge:
    """The model of the flags; where they leave something open, of a checkpoint's ``config``.

    Args:
        kl16: whether the latents are the published tokenizer's, or a checkpoint's, whatever they are.
        calibration: ``channel_mean`` and ``channel_std``, or nothing.
    """
    names = "img_size vae_stride patch_size vae_embed_dim mask_ratio_min label_drop_prob class_num attn_dropout"
    names += " proj_dropout buffer_size quant_min quant_max"
    kwargs = {name: getattr(args, name) for name in names.split()}
    kwargs["grad_checkpointing"] = args.checkpoint_blocks or args.grad_checkpointing
    channels = args.vae_embed_dim * args.patch_size**2
    if args.channel_order is not None:
        order = read_channel_order(args.channel_order, channels, kl16)
    else:
        order = None if kl16 else list(range(channels))
    asked = {
        "head": args.head,
        "channels_per_group": args.channels_per_group,
        "channel_embed_dim": args.head_dim,
        "channel_depth": args.head_depth,
        "channel_heads": args.head_heads,
        "quantizer": args.quantizer,
        "channel_order": order,
    }
    levels = 2**args.quant_bits
    # Before what follows from these is found to be impossible: groups too large, an order of too few channels.
    for name, value in {"quant_levels": levels, **{n: kwargs[n] for n in ("vae_embed_dim", "patch_size")}}.items():
        if config.get(name, value) != value:
            raise errors.UserError(
                f"{args.resume} was trained differently: {name} is {config[name]} there, {value} here "
                f"({checkpoint.MEANING[name]})"
            )
    adopted = {name: config[name] for name in checkpoint.ADOPTED if name in config}
    kwargs |= adopted | {name: value for name, value in asked.items() if value is not None} | calibration
    try:
        return MODELS[args.model](quant_levels=levels, **kwargs)
    except Exception as error:  # sizes that cannot be, of flags or of a checkpoint, fail in many ways
        raise errors.UserError(errors.reason(error)) from error


def open_checkpoint(args: argparse.Namespace) -> tuple[dict[str, Any], Path | None]:
    """The checkpoint that ``--resume`` names; empty for a fresh start."""
    if not args.resume:
        return {}, None
    measuring = args.evaluate or args.evaluate_nll
    try:
        path = checkpoint.find(args.resume)
    except errors.UserError:
        if measuring or Path(args.resume).resolve() != Path(args.output_dir).resolve():
            raise
        misc.log.info("no %s in %s: starting afresh", checkpoint.CHECKPOINT_NAME, args.resume)
        return {}, None
    return (checkpoint.read_run(path), path) if measuring else checkpoint.read_newest_whole(path)


#: Flags that need not repeat, at their defaults, what a file tells: of weights to measure, and to start from.
MEASURED = ("model", "img_size", "patch_size", "buffer_size", "class_num", "quant_min", "quant_max", "quant_bits")
STARTED = ("model", "buffer_size", "quant_min", "quant_max", "quant_bits")


def adopt_flags(args: argparse.Namespace, config: dict[str, Any], names: Sequence[str]) -> None:
    """Sets the flags that have their defaults to what ``config`` tells of its model."""
    parser, levels = get_args_parser(), config.get("quant_levels")
    told = {**config, "quant_bits": levels.bit_length() - 1} if isinstance(levels, int) else config
    for name in names:
        default = parser.get_default(name)
        if isinstance(told.get(name), type(default)) and getattr(args, name) == default != told[name]:
            if name == "model" and told[name] not in MODELS:
                continue
            setattr(args, name, told[name])
            misc.log.info("--%s %s, as the weights tell", name, told[name])


def open_start(finetune_from: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """The checkpoint that ``--finetune`` names; what it, or else its weights' shapes, tell of its model; its file."""
    path = checkpoint.find(finetune_from)
    content = checkpoint.read_run(path)
    return content, TokenBridge.config_of(content, path), path


CALIBRATION_IMAGES = 10_000


def calibrate(
    args: argparse.Namespace, config: dict, path: Path | None, dataset, vae, latent_factor: float, device: torch.device
) -> dict[str, list[float]]:
    """Means and deviations of the channels for ``--quant_calibrate``; empty without it, or if a checkpoint has them.

    Measured over the training set, or as many of its images as :data:`CALIBRATION_IMAGES`, evenly spaced.

    Raises:
        UserError: the checkpoint was trained without.
    """
    if not args.quant_calibrate or config.get("channel_mean") is not None:
        return {}
    if path is not None:
        raise errors.UserError(
            f"{path} was trained differently: without calibration there, with --quant_calibrate here"
        )
    dataset.set_draws(args.seed, 0)
    chosen = evenly_spaced(dataset, CALIBRATION_IMAGES)
    share = RankSampler(len(chosen), misc.get_rank(), misc.get_world_size())
    loader = make_loader(chosen, args, device, sampler=share, persistent_workers=False)
    vae = None if args.use_cached else vae.to(device)
    mean, deviation = channel_statistics(vae, loader, args.vae_embed_dim, latent_factor, device, args.precision)
    misc.log.info("calibrated: channel deviations from %.3f to %.3f", min(deviation), max(deviation))
    return {"channel_mean": mean, "channel_std": deviation}


@dataclass
class Run:
    """What sampling, measuring and training have in common."""

    args: argparse.Namespace
    device: torch.device
    vae: AutoencoderKL | None
    latent_factor: float
    evaluator: Evaluator | None  # None: pictures alone
    held_out: DataLoader | None  # for likelihoods


# --------------------------------------------------------------------------------------------------------------------
# Evaluation.


ADM_STATS = "fid_stats/adm_in256_stats.npz"  # the usual name of ADM's statistics of ImageNet 256


def make_evaluator(args: argparse.Namespace, device: torch.device) -> Evaluator | None:
    """Everything that metrics need, loaded before the first image is made; None for pictures alone.

    Raises:
        UserError: some of it is missing.
    """
    if args.no_metrics or not (args.evaluate or args.online_eval):
        return None
    if args.fid_stats is None and args.reference is None:
        args.fid_stats = ADM_STATS
    if args.fid_stats is not None and not Path(args.fid_stats).is_file():
        raise errors.UserError(
            f"no FID statistics at {args.fid_stats}: put ADM's for ImageNet 256 there, make others with "
            "main_metrics.py --save_stats and name them with --fid_stats, or pass --no_metrics for pictures alone"
        )
    return Evaluator(args.inception_weights, args.fid_stats, args.reference, device, args.eval_bsz, args.num_workers)


def sampling_settings(args: argparse.Namespace, cfg: float, temperature: float) -> Sampling:
    """The flags' settings at one guidance scale and temperature."""
    names = "num_images eval_bsz num_iter cfg_schedule gen_seed precision order confidence_noise save_confidence"
    names += " vae_precision"
    return Sampling(cfg=cfg, temperature=temperature, **{name: getattr(args, name) for name in names.split()})


def file_identity(path: str | Path) -> dict[str, str | int]:
    """What tells a file from a later one in its place."""
    file = Path(path).stat()
    return {"file": str(path), "size": file.st_size, "mtime_ns": file.st_mtime_ns}


def sample_and_measure(
    run: Run, model: TokenBridge, folder: Path, cfg: float, temperature: float, weights: dict
) -> dict[str, float]:
    """Numbered pictures in ``folder``, a grid of them beside it, and their metrics; those only on the main process."""
    args = run.args
    settings = sampling_settings(args, cfg, temperature)
    evaluate(model, run.vae, run.latent_factor, folder, settings, run.device, weights)
    images = sampled_images(folder, args.num_images)
    if misc.is_main_process():
        samples_grid(images, f"{folder}.png")
        if args.save_confidence:
            maps = confidence_folder(folder)
            samples_grid(sampled_images(maps, args.num_images), f"{maps}.png")
        if args.save_npz:
            export_npz(images, f"{folder}.npz")
    figures = {}
    if run.evaluator is not None:
        try:
            figures = run.evaluator.measure(run.evaluator.features(images))
        except BaseException:
            misc.log.error("measuring failed; the images are kept: python main_metrics.py --images %s", folder)
            raise
    if misc.is_main_process():
        if figures:
            misc.log.info("%s", table(figures))
        about = {"settings": asdict(settings), "weights": weights, "args": vars(args)}
        write_json(results_path(folder), {**figures, "seed": args.gen_seed, **about, **provenance()})
        if run.evaluator is not None and not args.keep_images:
            remove_images(folder)
        misc.log.info("sampled %d images; a grid of them is %s.png", args.num_images, folder)
    misc.barrier()
    return figures


def finished_before(run: Run, folder: Path, cfg: float, temperature: float, weights: dict) -> dict[str, float]:
    """The metrics that an interrupted search with the same command already has of this pair; empty if none."""
    about = {"settings": asdict(sampling_settings(run.args, cfg, temperature)), "weights": weights}
    before = read_results(folder)
    against = ("fid_stats", "reference")
    same_against = all(before.get("args", {}).get(name) == getattr(run.args, name) for name in against)
    done = run.evaluator is not None and same_run(before, about) and same_against
    misc.barrier()  # all processes have looked before one writes
    return {name: before[name] for name in ("images", *TITLES) if name in before} if done else {}


def search(run: Run, model: TokenBridge, weights: dict) -> None:
    """Samples at every given guidance scale and temperature; more than one make a table and a heat map."""
    args, out = run.args, Path(run.args.output_dir)
    pairs = list(product(args.cfg, args.temperature))
    rows = []
    for cfg, temperature in pairs:
        folder = out / ("samples" if len(pairs) == 1 else f"samples-cfg{cfg:g}-t{temperature:g}")
        figures = finished_before(run, folder, cfg, temperature, weights) if len(pairs) > 1 else {}
        figures = figures or sample_and_measure(run, model, folder, cfg, temperature, weights)
        rows.append({"cfg": cfg, "temperature": temperature, **figures})
    if len(pairs) > 1 and run.evaluator is not None and misc.is_main_process():
        write_search(rows, out)
        misc.log.info("wrote %s/search.md, search.json and search.png", out)


def measure_likelihood(run: Run, model: TokenBridge) -> dict[str, float]:
    """Held-out cross-entropy, said in the log."""
    vae = None if run.args.use_cached else run.vae
    figures = held_out_likelihood(model, vae, run.latent_factor, run.held_out, run.device, run.args.precision)
    misc.log.info(
        "held-out cross-entropy over %d images: %.4f nats, %.4f bits a dimension",
        figures["images"],
        figures["nats_per_dim"],
        figures["bits_per_dim"],
    )
    return figures


def evaluate_online(run: Run, model: TokenBridge, epoch: int, writer: SummaryWriter | None) -> None:
    """The measurements of one epoch, to TensorBoard: without guidance and with, and likelihood."""
    args, scalars = run.args, {}
    if args.online_nll:
        figures = measure_likelihood(run, model)
        scalars |= {f"eval/{name}": figures[name] for name in ("nats_per_dim", "bits_per_dim")}
    for cfg, temperature in product(dict.fromkeys([1.0, *args.cfg]), args.temperature) if args.online_eval else ():
        name = f"cfg{cfg:g}" + (f"-t{temperature:g}" if len(args.temperature) > 1 else "")
        folder = Path(args.output_dir) / "online_eval" / f"epoch{epoch:04d}-{name}"
        if misc.is_main_process():
            remove_images(folder)  # perhaps of another run: a restarted one does not come back to this epoch
        misc.barrier()
        figures = sample_and_measure(run, model, folder, cfg, temperature, {"epoch": epoch, "ema": not args.no_ema})
        scalars |= {f"eval/{key}-{name}": value for key, value in figures.items() if key in TITLES}
    if writer is not None:
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, epoch + 1)


# --------------------------------------------------------------------------------------------------------------------
# Training.


def make_training_loader(dataset, device: torch.device, args: argparse.Namespace) -> DataLoader:
    """Shuffled whole batches, this process's share."""
    sampler = ShuffledRankSampler(dataset, misc.get_world_size(), misc.get_rank(), shuffle=True, seed=args.seed)
    # Workers start anew with each epoch, and so hear of its coins.
    options = {"drop_last": True, "persistent_workers": False}
    loader = make_loader(dataset, args, device, sampler=sampler, **options)
    if not steps_per_epoch(loader, args.accum_iter):
        whole = args.batch_size * args.accum_iter * misc.get_world_size()
        raise errors.UserError(
            f"{len(dataset)} images do not fill one step of {whole}; lower --batch_size or --accum_iter"
        )
    return loader


def resume(
    content: dict, path: Path | None, model, ema, optimizer, scaler, steps: int, args: argparse.Namespace
) -> int:
    """Takes up a checkpoint's weights, and its optimizer and place where it has them.

    Args:
        steps: of an epoch of this run.

    Returns:
        the steps already taken of epoch ``args.start_epoch``.
    """
    if not content:
        return 0
    start_step = 0
    load_weights(model, content, path, ema=False)
    ema.module.load_state_dict(model.state_dict())
    if "model_ema" in content:
        load_weights(ema.module, content, path, ema=True)
    if "optimizer" in content and "epoch" in content:
        before = content.get("args")
        before = vars(before) if isinstance(before, argparse.Namespace) else before
        frozen = before.get("freeze", []) if isinstance(before, dict) else []
        if frozen != args.freeze:
            raise errors.UserError(
                f"{path} was trained with --freeze {frozen or 'nothing'}, not {args.freeze or 'nothing'}: to go on "
                "differently, start anew from it with --finetune and another --output_dir"
            )
        load_optimizer(optimizer, content["optimizer"], path)
        args.start_epoch = content["epoch"] + 1
        of = content.get("steps_per_epoch", steps)
        start_step = round(content.get("step", 0) * steps / of)
        processes = content.get("world_size", misc.get_world_size())
        if of != steps or processes != misc.get_world_size():
            misc.log.warning(
                "%s was written by %d processes with %d steps an epoch, this run has %d with %d: it continues at the "
                "same place of the epoch, but draws and order of images are not those of an unbroken run",
                *(path, processes, of, misc.get_world_size(), steps),
            )
    if scaler.is_enabled() and content.get("scaler"):
        load_scaler(scaler, content["scaler"], path)
    misc.log.info("resumed from %s, continuing at epoch %d, step %d", path, args.start_epoch, start_step)
    return start_step


def save(model: TokenBridge, ema, optimizer, scaler, epoch: int, step: int, steps: int, args) -> None:
    """Writes ``checkpoint-last.pth`` (README, section Files) from the main process.

    Args:
        epoch: the last finished.
        step: steps taken of the next one, of ``steps`` each has.
    """
    if not misc.is_main_process():
        return
    averaged = ema.module.state_dict()
    content = {
        "model": model.state_dict(),
        "model_ema": {name: averaged[name] for name, _ in model.named_parameters()},
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "step": step,
        "steps_per_epoch": steps,
        "world_size": misc.get_world_size(),
        "config": {**model.config, **model.metadata},
        "args": vars(args),
    }
    if scaler.is_enabled():
        content["scaler"] = scaler.state_dict()
    checkpoint.save(Path(args.output_dir) / checkpoint.CHECKPOINT_NAME, content, args.keep_last)


def train(run: Run, model: TokenBridge, loader: DataLoader, content: dict, path: Path | None) -> None:
    """Trains ``model`` from ``content`` on, saving, and measuring where asked for."""
    args, device = run.args, run.device
    if misc.is_main_process():
        remove_parts(Path(args.output_dir).glob(".*.part"))
    # The average starts as a copy of the weights that all processes have once DDP has shared those of the first.
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if misc.get_world_size() > 1 else model
    ema = ModelEmaV3(model, decay=args.ema_rate, exclude_buffers=True)
    if args.compile:
        model.compile_blocks()
    batch = args.batch_size * args.accum_iter * misc.get_world_size()
    if args.lr is None:
        args.lr = args.blr * batch / 256
    groups = misc.add_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    steps = steps_per_epoch(loader, args.accum_iter)
    start_step = resume(content, path, model, ema, optimizer, scaler, steps, args)
    content.clear()
    peak = misc.matmul_flops(device, args.precision)
    misc.log.info("whole batch %d, learning rate %.3g, matrix products at %.2f TFLOP/s", batch, args.lr, peak / 1e12)

    if args.start_epoch >= args.epochs:
        misc.log.info("all %d epochs are done: nothing to train", args.epochs)
    done = args.start_epoch * steps + start_step
    writer = SummaryWriter(args.output_dir) if misc.is_main_process() else None
    vae = None if args.use_cached else run.vae
    to_latents = partial(latents_from, vae=vae, latent_factor=run.latent_factor)
    bar = misc.progress(total=args.epochs * steps, initial=done, unit="step", desc="training")
    bad_steps = BadSteps(args.max_bad_steps, args.output_dir)
    with bar, misc.StopSignals() as stop_signals:
        for epoch in range(args.start_epoch, args.epochs):
            loader.sampler.set_epoch(epoch)
            loader.sampler.start = start_step * args.accum_iter * args.batch_size
            loader.dataset.set_draws(args.seed, epoch)

            def after_step(taken: int, settle: Callable[[], None], epoch: int = epoch) -> None:
                stop = stop_signals.agreed()
                due = args.save_every_steps and (epoch * steps + taken) % args.save_every_steps == 0
                if stop or (due and taken < steps):
                    settle()
                    finished, step = divmod(epoch * steps + taken, steps)
                    save(model, ema, optimizer, scaler, finished - 1, step, steps, args)
                if stop:
                    misc.barrier()
                    raise errors.Preempted(
                        f"by {stop_signals.heard or 'another process'}, saved after epoch {epoch}, step {taken - 1}; "
                        f"start the same command with --resume {args.output_dir} to continue"
                    )

            train_one_epoch(
                wrapped, ema, optimizer, scaler, loader, epoch, to_latents, device, args, bar, writer, peak,
                bad_steps, start_step, after_step,
            )  # fmt: skip
            start_step = 0
            if isinstance(loader.dataset, ImageFolder) and loader.dataset.bad_images is not None:
                loader.dataset.bad_images.count()
            last = epoch + 1 == args.epochs
            whole = args.save_every_steps and (epoch + 1) * steps % args.save_every_steps == 0
            if last or whole or (epoch + 1) % args.save_last_freq == 0:
                save(model, ema, optimizer, scaler, epoch, 0, steps, args)
            if last or (epoch + 1) % args.eval_freq == 0:
                evaluate_online(run, model if args.no_ema else ema.module, epoch, writer)
    if writer is not None:
        writer.close()


# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with misc.processes(args.device) as device:
        measuring = args.evaluate or args.evaluate_nll
        content, path = open_checkpoint(args) if measuring else ({}, None)
        adopt_flags(args, content.get("config", {}), MEASURED)
        start = open_start(args.finetune) if args.finetune and not measuring else None
        if start is not None:
            adopt_flags(args, start[1], STARTED)
        check_args(args)
        if not measuring:
            content, path = open_checkpoint(args)
        dataset = None if measuring else load_data(args, "train")
        val = load_data(args, "val") if args.evaluate_nll or args.online_nll else None
        vae, latent_factor, kl16 = load_tokenizer(args, [data for data in (dataset, val) if data is not None])
        misc.seed_everything(args.seed + misc.get_rank())
        config = content.get("config", {})
        if start is not None and path is None:
            config = finetune.adopted_config(start[1], args, latent_factor)
        calibration = calibrate(args, config, path, dataset, vae, latent_factor, device)
        model = build_model(args, config, kl16 or path is not None or "channel_order" in config, calibration)
        if path is not None:
            checkpoint.check_config(config, model, latent_factor, path)
        if start is not None and path is None:
            finetune.start_from(model, *start, ema=not args.no_ema)
        start = None  # it may lie in memory
        model.metadata = {"model": args.model, "latent_factor": latent_factor}
        if measuring:
            load_weights(model, content, path, ema=not args.no_ema)
            content.clear()
        else:
            model.metadata["class_names"] = dataset.classes
            finetune.freeze(model, args.freeze)
        misc.log.info("%s: %.2fM parameters", args.model, sum(p.numel() for p in model.parameters()) / 1e6)
        model, vae = model.to(device), None if vae is None else vae.to(device, memory_format=torch.channels_last)
        if measuring and args.compile:
            model.compile_blocks()
        loader = None if measuring else make_training_loader(dataset, device, args)
        share = None if val is None else RankSampler(len(val), misc.get_rank(), misc.get_world_size())
        held_out = None if val is None else make_loader(val, args, device, sampler=share)
        run = Run(args, device, vae, latent_factor, make_evaluator(args, device), held_out)
        if args.evaluate_nll:
            figures = measure_likelihood(run, model)
            if misc.is_main_process():
                write_json(
                    Path(args.output_dir) / "likelihood.json", {**figures, "resume": args.resume, **provenance()}
                )
        if args.evaluate:
            vae_file = checkpoint.located(args.vae_path, checkpoint.VAE_NAMES)
            weights = {"ema": not args.no_ema, "model": file_identity(path), "vae": file_identity(vae_file)}
            search(run, model, weights)
        if not measuring:
            train(run, model, loader, content, path)


if __name__ == "__main__":
    errors.run(main)
