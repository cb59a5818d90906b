"""Sampling whole images, guidance included: this project's way against the release's in float32."""

import argparse
from collections.abc import Callable

import torch

from benchmarks.baselines import RecomputingHead, plain_kernels
from benchmarks.common import add_ways, benchmark_parser, compare_ways, parse
from models.sampling import SamplingOptions, sampling_plan
from models.tokenbridge import MODELS
from util import misc


def prepare(args: argparse.Namespace, release: bool, precision: str) -> tuple[Callable[[], None], float]:
    """A function that samples a batch, and its operations; see :func:`benchmarks.common.compare_ways`."""
    model = MODELS[args.model](quant_levels=64, head=args.head).to(args.device).eval().requires_grad_(False)
    if release:
        model.head.__class__ = RecomputingHead
    elif args.compile:
        model.compile_blocks()
    labels = torch.arange(args.batch, device=args.device)

    def sample() -> None:
        seeds = None if release else range(args.batch)
        with misc.autocast(args.device, precision):
            model.sample_tokens(args.batch, args.num_iter, args.cfg, labels=labels, seeds=seeds)

    # All ways are charged for what is needed: two passes of the backbone a step, the head for the tokens taken.
    plan = sampling_plan(SamplingOptions(args.num_iter), model.seq_len)
    backbone = sum(2 * model.backbone.flops(step.masked) for step in plan)
    work = plain_kernels()(sample) if release else sample
    return work, args.batch * (backbone + model.seq_len * model.head.sampling_flops())


def main() -> None:
    """Runs the command line."""
    parser = benchmark_parser(__doc__, repeats=3)
    add_ways(parser, batch=1, what="images at once")
    parser.add_argument("--num_iter", type=int, default=16, help="autoregressive steps")
    parser.add_argument("--cfg", type=float, default=3.0, help="guidance scale")
    args = parse(parser)
    compare_ways("sampling", prepare, args, steps=args.num_iter)


if __name__ == "__main__":
    main()
