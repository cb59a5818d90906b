"""Measure the cost and the quality of samples of a trained model under many sampling settings."""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation import SampleSettings, chunks_of, sample_chunk
from experiments.features import load_net
from experiments.measures import all_images, feature_statistics, share_recognized
from generate import add_pipeline_args, load_pipeline
from models.pipeline import TokenBridgePipeline
from models.sampling import SamplingOptions
from util import errors
from util.args import add_sampling_args, check_positive, new_parser
from util.files import read_json, write_json
from util.log import log
from util.metrics.compute import frechet_distance
from util.process_group import process_group
from util.provenance import provenance

#: Families of settings, each with the options that differ from the flags, by number of steps.
FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "random order": ({}, (16, 12, 8, 6, 4, 3, 2)),
    "Halton order": ({"order": "halton"}, (8, 6, 4)),
    "two-stage": ({"step_schedule": "two-stage"}, (8, 6, 4)),
    "most confident first": ({"order": "confidence"}, (8,)),
    "guidance on the first half": ({"cfg_interval": (0.0, 0.5)}, (16, 8)),
    "guidance on the second half": ({"cfg_interval": (0.5, 1.0)}, (16, 8)),
    "guidance reused once": ({"cfg_reuse": 2}, (16, 8)),
}


def get_args_parser() -> argparse.ArgumentParser:
    """Return the command line of this module."""
    parser = new_parser(__doc__, "experiments.cost")
    add_pipeline_args(parser)
    parser.add_argument("--reference", default="", help="folder of held-out images")
    parser.add_argument("--features", default="", help="weights saved by experiments.features")
    text = "random seeds of sampling"
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help=text)
    parser.add_argument("--num_images", type=int, default=600, help="images of each setting")
    parser.add_argument("--batch_size", type=int, default=200, help="images sampled at once")
    text = "file to write or add to; what it has of this model is not measured again"
    parser.add_argument("--json", default="", help=text)
    add_sampling_args(parser, SamplingOptions)
    return parser


def all_settings(base: SamplingOptions) -> Iterator[tuple[str, SamplingOptions]]:
    """Yield the name and the options of every setting of :data:`FAMILIES`."""
    for family, (changes, counts) in FAMILIES.items():
        for steps in counts:
            yield family, SamplingOptions(**{**asdict(base), **changes, "num_iter": steps})


def sampled_images(pipe: TokenBridgePipeline, settings: SampleSettings) -> Tensor:
    """Return images of the classes in order, bytes ``[N, 3, H, W]`` on the CPU."""
    chunks = chunks_of(settings.num_images, settings.eval_bsz)
    parts = [
        sample_chunk(pipe.model, pipe.tokenizer, numbers, settings, pipe.device)
        for numbers in chunks
    ]
    return torch.cat([images for images, _ in parts])


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device) as device:
        for name in ("reference", "features", "json"):
            if not getattr(args, name):
                raise errors.UserError(f"--{name} is missing; see --help")
        check_positive(args, "num_images", "batch_size")
        pipe = load_pipeline(args, device)
        net = load_net(args.features, device)
        real = feature_statistics(net.features(all_images(args.reference).to(device)))
        names = SamplingOptions.__dataclass_fields__
        base = SamplingOptions(**{name: getattr(args, name) for name in names})
        rows = read_json(args.json)["rows"] if Path(args.json).exists() else []
        measured = {
            (row["family"], row["steps"], row["seed"])
            for row in rows
            if row["resume"] == args.resume
        }
        for (family, options), seed in product(all_settings(base), args.seeds):
            if (family, options.num_iter, seed) in measured:
                continue
            settings = SampleSettings(
                **asdict(options),
                num_images=args.num_images,
                eval_bsz=args.batch_size,
                gen_seed=seed,
                precision=args.precision,
            )
            started = time.perf_counter()
            images = sampled_images(pipe, settings).to(device)
            row = {
                "resume": args.resume,
                "family": family,
                "steps": options.num_iter,
                "seed": seed,
                "gflop": pipe.model.sampling_flops(options) / 1e9,
                "seconds": (time.perf_counter() - started) / args.num_images,
                "frechet": frechet_distance(feature_statistics(net.features(images)), real),
                "recognized": share_recognized(net, images),
            }
            rows.append(row)
            text = "%s, %d steps, seed %d: Frechet distance %.1f, recognized %.3f"
            log.info(text, family, options.num_iter, seed, row["frechet"], row["recognized"])
            write_json(args.json, {"rows": rows, "base": asdict(base), **provenance()})


if __name__ == "__main__":
    errors.run(main)
