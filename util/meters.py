"""What a training loop records: losses, speed, skipped steps, progress bar and dashboard."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from util import distributed
from util.dashboards import RunLog
from util.devices import memory_in_use
from util.errors import reason
from util.log import log, progress_bar, warn


class StepResult(NamedTuple):
    """The outcome of one optimizer step; its tensors are on the device."""

    loss: Tensor
    grad_norm: Tensor  # before clipping
    lr: float
    epoch: int  # from 0
    step: int  # of the epoch, from 0


class Meter:
    """Mean loss, gradient norm and speed since the last reading. Reading waits for the device.

    Args:
        images: images per step, over all ranks.
        flops: floating-point operations per step on this device.
        device: where the model is.

    Attributes:
        peak_flops: floating-point operations per second of a large matrix product on this device,
            the reference of the utilization.
    """

    def __init__(self, images: int, flops: float, device: torch.device):
        self.images, self.flops, self.device = images, flops, device
        self.peak_flops = math.inf
        self.restart()

    def restart(self) -> None:
        """Forget all steps, and start the clock."""
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.started = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """Count a step whose loss and gradient are finite."""
        self.losses.append(result.loss)
        self.norms.append(result.grad_norm)

    def read(self) -> dict[str, float]:
        """Return the metrics by TensorBoard tag, and restart; nothing if no step was counted."""
        if not self.losses:
            return {}
        loss = distributed.all_reduce_mean(torch.stack(self.losses).mean()).item()
        norms = torch.stack(self.norms)
        # With fp16, steps whose gradients overflow are counted
        norm = norms.where(norms.isfinite(), math.nan).nanmean().item()
        seconds = (time.perf_counter() - self.started) / len(self.losses)
        self.restart()
        return {
            "train/loss": loss,
            "train/grad_norm": norm,
            "speed/images_per_second": self.images / seconds,
            "speed/model_flops_utilization": self.flops / seconds / self.peak_flops,
            "speed/memory_gib": memory_in_use(self.device),
        }


class BadSteps:
    """Counts skipped steps, whose loss or gradient was not finite, and lists their images.

    Args:
        limit: the number of skipped steps that a run may have.
        folder: the folder of ``bad_steps-rank<n>.jsonl``.
    """

    def __init__(self, limit: int, folder: str | Path):
        self.limit = limit
        self.count = 0
        self.rank = distributed.get_rank()
        self.path = Path(folder) / f"bad_steps-rank{self.rank}.jsonl"

    def add(self, result: StepResult, files: list[str]) -> None:
        """Record a skipped step, with the ``files`` of its images. All ranks call this.

        Raises:
            UserError: there are more skipped steps than the limit. All ranks raise it.
        """
        self.count += 1
        loss, norm = result.loss.item(), result.grad_norm.item()
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "lr": result.lr,
            "epoch": result.epoch,
            "step": result.step,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps({**metrics, "rank": self.rank, "files": files}) + "\n")
        except OSError as error:
            log.warning(
                "cannot write %s (%s); the images are %s",
                self.path,
                reason(error),
                ", ".join(files),
            )
        problem = (
            f"loss {loss:.4g}, gradient norm {norm:.4g} at epoch {result.epoch}, "
            f"step {result.step}: not finite"
        )
        if self.count > self.limit:
            distributed.raise_on_all_ranks(
                f"{problem}, the step was skipped (learning rate {result.lr:.3g}, rank "
                f"{self.rank}, bad steps so far {self.count}); its images are listed in "
                f"{self.path}; lower the learning rate, check the data, or allow more with "
                "--max_bad_steps"
            )
        warn("%s, the step is skipped (%d of %d allowed)", problem, self.count, self.limit)


class TrainingLog:
    """The progress bar and, on rank 0, the dashboard of a training run; a context manager.

    Args:
        writer: the dashboard; None on other ranks.
        steps_done: steps of the run so far.
        total_steps: steps of the whole run.
    """

    def __init__(self, writer: RunLog | None, steps_done: int, total_steps: int):
        self.bar = progress_bar(total=total_steps, initial=steps_done, unit="step", desc="training")
        self.writer = writer

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.writer is not None:
            self.writer.close()
        self.bar.close()

    def show(self, metrics: Mapping[str, float], epoch: int, steps_done: int) -> None:
        """Write metrics beside the progress bar and to the dashboard."""
        if "train/loss" in metrics:
            uniform = metrics.get("train/loss_of_uniform_guessing")
            beside = "" if uniform is None else f" (uniform {uniform:.4f})"
            self.bar.set_postfix_str(
                f"epoch {epoch} loss {metrics['train/loss']:.4f}{beside} "
                f"lr {metrics['train/lr']:.2e} "
                f"{metrics['speed/images_per_second']:.1f} img/s "
                f"MFU {metrics['speed/model_flops_utilization']:.0%}",
                refresh=False,
            )
        if self.writer is not None:
            self.writer.add_scalars(metrics, steps_done)
