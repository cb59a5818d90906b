"""The settings of a training run, each declared once, with its flag's default and help."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from util.dashboards import DASHBOARDS
from util.options import option


@dataclass
class TrainingSettings:
    """Settings of a training run. The flags of the same names set them.

    The defaults are those of main_tokenbridge.py; main_vae.py has some of its own.
    """

    output_dir: str | Path
    batch_size: int  # images per batch on each rank
    lr: float  # peak learning rate
    epochs: int = option(400, "passes over the training images")
    accum_iter: int = option(1, "batches per optimizer step")
    min_lr: float = option(0.0, "learning rate at the end of the cosine")
    lr_schedule: str = option(
        "cosine",
        "learning rate after the warm-up: half a cosine down to --min_lr, or constant --lr",
        choices=["cosine", "constant"],
    )
    warmup_epochs: float = option(100, "epochs in which the learning rate rises from 0")
    weight_decay: float = option(
        0.02, "weight decay of AdamW; none for biases and one-dimensional weights"
    )
    grad_clip: float = option(1.0, "maximum gradient norm; 0 turns clipping off (release: 3.0)")
    compile: bool = option(
        False, "torch.compile the blocks, which takes minutes before the first step"
    )
    ema_rate: float = option(0.9999, "decay of the weights' EMA per step")
    no_ema_warmup: bool = option(
        False,
        "use --ema_rate from the first step on, as the paper; by default the rate rises to it",
    )
    start_epoch: int = option(0, "first epoch; --resume sets it if the checkpoint stores one")
    save_last_freq: int = option(5, "epochs between two checkpoints")
    save_every_steps: int = option(
        0, "steps between two checkpoints; 0 saves at the end of epochs only"
    )
    keep_last: int = option(2, "checkpoints to keep, including the newest")
    keep_every: int = option(
        0, "also keep the checkpoint of every N-th epoch, checkpoint-epoch<N>.pth; 0 keeps none"
    )
    eval_freq: int = option(40, "epochs between two measurements during training")
    max_bad_steps: int = option(
        0, "maximum number of steps skipped because loss or gradient is NaN or infinite"
    )
    log: str = option(
        "tensorboard",
        "dashboard of the run; wandb and trackio are packages of their own, which read their "
        "settings from environment variables",
        choices=list(DASHBOARDS),
    )
    dry_run: bool = option(
        False, "take two steps, report hours, memory and the size of a checkpoint, write nothing"
    )
    # These have flags elsewhere.
    precision: str = "bf16"
    seed: int = 1
    freeze: Sequence[str] = ()
    args: dict[str, Any] = field(default_factory=dict)  # all flags: checkpoints record them

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "TrainingSettings":
        """Return the settings of a command line. What it has no flag for keeps its default."""
        flags = vars(args)
        names = {setting.name for setting in fields(cls)} - {"args"}
        return cls(**{name: flags[name] for name in names & set(flags)}, args=flags)
