"""FID, Inception Score, precision and recall of a folder of images; reference statistics (torchrun or plain python)."""

import argparse

from util import distributed, errors
from util.args import WORKERS, add_device_arg, add_metrics_args, check_positive, new_parser
from util.data.datasets import PlainImages
from util.files import write_json
from util.log import log
from util.metrics.compute import Evaluator, check_number, save_statistics, warn_if_few
from util.metrics.tables import metrics_table
from util.process_group import process_group
from util.provenance import provenance


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = new_parser(__doc__)
    text = "what to measure: a folder of images, parquet files, hf://datasets/owner/name, or .npz with arr_0"
    parser.add_argument("--images", default="", help=text)
    add_metrics_args(parser)
    parser.add_argument("--save_stats", help=".npz to write the images' statistics (mu, sigma) to")
    parser.add_argument(
        "--img_size", type=int, help="crop to this size as for training; for --save_stats only"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images at once on each device")
    parser.add_argument(
        "--num_workers", type=int, default=WORKERS, help="image reading processes for each device"
    )
    parser.add_argument("--json", help="file to write the figures to")
    add_device_arg(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that are missing, out of range or do not go together."""
    check_positive(args, "batch_size", *(["img_size"] if args.img_size is not None else []))
    if not args.images:
        raise errors.UserError(
            "--images is missing: name a folder of images, or an .npz with arr_0"
        )
    if args.img_size is not None and not args.save_stats:
        raise errors.UserError(
            "--img_size goes with --save_stats only; images to measure are read as they are"
        )


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device) as device:
        distributed.on_all_ranks(lambda: check_args(args))
        images = distributed.on_all_ranks(lambda: PlainImages(args.images, args.img_size))
        if args.save_stats:
            distributed.on_all_ranks(lambda: check_number(len(images), "images"))
        how = device, args.batch_size, args.num_workers, len(images)
        evaluator = Evaluator(args.inception_weights, args.fid_stats, args.reference, *how)
        features = evaluator.features(images)
        if args.save_stats:
            if distributed.is_main_process():
                warn_if_few(len(images), "images")
                save_statistics(args.save_stats, features)
            log.info("wrote the statistics of %d images to %s", len(images), args.save_stats)
            if not (args.fid_stats or args.reference or args.json):
                return
        if args.img_size is not None:  # the crop was for the statistics
            features = evaluator.features(distributed.on_all_ranks(images.uncropped))
        figures = evaluator.measure(features)
        if distributed.is_main_process():
            print(metrics_table(figures))
            if args.json:
                write_json(args.json, {**figures, **provenance(), "args": vars(args)})


if __name__ == "__main__":
    errors.run(main)
