"""What a training loop records: means of losses, speed, the steps that were not finite, and TensorBoard's log."""

import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from util import distributed
from util.devices import memory_in_use
from util.errors import reason
from util.log import log, warn
from util.training_state import Step


class Meter:
    """Losses and gradient norms since they were last read, and the speed; reading waits for the device.

    Args:
        images: images of one step, over all processes.
        flops: operations of one step on this device.
        peak_flops: operations a second of a large matrix product here, what utilization is measured against.
    """

    def __init__(self, images: int, flops: float, peak_flops: float, device: torch.device):
        self.images, self.flops, self.peak_flops, self.device = images, flops, peak_flops, device
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.started = time.perf_counter()

    def add(self, step: Step) -> None:
        """Counts a step that was taken."""
        self.losses.append(step.loss)
        self.norms.append(step.norm)

    def read(self) -> dict[str, float]:
        """Means since the last reading by TensorBoard tag; empty if no step was taken."""
        if not self.losses:
            return {}
        loss = distributed.all_reduce_mean(torch.stack(self.losses).mean()).item()
        norms = torch.stack(self.norms)
        seconds = (time.perf_counter() - self.started) / len(self.losses)
        self.losses, self.norms, self.started = [], [], time.perf_counter()
        norm = (
            norms.where(norms.isfinite(), math.nan).nanmean().item()
        )  # fp16 skips steps whose gradients overflow
        return {
            "train/loss": loss,
            "train/grad_norm": norm,
            "speed/images_per_second": self.images / seconds,
            "speed/model_flops_utilization": self.flops / seconds / self.peak_flops,
            "speed/memory_gib": memory_in_use(self.device),
        }


class BadSteps:
    """Counts the steps that were not taken because loss or gradient was not finite, and lists their images.

    Args:
        limit: how many a run may have.
        folder: where ``bad_steps-rank<n>.jsonl`` goes.
    """

    def __init__(self, limit: int, folder: str | Path):
        self.limit, self.count, self.rank = limit, 0, distributed.get_rank()
        self.path = Path(folder) / f"bad_steps-rank{self.rank}.jsonl"

    def add(self, step: Step, files: list[str]) -> None:
        """Records a step that was not taken, with the ``files`` of its images; all ranks call this.

        Raises:
            UserError: there have been more than the limit; on all ranks.
        """
        self.count += 1
        loss, norm = step.loss.item(), step.norm.item()
        figures = {
            "loss": loss,
            "grad_norm": norm,
            "lr": step.lr,
            "epoch": step.epoch,
            "step": step.step,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps({**figures, "rank": self.rank, "files": files}) + "\n")
        except OSError as error:
            log.warning(
                "cannot write %s (%s); the images are %s",
                self.path,
                reason(error),
                ", ".join(files),
            )
        what = f"loss {loss:.4g}, gradient norm {norm:.4g} at epoch {step.epoch}, step {step.step}: not finite"
        if self.count > self.limit:
            distributed.raise_on_all_ranks(
                f"{what}, the step was not taken (learning rate {step.lr:.3g}, process {self.rank}, bad steps so far "
                f"{self.count}); its images are listed in {self.path}; lower the learning rate, check the data, or "
                "allow more with --max_bad_steps"
            )
        warn("%s, the step is left out (%d of %d allowed)", what, self.count, self.limit)


class RunLog(SummaryWriter):
    """A TensorBoard log that never ends a run: values that cannot be written are dropped, with one warning.

    After :data:`PAUSE` seconds it tries again, with a new file.

    Args:
        folder: where the log goes.
        steps_done: steps of the run up to now. What the folder's logs hold of later ones, from before the run went
            back to this step, is hidden.
    """

    PAUSE = 60.0

    def __init__(self, folder: str | Path, steps_done: int):
        self.folder, self.closed_until, self.warned = folder, -math.inf, False
        threading.excepthook = report_thread
        self._try(super().__init__, str(folder), purge_step=steps_done + 1)

    def _try(self, call: Callable, *args: Any, **options: Any) -> None:
        if time.monotonic() < self.closed_until:
            return
        try:
            call(*args, **options)
        except (
            Exception
        ) as error:  # the thread's, too, raised by a later call; the log is no reason to end a run
            if not self.warned:
                text = "cannot write TensorBoard's log in %s (%s); training goes on without it, and tries again"
                log.warning(text, self.folder, reason(error))
            self.warned, self.closed_until = True, time.monotonic() + self.PAUSE
            self.file_writer = self.all_writers = None  # the next call makes a new one

    def add_scalar(self, *args: Any, **options: Any) -> None:
        """See :class:`torch.utils.tensorboard.SummaryWriter`."""
        self._try(super().add_scalar, *args, **options)

    def add_image(self, *args: Any, **options: Any) -> None:
        """See :class:`torch.utils.tensorboard.SummaryWriter`."""
        self._try(super().add_image, *args, **options)

    def close(self) -> None:
        """Write what is left."""
        self._try(super().close)


def report_thread(args: Any) -> None:
    """Print the traceback of a thread's exception, unless it is of the file system, which the thread's owner raises."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)
