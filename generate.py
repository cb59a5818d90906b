"""Sample images of classes from a trained model, or regenerate parts of an image."""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import util.interpreter  # noqa: F401, before all packages

import torch
from PIL import Image

from models.editing import REGIONS, outpainted
from models.pipeline import DEFAULT_STRENGTH, TokenBridgePipeline
from models.sampling import SamplingOptions
from util import errors
from util.args import add_device_arg, add_sampling_args, check_positive, check_range, new_parser
from util.data.images import image_grid, png_settings
from util.files import written_whole
from util.log import log
from util.precision import PRECISIONS
from util.process_group import process_group

GIF_SECONDS = 4.0  # duration of all frames
LAST_FRAME_SECONDS = 2.0  # how much longer the last frame is shown


def add_pipeline_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of :func:`load_pipeline`."""
    parser.add_argument(
        "--resume",
        default="",
        help="the model: folder or file of a run, an exported folder, owner/repo "
        "or hf://owner/repo/path",
    )
    parser.add_argument(
        "--vae_path",
        help="its tokenizer; by default the one beside the model, or the vae_path that the "
        "checkpoint stores",
    )
    parser.add_argument(
        "--no_ema", action="store_true", help="use the trained weights instead of their EMA"
    )
    add_device_arg(parser)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="bf16",
        help="precision of autocast; fp32 turns it off",
    )


def load_pipeline(args: argparse.Namespace, device: torch.device) -> TokenBridgePipeline:
    """Return the pipeline of the model and tokenizer that flags name, on ``device``.

    Raises:
        UserError: ``--resume`` is missing, or a file is missing or damaged.
    """
    if not args.resume:
        raise errors.UserError("--resume is missing: name the model's folder or file")
    pipeline = TokenBridgePipeline.from_pretrained(
        args.resume,
        args.vae_path,
        ema=False if args.no_ema else None,  # None: the EMA if there is one
        precision=args.precision,
    )
    return pipeline.to(device)


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    add_pipeline_args(parser)
    parser.add_argument(
        "--classes",
        nargs="+",
        help="names of class folders, ImageNet class names, or numbers; "
        "by default images of any class",
    )
    parser.add_argument(
        "--candidates", type=int, default=1, help="images of each class, the most likely first"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the first candidate, counted up for the next ones; equals the number of the "
        "image in main_tokenbridge.py --evaluate",
    )
    parser.add_argument(
        "--gen_seed",
        type=int,
        default=0,
        help="combined with --seed as in main_tokenbridge.py --evaluate",
    )
    edit = parser.add_argument_group("editing")
    edit.add_argument(
        "--image",
        help="image to edit, cropped to the model's size; without --mask and --outpaint, vary it",
    )
    edit.add_argument(
        "--mask",
        help="what to regenerate: an image of the same size, white there, or a region of the "
        f"cropped image: {', '.join(REGIONS)}",
    )
    edit.add_argument(
        "--outpaint",
        type=int,
        metavar="PIXELS",
        help="generate this many of the model's pixels around the image, which is shrunk to make "
        "room",
    )
    edit.add_argument(
        "--strength",
        type=float,
        help=f"share of the tokens that a variation regenerates, {DEFAULT_STRENGTH} if not given",
    )
    how = parser.add_argument_group("sampling")
    add_sampling_args(how, SamplingOptions)
    parser.set_defaults(num_iter=SamplingOptions.num_iter, cfg=3.0)
    how.add_argument("--batch_size", type=int, default=64, help="images sampled at once")
    parser.add_argument(
        "--output",
        help="PNG to write, by default generated.png: a row with an image of each class, or a row "
        "of candidates per class",
    )
    parser.add_argument(
        "--output_dir",
        help="instead of one PNG, write one for each image into this folder, "
        "class-<number>-seed-<seed>.png",
    )
    parser.add_argument(
        "--gif",
        action="store_true",
        help="beside each PNG, also write a GIF that shows each sampling step",
    )
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for impossible flags, before files are read."""
    check_positive(args, "candidates", "num_iter", "batch_size")
    check_range(args, 0, 2**32 - args.candidates, "seed")
    check_range(args, 0, math.inf, "gen_seed", "cfg", "temperature", "confidence_noise")
    if args.output and args.output_dir:
        raise errors.UserError("--output and --output_dir exclude each other: remove one of them")
    if args.output and Path(args.output).suffix.lower() != ".png":
        raise errors.UserError(f"--output {args.output}: choose a name that ends in .png")
    if args.mask and args.outpaint is not None:
        raise errors.UserError("--mask and --outpaint exclude each other: remove one of them")
    if args.image is None and (args.mask or args.outpaint is not None):
        raise errors.UserError("--mask and --outpaint need --image, the image to edit")


def write_gif(frames: Sequence[Image.Image], path: Path) -> None:
    """Write ``frames`` as a GIF that repeats forever and shows the last frame longer."""
    durations = [max(20, int(1000 * GIF_SECONDS / len(frames)))] * len(frames)  # milliseconds
    durations[-1] += int(1000 * LAST_FRAME_SECONDS)
    with written_whole(path) as file:
        frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        )


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device) as device:
        check_args(args)
        pipe = load_pipeline(args, device)
        image, mask = args.image, args.mask
        if args.outpaint is not None:
            image, mask = outpainted(image, pipe.model.config["img_size"], args.outpaint)

        # Sample
        names = (*SamplingOptions.__dataclass_fields__, "strength", "gen_seed", "batch_size")
        options = {name: getattr(args, name) for name in names}
        if args.strength is None:
            del options["strength"]
        frames: list[list[Image.Image]] = []
        callback = (lambda step, steps, images: frames.append(images)) if args.gif else None
        classes = args.classes or [None]
        count = args.candidates
        seeds = list(range(args.seed, args.seed + count)) * len(classes)
        labels = args.classes and [label for label in classes for _ in range(count)]
        samples = pipe(
            labels, seeds=seeds, image=image, mask_image=mask, callback=callback, **options
        )

        # Order the candidates of each class, the most likely first
        scores = samples.log_likelihoods
        order = sorted(range(len(seeds)), key=lambda row: (row // count, -scores[row]))
        titles = ["any class"] * len(seeds)
        if samples.labels:
            titles = [pipe.class_names[label] for label in samples.labels]

        # Write all images into one file, or each into its own
        files = {Path(args.output or "generated.png"): order}
        if args.output_dir:
            folder = Path(args.output_dir)
            files = {folder / samples.file_name(row): [row] for row in order}
        for path, rows in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = samples.part(rows)
            settings = {**options, "class_labels": part.labels, "seeds": part.seeds}
            captions = [titles[row] for row in rows] if len(rows) > 1 and samples.labels else []
            grid = partial(image_grid, columns=count if count > 1 else len(rows), captions=captions)
            with written_whole(path) as file:
                grid(part.images).save(file, "png", pnginfo=png_settings(settings))
            if args.gif:
                shown = [grid([images[row] for row in rows]) for images in frames]
                write_gif(shown, path.with_suffix(".gif"))
        for row in order:
            text = "%s, seed %d: log-likelihood %.1f nats"
            log.info(text, titles[row], seeds[row], scores[row])
        log.info("wrote %s%s", args.output_dir or path, " with GIFs" if args.gif else "")


if __name__ == "__main__":
    errors.run(main)
