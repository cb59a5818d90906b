"""The learning rate: linear warm-up, then constant or a half cosine."""

import math
from typing import Protocol

from torch.optim import Optimizer

from util.log import counted, log, warn

#: The least sum of the learning rates of all steps with which a run can learn. Adam moves a weight
#: by about the learning rate per step, and initial weights have a standard deviation of 0.02.
LEAST_MOVE = 1e-3


class Schedule(Protocol):
    """Settings of the learning rate.

    A parsed command line or :class:`util.training_state.TrainingSettings`.
    """

    lr: float
    min_lr: float
    lr_schedule: str
    warmup_epochs: float
    epochs: int


def learning_rate(epoch: float, args: Schedule) -> float:
    """Return the learning rate at a fractional ``epoch``.

    Args:
        epoch: ``epoch + iteration / iterations per epoch``.
        args: the settings. ``lr_schedule`` is ``"cosine"`` or ``"constant"``.
    """
    if epoch < args.warmup_epochs:
        return args.lr * epoch / args.warmup_epochs
    if args.lr_schedule == "constant":
        return args.lr
    if args.lr_schedule != "cosine":
        raise ValueError(f'lr_schedule is "cosine" or "constant", not {args.lr_schedule!r}')
    progress = (epoch - args.warmup_epochs) / max(args.epochs - args.warmup_epochs, 1e-8)
    return args.min_lr + (args.lr - args.min_lr) * 0.5 * (
        1 + math.cos(math.pi * min(progress, 1.0))
    )


def adjust_learning_rate(optimizer: Optimizer, epoch: float, args: Schedule) -> float:
    """Set the optimizer's learning rate to :func:`learning_rate`, and return it.

    Groups of the optimizer that have an ``lr_scale`` multiply it by that.
    """
    lr = learning_rate(epoch, args)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def log_learning_rates(args: Schedule, steps_per_epoch: int) -> None:
    """Log the steps and the highest learning rate of a run; warn if it is too low."""
    steps = args.epochs * steps_per_epoch
    samples = 1000
    rates = [learning_rate(args.epochs * sample / samples, args) for sample in range(samples)]
    peak = max(rates)
    total = sum(rates) / samples * steps
    log.info(
        "%s, %d in each of %s, learning rate up to %.3g",
        counted(steps, "step"),
        steps_per_epoch,
        counted(args.epochs, "epoch"),
        peak,
    )
    if args.epochs < args.warmup_epochs:
        warn(
            "this run of %d epochs never leaves its warm-up of %g: its learning rate ends at %.2g, "
            "not %.2g; lower --warmup_epochs, for example to a tenth of the epochs",
            args.epochs,
            args.warmup_epochs,
            peak,
            args.lr,
        )
    if 0 < total < LEAST_MOVE:
        warn(
            "the learning rates of all steps add up to %.2g: Adam moves no weight further than "
            "that, and less than %g has no visible effect; raise --lr (1e-3 for a small model, "
            "2e-4 for a large one) or --epochs",
            total,
            LEAST_MOVE,
        )
