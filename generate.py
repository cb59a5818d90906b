"""Pictures of classes, and parts of pictures made anew, by a trained model."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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

GIF_SECONDS, LAST_FRAME = 4.0, 2.0  # all frames together, and the last one beyond that


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of :func:`load_pipeline`."""
    text = (
        "the model: a run's folder or file, an exported folder, owner/repo or hf://owner/repo/path"
    )
    parser.add_argument("--resume", default="", help=text)
    text = "its tokenizer; by default the one beside the model, or the one that its run names"
    parser.add_argument("--vae_path", help=text)
    parser.add_argument(
        "--no_ema", action="store_true", help="the weights themselves, not their average"
    )
    add_device_arg(parser)
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="bf16", help="of autocast; fp32 means none"
    )


def load_pipeline(args: argparse.Namespace, device: torch.device) -> TokenBridgePipeline:
    """The model and tokenizer that the flags name, on ``device``; UserError if there are none."""
    if not args.resume:
        raise errors.UserError("--resume is missing: name the model's folder or file")
    ema = False if args.no_ema else None
    return TokenBridgePipeline.from_pretrained(
        args.resume, args.vae_path, ema=ema, precision=args.precision
    ).to(device)


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = new_parser(__doc__)
    add_model_args(parser)
    text = "names of class folders, ImageNet's names, or numbers; by default none: pictures of any class"
    parser.add_argument("--classes", nargs="+", help=text)
    parser.add_argument(
        "--candidates", type=int, default=1, help="pictures of each class, the most likely first"
    )
    text = "of the first candidate, the next has the next: the number of an image of --evaluate"
    parser.add_argument("--seed", type=int, default=0, help=text)
    parser.add_argument("--gen_seed", type=int, default=0, help="as of --evaluate")
    edit = parser.add_argument_group("editing")
    edit.add_argument(
        "--image",
        help="to edit; cropped to the model's size; without --mask and --outpaint, vary it",
    )
    edit.add_argument(
        "--mask", help="an image of the same size, white where the picture is made anew"
    )
    text = (
        "make this many pixels anew on each side of the image, whose square is shrunk to make room"
    )
    edit.add_argument("--outpaint", type=int, metavar="PIXELS", help=text)
    edit.add_argument(
        "--strength",
        type=float,
        default=0.5,
        help="share of the tokens that a variation makes anew",
    )
    how = parser.add_argument_group("sampling")
    add_sampling_args(how, SamplingOptions)
    parser.set_defaults(num_iter=SamplingOptions.num_iter, cfg=3.0)
    how.add_argument("--batch_size", type=int, default=64, help="pictures at once, as --eval_bsz")
    parser.add_argument(
        "--output",
        default="generated.png",
        help="a PNG: a row of the classes, or a row of candidates for each class",
    )
    parser.add_argument(
        "--gif", action="store_true", help="also <output>.gif, which shows how the tokens fill in"
    )
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is read."""
    check_positive(args, "candidates", "num_iter", "batch_size")
    check_range(args, 0, 2**32 - args.candidates, "seed")
    check_range(args, 0, math.inf, "gen_seed", "cfg", "temperature", "confidence_noise")
    if Path(args.output).suffix.lower() != ".png":
        raise errors.UserError(f"--output {args.output}: the picture is a .png")
    if args.mask and args.outpaint is not None:
        raise errors.UserError("--mask and --outpaint: choose one, which is made anew")
    if args.image is None and (args.mask or args.outpaint is not None):
        raise errors.UserError("--mask and --outpaint need --image, the picture to edit")


def side_by_side(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size, row by row, pixel for pixel."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * width, number // columns * height))
    return sheet


def write_gif(frames: Sequence[Image.Image], path: Path) -> None:
    """Writes pictures as an endless GIF, the last one shown longer."""
    durations = [max(20, int(1000 * GIF_SECONDS / len(frames)))] * len(frames)
    durations[-1] += int(1000 * LAST_FRAME)
    with written_whole(path) as file:
        frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        )


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device) as device:
        check_args(args)
        pipe = load_pipeline(args, device)
        image, mask = args.image, args.mask
        if args.outpaint is not None:
            image, mask = outpainted(image, pipe.model.config["img_size"], args.outpaint)
        names = (*SamplingOptions.__dataclass_fields__, "strength", "gen_seed", "batch_size")
        given = {name: getattr(args, name) for name in names}
        frames: list[list[Image.Image]] = []
        callback = (lambda step, steps, images: frames.append(images)) if args.gif else None
        classes, count = args.classes or [None], args.candidates
        seeds = list(range(args.seed, args.seed + count)) * len(classes)
        labels = args.classes and [label for label in classes for _ in range(count)]
        made = pipe(labels, seeds=seeds, image=image, mask_image=mask, callback=callback, **given)
        # Of each class, the most likely first.
        scores = made.log_likelihoods
        order = sorted(range(len(seeds)), key=lambda row: (row // count, -scores[row]))
        columns = count if count > 1 else len(classes)
        written = Path(args.output)
        in_order = made.part(order)
        asked = {**given, "class_labels": in_order.labels, "seeds": in_order.seeds}
        with written_whole(written) as file:
            side_by_side(in_order.images, columns).save(file, "png", pnginfo=png_settings(asked))
        if args.gif:
            sheets = [side_by_side([images[row] for row in order], columns) for images in frames]
            write_gif(sheets, written.with_suffix(".gif"))
        for row in order:
            name = pipe.class_names[made.labels[row]] if made.labels else "any class"
            log.info("%s, seed %d: log-likelihood %.1f nats", name, seeds[row], scores[row])
        log.info("wrote %s%s", written, f" and {written.with_suffix('.gif')}" if args.gif else "")


if __name__ == "__main__":
    errors.run(main)
