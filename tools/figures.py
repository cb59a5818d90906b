"""Draw figures of the paper: levels (3), samples (2, 9), parallel head (7), confidence (8)."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import norm
from torch import Tensor

from engine_tokenbridge import channel_statistics
from models.quantizer import QUANTIZERS, ScalarQuantizer
from models.sampling import SamplingOptions, check_guidance, check_head_options
from models.tokenbridge import TokenBridge
from models.tokenizer import CachedMoments, Tokenizer
from util import errors
from util.args import (
    add_quantizer_args,
    add_run_args,
    add_sampling_args,
    add_vae_arg,
    check_bits,
    check_positive,
    check_range,
    new_parser,
)
from util.checkpoint.files import CHECKPOINT_NAME
from util.checkpoint.runs import find_checkpoint, read_run
from util.checkpoint.vae_files import tokenizer_config
from util.config import TokenizerInfo, check_config, check_tokenizer
from util.data.classes import find_classes
from util.data.images import confidence_maps, save_grid
from util.data.loaders import evenly_spaced, make_loader
from util.data.packed import open_cache
from util.log import log
from util.metrics.plots import save_figure
from util.precision import autocast, check_finite
from util.process_group import process_group
from util.rng import image_seeds, seed_everything

# --------------------------------------------------------------------------------------------------
# Command line


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__, "tools.figures", config=False)
    figures = parser.add_subparsers(dest="figure", required=True)

    levels = figures.add_parser(
        "levels", help="Figure 3: histograms of latents before and after quantization"
    )
    levels.add_argument("--cached_path", default="", help="cache of main_cache.py or tools.pack")
    levels.add_argument("--quant_bits", type=int, default=6, help="2^bits levels per channel")
    levels.add_argument("--quant_min", type=float, default=-5.0, help="lower bound of the latents")
    levels.add_argument("--quant_max", type=float, default=5.0, help="upper bound of the latents")
    levels.add_argument(
        "--num_images", type=int, default=1000, help="images to read, at most, evenly spaced"
    )
    add_quantizer_args(levels, QUANTIZERS, default="gaussian")

    samples = figures.add_parser("samples", help="Figures 2 and 9: samples by class")
    samples.add_argument("--per_class", type=int, default=4, help="samples of each class")
    parallel = figures.add_parser(
        "parallel", help="Figure 7: samples of a parallel head above those of an autoregressive one"
    )
    parallel.add_argument(
        "--resume_parallel",
        default="",
        help="folder of the checkpoint trained with --head parallel",
    )
    confidence = figures.add_parser(
        "confidence",
        help="Figure 8: samples in random order and in order of confidence, and confidence maps",
    )
    for command in (samples, parallel, confidence):
        command.add_argument("--resume", default="", help=f"folder that holds {CHECKPOINT_NAME}")
        text = "names of class folders, ImageNet class names, or numbers; by default eight classes"
        command.add_argument("--classes", nargs="+", help=text)
        command.add_argument(
            "--gen_seed",
            type=int,
            default=0,
            help="seed of sampling; each sample draws from it and the sample's number",
        )
        command.add_argument(
            "--no_ema", action="store_true", help="use the trained weights instead of their EMA"
        )
        add_sampling_args(command, SamplingOptions)
        command.set_defaults(cfg=3.0)
        add_vae_arg(command)
    for command in (levels, samples, parallel, confidence):
        command.add_argument("--output", default="", help="PNG to write; by default <figure>.png")
        add_run_args(command, batch_size=16, seed=0, precision="bf16")
    return parser


# --------------------------------------------------------------------------------------------------
# Figure 3


def level_density(values: Tensor, levels: ScalarQuantizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the histogram of quantized ``values``.

    Returns:
        K + 1 edges, halfway between the levels, and K densities between the edges.
    """
    indices, _ = levels(values)
    shares = torch.bincount(indices.flatten(), minlength=levels.levels).double() / indices.numel()
    centers = levels.dequantize(torch.arange(levels.levels)).double()
    # Continue the levels by one at each end, for the outer edges
    first = 2 * centers[:1] - centers[1:2]
    last = 2 * centers[-1:] - centers[-2:-1]
    extended = torch.cat([first, centers, last])
    edges = (extended[1:] + extended[:-1]) / 2
    return edges.numpy(), (shares / edges.diff()).numpy()


def plot_levels(latents: Tensor, levels: ScalarQuantizer, unit: str) -> Figure:
    """Plot histograms of ``latents [C, N]`` before and after quantization, and of each channel.

    Args:
        unit: of the latents, for the label of the axis.
    """
    columns = min(8, len(latents))
    rows = math.ceil(len(latents) / columns)
    figure = Figure(figsize=(12, 4.5 + 1.3 * rows), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[4.0 / 1.3, *[1] * rows])

    # All channels
    axes = figure.add_subplot(grid[0, :])
    # torch computes no quantiles of large tensors
    span = float(latents.abs().quantile(0.9995) if latents.numel() < 10**7 else latents.abs().max())
    x = np.linspace(-span, span, 400)
    values = latents.flatten().numpy()
    bins = x[::2].tolist()
    axes.hist(values, bins=bins, density=True, color="tab:gray", alpha=0.4, label="latents")
    edges, density = level_density(latents, levels)
    axes.stairs(density, edges, color="tab:purple", label=f"quantized to {levels.levels} levels")
    normal = norm.pdf(x, float(latents.mean()), float(latents.std()))
    axes.plot(x, normal, color="black", lw=1, label="normal of this mean and std")
    axes.plot([], [], color="black", lw=0.5, ls="--", label="standard normal (below)")
    centers = levels.dequantize(torch.arange(levels.levels)).numpy()
    axes.plot(centers, np.full(len(centers), -0.012), "|", color="tab:purple", ms=8, label="levels")
    axes.set(xlim=(-span, span), xlabel=f"latent ({unit})", ylabel="density")
    axes.legend(loc="upper right")

    # Each channel
    for number, channel in enumerate(latents):
        small = figure.add_subplot(grid[1 + number // columns, number % columns])
        bins = x[::8].tolist()
        small.hist(channel.numpy(), bins=bins, density=True, color="tab:purple", alpha=0.6)
        small.plot(x, norm.pdf(x), color="black", lw=0.5, ls="--")
        title = f"channel {number}: {channel.mean():.2f} +- {channel.std():.2f}"
        small.set_title(title, fontsize=7)
        small.set(xlim=(-span, span), yticks=[])
        small.tick_params(labelsize=6)
    return figure


def draw_levels(args: argparse.Namespace, device: torch.device) -> None:
    """Draw Figure 3 from cached moments."""
    check_bits(args.quant_bits, "--quant_bits")
    check_positive(args, "num_images")
    if not args.cached_path:
        raise errors.UserError("--cached_path is missing: name the folder that main_cache.py wrote")
    cache = open_cache(args.cached_path, mirror=False)
    vae, latent_factor = tokenizer_config(cache.metadata, args.cached_path)
    cache.shape = tuple(cache[0][0].shape)
    loader = make_loader(evenly_spaced(cache, args.num_images), args, device)
    seed_everything(args.seed)
    encoder = CachedMoments(latent_factor, vae.get("deterministic", False))
    samples = [encoder.encode(moments).sample() for moments, _ in loader]
    latents = torch.cat(samples).transpose(0, 1).flatten(1)  # [C, N]
    bounds = (args.quant_min, args.quant_max)
    unit = "scaled by the latent factor"
    if args.quant_calibrate:  # in units of its own std, each channel has the same levels
        cpu = torch.device("cpu")
        mean, std = channel_statistics(encoder, loader, len(latents), cpu, "fp32")
        latents = (latents - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
        bounds = (-3 * math.sqrt(3), 3 * math.sqrt(3))
        unit = "in standard deviations of each channel"
    try:
        levels = QUANTIZERS[args.quantizer](2**args.quant_bits, *bounds)
    except ValueError as error:
        raise errors.UserError(str(error)) from error
    save_figure(plot_levels(latents, levels, unit), args.output)


# --------------------------------------------------------------------------------------------------
# Figures 2, 7, 8 and 9


def load_model(
    resume: str, flag: str, tokenizer: TokenizerInfo, args: argparse.Namespace
) -> TokenBridge:
    """Return the model in folder ``resume``, which ``flag`` named.

    Raises:
        UserError: it is missing or damaged, or tokenizer or flags do not fit it.
    """
    if not resume:
        raise errors.UserError(f"{flag} is missing: name the folder that holds {CHECKPOINT_NAME}")
    path = find_checkpoint(resume)
    content = read_run(path)
    model: Any = TokenBridge.from_content(content, path, ema=not args.no_ema)
    stored = content.get("config", {})
    check_config(stored, {**model.config, "latent_factor": tokenizer.latent_factor}, path)
    check_tokenizer(stored, tokenizer, path)
    try:
        check_head_options(model.head, args)
        check_guidance(model.config["label_drop_prob"], args.cfg)
    except ValueError as error:
        raise errors.UserError(str(error)) from error
    return model


@torch.no_grad()
def sample(
    model: TokenBridge,
    tokenizer: Tokenizer,
    labels: Sequence[int],
    order: str,
    args: argparse.Namespace,
) -> tuple[Tensor, Tensor]:
    """Sample an image of each label.

    Returns:
        images (uint8 ``[N, 3, H, W]``), and maps of the confidence of their tokens, as images of
        the same shape.
    """
    images = []
    maps = []
    seeds = image_seeds(args.gen_seed, range(len(labels)))
    names = SamplingOptions.__dataclass_fields__
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    options["order"] = order
    for start in range(0, len(labels), args.batch_size):
        part = slice(start, start + args.batch_size)
        with autocast(model.device, args.precision):
            latents, confidence = model.sample_tokens(
                len(labels[part]),
                labels=torch.tensor(labels[part]),
                seeds=seeds[part],
                return_confidence=True,
                **options,
            )
        images.append(tokenizer.decode_images(latents, args.precision))
        grids = confidence.unflatten(1, (model.grid_size, -1)).cpu()
        check_finite(grids, "the transformer", args.precision)
        maps.append(confidence_maps(grids, images[-1].shape[-1]))
    return torch.cat(images), torch.cat(maps)


def draw_samples(args: argparse.Namespace, device: torch.device) -> None:
    """Draw Figure 2, 7, 8 or 9: a column of samples for each class."""
    check_positive(args, "num_iter", "batch_size")
    check_range(args, 0, math.inf, "temperature", "confidence_noise", "gen_seed")
    tokenizer = Tokenizer.from_pretrained(args.vae_path)
    info = tokenizer.info
    tokenizer.to(device, memory_format=torch.channels_last)
    model = load_model(args.resume, "--resume", info, args).to(device)
    names = model.class_names
    labels = find_classes(args.classes, names)
    if args.figure == "samples":
        check_positive(args, "per_class")
        rows = [sample(model, tokenizer, labels * args.per_class, args.order, args)[0]]
    elif args.figure == "parallel":
        parallel = load_model(args.resume_parallel, "--resume_parallel", info, args).to(device)
        require_head(model, "ar", "--resume")
        require_head(parallel, "parallel", "--resume_parallel")
        models = (parallel, model)
        rows = [sample(each, tokenizer, labels, args.order, args)[0] for each in models]
    else:
        random_order, _ = sample(model, tokenizer, labels, "random", args)
        rows = [random_order, *sample(model, tokenizer, labels, "confidence", args)]
    titles = [names[label].split(",")[0] for label in labels]
    save_grid(torch.cat(rows), args.output, columns=len(labels), titles=titles, min_size=128)


def require_head(model: TokenBridge, head: str, flag: str) -> None:
    """Raise UserError unless the model that ``flag`` named has this head."""
    if model.config["head"] != head:
        raise errors.UserError(
            f"{flag} needs a model of --head {head}, but its head is {model.config['head']}"
        )


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device, args.deterministic, args.precision) as device:
        check_range(args, 0, math.inf, "num_workers", "seed")
        args.output = args.output or f"{args.figure}.png"
        if Path(args.output).suffix.lower() != ".png":
            raise errors.UserError(f"--output {args.output}: choose a name that ends in .png")
        if args.figure == "levels":
            draw_levels(args, device)
        else:
            draw_samples(args, device)
        log.info("wrote %s", args.output)


if __name__ == "__main__":
    errors.run(main)
