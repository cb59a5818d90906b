"""Measure FID, KID, Inception Score, precision and recall of images, or save their statistics.

Runs with torchrun or plain python.
"""

import argparse

import util.interpreter  # noqa: F401, before all packages

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
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--images",
        default="",
        help="images to measure: a folder, parquet files, hf://datasets/owner/name, "
        "or an .npz with arr_0",
    )
    add_metrics_args(parser)
    parser.add_argument(
        "--save_stats", help=".npz to write the statistics of the images to (mu, sigma)"
    )
    parser.add_argument(
        "--img_size",
        type=int,
        help="crop the images to this size, as training does; for --save_stats only",
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images per batch on each device"
    )
    parser.add_argument(
        "--num_workers", type=int, default=WORKERS, help="processes per device that read images"
    )
    parser.add_argument("--json", help="file to write the metrics to")
    add_device_arg(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for flags that are missing, out of range or exclude each other."""
    check_positive(args, "batch_size")
    if args.img_size is not None:
        check_positive(args, "img_size")
    if not args.images:
        raise errors.UserError("--images is missing: name a folder of images or an .npz with arr_0")
    if args.img_size is not None and not args.save_stats:
        raise errors.UserError(
            "--img_size only applies to --save_stats; images to measure are never cropped: "
            "remove it"
        )


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device) as device:
        distributed.on_all_ranks(lambda: check_args(args))
        images = distributed.on_all_ranks(lambda: PlainImages(args.images, args.img_size))
        if args.save_stats:
            distributed.on_all_ranks(lambda: check_number(len(images), "images"))
        evaluator = Evaluator(
            args.features,
            args.feature_weights,
            args.fid_stats,
            args.reference,
            device,
            args.batch_size,
            args.num_workers,
            len(images),
        )
        features = evaluator.features(images)

        # Statistics
        if args.save_stats:
            if distributed.is_main_process():
                warn_if_few(len(images), "images", evaluator.network)
                save_statistics(args.save_stats, features, args.features)
            log.info("wrote the statistics of %d images to %s", len(images), args.save_stats)
            if not (args.fid_stats or args.reference or args.json):
                return

        # Metrics
        if args.img_size is not None:  # only the statistics are of cropped images
            features = evaluator.features(distributed.on_all_ranks(images.uncropped))
        metrics = evaluator.measure(features)
        if distributed.is_main_process():
            print(metrics_table(metrics))
            if args.json:
                write_json(args.json, {**metrics, **provenance(), "args": vars(args)})


if __name__ == "__main__":
    errors.run(main)
