"""Sampling whole images, guidance included: this project's way against the release's in float32."""

import argparse
from contextlib import nullcontext

import torch

from benchmarks.baselines import plain_kernels, sample_tokens_plainly
from benchmarks.common import add_ways, compare_ways, parse, prepare_way, seconds
from models.sampling import SamplingOptions, sampling_plan
from models.tokenbridge import MODELS, TokenBridge
from util import misc


def flops(model: TokenBridge, num_iter: int) -> float:
    """Of sampling one image with guidance, counted as in training: two passes a step, and the head of what it takes."""
    plan = sampling_plan(SamplingOptions(num_iter), model.seq_len)
    return sum(2 * model.backbone_flops(step.masked) + (step.masked - step.left) * model.token_flops() for step in plan)


def sample(args: argparse.Namespace, way: str) -> tuple[list[float], float, float, float]:
    """Times of one way, peak memory in GiB, operations, and the matrix peak."""
    precision = prepare_way(args, way)
    torch.manual_seed(0)
    with plain_kernels() if way == "release" else nullcontext():
        model = MODELS[args.model](quant_levels=64).to(args.device).eval().requires_grad_(False)
    if args.compile and way != "release":
        model.compile_blocks()
    labels = torch.arange(args.batch, device=args.device)

    def work():
        if way == "release":
            return sample_tokens_plainly(model, labels, args.num_iter, args.cfg, 1.0)
        with misc.autocast(args.device, precision):
            return model.sample_tokens(args.batch, args.num_iter, args.cfg, labels=labels, seeds=range(args.batch))

    times = seconds(work, args.repeats, args.device)
    memory = misc.memory_in_use(args.device)
    return times, memory, flops(model, args.num_iter) * args.batch, misc.matmul_flops(args.device, precision)


def main() -> None:
    """Runs the command line."""

    def add(parser) -> None:
        add_ways(parser, 1, "images at once")
        parser.add_argument("--num_iter", type=int, default=16)
        parser.add_argument("--cfg", type=float, default=3.0)

    args = parse(__doc__, 3, add)
    compare_ways("sampling", sample, args, steps=args.num_iter)


if __name__ == "__main__":
    main()
