"""The state of a training run.

Checkpoints hold it: weights, EMA, optimizer, gradient scaler, epoch and step.
"""

import argparse
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from util import distributed
from util.args import OF_A_MACHINE
from util.checkpoint.files import CHECKPOINT_NAME, epoch_path, file_stamp
from util.checkpoint.load import load_optimizer, load_scaler, load_weights
from util.checkpoint.names import to_published
from util.checkpoint.runs import is_plain
from util.checkpoint.saver import Saver
from util.checksums import bit_sum, checksum
from util.errors import UserError
from util.log import log
from util.training_settings import TrainingSettings

#: Flags that say where a run starts, not what it computes.
OF_A_START = ("resume", "output_dir", "finetune", "dry_run")
ADAM_STATE = ("exp_avg", "exp_avg_sq")  # of each parameter
#: After n steps the EMA decays by n / (n + 10), at most --ema_rate: it covers the last tenth of a
#: short run, not the initial weights. At rate 0.9999 the warm-up ends after 100,000 steps. The
#: published recipe takes 150,000 more, after which an EMA with warm-up differs from one without by
#: a share of exp(-15), less than float32 rounds. The paper and the release have no warm-up
#: (--no_ema_warmup).
EMA_WARMUP: dict[str, Any] = {"warmup_gamma": 10.0, "warmup_power": 1.0}


def add_weight_decay(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return optimizer groups: first without decay, then with it.

    One-dimensional parameters and biases are without decay, all others with it. Frozen parameters
    are left out. Within a group, the order is that of published optimizer states.
    """
    spared, decayed = [], []
    for name, parameter in to_published(dict(model.named_parameters())).items():
        if parameter.requires_grad:
            spare = parameter.ndim == 1 or name.endswith(".bias")
            (spared if spare else decayed).append(parameter)
    return [
        {"params": spared, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": weight_decay},
    ]


class TrainingState:
    """The model, EMA, optimizer and gradient scaler of a run, and the next epoch and step.

    Args:
        model: on its device. With several ranks all take the weights of rank 0.
        settings: of the run.
        steps_per_epoch: optimizer steps of an epoch.
        name: the file name of checkpoints.
        parts: lists of optimizer groups. The gradients of each list are clipped by their own norm.
            By default one list holds all parameters of ``model``.

    Attributes:
        wrapped: the model that computes losses, in its DDP wrapper if there are several ranks.
        ema: timm's ``ModelEmaV3``; :attr:`ema_model` is its model.
        epoch, step: the next step to take. Epochs, and the steps of an epoch, count from 0.
        ema_steps: updates of the EMA so far.
        clipped: parameters whose gradients are clipped together, one list for each of ``parts``.
        resumed: whether :meth:`load` has been called.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingSettings,
        steps_per_epoch: int,
        name: str = CHECKPOINT_NAME,
        parts: Sequence[list[dict]] | None = None,
    ):
        from timm.utils import ModelEmaV3  # loads torchvision, which takes longer than torch

        self.model: Any = model
        self.settings = settings
        self.steps_per_epoch = steps_per_epoch
        self.path = Path(settings.output_dir) / name
        self.device = next(model.parameters()).device
        self.wrapped: nn.Module = model
        # FSDP would go here: see `shard` in tests/models/test_fsdp.py. Saving, and comparing ranks,
        # assume that every rank holds all weights.
        if distributed.get_world_size() > 1:
            self.wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
            # Buffers are tables that never change. As an argument of the constructor this would
            # also keep them from being sent to other ranks once.
            self.wrapped.broadcast_buffers = False
        # A copy of the weights that all ranks have after DDP has sent those of rank 0
        self.ema = ModelEmaV3(
            model,
            decay=settings.ema_rate,
            exclude_buffers=True,
            use_warmup=not settings.no_ema_warmup,
            **EMA_WARMUP,
        )
        self.ema_steps = 0
        if settings.compile:
            log.info(
                "compiling the blocks: the first step and the first measurement take up to some "
                "minutes longer"
            )
            for module in (self.model, self.ema_model):
                module.compile_blocks()
        parts = parts or [add_weight_decay(model, settings.weight_decay)]
        self.clipped = [[p for group in part for p in group["params"]] for part in parts]
        self.optimizer = torch.optim.AdamW(
            [*chain(*parts)],
            lr=settings.lr,
            betas=(0.9, 0.95),
            fused=self.device.type != "mps",  # which cannot skip a step by a flag on the device
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.epoch = settings.start_epoch
        self.step = 0
        self.saver = Saver()
        self.resumed = False
        self._saved_at: tuple[Path, int, int] | None = None
        # Checksums of weights and EMA at the last save, of all ranks
        self._sums: distributed.HostCopy | None = None

    @property
    def steps_done(self) -> int:
        """Steps of the whole run so far."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def ema_model(self) -> Any:
        """The model with the averaged weights."""
        return self.ema.module

    def update_ema(self) -> None:
        """Update the EMA with the present weights, after a step that changed them."""
        self.ema_steps += 1
        self.ema.update(self.model, self.ema_steps if self.ema.use_warmup else None)

    def advance(self) -> None:
        """Count a step."""
        self.epoch, self.step = divmod(self.steps_done + 1, self.steps_per_epoch)

    # ----------------------------------------------------------------------------------------------
    # Saving

    def save(self) -> None:
        """Start to write a checkpoint in the background, unless the file already holds this step.

        All ranks call this. Rank 0 writes the present state, if the weights of all ranks are equal.
        The pending step must be finished before; :meth:`finish` waits for the file.

        Raises:
            UserError: see :meth:`check_ranks`.
        """
        saved_at = self.path.resolve(), self.epoch, self.step
        if self._saved_at == saved_at:
            return
        self.check_ranks()
        self._saved_at = saved_at
        if distributed.get_world_size() > 1:
            sums = [bit_sum(model.parameters()) for model in (self.model, self.ema_model)]
            self._sums = distributed.gather_async(torch.stack(sums))
        if not distributed.is_main_process():
            return
        averaged = {name: value.detach() for name, value in self.ema_model.named_parameters()}
        content = {
            "model": to_published(self.model.state_dict()),
            "model_ema": to_published(averaged),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch - 1,  # the last finished one
            "step": self.step,  # the next one to take, in the epoch after that
            "steps_per_epoch": self.steps_per_epoch,
            "world_size": distributed.get_world_size(),
            "average_steps": self.ema_steps,
            "ema_warmup": self.ema.use_warmup,
            "config": {**self.model.config, **self.model.metadata},
            "args": self.settings.args,
        }
        if self.scaler.is_enabled():
            content["scaler"] = self.scaler.state_dict()
        sums, every = self._sums, self.settings.keep_every
        is_milestone = self.step == 0 and every > 0 and self.epoch > 0 and self.epoch % every == 0
        self.saver.save(
            self.path,
            content,
            self.settings.keep_last,
            lambda: not differing_ranks(sums),
            epoch_path(self.path, self.epoch) if is_milestone else None,
        )

    def check_ranks(self) -> None:
        """Compare the weights and the EMA that the ranks had at the last save; all ranks call this.

        Raises:
            UserError: they differ. All ranks raise it; rank 0 prints which ranks, and their hosts.
        """
        differing, self._sums = differing_ranks(self._sums), None
        if not differing:
            return
        path, epoch, step = self._saved_at
        hosts = distributed.gather_objects(socket.gethostname())
        where = ", ".join(f"{rank} on {hosts[rank]}" for rank in differing)
        advice = "start again"
        if path.exists():
            advice = f"{path} is from an earlier step, continue from it"
        distributed.raise_on_all_ranks(
            f"at epoch {epoch}, step {step} the weights of {len(differing)} of {len(hosts)} ranks "
            f"differ from the others': {where}; no checkpoint of this step was written; {advice}, "
            "without the machines whose memory, GPU or connection is at fault"
        )

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk; all ranks call this.

        Raises:
            UserError: it cannot be written, or see :meth:`check_ranks`; on all ranks.
        """
        self.check_ranks()
        distributed.on_rank_0(self.saver.finish)

    # ----------------------------------------------------------------------------------------------
    # Resuming

    def load(self, content: Mapping[str, Any], path: Path) -> None:
        """Load weights, EMA, optimizer, scaler, epoch and step, if the checkpoint holds them.

        Only rank 0 needs the content; it sends the state to the other ranks.

        Args:
            content: see :func:`util.checkpoint.runs.read_run`.
            path: the file, for messages.

        Raises:
            UserError: an entry is damaged or of another model, or other parameters were frozen.
        """
        distributed.on_rank_0(lambda: self._load_on_rank_0(content, path))
        self._send_to_all_ranks()
        self.resumed, self._saved_at = True, (path.resolve(), self.epoch, self.step)
        log.info(
            "resumed from %s, continuing at epoch %d, step %d of %d",
            *(path, self.epoch, self.step, self.steps_per_epoch),
        )

    def _load_on_rank_0(self, content: Mapping[str, Any], path: Path) -> None:
        load_weights(self.model, content, path, ema=False)
        self.ema_model.load_state_dict(self.model.state_dict())
        if "model_ema" in content:
            load_weights(self.ema_model, content, path, ema=True)
            self._load_ema_warmup(content, path)
        if "optimizer" in content and "epoch" in content:
            self._compare_settings(content, path)
            load_optimizer(self.optimizer, content["optimizer"], path)
            self._load_epoch_and_step(content, path)
            if "model_ema" in content:  # files of earlier versions do not store the number
                self.ema_steps = content.get("average_steps", self.steps_done)
        if self.scaler.is_enabled() and content.get("scaler"):
            load_scaler(self.scaler, content["scaler"], path)
        self.saver.whole = file_stamp(path)

    def _compare_settings(self, content: Mapping[str, Any], path: Path) -> None:
        """Compare the flags with those of the run that wrote the file."""
        args = content.get("args")
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        args = args if isinstance(args, dict) else {}
        freeze, saved_freeze = list(self.settings.freeze), args.get("freeze", [])
        if not is_plain(saved_freeze):
            raise UserError(f"{path} is damaged: its args.freeze is no list of patterns")
        if saved_freeze != freeze:
            raise UserError(
                f"{path} was trained with --freeze {saved_freeze or 'nothing'}, not "
                f"{freeze or 'nothing'}: to change it, start a new run with --finetune and another "
                "--output_dir"
            )
        differing = [
            f"--{name} {saved} (now {value})"
            for name, value in self.settings.args.items()
            if name not in (*OF_A_MACHINE, *OF_A_START)
            if is_plain(value) and is_plain(saved := args.get(name, value)) and saved != value
        ]
        if differing:
            log.info("flags of the run that wrote %s: %s", path, ", ".join(differing))
        precision = self.settings.precision
        if args.get("precision", precision) != precision:
            log.warning(
                "%s was written by a run in %s, this run computes in %s: its steps round "
                "differently",
                *(path, args["precision"], precision),
            )

    def _load_ema_warmup(self, content: Mapping[str, Any], path: Path) -> None:
        """Use the EMA warm-up if the checkpoint's run did.

        Raises:
            UserError: it did, but this run has ``--no_ema_warmup``.
        """
        # The release has no warm-up and writes no config; earlier versions of this project store
        # a config but not the entry.
        warmup = content.get("ema_warmup", "config" in content)
        if warmup and not self.ema.use_warmup:
            raise UserError(
                f"{path} was trained with a warm-up of the EMA: remove --no_ema_warmup, or start a "
                "new run with --finetune and another --output_dir"
            )
        if self.ema.use_warmup and not warmup:
            log.info(
                "EMA with the constant rate %g, without a warm-up, as in %s", self.ema.decay, path
            )
        self.ema.use_warmup = warmup

    def _load_epoch_and_step(self, content: Mapping[str, Any], path: Path) -> None:
        steps, ranks = self.steps_per_epoch, distributed.get_world_size()
        saved_steps = content.get("steps_per_epoch", steps)
        saved_ranks = content.get("world_size", ranks)
        # Rounded down: no image of the epoch is left out
        step = content.get("step", 0) * steps // saved_steps
        self.epoch, self.step = divmod((content["epoch"] + 1) * steps + step, steps)
        if (saved_steps, saved_ranks) != (steps, ranks):
            differing = (
                "random numbers" if saved_steps == steps else "random numbers and image order"
            )
            log.warning(
                "%s was written by %d ranks with %d steps per epoch, this run has %d with %d: it "
                "continues at the same share of the epoch, rounded down to a step, but its %s "
                "differ from those of an uninterrupted run",
                *(path, saved_ranks, saved_steps, ranks, steps, differing),
            )

    def _send_to_all_ranks(self) -> None:
        """Send the state of rank 0 to all ranks, and compare what they received."""
        if distributed.get_world_size() == 1:
            return
        learned = [p for group in self.optimizer.param_groups for p in group["params"]]
        adam = self.optimizer.state
        has_state = [parameter in adam for parameter in learned]
        counts = self.epoch, self.step, self.ema_steps, self.ema.use_warmup
        counts, has_state, scaler = distributed.broadcast_object(
            (counts, has_state, self.scaler.state_dict())
        )
        self.epoch, self.step, self.ema_steps, self.ema.use_warmup = counts
        if scaler:
            self.scaler.load_state_dict(scaler)
        tensors = [*self.model.state_dict().values(), *self.ema_model.state_dict().values()]
        for parameter in (p for p, stored in zip(learned, has_state, strict=True) if stored):
            if parameter not in adam:
                step = torch.zeros((), device=parameter.device)
                adam[parameter] = {"step": step}
                adam[parameter] |= {name: torch.zeros_like(parameter) for name in ADAM_STATE}
            tensors += [adam[parameter][name] for name in ("step", *ADAM_STATE)]
        distributed.broadcast_tensors(tensors)
        distributed.check_equal(
            {"the checksum of weights, EMA and optimizer": checksum(tensors)},
            "memory or the connection between these machines is at fault",
        )


def differing_ranks(sums: distributed.HostCopy | None) -> list[int]:
    """Return the ranks whose checksums differ from those of most ranks; none without checksums."""
    if sums is None:
        return []
    rows = [tuple(row) for row in sums.read().tolist()]
    most_common = Counter(rows).most_common(1)[0][0]
    return [rank for rank, row in enumerate(rows) if row != most_common]
