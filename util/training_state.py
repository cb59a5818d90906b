"""All that a training run changes and must save: weights, their average, optimizer, gradient scaler, epoch, step."""

import argparse
import math
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util import distributed
from util.checkpoint.files import CHECKPOINT_NAME, file_stamp
from util.checkpoint.load import load_optimizer, load_scaler, load_weights
from util.checkpoint.names import to_published
from util.checkpoint.runs import is_plain
from util.checkpoint.saver import Saver
from util.checksums import bit_sum, checksum
from util.errors import UserError
from util.log import log

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of each parameter
#: After n steps the average decays by n / (n + 10), at most --ema_rate: it spans the last tenth of a short run, not
#: the drawn weights. At 0.9999 that ends after 100,000 steps; of the published recipe 150,000 are left, after which
#: averages with and without it differ by a share of exp(-15), less than float32 rounds in them.
#: The paper's and the release's averages have no warm-up (--no_ema_warmup).
AVERAGE_WARMUP = {"warmup_gamma": 10.0, "warmup_power": 1.0}


class Step(NamedTuple):
    """A step that was computed, and taken if its gradient was finite."""

    loss: Tensor  # on the device
    norm: Tensor  # of the gradient before clipping, on the device
    finite: Tensor  # whether loss and gradient were; in fp16 the loss alone: the scaler sees to the gradient
    taken: Tensor  # whether the weights changed
    lr: float
    epoch: int  # from 0
    step: int  # of the epoch, from 0


class TrainingState:
    """A run's model, average, optimizer and scaler, and its next step.

    A step's outcome is looked at when the next one has been computed, so that the device never waits for the host:
    :meth:`take_step` starts a step, :meth:`settle` ends it. The average sees no step that was not taken.

    Args:
        model: on its device; with several processes all take the weights of the first.
        args: ``ema_rate``, ``no_ema_warmup``, ``weight_decay``, ``lr``, ``grad_clip``, ``precision``, ``compile``,
            ``start_epoch``.
        steps_per_epoch: optimizer steps of an epoch.
        name: the file name of checkpoints.
        parts: the optimizer's groups, in lists, each of which has its gradients clipped by a norm of its own; by
            default one list, of all of ``model``.

    Attributes:
        wrapped: the model that computes losses: in its DDP wrapper where there are several processes.
        epoch, step: the next step to take; epochs and an epoch's steps count from 0.
        average_steps: steps that the average has seen.
        saver: writes the main process's checkpoints.
        resumed: whether :meth:`load` has been called.
    """

    def __init__(
        self,
        model: nn.Module,
        args: argparse.Namespace,
        steps_per_epoch: int,
        name: str = CHECKPOINT_NAME,
        parts: Sequence[list[dict]] | None = None,
    ):
        self.model, self.steps_per_epoch, self.grad_clip, self.name = (
            model,
            steps_per_epoch,
            args.grad_clip,
            name,
        )
        self.device, self.precision = next(model.parameters()).device, args.precision
        several = distributed.get_world_size() > 1
        self.wrapped = (
            DistributedDataParallel(model, gradient_as_bucket_view=True) if several else model
        )
        if several:  # buffers are tables that never change; as an argument, this would also keep them from being shared
            self.wrapped.broadcast_buffers = False
        # A copy of the weights that all processes have once DDP has shared those of the first.
        warmup = {"use_warmup": not args.no_ema_warmup, **AVERAGE_WARMUP}
        self.average = ModelEmaV3(model, decay=args.ema_rate, exclude_buffers=True, **warmup)
        self.average_steps = 0
        if args.compile:
            model.compile_blocks()
        parts = parts or [add_weight_decay(model, args.weight_decay)]
        self.clipped = [
            [parameter for group in part for parameter in group["params"]] for part in parts
        ]
        # On Apple GPUs the fused optimizer cannot leave out a step by a flag on the device: there the host looks at it.
        self.fused = self.device.type != "mps"
        self.optimizer = torch.optim.AdamW(
            [*chain(*parts)], lr=args.lr, betas=(0.9, 0.95), fused=self.fused
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.precision == "fp16")
        self.epoch, self.step = args.start_epoch, 0
        self._pending: tuple[Step, distributed.HostCopy] | None = None
        self._sums: distributed.HostCopy | None = (
            None  # checksums of the weights and the EMA at the last save, of all ranks
        )
        self.saver, self._saved_at, self.resumed = Saver(), None, False

    @property
    def steps_done(self) -> int:
        """Steps of the whole run up to here."""
        return self.epoch * self.steps_per_epoch + self.step

    def take_step(self, loss: Tensor, lr: float) -> None:
        """Clips the gradients of ``loss``, and takes the optimizer's step unless their norm is not finite.

        Nothing is waited for: the fused optimizer looks at the flag on the device. ``lr`` is kept for the record.
        """
        self.scaler.unscale_(self.optimizer)
        norm = sum(
            nn.utils.clip_grad_norm_(part, self.grad_clip or math.inf) for part in self.clipped
        )
        # After DDP's exchange every process sees the same norm. With fp16 an overflowing gradient is the scaler's
        # business: it leaves the step out by itself and lowers the scale.
        finite = taken = torch.isfinite(norm)
        if self.scaler.is_enabled():
            finite = torch.isfinite(distributed.all_reduce_mean(loss))
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif not self.fused:
            if finite:
                self.optimizer.step()
        else:
            self.optimizer.found_inf, self.optimizer.grad_scale = (
                (~finite).float(),
                None,
            )  # as a scaler would tell it
            self.optimizer.step()
            del self.optimizer.found_inf, self.optimizer.grad_scale
        self.optimizer.zero_grad(set_to_none=True)
        answers = distributed.HostCopy(torch.stack([finite, taken]))
        self._pending = Step(loss, norm, finite, taken, lr, self.epoch, self.step), answers
        self.epoch, self.step = divmod(self.steps_done + 1, self.steps_per_epoch)

    def settle(self) -> Step | None:
        """Waits for the last step and updates the average by it if it was taken; None if it is settled already.

        Raises:
            UserError: see :meth:`check_ranks`.
        """
        self.check_ranks()
        if self._pending is None:
            return None
        (last, answers), self._pending = self._pending, None
        finite, taken = answers.read()
        last = last._replace(finite=finite, taken=taken)
        if last.taken:
            self.average_steps += 1
            self.average.update(self.model, self.average_steps if self.average.use_warmup else None)
        return last

    # ----------------------------------------------------------------------------------------------------------------
    # Files.

    def save(self, args: argparse.Namespace) -> None:
        """Start to write the checkpoint :attr:`name`, unless the file is of this very step already.

        All ranks call this; the main process writes the run as it is at this moment, if all ranks have equal weights.
        :meth:`settle` comes before, :meth:`finish` at the end.

        Args:
            args: ``output_dir``, ``keep_last``, and everything else that the file stores about the run.

        Raises:
            UserError: see :meth:`check_ranks`.
        """
        path = Path(args.output_dir) / self.name
        place = path.resolve(), self.epoch, self.step
        if self._saved_at == place:
            return
        self.check_ranks()
        self._saved_at = place
        if distributed.get_world_size() > 1:
            sums = [bit_sum(model.parameters()) for model in (self.model, self.average.module)]
            self._sums = distributed.gather_async(torch.stack(sums))
        if not distributed.is_main_process():
            return
        averaged = {name: value.detach() for name, value in self.average.module.named_parameters()}
        content = {
            "model": to_published(self.model.state_dict()),
            "model_ema": to_published(averaged),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch - 1,  # the last finished
            "step": self.step,  # the next one to take, of the epoch after that
            "steps_per_epoch": self.steps_per_epoch,
            "world_size": distributed.get_world_size(),
            "average_steps": self.average_steps,
            "ema_warmup": self.average.use_warmup,
            "config": {**self.model.config, **self.model.metadata},
            "args": vars(args),
        }
        if self.scaler.is_enabled():
            content["scaler"] = self.scaler.state_dict()
        sums = self._sums
        self.saver.save(path, content, args.keep_last, lambda: not differing_ranks(sums))

    def check_ranks(self) -> None:
        """Compare the weights and the EMA that the ranks had at the last save; all ranks call this.

        Raises:
            UserError: they differ, on all ranks; the main one prints which ranks, and where.
        """
        differing, self._sums = differing_ranks(self._sums), None
        if not differing:
            return
        path, epoch, step = self._saved_at
        hosts = distributed.gather_objects(socket.gethostname())
        where = ", ".join(f"{rank} on {hosts[rank]}" for rank in differing)
        advice = (
            f"{path} is of an earlier step, continue from it" if path.exists() else "start again"
        )
        distributed.raise_on_all_ranks(
            f"at epoch {epoch}, step {step} the weights of {len(differing)} of {len(hosts)} ranks differ from the "
            f"others': {where}; no checkpoint was written of this step; {advice}, without the machines whose memory, "
            "GPU or connection is at fault"
        )

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk; all ranks call this.

        Raises:
            UserError: it cannot be written, or see :meth:`check_ranks`; on all ranks.
        """
        self.check_ranks()
        distributed.on_rank_0(self.saver.finish)

    def load(self, content: Mapping[str, Any], path: Path, frozen: list[str]) -> None:
        """Takes over a checkpoint's weights, and its average, optimizer, scaler, epoch and step where it has them.

        The main process alone needs the content; all others get what it made of it.

        Args:
            content: see :func:`util.checkpoint.runs.read_run`.
            path: the file, for messages.
            frozen: this run's ``--freeze``.

        Raises:
            UserError: something in it is damaged, of another model, or was trained with other frozen parameters.
        """
        distributed.on_rank_0(lambda: self._take_over(content, path, frozen))
        self._share()
        self.resumed, self._saved_at = True, (path.resolve(), self.epoch, self.step)
        text = "resumed from %s, continuing at epoch %d, step %d of %d"
        log.info(text, path, self.epoch, self.step, self.steps_per_epoch)

    def _take_over(self, content: Mapping[str, Any], path: Path, frozen: list[str]) -> None:
        load_weights(self.model, content, path, ema=False)
        self.average.module.load_state_dict(self.model.state_dict())
        if "model_ema" in content:
            load_weights(self.average.module, content, path, ema=True)
            self._take_ema_warmup(content, path)
        if "optimizer" in content and "epoch" in content:
            args = content.get("args")
            args = vars(args) if isinstance(args, argparse.Namespace) else args
            args = args if isinstance(args, dict) else {}
            before, precision = args.get("freeze", []), args.get("precision", self.precision)
            if not is_plain(before):
                raise UserError(f"{path} is damaged: its args.freeze is no list of patterns")
            if before != frozen:
                raise UserError(
                    f"{path} was trained with --freeze {before or 'nothing'}, not {frozen or 'nothing'}: to go on "
                    "differently, start anew from it with --finetune and another --output_dir"
                )
            if precision != self.precision:
                text = "%s was written by a run in %s, this one computes in %s: its steps round differently"
                log.warning(text, path, precision, self.precision)
            load_optimizer(self.optimizer, content["optimizer"], path)
            self._take_place(content, path)
            if "model_ema" in content:  # files of earlier versions do not count
                self.average_steps = content.get("average_steps", self.steps_done)
        if self.scaler.is_enabled() and content.get("scaler"):
            load_scaler(self.scaler, content["scaler"], path)
        self.saver.whole = file_stamp(path)

    def _take_ema_warmup(self, content: Mapping[str, Any], path: Path) -> None:
        """Warm the EMA up or not as the checkpoint's run did; UserError if ``--no_ema_warmup`` is against that."""
        # The release's files have no config, and constant rates; those of earlier versions here do not tell.
        warmup = content.get("ema_warmup", "config" in content)
        if warmup and not self.average.use_warmup:
            raise UserError(
                f"{path} was trained with a warm-up of the EMA: leave out --no_ema_warmup, or start from it with "
                "--finetune and another --output_dir"
            )
        if self.average.use_warmup and not warmup:
            log.info(
                "EMA with the constant rate %g, without a warm-up, as in %s",
                self.average.decay,
                path,
            )
        self.average.use_warmup = warmup

    def _share(self) -> None:
        """Gives all processes the main one's state, and compares what they then have."""
        if distributed.get_world_size() == 1:
            return
        learned = [
            parameter for group in self.optimizer.param_groups for parameter in group["params"]
        ]
        moments = self.optimizer.state
        stepped = [parameter in moments for parameter in learned]
        counts = self.epoch, self.step, self.average_steps, self.average.use_warmup
        counts, stepped, scale = distributed.broadcast_object(
            (counts, stepped, self.scaler.state_dict())
        )
        self.epoch, self.step, self.average_steps, self.average.use_warmup = counts
        if scale:
            self.scaler.load_state_dict(scale)
        learned = [parameter for parameter, has in zip(learned, stepped, strict=True) if has]
        tensors = [
            each
            for model in (self.model, self.average.module)
            for each in model.state_dict().values()
        ]
        for parameter in learned:
            if parameter not in moments:
                step = torch.zeros((), device=parameter.device)
                moments[parameter] = {
                    "step": step,
                    **{name: torch.zeros_like(parameter) for name in MOMENTS},
                }
            tensors += [moments[parameter][name] for name in ("step", *MOMENTS)]
        distributed.broadcast_tensors(tensors)
        state = {"the checksum of weights, average and optimizer": checksum(tensors)}
        distributed.check_equal(
            state, "memory or the connection between these machines is at fault"
        )

    def _take_place(self, content: Mapping[str, Any], path: Path) -> None:
        steps, process_group = self.steps_per_epoch, distributed.get_world_size()
        steps_there, processes_there = (
            content.get("steps_per_epoch", steps),
            content.get("world_size", process_group),
        )
        # Rounded down: part of an epoch never counts as a whole one, and no image of the epoch is left out.
        step = content.get("step", 0) * steps // steps_there
        self.epoch, self.step = divmod((content["epoch"] + 1) * steps + step, steps)
        if (steps_there, processes_there) != (steps, process_group):
            differing = "draws" if steps_there == steps else "draws and order of images"
            log.warning(
                "%s was written by %d processes with %d steps an epoch, this run has %d with %d: it continues at the "
                "same place of the epoch, rounded down to a step, but its %s are not those of an unbroken run",
                *(path, processes_there, steps_there, process_group, steps, differing),
            )


def differing_ranks(sums: distributed.HostCopy | None) -> list[int]:
    """Return the ranks whose checksums, a row for each rank, are not those of most ranks; none without checksums."""
    rows = [] if sums is None else [tuple(row) for row in sums.read().tolist()]
    most = Counter(rows).most_common(1)
    return [rank for rank, row in enumerate(rows) if row != most[0][0]]


def add_weight_decay(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return optimizer groups: one-dimensional parameters and biases without decay, then all others with decay.

    Frozen parameters are left out. Within a group, the order is that of published optimizer states.
    """
    spared, decayed = [], []
    for name, parameter in to_published(dict(model.named_parameters())).items():
        if parameter.requires_grad:
            (spared if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [
        {"params": spared, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": weight_decay},
    ]
