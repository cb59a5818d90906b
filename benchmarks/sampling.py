"""Sampling images with guidance: this code against the released implementation in float32."""

import argparse
from collections.abc import Callable

import torch

from benchmarks.baselines import RecomputingHead, plain_kernels
from benchmarks.common import add_variant_flags, benchmark_parser, compare_variants, parse_flags
from models.sampling import SamplingOptions
from models.tokenbridge import MODELS
from util.precision import autocast


def prepare_sampling(
    args: argparse.Namespace, release: bool, precision: str
) -> tuple[Callable[[], None], float]:
    """Return a function that samples a batch, and its FLOPs; see ``compare_variants``."""
    model = MODELS[args.model](quant_levels=64, head=args.head)
    model = model.to(args.device).eval().requires_grad_(False)
    if release:
        model.head.__class__ = RecomputingHead
    elif args.compile:
        model.compile_blocks()
    labels = torch.arange(args.batch, device=args.device)

    def sample() -> None:
        seeds = None if release else range(args.batch)
        with autocast(args.device, precision):
            model.sample_tokens(args.batch, args.num_iter, args.cfg, labels=labels, seeds=seeds)

    # All variants count the FLOPs that are necessary: two passes of the backbone per step
    # (guidance), and one pass of the head per token.
    flops = args.batch * model.sampling_flops(SamplingOptions(args.num_iter, args.cfg))
    return plain_kernels()(sample) if release else sample, flops


def main() -> None:
    """Run the command line."""
    parser = benchmark_parser(__doc__, repeats=3)
    add_variant_flags(parser, batch=1, batch_help="images sampled at once")
    parser.add_argument(
        "--num_iter", type=int, nargs="+", default=[16, 4], help="autoregressive steps"
    )
    parser.add_argument("--cfg", type=float, default=3.0, help="guidance scale")
    args = parse_flags(parser)
    compare_variants("sampling", prepare_sampling, args, num_iter=args.num_iter)


if __name__ == "__main__":
    main()
