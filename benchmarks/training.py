"""A training step, forward, backward, optimizer and average: this project's way against the release's in float32."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from benchmarks.baselines import plain_kernels
from benchmarks.common import add_ways, benchmark_parser, compare_ways, parse, training_state
from models.tokenbridge import MODELS, TokenBridge
from util.precision import autocast
from util.training_state import add_weight_decay


def release_step(model: TokenBridge, batch: Sequence[Tensor]) -> Callable[[], None]:
    """A function that takes a step as the release does: optimizer and average one tensor after the other."""
    ema = ModelEmaV3(model, decay=0.9999, exclude_buffers=True)
    optimizer = torch.optim.AdamW(add_weight_decay(model, 0.02), lr=1e-4, betas=(0.9, 0.95))

    @plain_kernels()
    def step() -> None:
        model(*batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for average, value in zip(ema.module.parameters(), model.parameters(), strict=True):
                average.mul_(0.9999).add_(value, alpha=1e-4)

    return step


def our_step(
    model: TokenBridge, batch: Sequence[Tensor], precision: str, compiled: bool
) -> Callable[[], None]:
    """A function that takes a step as ``engine_tokenbridge.train_one_epoch`` does."""
    state = training_state(model, precision, compiled)

    def step() -> None:
        with autocast(state.device, precision):
            loss = model(*batch)
        state.scaler.scale(loss).backward()
        state.take_step(loss.detach(), 1e-4)
        state.settle()

    return step


def prepare(
    args: argparse.Namespace, release: bool, precision: str
) -> tuple[Callable[[], None], float]:
    """A function that takes a step, and its operations; see :func:`benchmarks.common.compare_ways`."""
    options = {"head": args.head, "grad_checkpointing": args.grad_checkpointing}
    model = MODELS[args.model](quant_levels=64, **options).to(args.device)
    latents = torch.randn(args.batch, 16, model.grid_size, model.grid_size, device=args.device)
    labels = torch.arange(args.batch, device=args.device)
    # Training draws the number of masked tokens at each step; here it is always the median, so that steps compare.
    model.draw_num_masked = partial(model.num_masked_at, 0.5)
    batch = latents, labels
    step = (
        release_step(model, batch) if release else our_step(model, batch, precision, args.compile)
    )
    return step, args.batch * model.training_flops(model.num_masked_at(0.5))


def main() -> None:
    """Runs the command line."""
    parser = benchmark_parser(__doc__, repeats=3)
    add_ways(parser, batch=4, what="images of a step")
    parser.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="recompute activations in the backward pass",
    )
    compare_ways("training", prepare, parse(parser))


if __name__ == "__main__":
    main()
