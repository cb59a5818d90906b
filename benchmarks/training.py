"""A training step (forward, backward, optimizer, EMA): this code against the release in float32."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from benchmarks.baselines import plain_kernels
from benchmarks.common import (
    add_variant_flags,
    benchmark_parser,
    compare_variants,
    new_trainer,
    parse_flags,
)
from models.tokenbridge import MODELS, TokenBridge
from util.training_state import add_weight_decay

#: Quantiles of the number of masked tokens that the steps take in turn with ``--vary_masks``.
VARIED_QUANTILES = (0.5, 0.9, 0.1, 0.7, 0.3)


def release_step(model: TokenBridge, batch: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that takes a step as the release does, EMA parameter by parameter."""
    ema = ModelEmaV3(model, decay=0.9999, exclude_buffers=True)
    optimizer = torch.optim.AdamW(add_weight_decay(model, 0.02), lr=1e-4, betas=(0.9, 0.95))

    @plain_kernels()
    def step() -> None:
        model(*batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            parameters = zip(ema.module.parameters(), model.parameters(), strict=True)
            for average, parameter in parameters:
                average.mul_(0.9999).add_(parameter, alpha=1e-4)

    return step


def our_step(
    model: TokenBridge, batch: Sequence[Tensor], precision: str, compiled: bool
) -> Callable[[], None]:
    """Return a function that takes a step as ``engine_tokenbridge.train_one_epoch`` does."""
    trainer = new_trainer(model, precision, compiled)

    def step() -> None:
        trainer.clip_and_step(trainer.backward([batch]), lr=1e-4)
        trainer.finish_step()

    return step


def prepare_training(
    args: argparse.Namespace, release: bool, precision: str
) -> tuple[Callable[[], None], float]:
    """Return a function that takes a step, and its FLOPs; see ``compare_variants``."""
    options = {"head": args.head, "grad_checkpointing": args.grad_checkpointing}
    model = MODELS[args.model](quant_levels=64, **options).to(args.device)
    latents = torch.randn(args.batch, 16, model.grid_size, model.grid_size, device=args.device)
    labels = torch.arange(args.batch, device=args.device)
    # Training draws the number of masked tokens in every step. The median makes steps comparable.
    quantiles = cycle(VARIED_QUANTILES if args.vary_masks else [0.5])
    model.draw_num_masked = lambda: model.num_masked_at(next(quantiles))
    batch = latents, labels
    ours = partial(our_step, precision=precision, compiled=args.compile)
    step = (release_step if release else ours)(model, batch)
    num_masked = None if args.vary_masks else model.num_masked_at(0.5)
    return step, args.batch * model.training_flops(num_masked)


def main() -> None:
    """Run the command line."""
    parser = benchmark_parser(__doc__, repeats=3)
    add_variant_flags(parser, batch=4, batch_help="batch size")
    text = "recompute activations in the backward pass"
    parser.add_argument("--grad_checkpointing", action="store_true", help=text)
    text = "vary the number of masked tokens over the steps, as training does"
    parser.add_argument("--vary_masks", action="store_true", help=text)
    compare_variants("training", prepare_training, parse_flags(parser))


if __name__ == "__main__":
    main()
