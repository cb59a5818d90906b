"""Trains a TokenBridge, or samples from one (torchrun or plain python)."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from engine_tokenbridge import Trainer, channel_statistics, train
from evaluation import (
    Run,
    check_num_images,
    evaluate_online,
    make_evaluator,
    measure_likelihood,
    search,
    weights_identity,
)
from models.heads import HEADS
from models.quantizer import QUANTIZERS
from models.sampling import SamplingOptions, check_guidance, check_head_options
from models.tokenbridge import MODELS, TokenBridge, sizes_of
from models.tokenizer import CachedMoments, Encoder, Tokenizer
from util import distributed, errors
from util.args import (
    DATA_PATH,
    add_column_args,
    add_dry_run_arg,
    add_ema_args,
    add_metrics_args,
    add_mirror_arg,
    add_model_args,
    add_run_args,
    add_sampling_args,
    add_skip_arg,
    check_bits,
    check_positive,
    check_range,
    check_same_flags,
    new_parser,
)
from util.checkpoint import finetune, hub
from util.checkpoint.files import CHECKPOINT_NAME
from util.checkpoint.load import load_weights
from util.checkpoint.runs import (
    check_folder_is_free,
    check_newest_checkpoint,
    find_checkpoint,
    find_checkpoint_to_resume,
    read_newest_checkpoint,
    read_run,
)
from util.checkpoint.vae_files import tokenizer_config
from util.config import (
    EVALUATE,
    FINETUNE,
    KL16_LATENT_FACTOR,
    RESUME,
    Start,
    TokenizerInfo,
    resolve,
)
from util.data.caches import cache_metadata
from util.data.loaders import (
    Data,
    check_same_inputs,
    data_root,
    evenly_spaced,
    load_data,
    loader_of_all,
    training_loader,
)
from util.files import remove_parts, write_json
from util.log import log
from util.precision import PRECISIONS
from util.process_group import process_group
from util.provenance import provenance
from util.rng import seed_everything
from util.signals import StopSignals
from util.training_state import TrainingSettings

# --------------------------------------------------------------------------------------------------------------------
# The command line.


def add_training_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of training."""
    train = parser.add_argument_group("training")
    train.add_argument(
        "--finetune",
        default="",
        help="start from these weights (file, folder, hf://owner/repo/path) as far as they fit",
    )
    train.add_argument(
        "--freeze",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="parameters that stay: encoder_blocks.*, class_emb.*",
    )
    train.add_argument("--epochs", type=int, default=400, help="passes over the training images")
    train.add_argument(
        "--accum_iter", type=int, default=1, help="batches whose gradients make one step"
    )
    train.add_argument(
        "--lr", type=float, help="peak learning rate; by default blr x whole batch / 256"
    )
    train.add_argument(
        "--blr", type=float, default=1e-4, help="base learning rate, for a batch of 256"
    )
    train.add_argument(
        "--min_lr", type=float, default=0.0, help="learning rate at the end of the cosine"
    )
    text = "learning rate after the warm-up: half a cosine down to --min_lr, or --lr throughout"
    train.add_argument("--lr_schedule", choices=["cosine", "constant"], default="cosine", help=text)
    text = "epochs over which the learning rate rises from 0"
    train.add_argument("--warmup_epochs", type=float, default=100, help=text)
    train.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the blocks; minutes before the first step",
    )
    train.add_argument(
        "--weight_decay",
        type=float,
        default=0.02,
        help="AdamW's; biases and one-dimensional weights have none",
    )
    train.add_argument(
        "--grad_clip",
        type=float,
        default=1.0,
        help="largest gradient norm; 0 for no limit (release: 3.0)",
    )
    add_ema_args(train, 0.9999)
    train.add_argument(
        "--start_epoch", type=int, default=0, help="set by --resume where the checkpoint tells"
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
    add_dry_run_arg(train)
    train.add_argument(
        "--keep_last", type=int, default=2, help="checkpoints kept, the newest included"
    )


def add_evaluation_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of sampling and evaluation."""
    sample = parser.add_argument_group("sampling and evaluation")
    sample.add_argument(
        "--evaluate", action="store_true", help="sample from --resume's weights, measure, and stop"
    )
    sample.add_argument(
        "--online_eval", action="store_true", help="sample and measure during training, too"
    )
    sample.add_argument(
        "--evaluate_nll",
        action="store_true",
        help="measure --resume's held-out likelihood, and stop",
    )
    sample.add_argument("--online_nll", action="store_true", help="measure it during training, too")
    sample.add_argument(
        "--eval_freq", type=int, default=40, help="epochs between two measurements during training"
    )
    sample.add_argument(
        "--eval_bsz", type=int, default=64, help="images sampled at once on each device"
    )
    sample.add_argument("--num_images", type=int, default=50000, help="over all classes evenly")
    add_sampling_args(sample, SamplingOptions, search=True)
    sample.add_argument(
        "--gen_seed", type=int, default=0, help="with an image's number, the seed of that image"
    )
    sample.add_argument(
        "--no_ema", action="store_true", help="evaluate the weights themselves, not their average"
    )
    sample.add_argument("--no_metrics", action="store_true", help="pictures alone")
    sample.add_argument(
        "--keep_images", action="store_true", help="keep the images once they are measured"
    )
    sample.add_argument(
        "--vae_precision", choices=PRECISIONS, help="of decoding; by default --precision"
    )
    sample.add_argument(
        "--save_confidence", action="store_true", help="also picture each token's confidence"
    )
    sample.add_argument(
        "--save_npz",
        action="store_true",
        help="also write the images as ADM's evaluator reads them",
    )
    add_metrics_args(sample)


def add_file_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name files and folders."""
    files = parser.add_argument_group("files")
    files.add_argument("--data_path", default="./data/imagenet", help=DATA_PATH)
    files.add_argument(
        "--use_cached",
        action="store_true",
        help="train on cached moments; needs no images, no tokenizer",
    )
    files.add_argument("--cached_path", default="", help="what main_cache.py or tools.pack wrote")
    files.add_argument(
        "--cached_val_path",
        default="",
        help="what main_cache.py --split val wrote, for likelihoods",
    )
    files.add_argument(
        "--output_dir", default="./output_dir", help="checkpoints, TensorBoard's logs, samples"
    )
    files.add_argument(
        "--resume",
        default="",
        help="a run's folder or file, safetensors or not, or hf://owner/repo/path",
    )
    add_mirror_arg(files)
    add_skip_arg(files)
    add_column_args(files)


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = new_parser(__doc__)
    add_model_args(parser, {"model": MODELS, "head": HEADS, "quantizer": QUANTIZERS})
    add_training_args(parser)
    add_evaluation_args(parser)
    add_file_args(parser)
    add_run_args(parser, batch_size=16, seed=1, precision="bf16")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for values that cannot work, before anything is read or written."""
    check_bits(args.quant_bits, "--quant_bits")
    check_positive(
        args, "img_size", "batch_size", "epochs", "accum_iter", "class_num", "eval_bsz", "num_iter"
    )
    check_positive(
        args,
        "save_last_freq",
        "keep_last",
        "eval_freq",
        "vae_embed_dim",
        "vae_stride",
        "patch_size",
    )
    check_range(
        args, 0, 1, "attn_dropout", "proj_dropout", "label_drop_prob", "mask_ratio_min", "ema_rate"
    )
    check_range(
        args,
        0,
        math.inf,
        "grad_clip",
        "weight_decay",
        "warmup_epochs",
        "start_epoch",
        "num_workers",
        "min_lr",
    )
    check_range(args, 0, math.inf, "save_every_steps", "max_bad_steps")
    args.cfg, args.temperature = (
        v if isinstance(v, list) else [v] for v in (args.cfg, args.temperature)
    )
    for name in ("channels_per_group", "head_dim", "head_depth", "head_heads"):
        if getattr(args, name) is not None:
            check_positive(args, name)
    check_range(args, 0, math.inf, "confidence_noise", "gen_seed", "seed")
    for name in ("cfg", "temperature"):
        if not all(0 <= value < math.inf for value in getattr(args, name)):
            raise errors.UserError(
                f"--{name} {min(getattr(args, name))}: it must be a number, and not negative"
            )
    check_positive(args, "num_images")
    if args.online_eval and not args.no_metrics:
        check_num_images(args.num_images, args.class_num)
    if (args.evaluate or args.evaluate_nll) and not args.resume:
        flag = "--evaluate" if args.evaluate else "--evaluate_nll"
        raise errors.UserError(
            f"{flag} needs --resume, the folder that holds the weights to measure"
        )
    if args.finetune and (args.evaluate or args.evaluate_nll):
        raise errors.UserError(
            "--finetune is for training: name the weights to measure with --resume"
        )
    if args.use_cached and not args.cached_path and not args.evaluate and not args.evaluate_nll:
        raise errors.UserError(
            "--use_cached needs --cached_path, the folder that main_cache.py wrote"
        )
    if args.skip_bad_images and (args.evaluate or args.evaluate_nll):
        raise errors.UserError(
            "--skip_bad_images is for training: measurements are of all images or none; remove it"
        )
    if not args.use_cached:
        unused = [name for name in ("cached_path", "cached_val_path") if getattr(args, name)]
        if unused and not args.evaluate:
            raise errors.UserError(
                f"--{unused[0]} is read with --use_cached only: add that flag, or remove this one"
            )
    if args.use_cached and not args.cached_val_path and (args.evaluate_nll or args.online_nll):
        raise errors.UserError(
            "likelihoods from a cache need --cached_val_path, what main_cache.py --split val wrote"
        )


# --------------------------------------------------------------------------------------------------------------------
# The parts of a run: checkpoint, tokenizer, model.


def open_start(args: argparse.Namespace) -> Start:
    """The checkpoint that ``--resume`` or ``--finetune`` names; a fresh start without one.

    The main process reads it, so that the file need not lie on other machines; these have a Start without content.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    content = {}

    def read() -> Start:
        start = read_start(args)
        content.update(start.content)
        return dataclasses.replace(start, content={})

    if args.resume and not (args.evaluate or args.evaluate_nll or hub.is_address(args.resume)):
        check_newest_checkpoint(args.resume)
    return dataclasses.replace(distributed.on_rank_0(read), content=content)


def read_start(args: argparse.Namespace) -> Start:
    """:func:`open_start` by this process alone.

    ``--resume`` with the run's own ``--output_dir`` is a fresh start, or one from ``--finetune``, until it holds one.
    """
    measuring = args.evaluate or args.evaluate_nll
    if args.resume:
        path = (
            find_checkpoint(args.resume)
            if measuring
            else find_checkpoint_to_resume(args.resume, args.output_dir)
        )
        if path is not None:
            content, path = (read_run(path), path) if measuring else read_newest_checkpoint(path)
            return Start(
                EVALUATE if measuring else RESUME, content, path, content.get("config", {})
            )
    check_folder_is_free(args.output_dir, args.resume, CHECKPOINT_NAME)
    if args.finetune:
        path = find_checkpoint(args.finetune)
        content = read_run(path)
        return Start(FINETUNE, content, path, TokenBridge.config_of(content, path))
    return Start()


def load_tokenizer(
    args: argparse.Namespace, defaults: argparse.Namespace, splits: Sequence[str], start: Start
) -> tuple[Tokenizer | None, TokenizerInfo]:
    """The tokenizer, None where cached moments are enough, and its description, by itself or by the caches.

    Raises:
        UserError: it cannot be read, is not named, or a cache was made with another one.
    """
    tokenizer, found = None, []
    roots = [data_root(args, split) for split in splits]
    named = args.vae_path != defaults.vae_path
    needed = args.evaluate or args.online_eval or not args.use_cached
    factor = start.config.get("latent_factor", KL16_LATENT_FACTOR)
    if (
        needed
        and not named
        and not math.isclose(factor, KL16_LATENT_FACTOR, rel_tol=1e-6)
        and start.use != FINETUNE
    ):
        told = f"{start.path} was trained with another tokenizer than KL-16, of latent factor {factor:.4g}"
        raise errors.UserError(f"{told}: name its file with --vae_path")
    if needed or named:
        tokenizer = Tokenizer.from_pretrained(args.vae_path)
        found.append(tokenizer.info)
    for root in roots if args.use_cached else ():
        metadata = cache_metadata(root)
        found.append(
            TokenizerInfo(*tokenizer_config(metadata, root), root, metadata.get("vae_sha256"))
        )
    for other, later in combinations(found, 2):
        if not other.same_factor(later.latent_factor):
            differing = "latent factors"
        elif not other.same_weights(later.sha256):
            differing = "weights"
        else:
            continue
        raise errors.UserError(
            f"{later.source} was made with another tokenizer than {other.source}: {differing} differ"
        )
    known = next((each.sha256 for each in found if each.sha256 is not None), None)
    return tokenizer if needed else None, found[-1]._replace(sha256=known)


def load_inputs(
    args: argparse.Namespace, defaults: argparse.Namespace, splits: Sequence[str], start: Start
) -> tuple[Tokenizer | None, TokenizerInfo, dict, dict[str, Data]]:
    """Load what this process reads itself, without exchanging anything with the other ranks.

    Returns:
        the tokenizer and its description (:func:`load_tokenizer`), the model's arguments, and the data sets by split.

    Raises:
        UserError: something is missing, damaged, or does not fit the rest.
    """
    tokenizer, info = load_tokenizer(args, defaults, splits, start)
    config = resolve(args, defaults, MODELS, sizes_of, info, start)
    if args.evaluate and not args.no_metrics:  # the number of classes is that of the weights
        check_num_images(args.num_images, args.class_num)
    data, classes = {}, None if start.use == FINETUNE else start.config.get("class_names")
    for split in splits:
        data[split] = load_data(args, split, info, classes)
        classes = data[split].classes
    return tokenizer, info, config, data


CALIBRATION_IMAGES = 10_000


def calibrate(
    args: argparse.Namespace, dataset: Data, encoder: Encoder, channels: int, device: torch.device
) -> dict[str, list[float]]:
    """Measure mean and standard deviation of the ``channels`` of the latents.

    They are measured over :data:`CALIBRATION_IMAGES` training images, evenly spaced.
    """
    dataset.set_draws(args.seed, 0)
    images = evenly_spaced(dataset, CALIBRATION_IMAGES)
    loader = loader_of_all(images, device, args, persistent_workers=False)
    if isinstance(encoder, Tokenizer):
        encoder.to(device)
    mean, std = channel_statistics(encoder, loader, channels, device, args.precision)
    log.info("calibrated: standard deviations of channels from %.3f to %.3f", min(std), max(std))
    return {"channel_mean": mean, "channel_std": std}


def build_model(
    args: argparse.Namespace,
    config: dict,
    start: Start,
    device: torch.device,
    classes: Sequence[str] | None,
) -> TokenBridge:
    """The model that ``config`` describes, with the weights of the checkpoint that the run starts from, or drawn ones.

    A run that is resumed gets its weights later, with the rest of its state.

    Args:
        classes: names of the classes to train on.

    Raises:
        UserError: sizes that do not fit each other, options of sampling or weights that do not fit the model.
    """

    def construct() -> TokenBridge:
        trained = start.config if start.use == EVALUATE else config
        try:
            model = MODELS[args.model](**config)
            check_head_options(model.head, args)
            for cfg in args.cfg if args.evaluate or args.online_eval else ():
                check_guidance(trained.get("label_drop_prob", 0.1), cfg)
            return model
        except (
            Exception
        ) as error:  # impossible sizes, of flags or of a checkpoint, fail in many ways
            raise errors.UserError(errors.reason(error)) from error

    model = distributed.on_all_ranks(construct)

    def load() -> None:
        if start.use == FINETUNE:
            finetune.start_from(
                model, start.content, start.config, start.path, not args.no_ema, classes
            )
        elif start.use == EVALUATE:
            load_weights(model, start.content, start.path, ema=not args.no_ema)

    distributed.on_rank_0(load)
    if start.use != RESUME:
        start.content.clear()  # it may lie in memory
    distributed.on_all_ranks(lambda: model.to(device))
    distributed.broadcast_tensors(model.state_dict().values())
    return model


# --------------------------------------------------------------------------------------------------------------------
# Training.


def train_model(
    run: Run, model: TokenBridge, loader: DataLoader, start: Start, settings: TrainingSettings
) -> None:
    """Train ``model`` from the epoch and step of ``start``; save, and measure if flags ask for it."""
    args = run.args
    if distributed.is_main_process() and not args.dry_run:
        remove_parts(Path(args.output_dir).glob(".*.part"))
    trainer = Trainer(model, settings, loader, run.encoder)
    state = trainer.state
    if start.use == RESUME:
        state.load(start.content, start.path)
        start.content.clear()
    if distributed.get_world_size() > 2:
        trainer.order_gradients((args.batch_size, *model.latent_shape))
    measured_model = state.model if args.no_ema else state.ema_model

    def measure(epoch: int, writer: SummaryWriter | None, stop_signals: StopSignals) -> None:
        evaluate_online(run, measured_model, epoch, writer, stop_signals)

    train(trainer, measure, save_before_measuring=args.online_eval or args.online_nll)


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device, args.deterministic, args.precision) as device:
        # Flags, and the files that they name
        check_same_flags(args, device)
        distributed.on_all_ranks(lambda: check_args(args))
        measuring = args.evaluate or args.evaluate_nll
        splits = ["train"] * (not measuring) + ["val"] * (args.evaluate_nll or args.online_nll)
        start = open_start(args)
        defaults = get_args_parser().parse_args([])
        tokenizer, info, config, data = distributed.on_all_ranks(
            lambda: load_inputs(args, defaults, splits, start)
        )
        check_same_inputs(data, tokenizer and tokenizer.vae)
        seed_everything(args.seed + distributed.get_rank())
        cached = CachedMoments(info.latent_factor, info.deterministic)
        encoder = cached if args.use_cached else tokenizer

        # Model
        if args.quant_calibrate and config["channel_mean"] is None:
            config |= calibrate(args, data["train"], encoder, info.config["embed_dim"], device)
        classes = None if measuring else data["train"].classes
        model = build_model(args, config, start, device, classes)
        model.metadata = {"model": args.model, "latent_factor": info.latent_factor}
        if (args.evaluate or args.online_eval) and args.num_iter > model.seq_len:
            log.info(
                "--num_iter %d is reduced to the number of tokens, %d", args.num_iter, model.seq_len
            )
        parameters = sum(parameter.numel() for parameter in model.parameters())
        log.info("%s: %.2fM parameters", args.model, parameters / 1e6)

        # Data and metrics
        if tokenizer is not None:
            distributed.on_all_ranks(
                lambda: tokenizer.to(device, memory_format=torch.channels_last)
            )
        held_out = loader_of_all(data["val"], device, args) if "val" in data else None
        loader = None
        if not measuring:
            loader = distributed.on_all_ranks(lambda: training_loader(data["train"], device, args))
        run = Run(args, device, tokenizer, encoder, make_evaluator(args, device), held_out)

        # Train
        if not measuring:
            model.metadata["class_names"] = classes
            saved_sha256 = start.config.get("vae_sha256") if start.use == RESUME else None
            if (vae_sha256 := info.sha256 or saved_sha256) is not None:
                model.metadata["vae_sha256"] = vae_sha256
            distributed.on_all_ranks(lambda: finetune.freeze(model, args.freeze))
            if args.lr is None:
                batch = args.batch_size * args.accum_iter * distributed.get_world_size()
                args.lr = args.blr * batch / 256
            train_model(run, model, loader, start, TrainingSettings.from_args(args))
            return

        # Or measure
        if args.compile:
            model.compile_blocks()
        if args.evaluate_nll:
            metrics = {**measure_likelihood(run, model), "resume": args.resume, **provenance()}
            if distributed.is_main_process():
                write_json(Path(args.output_dir) / "likelihood.json", metrics)
        if args.evaluate:
            search(run, model, weights_identity(run, model))


if __name__ == "__main__":
    errors.run(main)
