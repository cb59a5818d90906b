"""The learning rate: linear warm-up, then constant or a half cosine."""

import math
from typing import Protocol

from torch.optim import Optimizer

from util.log import log, warn

#: The least sum of the learning rates of all steps with which a run can learn. Adam moves a weight
#: by about the learning rate per step, and initial weights have a standard deviation of 0.02.
LEAST_MOVE = 1e-3


class Schedule(Protocol):
    """Settings of the learning rate: a command line, or :class:`util.training_state.TrainingSettings`."""

    lr: float
    min_lr: float
    lr_schedule: str
    warmup_epochs: float
    epochs: int


def learning_rate(epoch: float, args: Schedule) -> float:
    """Return the learning rate at a fractional ``epoch``.

    Args:
        epoch: ``epoch + iteration / iterations per epoch``.
        args: ``lr``, ``min_lr``, ``warmup_epochs``, ``epochs`` and ``lr_schedule`` (``"cosine"`` or ``"constant"``).
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
    """Set and return :func:`learning_rate`; groups of the optimizer multiply it by their ``lr_scale``, if any."""
    lr = learning_rate(epoch, args)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def log_learning_rates(args: Schedule, steps_per_epoch: int) -> None:
    """Log the steps and the highest learning rate of a run; warn if they are too low to have an effect."""
    steps, looks = args.epochs * steps_per_epoch, 1000
    rates = [learning_rate(args.epochs * look / looks, args) for look in range(looks)]
    peak, total = max(rates), sum(rates) / looks * steps
    log.info(
        "%d steps, %d in each of %d epochs, learning rate up to %.3g",
        steps,
        steps_per_epoch,
        args.epochs,
        peak,
    )
    if args.epochs < args.warmup_epochs:
        text = "this run of %d epochs never leaves its warm-up of %g: its learning rate ends at %.2g, not %.2g; lower "
        warn(
            text + "--warmup_epochs, to a tenth of the epochs, say",
            args.epochs,
            args.warmup_epochs,
            peak,
            args.lr,
        )
    if 0 < total < LEAST_MOVE:
        text = "the learning rates of all steps add up to %.2g: Adam moves no weight further than that, and %g is the "
        text += "least that shows; raise --lr (1e-3 for a small model, 2e-4 for a large one) or --epochs"
        warn(text, total, LEAST_MOVE)
