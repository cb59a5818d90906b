"""All that a training run changes and must save: weights, their average, optimizer, gradient scaler, epoch, step."""

import argparse
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util import checkpoint, misc
from util.checkpoint.load import load_optimizer, load_scaler, load_weights
from util.checkpoint.saver import Saver
from util.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of each parameter
#: After n steps the average decays by n / (n + 10), at most --ema_rate: it spans the last tenth of a short run, not
#: the drawn weights. At 0.9999 that ends after 100,000 steps; of the published recipe 150,000 are left, after which
#: averages with and without it differ by a share of exp(-15), less than float32 rounds in them.
AVERAGE_WARMUP = {"use_warmup": True, "warmup_gamma": 10.0, "warmup_power": 1.0}


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
        args: ``ema_rate``, ``weight_decay``, ``lr``, ``grad_clip``, ``precision``, ``compile``, ``start_epoch``.
        steps_per_epoch: optimizer steps of an epoch.
        name: the file name of checkpoints.
        parts: the optimizer's groups, in lists, each of which has its gradients clipped by a norm of its own; by
            default one list, of all of ``model``.

    Attributes:
        wrapped: the model that computes losses: in its DDP wrapper where there are several processes.
        epoch, step: the next step to take; epochs and an epoch's steps count from 0.
        average_steps: steps that the average has seen.
        saver: writes the main process's checkpoints; its ``finish`` waits for the last one.
    """

    def __init__(
        self,
        model: nn.Module,
        args: argparse.Namespace,
        steps_per_epoch: int,
        name: str = checkpoint.CHECKPOINT_NAME,
        parts: Sequence[list[dict]] | None = None,
    ):
        self.model, self.steps_per_epoch, self.grad_clip, self.name = model, steps_per_epoch, args.grad_clip, name
        self.device, self.precision = next(model.parameters()).device, args.precision
        several = misc.get_world_size() > 1
        self.wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if several else model
        if several:  # buffers are tables that never change; as an argument, this would also keep them from being shared
            self.wrapped.broadcast_buffers = False
        # A copy of the weights that all processes have once DDP has shared those of the first.
        self.average = ModelEmaV3(model, decay=args.ema_rate, exclude_buffers=True, **AVERAGE_WARMUP)
        self.average_steps = 0
        if args.compile:
            model.compile_blocks()
        parts = parts or [misc.add_weight_decay(model, args.weight_decay)]
        self.clipped = [[parameter for group in part for parameter in group["params"]] for part in parts]
        # On Apple GPUs the fused optimizer cannot leave out a step by a flag on the device: there the host looks at it.
        self.fused = self.device.type != "mps"
        self.optimizer = torch.optim.AdamW([*chain(*parts)], lr=args.lr, betas=(0.9, 0.95), fused=self.fused)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.precision == "fp16")
        self.epoch, self.step = args.start_epoch, 0
        self._pending: tuple[Step, misc.Arriving] | None = None
        self.saver, self._saved_at = Saver(), None

    @property
    def steps_done(self) -> int:
        """Steps of the whole run up to here."""
        return self.epoch * self.steps_per_epoch + self.step

    def take_step(self, loss: Tensor, lr: float) -> None:
        """Clips the gradients of ``loss``, and takes the optimizer's step unless their norm is not finite.

        Nothing is waited for: the fused optimizer looks at the flag on the device. ``lr`` is kept for the record.
        """
        self.scaler.unscale_(self.optimizer)
        norm = sum(nn.utils.clip_grad_norm_(part, self.grad_clip or math.inf) for part in self.clipped)
        # After DDP's exchange every process sees the same norm. With fp16 an overflowing gradient is the scaler's
        # business: it leaves the step out by itself and lowers the scale.
        finite = taken = torch.isfinite(norm)
        if self.scaler.is_enabled():
            finite = torch.isfinite(misc.all_reduce_mean(loss))
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif not self.fused:
            if finite:
                self.optimizer.step()
        else:
            self.optimizer.found_inf, self.optimizer.grad_scale = (~finite).float(), None  # as a scaler would tell it
            self.optimizer.step()
            del self.optimizer.found_inf, self.optimizer.grad_scale
        self.optimizer.zero_grad(set_to_none=True)
        answers = misc.Arriving(torch.stack([finite, taken]))
        self._pending = Step(loss, norm, finite, taken, lr, self.epoch, self.step), answers
        self.epoch, self.step = divmod(self.steps_done + 1, self.steps_per_epoch)

    def settle(self) -> Step | None:
        """Waits for the last step and updates the average by it if it was taken; None if it is settled already."""
        if self._pending is None:
            return None
        (last, answers), self._pending = self._pending, None
        finite, taken = answers.read()
        last = last._replace(finite=finite, taken=taken)
        if last.taken:
            self.average_steps += 1
            self.average.update(self.model, self.average_steps)
        return last

    # ----------------------------------------------------------------------------------------------------------------
    # Files.

    def save(self, args: argparse.Namespace) -> None:
        """Starts to write the main process's checkpoint, :attr:`name`, unless the newest one is of this very step.

        The file holds what the run is at this moment, and is there when :attr:`saver` has finished. :meth:`settle`
        comes before.

        Args:
            args: ``output_dir``, ``keep_last``, and everything else that the file is to tell of the run.

        Raises:
            UserError: the one before could not be written.
        """
        if self._saved_at == self.steps_done or not misc.is_main_process():
            return
        averaged = self.average.module.state_dict()
        content = {
            "model": self.model.state_dict(),
            "model_ema": {name: averaged[name] for name, _ in self.model.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch - 1,  # the last finished
            "step": self.step,  # the next one to take, of the epoch after that
            "steps_per_epoch": self.steps_per_epoch,
            "world_size": misc.get_world_size(),
            "average_steps": self.average_steps,
            "config": {**self.model.config, **self.model.metadata},
            "args": vars(args),
        }
        if self.scaler.is_enabled():
            content["scaler"] = self.scaler.state_dict()
        self.saver.save(Path(args.output_dir) / self.name, content, args.keep_last)
        self._saved_at = self.steps_done

    def load(self, content: Mapping[str, Any], path: Path, frozen: list[str]) -> None:
        """Takes over a checkpoint's weights, and its average, optimizer, scaler, epoch and step where it has them.

        The main process alone needs the content; all others get what it made of it.

        Args:
            content: see :func:`util.checkpoint.read_run`.
            path: the file, for messages.
            frozen: this run's ``--freeze``.

        Raises:
            UserError: something in it is damaged, of another model, or was trained with other frozen parameters.
        """
        misc.by_main_process(lambda: self._take_over(content, path, frozen))
        self._share()
        misc.log.info("resumed from %s, continuing at epoch %d, step %d", path, self.epoch, self.step)

    def _take_over(self, content: Mapping[str, Any], path: Path, frozen: list[str]) -> None:
        load_weights(self.model, content, path, ema=False)
        self.average.module.load_state_dict(self.model.state_dict())
        if "model_ema" in content:
            load_weights(self.average.module, content, path, ema=True)
        if "optimizer" in content and "epoch" in content:
            args = content.get("args")
            args = vars(args) if isinstance(args, argparse.Namespace) else args
            args = args if isinstance(args, dict) else {}
            before, precision = args.get("freeze", []), args.get("precision", self.precision)
            if before != frozen:
                raise UserError(
                    f"{path} was trained with --freeze {before or 'nothing'}, not {frozen or 'nothing'}: to go on "
                    "differently, start anew from it with --finetune and another --output_dir"
                )
            if precision != self.precision:
                text = "%s was written by a run in %s, this one computes in %s: its steps round differently"
                misc.log.warning(text, path, precision, self.precision)
            load_optimizer(self.optimizer, content["optimizer"], path)
            self._take_place(content, path)
            if "model_ema" in content:  # files of earlier versions do not count
                self.average_steps = content.get("average_steps", self.steps_done)
        if self.scaler.is_enabled() and content.get("scaler"):
            load_scaler(self.scaler, content["scaler"], path)

    def _share(self) -> None:
        """Gives all processes the main one's state, and compares what they then have."""
        if misc.get_world_size() == 1:
            return
        learned = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = self.optimizer.state
        stepped = [parameter in moments for parameter in learned]
        place = self.epoch, self.step, self.average_steps, stepped, self.scaler.state_dict()
        self.epoch, self.step, self.average_steps, stepped, scale = misc.from_main_process(place)
        if scale:
            self.scaler.load_state_dict(scale)
        learned = [parameter for parameter, has in zip(learned, stepped, strict=True) if has]
        tensors = [each for model in (self.model, self.average.module) for each in model.state_dict().values()]
        for parameter in learned:
            if parameter not in moments:
                step = torch.zeros((), device=parameter.device)
                moments[parameter] = {"step": step, **{name: torch.zeros_like(parameter) for name in MOMENTS}}
            tensors += [moments[parameter][name] for name in ("step", *MOMENTS)]
        misc.share(tensors)
        state = {"the checksum of weights, average and optimizer": misc.checksum(tensors)}
        misc.check_same(state, "memory or the connection between these machines is at fault")

    def _take_place(self, content: Mapping[str, Any], path: Path) -> None:
        steps, processes = self.steps_per_epoch, misc.get_world_size()
        steps_there, processes_there = content.get("steps_per_epoch", steps), content.get("world_size", processes)
        self.epoch, self.step = content["epoch"] + 1, round(content.get("step", 0) * steps / steps_there)
        if (steps_there, processes_there) != (steps, processes):
            differing = "draws" if steps_there == steps else "draws and order of images"
            misc.log.warning(
                "%s was written by %d processes with %d steps an epoch, this run has %d with %d: it continues at the "
                "same place of the epoch, but its %s are not those of an unbroken run",
                *(path, processes_there, steps_there, processes, steps, differing),
            )
