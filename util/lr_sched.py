"""The learning rate: linear warm-up, then constant or a half cosine."""

import math
from argparse import Namespace

from torch.optim import Optimizer


def adjust_learning_rate(optimizer: Optimizer, epoch: float, args: Namespace) -> float:
    """Sets and returns the rate at a fractional ``epoch``.

    Args:
        optimizer: its groups get the rate, times their ``lr_scale`` where they have one.
        epoch: epochs done, iterations included: ``epoch + iteration / iterations an epoch``.
        args: ``lr``, ``min_lr``, ``warmup_epochs``, ``epochs`` and ``lr_schedule`` (``"cosine"`` or ``"constant"``).
    """
    if epoch < args.warmup_epochs:
        lr = args.lr * epoch / args.warmup_epochs
    elif args.lr_schedule == "constant":
        lr = args.lr
    elif args.lr_schedule == "cosine":
        progress = (epoch - args.warmup_epochs) / max(args.epochs - args.warmup_epochs, 1e-8)
        lr = args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    else:
        raise ValueError(f'lr_schedule is "cosine" or "constant", not {args.lr_schedule!r}')
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
