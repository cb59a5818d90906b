"""Train a TokenBridge, or sample from one and measure it (torchrun or plain python)."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import util.interpreter  # noqa: F401, before all packages

import torch
from torch.utils.data import DataLoader

from engine_tokenbridge import Trainer, channel_statistics, train
from evaluation import (
    Run,
    check_num_images,
    evaluate_online,
    make_evaluator,
    measure_likelihood,
    sampling_settings,
    search,
    weights_identity,
)
from models.heads import HEADS
from models.quantizer import QUANTIZERS
from models.sampling import SamplingOptions, check_guidance, check_head_options, sampling_plan
from models.tokenbridge import MODELS, TokenBridge, sizes_of
from models.tokenizer import CachedMoments, LatentEncoder, Tokenizer
from util import distributed, errors
from util.args import (
    DATA_PATH,
    add_column_args,
    add_metrics_args,
    add_mirror_arg,
    add_model_args,
    add_run_args,
    add_sampling_args,
    add_skip_arg,
    add_training_args,
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
from util.dashboards import RunLog, check_dashboard
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
from util.training_settings import TrainingSettings

# --------------------------------------------------------------------------------------------------
# Command line


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of training."""
    train = parser.add_argument_group("training")
    train.add_argument(
        "--finetune",
        default="",
        help="start from the weights of this model (file, folder, hf://owner/repo/path); "
        "weights that do not fit are initialized",
    )
    train.add_argument(
        "--freeze",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="parameters that are not trained, such as encoder_blocks.* or class_emb.*",
    )
    text = "peak learning rate; by default --blr x global batch size / 256"
    train.add_argument("--lr", type=float, help=text)
    text = "base learning rate, for a global batch size of 256"
    train.add_argument("--blr", type=float, default=1e-4, help=text)
    add_training_args(train, TrainingSettings)


def add_evaluation_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of sampling and evaluation."""
    sample = parser.add_argument_group("sampling and evaluation")
    sample.add_argument(
        "--evaluate",
        action="store_true",
        help="instead of training, sample from the weights in --resume and measure the images",
    )
    sample.add_argument(
        "--online_eval", action="store_true", help="sample and measure during training, too"
    )
    sample.add_argument(
        "--evaluate_nll",
        action="store_true",
        help="instead of training, measure the held-out likelihood of the weights in --resume",
    )
    sample.add_argument(
        "--online_nll",
        action="store_true",
        help="measure the held-out likelihood during training, too",
    )
    sample.add_argument(
        "--eval_bsz", type=int, default=64, help="images sampled at once on each device"
    )
    sample.add_argument(
        "--num_images", type=int, default=50000, help="images to sample, evenly over all classes"
    )
    add_sampling_args(sample, SamplingOptions, search=True)
    sample.add_argument(
        "--gen_seed",
        type=int,
        default=0,
        help="seed of sampling; each image draws from it and the image's number",
    )
    sample.add_argument(
        "--no_ema", action="store_true", help="evaluate the trained weights instead of their EMA"
    )
    sample.add_argument(
        "--no_metrics", action="store_true", help="sample images without measuring them"
    )
    sample.add_argument(
        "--keep_images",
        action="store_true",
        help="keep the images after measuring; by default they are deleted",
    )
    sample.add_argument(
        "--vae_precision",
        choices=PRECISIONS,
        help="precision of the tokenizer's decoder; by default --precision",
    )
    sample.add_argument(
        "--save_confidence",
        action="store_true",
        help="also write maps of the confidence of each image's tokens",
    )
    sample.add_argument(
        "--save_npz",
        action="store_true",
        help="also write all images to one .npz, for ADM's evaluator",
    )
    add_metrics_args(sample)


def add_file_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name files and folders."""
    files = parser.add_argument_group("files")
    files.add_argument("--data_path", default="./data/imagenet", help=DATA_PATH)
    files.add_argument(
        "--use_cached",
        action="store_true",
        help="train on cached moments; needs neither images nor tokenizer",
    )
    files.add_argument(
        "--cached_path", default="", help="training cache of main_cache.py or tools.pack"
    )
    files.add_argument(
        "--cached_val_path",
        default="",
        help="validation cache of main_cache.py --split val, for likelihoods",
    )
    files.add_argument(
        "--output_dir",
        default="./output_dir",
        help="folder of checkpoints, TensorBoard logs and samples",
    )
    files.add_argument(
        "--resume",
        default="",
        help="checkpoint to continue or evaluate: folder of a run, .pth or .safetensors file, "
        "or hf://owner/repo/path",
    )
    add_mirror_arg(files)
    add_skip_arg(files)
    add_column_args(files)


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    add_model_args(parser, {"model": MODELS, "head": HEADS, "quantizer": QUANTIZERS})
    add_training_flags(parser)
    add_evaluation_args(parser)
    add_file_args(parser)
    add_run_args(parser, batch_size=16, seed=1, precision="bf16")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for impossible flags, before files are read or written."""
    measuring = args.evaluate or args.evaluate_nll

    # Ranges
    check_bits(args.quant_bits, "--quant_bits")
    check_positive(
        args, "img_size", "batch_size", "epochs", "accum_iter", "class_num", "eval_bsz", "num_iter"
    )
    check_positive(args, "save_last_freq", "keep_last", "eval_freq")
    check_positive(args, "vae_embed_dim", "vae_stride", "patch_size")
    check_range(
        args, 0, 1, "attn_dropout", "proj_dropout", "label_drop_prob", "mask_ratio_min", "ema_rate"
    )
    check_range(args, 0, math.inf, "grad_clip", "weight_decay", "warmup_epochs", "start_epoch")
    check_range(args, 0, math.inf, "num_workers", "min_lr", "save_every_steps", "max_bad_steps")
    check_range(args, 0, math.inf, "keep_every")
    for name in ("channels_per_group", "head_dim", "head_depth", "head_heads"):
        if getattr(args, name) is not None:
            check_positive(args, name)
    check_range(args, 0, math.inf, "confidence_noise", "gen_seed", "seed")
    for name in ("cfg", "temperature"):
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        setattr(args, name, values)
        if not all(0 <= value < math.inf for value in values):
            raise errors.UserError(f"--{name} {min(values)}: it must be a number, and not negative")
    check_positive(args, "num_images")
    if args.online_eval and not args.no_metrics:
        check_num_images(args.num_images, args.class_num)

    # Flags that need or exclude others
    check_dashboard(args.log)
    if measuring and not args.resume:
        flag = "--evaluate" if args.evaluate else "--evaluate_nll"
        raise errors.UserError(
            f"{flag} needs --resume, the folder that holds the weights to measure"
        )
    if args.dry_run and measuring:
        raise errors.UserError("--dry_run is for training: remove it")
    if args.finetune and measuring:
        raise errors.UserError(
            "--finetune is for training: name the weights to measure with --resume"
        )
    if args.use_cached and not args.cached_path and not measuring:
        raise errors.UserError(
            "--use_cached needs --cached_path, the folder that main_cache.py wrote"
        )
    if args.skip_bad_images and measuring:
        raise errors.UserError(
            "--skip_bad_images is for training, because measurements must cover all images: "
            "remove it"
        )
    if not args.use_cached and not args.evaluate:
        for name in ("cached_path", "cached_val_path"):
            if getattr(args, name):
                raise errors.UserError(
                    f"--{name} only applies with --use_cached: add --use_cached, or remove --{name}"
                )
    if args.use_cached and not args.cached_val_path and (args.evaluate_nll or args.online_nll):
        raise errors.UserError(
            "likelihoods with --use_cached need --cached_val_path, "
            "the folder that main_cache.py --split val wrote"
        )


# --------------------------------------------------------------------------------------------------
# Checkpoint, tokenizer and model


def open_start(args: argparse.Namespace) -> Start:
    """Return the checkpoint that ``--resume`` or ``--finetune`` names; a fresh start without one.

    Only rank 0 reads the file, which other machines need not have: the content is empty on other
    ranks.

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
    """Read the checkpoint of :func:`open_start`, without collective operations.

    ``--resume`` may name the ``--output_dir`` of a run that has not saved yet. Then the run starts
    from ``--finetune`` or from scratch.
    """
    path: Path | None
    if args.resume and (args.evaluate or args.evaluate_nll):
        path = find_checkpoint(args.resume)
        content = read_run(path)
        return Start(EVALUATE, content, path, content.get("config", {}))
    if args.resume:
        path = find_checkpoint_to_resume(args.resume, args.output_dir)
        if path is not None:
            content, path = read_newest_checkpoint(path)
            return Start(RESUME, content, path, content.get("config", {}))
    check_folder_is_free(args.output_dir, args.resume, CHECKPOINT_NAME)
    if args.finetune:
        path = find_checkpoint(args.finetune)
        content = read_run(path)
        return Start(FINETUNE, content, path, TokenBridge.config_of(content, path))
    return Start()


def load_tokenizer(
    args: argparse.Namespace, defaults: argparse.Namespace, splits: Sequence[str], start: Start
) -> tuple[Tokenizer | None, TokenizerInfo]:
    """Return the tokenizer and its description.

    Args:
        defaults: flags that nobody typed.
        splits: of the data to read, ``"train"`` and ``"val"``.
        start: the checkpoint that the run starts from.

    Returns:
        the tokenizer, or None if cached moments are enough; and the description in the tokenizer's
        file or in the metadata of the caches.

    Raises:
        UserError: the tokenizer cannot be read, another one is needed than the default, or a cache
            was made with another one.
    """
    tokenizer = None
    descriptions = []
    roots = [data_root(args, split) for split in splits]
    typed = args.vae_path != defaults.vae_path
    needed = args.evaluate or args.online_eval or not args.use_cached
    factor = start.config.get("latent_factor", KL16_LATENT_FACTOR)
    is_kl16 = math.isclose(factor, KL16_LATENT_FACTOR, rel_tol=1e-6)
    if needed and not typed and not is_kl16 and start.use != FINETUNE:
        raise errors.UserError(
            f"{start.path} was trained with another tokenizer than KL-16, "
            f"of latent factor {factor:.4g}: name its file with --vae_path"
        )

    # The tokenizer's own description, and those of the caches
    if needed or typed:
        tokenizer = Tokenizer.from_pretrained(args.vae_path)
        descriptions.append(tokenizer.info)
    for root in roots if args.use_cached else ():
        metadata = cache_metadata(Path(root))
        config, latent_factor = tokenizer_config(metadata, root)
        vae_sha256 = metadata.get("vae_sha256")
        descriptions.append(TokenizerInfo(config, latent_factor, root, vae_sha256))
    for first, second in combinations(descriptions, 2):
        if not first.same_factor(second.latent_factor):
            difference = "latent factors"
        elif not first.same_weights(second.sha256):
            difference = "weights"
        else:
            continue
        raise errors.UserError(
            f"{second.source} was made with another tokenizer than {first.source}: "
            f"{difference} differ"
        )
    hashes = [info.sha256 for info in descriptions if info.sha256 is not None]
    info = descriptions[-1]._replace(sha256=hashes[0] if hashes else None)
    return tokenizer if needed else None, info


def load_inputs(
    args: argparse.Namespace, defaults: argparse.Namespace, splits: Sequence[str], start: Start
) -> tuple[Tokenizer | None, TokenizerInfo, dict, dict[str, Data]]:
    """Load tokenizer and data, and resolve the model's arguments, without collective operations.

    Returns:
        the tokenizer and its description (:func:`load_tokenizer`), the arguments of the model, and
        the data sets by split.

    Raises:
        UserError: a file is missing or damaged, or files, flags and checkpoint do not fit together.
    """
    tokenizer, info = load_tokenizer(args, defaults, splits, start)
    config = resolve(args, defaults, MODELS, sizes_of, info, start)
    if args.evaluate and not args.no_metrics:  # the number of classes is that of the weights
        check_num_images(args.num_images, args.class_num)
    data: dict[str, Data] = {}
    # All splits have the class names of the checkpoint, or of the first split
    classes = None if start.use == FINETUNE else start.config.get("class_names")
    for split in splits:
        data[split] = load_data(args, split, info, classes)
        classes = data[split].classes
    return tokenizer, info, config, data


CALIBRATION_IMAGES = 10_000  # at most, evenly spaced


def calibrate(
    args: argparse.Namespace,
    dataset: Data,
    encoder: LatentEncoder,
    channels: int,
    device: torch.device,
) -> dict[str, list[float]]:
    """Return mean and standard deviation of each latent channel, as arguments of the model.

    They are measured on :data:`CALIBRATION_IMAGES` training images.
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
    """Return the model that ``config`` describes, on ``device``.

    It is randomly initialized, or has the weights of the checkpoint to evaluate or to fine-tune. A
    resumed run loads its weights later, with the rest of its state.

    Args:
        classes: names of the classes to train on.

    Raises:
        UserError: sizes do not fit each other, or sampling options or weights do not fit the model.
    """

    def construct() -> TokenBridge:
        trained = start.config if start.use == EVALUATE else config
        try:
            model = MODELS[args.model](**config)
            check_head_options(model.head, args)
            for cfg in args.cfg if args.evaluate or args.online_eval else ():
                check_guidance(trained.get("label_drop_prob", 0.1), cfg)
                sampling_plan(sampling_settings(args, cfg, args.temperature[0]), model.seq_len)
            return model
        except Exception as error:  # impossible sizes raise errors of many types
            raise errors.UserError(errors.reason(error)) from error

    model = distributed.on_all_ranks(construct)

    def load() -> None:
        path = start.path
        if path is None:
            return
        if start.use == FINETUNE:
            finetune.start_from(model, start.content, start.config, path, not args.no_ema, classes)
        elif start.use == EVALUATE:
            load_weights(model, start.content, path, ema=not args.no_ema)

    distributed.on_rank_0(load)
    if start.use != RESUME:
        start.content.clear()  # free the memory
    distributed.on_all_ranks(lambda: model.to(device))
    distributed.broadcast_tensors(model.state_dict().values())
    return model


# --------------------------------------------------------------------------------------------------
# Train


def train_model(
    run: Run, model: TokenBridge, loader: DataLoader, start: Start, settings: TrainingSettings
) -> None:
    """Train ``model`` from the epoch and step of ``start``; save, and measure as flags say."""
    args = run.args
    if distributed.is_main_process() and not args.dry_run:
        remove_parts(Path(args.output_dir).glob(".*.part"))
    trainer = Trainer(model, settings, loader, run.encoder)
    state = trainer.state
    if start.use == RESUME and start.path is not None:
        state.load(start.content, start.path)
        start.content.clear()
    if distributed.get_world_size() > 2:
        trainer.order_gradients((args.batch_size, *model.latent_shape))
    measured_model = model if args.no_ema else state.ema_model

    def measure(epoch: int, writer: RunLog | None, stop_signals: StopSignals) -> None:
        evaluate_online(run, measured_model, epoch, state.steps_done, writer, stop_signals)

    train(trainer, measure, save_before_measuring=args.online_eval or args.online_nll)


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device, args.deterministic, args.precision) as device:
        # Flags, and the files that flags name
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
        encoder = tokenizer
        if args.use_cached:
            encoder = CachedMoments(info.latent_factor, info.deterministic)

        # Model
        if args.quant_calibrate and config["channel_mean"] is None:
            config |= calibrate(args, data["train"], encoder, info.config["embed_dim"], device)
        classes = start.config.get("class_names") if measuring else data["train"].classes
        model = build_model(args, config, start, device, classes)
        model.metadata = {
            "model": args.model,
            "latent_factor": info.latent_factor,
            "class_names": classes,
        }
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
        if loader is not None:
            saved_sha256 = start.config.get("vae_sha256") if start.use == RESUME else None
            vae_sha256 = info.sha256 or saved_sha256
            if vae_sha256 is not None:
                model.metadata["vae_sha256"] = vae_sha256
            distributed.on_all_ranks(lambda: finetune.freeze(model, args.freeze))
            if args.lr is None:
                global_batch = args.batch_size * args.accum_iter * distributed.get_world_size()
                args.lr = args.blr * global_batch / 256
            train_model(run, model, loader, start, TrainingSettings.from_args(args))
            return

        # Or measure
        if args.compile:
            log.info("compiling the blocks: the first batch takes up to some minutes longer")
            model.compile_blocks()
        if args.evaluate_nll:
            metrics = {**measure_likelihood(run, model), "resume": args.resume, **provenance()}
            if distributed.is_main_process():
                write_json(Path(args.output_dir) / "likelihood.json", metrics)
        if args.evaluate:
            search(run, model, weights_identity(run, model))


if __name__ == "__main__":
    errors.run(main)
