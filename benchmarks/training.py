"""A training step, forward, backward, optimizer and average: this project's way against the release's in float32.

Each way runs in a process of its own, so that its peak memory is its own.
"""

import argparse
from contextlib import nullcontext
from functools import partial

import torch
from timm.utils import ModelEmaV3

from benchmarks.baselines import plain_kernels
from benchmarks.common import add_ways, compare_ways, parse, prepare_way, seconds
from models.tokenbridge import MODELS
from util import misc
from util.training_state import TrainingState


def steps(args: argparse.Namespace, way: str) -> tuple[list[float], float, float, float]:
    """Times of one way, peak memory in GiB, operations, and the matrix peak."""
    device, precision = args.device, prepare_way(args, way)
    torch.manual_seed(0)
    with plain_kernels() if way == "release" else nullcontext():
        model = MODELS[args.model](quant_levels=64, grad_checkpointing=args.grad_checkpointing).to(device)
    side = model.grid_size
    latents = torch.randn(args.batch, 16, side, side, device=device)
    labels = torch.arange(args.batch, device=device)
    if way == "release":
        ema = ModelEmaV3(model, decay=0.9999, exclude_buffers=True)
        optimizer = torch.optim.AdamW(misc.add_weight_decay(model, 0.02), lr=1e-4, betas=(0.9, 0.95))
    else:
        options = {"ema_rate": 0.9999, "weight_decay": 0.02, "lr": 1e-4, "grad_clip": 1.0, "start_epoch": 0}
        run = argparse.Namespace(**options, precision=precision, compile=args.compile)
        state = TrainingState(model, run, steps_per_epoch=1)

    def step() -> None:
        if way == "release":
            model(latents, labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for average, value in zip(ema.module.parameters(), model.parameters(), strict=True):
                    average.mul_(0.9999).add_(value, alpha=1e-4)
            return
        with misc.autocast(device, precision):
            loss = model(latents, labels)
        state.scaler.scale(loss).backward()
        state.take_step(loss.detach(), 1e-4)
        state.settle()

    # The number of masked tokens is drawn anew each step; here it is always the middle one.
    model.draw_num_masked = partial(model.num_masked_at, 0.5)
    times = seconds(step, args.repeats, device)
    memory = misc.memory_in_use(device)
    work = model.training_flops(model.num_masked_at(0.5)) * args.batch
    return times, memory, work, misc.matmul_flops(device, precision)


def main() -> None:
    """Runs the command line."""

    def add(parser) -> None:
        add_ways(parser, 4, "images of a step")
        parser.add_argument("--grad_checkpointing", action="store_true")

    compare_ways("training", steps, parse(__doc__, 3, add))


if __name__ == "__main__":
    main()
