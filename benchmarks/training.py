"""A training step, forward, backward, optimizer and average: this project's way against the release's in float32.

Each way runs in a process of its own, so that its peak memory is its own.
"""

import argparse
from functools import partial

import torch
from timm.utils import ModelEmaV3

from benchmarks.common import finish, in_own_process, machine, parse, seconds, spread
from benchmarks.other_ways import plain_kernels
from engine_tokenbridge import take_step
from models.tokenbridge import MODELS
from util import misc


def steps(args: argparse.Namespace, way: str) -> tuple[list[float], float, float, float]:
    """Times of one way, peak memory in GiB, operations, and the matrix peak."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device, precision = args.device, "fp32" if way == "release" else way
    if way != "release" and device.type == "cpu":
        misc.keep_freed_memory()  # as every script does
    torch.manual_seed(0)
    model = MODELS[args.model](quant_levels=64, grad_checkpointing=args.grad_checkpointing).to(device)
    ema = ModelEmaV3(model, decay=0.9999, exclude_buffers=True)
    if args.compile and way != "release":
        model.compile_blocks()
    groups = misc.add_weight_decay(model, 0.02)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=way != "release")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    side = model.grid_size
    latents = torch.randn(args.batch, 16, side, side, device=device)
    labels = torch.arange(args.batch, device=device)

    def step() -> None:
        with misc.autocast(device, precision):
            loss = model(latents, labels)
        scaler.scale(loss).backward()
        take_step(loss.detach(), optimizer, scaler, 1.0)
        if way == "release":
            with torch.no_grad():
                for average, value in zip(ema.module.parameters(), model.parameters(), strict=True):
                    average.mul_(0.9999).add_(value, alpha=1e-4)
        else:
            ema.update(model)

    # The number of masked tokens is drawn anew each step; here it is always the middle one.
    model.draw_num_masked = partial(model.num_masked_at, 0.5)
    if way == "release":
        with plain_kernels():
            times = seconds(step, args.repeats, device)
    else:
        times = seconds(step, args.repeats, device)
    memory = misc.memory_in_use(device)
    work = model.training_flops(model.num_masked_at(0.5)) * args.batch
    return times, memory, work, misc.matmul_flops(device, precision)


def main() -> None:
    """Runs the command line."""

    def add(parser) -> None:
        parser.add_argument("--model", choices=MODELS, default="tokenbridge_base")
        parser.add_argument("--batch", type=int, default=4, help="images of a step")
        parser.add_argument("--grad_checkpointing", action="store_true")
        parser.add_argument("--compile", action="store_true", help="of our ways")
        parser.add_argument(
            "--ways", nargs="+", default=["release", "fp32", "bf16"], help="of release, fp32, bf16, fp16"
        )

    args = parse(__doc__, 3, add)
    about, rows, slow = machine(args.device), [], None
    for way in args.ways:
        times, memory, work, peak = in_own_process(steps, args, way)
        figures = spread(times)
        slow = figures["median_s"] if way == "release" else slow
        row = {"way": "the release's, fp32" if way == "release" else f"ours, {way}", "model": args.model}
        row |= {"batch": args.batch, **figures, "images_per_s": args.batch / figures["median_s"]}
        row |= {"tflop": work / 1e12, "utilization": work / figures["median_s"] / peak, "peak_memory_gib": memory}
        rows.append({**row, "ratio": slow / figures["median_s"] if slow and way != "release" else None})
    finish("training", rows, about, args.json)


if __name__ == "__main__":
    main()
