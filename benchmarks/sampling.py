"""Sampling whole images, guidance included: this project's way against the release's in float32."""

import argparse

import torch

from benchmarks.common import finish, in_own_process, machine, parse, seconds, spread
from benchmarks.other_ways import plain_kernels, sample_tokens_plainly
from models.sampling import sampling_plan
from models.tokenbridge import MODELS, TokenBridge
from util import misc


def flops(model: TokenBridge, num_iter: int) -> float:
    """Of sampling one image with guidance: 2 operations a multiply-add, blocks of backbone and head."""
    c = model.config
    buffer, length, total = c["buffer_size"], model.seq_len, 0.0

    def blocks(depth: int, dim: int, places: int) -> float:
        return depth * (2 * places * (4 + 2 * c["mlp_ratio"]) * dim**2 + 4 * places**2 * dim)

    head = model.head
    token = head.places * (head.depth * 2 * 18 * head.dim**2 + 2 * (2 * head.dim**2 + head.dim * head.classes))
    for step in sampling_plan(num_iter, length, 2.0, "linear"):
        known = buffer + length - step.masked
        passes = blocks(c["encoder_depth"], c["encoder_embed_dim"], known)
        passes += blocks(c["decoder_depth"], c["decoder_embed_dim"], buffer + length)
        total += 2 * passes + (step.masked - step.left) * token
    return total


def sample(args: argparse.Namespace, way: str) -> tuple[list[float], float, float, float]:
    """Times of one way, peak memory in GiB, operations, and the matrix peak."""
    if args.threads:
        torch.set_num_threads(args.threads)
    precision = "fp32" if way == "release" else way
    if way != "release" and args.device.type == "cpu":
        misc.keep_freed_memory()  # as every script does
    torch.manual_seed(0)
    model = MODELS[args.model](quant_levels=64).to(args.device).eval().requires_grad_(False)
    labels = torch.arange(args.batch, device=args.device)

    def work():
        if way == "release":
            with plain_kernels():
                return sample_tokens_plainly(model, labels, args.num_iter, args.cfg, 1.0)
        with misc.autocast(args.device, precision):
            return model.sample_tokens(args.batch, args.num_iter, args.cfg, labels=labels, seeds=range(args.batch))

    times = seconds(work, args.repeats, args.device)
    memory = misc.memory_in_use(args.device)
    return times, memory, flops(model, args.num_iter) * args.batch, misc.matmul_flops(args.device, precision)


def main() -> None:
    """Runs the command line."""

    def add(parser) -> None:
        parser.add_argument("--model", choices=MODELS, default="tokenbridge_base")
        parser.add_argument("--batch", type=int, default=1, help="images at once")
        parser.add_argument("--num_iter", type=int, default=16)
        parser.add_argument("--cfg", type=float, default=3.0)
        parser.add_argument("--ways", nargs="+", default=["release", "fp32", "bf16"], help="or fp16")

    args = parse(__doc__, 3, add)
    about, rows, slow = machine(args.device), [], None
    for way in args.ways:
        times, memory, work, peak = in_own_process(sample, args, way)
        figures = spread(times)
        slow = figures["median_s"] if way == "release" else slow
        row = {"way": "the release's, fp32" if way == "release" else f"ours, {way}", "model": args.model}
        row |= {"batch": args.batch, "steps": args.num_iter, **figures}
        row |= {"images_per_s": args.batch / figures["median_s"], "tflop": work / 1e12}
        row |= {"utilization": work / figures["median_s"] / peak, "peak_memory_gib": memory}
        rows.append({**row, "ratio": slow / figures["median_s"] if slow and way != "release" else None})
    finish("sampling", rows, about, args.json)


if __name__ == "__main__":
    main()
