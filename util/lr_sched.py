"""The learning rate: linear warm-up, then constant or a half cosine."""

import math
from argparse import Namespace

from torch.optim import Optimizer

from util.log import log, warn

#: The least that rates add up to if a run is to learn: Adam moves a weight by about the rate in each step, and weights
#: are drawn with a deviation of 0.02.
LEAST_MOVE = 1e-3


def learning_rate(epoch: float, args: Namespace) -> float:
    """The rate at a fractional ``epoch``.

    Args:
        epoch: epochs done, iterations included: ``epoch + iteration / iterations an epoch``.
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


def adjust_learning_rate(optimizer: Optimizer, epoch: float, args: Namespace) -> float:
    """Sets and returns :func:`learning_rate`; the optimizer's groups get it times their ``lr_scale``, if any."""
    lr = learning_rate(epoch, args)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def tell_rates(args: Namespace, steps_per_epoch: int) -> None:
    """Logs the steps and the highest learning rate of a run; warns of a run whose rates cannot teach it anything."""
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
