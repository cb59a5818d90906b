"""Training: one step, one epoch, one run. Also caching of latents, and their channel statistics.

Sampling and metrics are in :mod:`evaluation`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from evaluation import evaluate  # noqa: F401, MAR's engine has evaluate, too
from models.tokenizer import LatentEncoder, Tokenizer
from util import distributed, launcher
from util.checkpoint.files import CHECKPOINT_NAME
from util.dashboards import RunLog
from util.data.caches import IMAGE_HASH, cached_file
from util.devices import matmul_flops, memory_in_use
from util.errors import Preempted, UserError
from util.files import FileWriter, written_whole
from util.log import counted, duration, log, progress_bar
from util.lr_sched import adjust_learning_rate, log_learning_rates
from util.meters import BadSteps, Meter, StepResult, TrainingLog
from util.precision import autocast, check_finite, double
from util.provenance import write_args
from util.rng import seed_everything
from util.signals import StopSignals
from util.training_settings import TrainingSettings
from util.training_state import TrainingState

LOG_EVERY = 20  # steps between two logged metrics: reading them waits for the device

# --------------------------------------------------------------------------------------------------
# One step


class Trainer:
    """A training run: its state (model, EMA, optimizer, scaler), data, tokenizer, metrics and log.

    Args:
        model: on its device. ``model(inputs, labels)`` returns the loss. It also has
            ``training_flops()``, ``config`` and ``metadata``; ``check_labels(labels)`` if there is
            a tokenizer; and ``compile_blocks()`` for ``settings.compile``.
        settings: settings of the run.
        loader: yields images ``[B, 3, H, W]`` or cached moments ``[B, 2C, h, w]``, and labels
            ``[B]``; see :func:`util.data.loaders.training_loader`.
        tokenizer: encodes the batches; None for a model that takes images (main_vae.py).
        checkpoint_name: the file name of checkpoints.
        parts: lists of optimizer groups; see :class:`util.training_state.TrainingState`.
        log_dir: the folder of TensorBoard's log and ``args.json``; by default the output folder.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingSettings,
        loader: DataLoader,
        tokenizer: LatentEncoder | None = None,
        *,
        checkpoint_name: str = CHECKPOINT_NAME,
        parts: Sequence[list[dict]] | None = None,
        log_dir: str | Path | None = None,
    ):
        self.settings = settings
        self.tokenizer = tokenizer
        self.loader: Any = loader
        self.log_dir = Path(log_dir or settings.output_dir)
        steps_per_epoch = len(loader) // settings.accum_iter  # drops an incomplete last step
        self.state = TrainingState(model, settings, steps_per_epoch, checkpoint_name, parts)
        self.images_per_step = settings.batch_size * settings.accum_iter  # on this rank
        self.meter = Meter(
            images=self.images_per_step * distributed.get_world_size(),
            flops=self.images_per_step * self.state.model.training_flops(),
            device=self.state.device,
        )
        self.bad_steps = BadSteps(settings.max_bad_steps, settings.output_dir)
        self.log: TrainingLog | None = None
        #: Loss of guessing uniformly; None for a model without one (a VAE).
        self.uniform_loss: float | None = getattr(self.state.model, "uniform_loss", None)
        self._reports_guessing = self.uniform_loss is not None and distributed.is_main_process()
        self._batches: Iterator = iter(())
        self._first_step = 0  # step of the epoch at which `_batches` starts
        self._pending: tuple[StepResult, distributed.HostCopy] | None = None

    def step(self) -> float:
        """Take one optimizer step on the next ``accum_iter`` batches, and return its learning rate.

        The step is started without waiting for the device. Its outcome is pending until
        :meth:`finish_step`, which the next step calls. All random numbers of a step follow from the
        seed, the rank, the epoch and the step, so a resumed run draws the same ones as an
        uninterrupted run.

        Raises:
            UserError: the data ended too early, or see :meth:`finish_step`.
        """
        state, settings = self.state, self.settings

        # Learning rate
        epoch = state.epoch + state.step / state.steps_per_epoch
        lr = adjust_learning_rate(state.optimizer, epoch, settings)

        # Data and random numbers
        batches = self.next_batches()
        seed_everything(settings.seed, distributed.get_rank(), state.epoch, state.step)

        # Encode, forward and backward
        loss = self.backward(batches)

        # The previous step: its EMA and metrics, while the weights are still those it left
        self.finish_step()

        # Clip the gradients, step unless one is NaN or infinite, and count the step
        self.clip_and_step(loss, lr)
        return lr

    def next_batches(self) -> list:
        """Return the batches of one step.

        Raises:
            UserError: the epoch has fewer batches than at its start.
        """
        batches = list(islice(self._batches, self.settings.accum_iter))
        if len(batches) < self.settings.accum_iter:
            raise UserError(
                f"the data of epoch {self.state.epoch} ended at step {self.state.step} of "
                f"{self.state.steps_per_epoch}: do not change the data during a run"
            )
        return batches

    def encode(self, batch: Tensor) -> Tensor:
        """Return the model's inputs: a sample of the scaled latents, or the images themselves.

        The tokenizer encodes outside autocast, in float32.
        """
        if self.tokenizer is None:
            return batch
        with torch.no_grad():
            return self.tokenizer.encode(batch).sample()

    def backward(self, batches: Sequence) -> Tensor:
        """Compute the gradients of one step. Return its mean loss on the device, detached."""
        state = self.state
        mean_loss = torch.zeros((), device=state.device)
        for i, (batch, labels) in enumerate(batches):
            if self.tokenizer is not None:
                state.model.check_labels(labels)  # on the device, this would synchronize
            batch, labels = (x.to(state.device, non_blocking=True) for x in (batch, labels))
            inputs = self.encode(batch)
            if self._reports_guessing and self.log is not None:
                self.report_guessing(inputs)
            # Ranks exchange gradients once per step, with its last batch
            accumulates = (
                isinstance(state.wrapped, DistributedDataParallel) and i < len(batches) - 1
            )
            with state.wrapped.no_sync() if accumulates else nullcontext():
                with autocast(state.device, self.settings.precision):
                    loss = state.wrapped(inputs, labels) / len(batches)
                state.scaler.scale(loss).backward()
            mean_loss += loss.detach()
        return mean_loss

    def report_guessing(self, latents: Tensor) -> None:
        """Log the losses of guessing, once: only with a lower loss has the model learned something.

        Args:
            latents: the first batch of rank 0, ``[B, C, h, w]``.
        """
        self._reports_guessing = False
        log.info("loss of guessing uniformly, at which training starts: %.3f", self.uniform_loss)
        frequency_loss = self.state.model.frequency_loss(latents)
        if frequency_loss is not None:
            text = "loss of guessing by the frequencies of each channel's levels: about %.3f"
            log.info(text, frequency_loss)

    def finish_step(self) -> None:
        """Finish the pending step, if any: update the EMA and metrics, or record a bad step.

        Raises:
            UserError: there have been too many bad steps, or the weights of the ranks differ.
        """
        self.state.check_ranks()  # compares the checksums that the last save gathered, if any
        if self._pending is None:
            return
        result, finite, taken = self.wait_for_step()
        if taken:
            self.state.update_ema()
        if finite:
            self.meter.add(result)
        else:  # lists its images in bad_steps-rank<n>.jsonl; too many such steps are an error
            self.bad_steps.add(result, self.files_of_step(result.step))

    def wait_for_step(self) -> tuple[StepResult, bool, bool]:
        """Wait for the pending step.

        Returns:
            the step, whether loss and gradients were finite, and whether the weights changed.
        """
        assert self._pending is not None
        (result, outcome), self._pending = self._pending, None
        finite, taken = outcome.read().tolist()
        return result, finite, taken

    def clip_and_step(self, loss: Tensor, lr: float) -> None:
        """Clip the gradients, step unless their norm is NaN or infinite, and count the step.

        This does not wait for the device, except on Apple GPUs, whose optimizer is not fused.

        Args:
            loss: mean loss of this step, for the metrics.
            lr: learning rate of this step, for the metrics.
        """
        state = self.state
        limit = self.settings.grad_clip or float("inf")
        state.scaler.unscale_(state.optimizer)
        norms = [nn.utils.clip_grad_norm_(part, limit) for part in state.clipped]
        norm = torch.stack(norms).sum()
        # DDP has summed the gradients, so all ranks compute the same norm. `finite` decides whether
        # this is a bad step, `taken` whether the weights change.
        finite = taken = torch.isfinite(norm)
        if state.scaler.is_enabled():
            # In fp16, gradients that overflow are no fault: the scaler skips the step and lowers
            # the scale. Only a loss that is not finite makes it a bad step.
            finite = torch.isfinite(distributed.all_reduce_mean(loss))
            state.scaler.step(state.optimizer)
            state.scaler.update()
        elif not state.optimizer.defaults["fused"]:
            if finite:
                state.optimizer.step()
        else:
            # The fused optimizer reads this flag on the device
            optimizer: Any = state.optimizer
            optimizer.found_inf, optimizer.grad_scale = (~finite).float(), None
            optimizer.step()
            del optimizer.found_inf, optimizer.grad_scale
        state.optimizer.zero_grad(set_to_none=True)
        result = StepResult(loss, norm, lr, state.epoch, state.step)
        # The flags are copied to the CPU asynchronously; wait_for_step reads them
        self._pending = result, distributed.HostCopy(torch.stack([finite, taken]))
        state.advance()

    def files_of_step(self, step: int) -> list[str]:
        """Return the image files of a ``step`` of this epoch, on this rank."""
        start = (step - self._first_step) * self.images_per_step
        indices = list(self.loader.sampler)[start : start + self.images_per_step]
        return [self.loader.dataset.samples[index][0] for index in indices]

    def order_gradients(self, shape: Sequence[int]) -> None:
        """Compute gradients of zeros of ``shape``, and discard them.

        DDP assigns gradients to buckets in the order in which they first become ready. With more
        than two ranks, the position in a bucket affects the order of summation, and so rounding.
        After one backward pass, a resumed run sums in the same order as an uninterrupted one.
        """
        state = self.state
        zeros = torch.zeros(*shape, device=state.device)
        labels = torch.zeros(shape[0], dtype=torch.long, device=state.device)
        with autocast(state.device, self.settings.precision):
            loss = state.wrapped(zeros, labels)
        loss.backward()
        state.optimizer.zero_grad(set_to_none=True)

    # ----------------------------------------------------------------------------------------------
    # Around the steps

    def start_epoch(self) -> None:
        """Start loading the batches of the epoch, from the next step on."""
        state, loader = self.state, self.loader
        loader.sampler.set_epoch(state.epoch)
        loader.sampler.start = state.step * self.images_per_step
        loader.dataset.set_draws(self.settings.seed, state.epoch)
        self.start_loading()

    def start_loading(self) -> None:
        """Start loading batches; the first ones belong to the next step."""
        self._batches, self._first_step = iter(self.loader), self.state.step

    def show(self, metrics: dict[str, float], epoch: int) -> None:
        """Write metrics to the log, if there is one."""
        if self.uniform_loss is not None:
            metrics = {**metrics, "train/loss_of_uniform_guessing": self.uniform_loss}
        if self.log is not None:
            self.log.show(metrics, epoch, self.state.steps_done)


# --------------------------------------------------------------------------------------------------
# One epoch


def train_one_epoch(trainer: Trainer, stop_signals: StopSignals) -> dict[str, float]:
    """Train from the next step to the end of the epoch, and save every ``save_every_steps`` steps.

    Args:
        trainer: has started to load the epoch's batches (:meth:`Trainer.start_epoch`).
        stop_signals: end the run after the step in which any rank received one.

    Returns:
        the last metrics, by TensorBoard tag.

    Raises:
        UserError: there were too many bad steps, the weights of the ranks differ, the checkpoint
            after a signal cannot be written, or the data ended too early.
        Preempted: a signal was received; the run has been saved.
    """
    state, settings = trainer.state, trainer.settings
    state.wrapped.train()
    trainer.meter.restart()
    epoch = state.epoch
    first_step = state.step
    metrics: dict[str, float] = {}
    while state.epoch == epoch:  # trainer.step advances epoch and step
        step = state.step
        # Ranks begin an epoch at different times
        timeout = distributed.STEP_TIMEOUT if step > first_step else distributed.TIMEOUT
        with distributed.collective_timeout(timeout):
            lr = trainer.step()
            stop = stop_signals.agreed()
        save = settings.save_every_steps and state.steps_done % settings.save_every_steps == 0
        show = (step + 1) % LOG_EVERY == 0 or step + 1 == state.steps_per_epoch

        # Log
        if trainer.log is not None:
            trainer.log.bar.update()
        if show or stop or save:
            trainer.finish_step()
        if show:
            metrics = {**(trainer.meter.read() or metrics), "train/lr": lr}
            trainer.show(metrics, epoch)

        # Save
        if stop or save:
            state.save()
            distributed.barrier()  # waits longer than the next step may
        if stop:
            state.finish()
            signal_name = stop_signals.heard or "another rank"
            raise Preempted(
                f"by {signal_name}, saved at epoch {state.epoch}, step {state.step}; "
                f"start the same command with --resume {settings.output_dir} to continue"
            )
    return metrics


# --------------------------------------------------------------------------------------------------
# One run

#: Called with the epoch, the dashboard (None except on rank 0), and the signals that end it.
MeasureEpoch = Callable[[int, RunLog | None, StopSignals], None]


def train(trainer: Trainer, measure: MeasureEpoch, save_before_measuring: bool = False) -> None:
    """Train from the next step to the last epoch, saving and measuring.

    Args:
        measure: is called after every ``eval_freq``-th epoch and after the last one. A run that
            resumes at the end of such an epoch calls it first, because measuring may have been
            interrupted.
        save_before_measuring: also save in these epochs, because measuring takes long or may fail.

    Raises:
        UserError, Preempted: see :func:`train_one_epoch`; or ``measure`` raised it.
    """
    state, settings = trainer.state, trainer.settings
    trainer.meter.peak_flops = matmul_flops(state.device, settings.precision)
    log.info(
        "global batch size %d, matrix products at %.2f TFLOP/s",
        trainer.meter.images,
        trainer.meter.peak_flops / 1e12,
    )
    log_learning_rates(settings, state.steps_per_epoch)
    if settings.dry_run:
        dry_run(trainer)
        return
    check_start(state, settings)
    if state.epoch < settings.epochs:
        distributed.on_rank_0(lambda: write_args(trainer.log_dir, settings.args))

    def is_last(epoch: int) -> bool:
        return epoch + 1 == settings.epochs

    def measures(epoch: int) -> bool:
        return is_last(epoch) or (epoch + 1) % settings.eval_freq == 0

    def measure_after(epoch: int) -> None:
        try:
            measure(epoch, training_log.writer, stop_signals)
        except Preempted as error:
            state.finish()
            raise Preempted(
                f"{error} while measuring after epoch {epoch}; start the same command with "
                f"--resume {settings.output_dir} to continue"
            ) from error

    total = settings.epochs * state.steps_per_epoch
    writer = None
    if distributed.is_main_process():
        writer = RunLog(
            settings.log,
            trainer.log_dir,
            state.steps_done,
            state.steps_per_epoch,
            settings.args,
        )
    training_log = TrainingLog(writer, state.steps_done, total)
    with training_log, StopSignals(state.device) as stop_signals, state.saver:
        trainer.log = training_log
        if state.step == 0 and state.epoch > settings.start_epoch and measures(state.epoch - 1):
            measure_after(state.epoch - 1)
        while (epoch := state.epoch) < settings.epochs:
            trainer.start_epoch()
            train_one_epoch(trainer, stop_signals)
            bad_images = trainer.loader.dataset.bad_images
            if bad_images is not None:
                bad_images.count()
            due = (epoch + 1) % settings.save_last_freq == 0 or is_last(epoch)
            due |= settings.keep_every > 0 and (epoch + 1) % settings.keep_every == 0
            if due or (save_before_measuring and measures(epoch)):
                state.save()
            if measures(epoch):
                measure_after(epoch)
        state.save()  # also if nothing was left to train, for a new output folder
        state.finish()
    log.info("trained %s: %s", counted(state.epoch, "epoch"), state.path)


def check_start(state: TrainingState, settings: TrainingSettings) -> None:
    """Check the epoch and step at which the run starts.

    Log if there is nothing to train, or if the run was restarted before its first checkpoint.

    Raises:
        UserError: on all ranks, if the run starts from scratch although it has saved before, or
            starts after its last epoch without a checkpoint.
    """
    saved_paths = [path for path in distributed.gather_objects(launcher.saved_before()) if path]
    if saved_paths and not state.resumed:
        distributed.raise_on_all_ranks(
            f"this run was restarted and begins from scratch, but it had written {saved_paths[0]}: "
            f"pass --resume {settings.output_dir}, and put --output_dir on a disk that all "
            "machines share"
        )
    if launcher.restarts() and not state.resumed:
        log.info("restarted before the first checkpoint: the run begins from scratch")
    if state.epoch < settings.epochs:
        return
    if not state.resumed:
        distributed.raise_on_all_ranks(
            f"--start_epoch {state.epoch} with --epochs {settings.epochs}: "
            "there is nothing to train"
        )
    log.info("%d epochs are done, --epochs is %d: nothing to train", state.epoch, settings.epochs)


def dry_run(trainer: Trainer) -> None:
    """Take two steps; log hours, memory and checkpoint size of the run. Write nothing.

    Raises:
        UserError: on all ranks, if loss or gradient is not finite.
    """
    state, settings = trainer.state, trainer.settings
    trainer.start_loading()
    batches = trainer.next_batches()
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        trainer.clip_and_step(trainer.backward(batches), settings.lr)
        result, finite, _ = trainer.wait_for_step()
    seconds = time.perf_counter() - start
    loss = distributed.all_reduce_mean(result.loss).item()
    if not finite:
        norm = result.grad_norm.item()
        distributed.raise_on_all_ranks(
            f"dry run: loss {loss:.4g}, gradient norm {norm:.4g}: not finite, a run would end"
        )
    # The two steps of the dry run are no steps of the run
    steps = max(0, settings.epochs * state.steps_per_epoch - state.steps_done + 2)
    log.info(
        "dry run: loss %.4f, %.3g s per step, %s for %d steps, without loading data and measuring",
        *(loss, seconds, duration(seconds * steps), steps),
    )
    # Weights and EMA, and two tensors of optimizer state for each learned parameter, in float32
    learned = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    weights = sum(value.numel() for value in state.model.state_dict().values())
    checkpoint_gib = (2 * weights + 2 * learned) * 4 / 2**30
    log.info(
        "dry run: %.1f GiB of memory on each rank, %.2f GiB for each checkpoint; "
        "nothing was written",
        *(memory_in_use(state.device), checkpoint_gib),
    )


# --------------------------------------------------------------------------------------------------
# Statistics of latent channels


@torch.no_grad()
def channel_statistics(
    tokenizer: LatentEncoder, loader: Iterable, channels: int, device: torch.device, precision: str
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of the scaled latents.

    They are taken over images and positions of all ranks, and computed from the posteriors without
    sampling: the variance of a channel is the variance of its means plus the mean of its variances.

    Args:
        loader: yields tuples that start with a batch for ``tokenizer``.
        channels: number of latent channels.
        precision: of the encoder.

    Raises:
        NotFinite: the tokenizer's encoder overflows.
    """
    sums = double(torch.zeros(3, channels, device=device))  # images, sum, sum of squares
    for batch, *_ in loader:
        batch = batch.to(device, non_blocking=True)
        with autocast(device, precision):
            posterior = tokenizer.encode(batch)
        mean = double(posterior.mean)
        std = double(posterior.std)
        first_moment = mean.mean(dim=(0, 2, 3))
        second_moment = (mean**2 + std**2).mean(dim=(0, 2, 3))
        ones = torch.ones_like(first_moment)
        sums += len(batch) * torch.stack([ones, first_moment, second_moment])
    sums = distributed.all_reduce_mean(sums)
    distributed.on_rank_0(lambda: check_finite(sums, "the tokenizer's encoder", precision))
    count, first_moment, second_moment = sums
    mean = first_moment / count
    std = (second_moment / count - mean**2).clamp(min=0).sqrt()
    return mean.tolist(), std.tolist()


# --------------------------------------------------------------------------------------------------
# Caching


@torch.no_grad()
def cache_latents(
    tokenizer: Tokenizer,
    loader: Iterable,
    cached_path: str | Path,
    device: torch.device,
    precision: str = "fp32",
) -> tuple[int, int]:
    """Write the posterior moments of each image and its mirror image.

    The file of an image is ``cached_path/<class>/<file name>.npz``.

    Args:
        loader: yields images ``[B, 3, H, W]``, labels, ``class/file`` names, and hashes of the
            image files (uint8 ``[B, 32]``); or None for a batch with nothing to cache.
        precision: of the encoder.

    Returns:
        the number of files written by all ranks, and how many of them replaced other files.

    Raises:
        UserError: a name points outside of ``cached_path``, or a file cannot be written.
        NotFinite: the encoder overflows.
    """
    counts = torch.zeros(2)  # written, replaced

    def write(path: Path, moments: Any, mirrored: Any, digest: Any) -> None:
        with written_whole(path, flush=False) as file:
            np.savez(file, moments=moments, moments_flip=mirrored, **{IMAGE_HASH: digest})

    writer = FileWriter()
    with progress_bar(loader, unit="batch", desc="caching") as batches, writer:
        for batch in batches:
            if batch is None:
                continue
            images, _, names, hashes = batch
            images = images.to(device, non_blocking=True)
            images = images.contiguous(memory_format=torch.channels_last)
            with autocast(device, precision):
                views = [tokenizer.encode(view).moments for view in (images, images.flip(3))]
            moments, mirrored = (view.float().cpu().contiguous() for view in views)
            for view in (moments, mirrored):
                check_finite(view, "the tokenizer's encoder", precision)
            writer.wait()  # for the files of the previous batch
            for name, *tensors in zip(names, moments, mirrored, hashes, strict=True):
                path = cached_file(cached_path, name)
                counts += torch.tensor([1.0, float(path.exists())])
                writer.submit(write, path, *(tensor.numpy() for tensor in tensors))
        writer.finish()  # all files are on disk before the other ranks receive the counts
    totals = distributed.all_reduce_mean(counts.to(device)) * distributed.get_world_size()
    written, replaced = totals.round().int().tolist()
    return written, replaced
