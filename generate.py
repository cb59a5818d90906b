"""Sample images of classes from a trained model, or regenerate parts of an image."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from models.editing import outpainted
from models.pipeline import TokenBridgePipeline
from models.sampling import SamplingOptions
from util import errors
from util.args import add_device_arg, add_sampling_args, check_positive, check_range, new_parser
from util.data.images import png_settings
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
    edit.add_argument("--mask", help="image of the same size, white where to regenerate the image")
    edit.add_argument(
        "--outpaint",
        type=int,
        metavar="PIXELS",
        help="generate this many pixels around the image, which is shrunk to make room",
    )
    edit.add_argument(
        "--strength",
        type=float,
        default=0.5,
        help="share of the tokens that a variation regenerates",
    )
    how = parser.add_argument_group("sampling")
    add_sampling_args(how, SamplingOptions)
    parser.set_defaults(num_iter=SamplingOptions.num_iter, cfg=3.0)
    how.add_argument("--batch_size", type=int, default=64, help="images sampled at once")
    parser.add_argument(
        "--output",
        default="generated.png",
        help="PNG to write: one row with an image of each class, or a row of candidates per class",
    )
    parser.add_argument(
        "--gif", action="store_true", help="also write <output>.gif, which shows each sampling step"
    )
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for impossible flags, before files are read."""
    check_positive(args, "candidates", "num_iter", "batch_size")
    check_range(args, 0, 2**32 - args.candidates, "seed")
    check_range(args, 0, math.inf, "gen_seed", "cfg", "temperature", "confidence_noise")
    if Path(args.output).suffix.lower() != ".png":
        raise errors.UserError(f"--output {args.output}: choose a name that ends in .png")
    if args.mask and args.outpaint is not None:
        raise errors.UserError("--mask and --outpaint exclude each other: remove one of them")
    if args.image is None and (args.mask or args.outpaint is not None):
        raise errors.UserError("--mask and --outpaint need --image, the image to edit")


def side_by_side(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Return one image that shows ``images`` of equal size in a grid, row by row, without gaps."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * width, number // columns * height))
    return sheet


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
        columns = count if count > 1 else len(classes)
        ordered = samples.part(order)

        # Write
        output = Path(args.output)
        settings = {**options, "class_labels": ordered.labels, "seeds": ordered.seeds}
        with written_whole(output) as file:
            side_by_side(ordered.images, columns).save(file, "png", pnginfo=png_settings(settings))
        if args.gif:
            sheets = [side_by_side([images[row] for row in order], columns) for images in frames]
            write_gif(sheets, output.with_suffix(".gif"))
        for row in order:
            name = pipe.class_names[samples.labels[row]] if samples.labels else "any class"
            log.info("%s, seed %d: log-likelihood %.1f nats", name, seeds[row], scores[row])
        log.info("wrote %s%s", output, f" and {output.with_suffix('.gif')}" if args.gif else "")


if __name__ == "__main__":
    errors.run(main)
