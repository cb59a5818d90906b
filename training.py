"""The epochs of a training run, of a TokenBridge or a tokenizer: each trained, saved and measured in turn."""

import time
from argparse import Namespace
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from engine_tokenbridge import backward, train_one_epoch
from models.vae import AutoencoderKL
from util import misc
from util.errors import Preempted
from util.loader import ImageFolder
from util.lr_sched import tell_rates
from util.meters import BadSteps
from util.provenance import write_args
from util.training_state import TrainingState


def train_epochs(
    state: TrainingState,
    loader: DataLoader,
    vae: AutoencoderKL | None,
    latent_factor: float | None,
    args: Namespace,
    log_dir: str | Path,
    measure: Callable[[int, SummaryWriter | None, misc.StopSignals], None],
    save_before_measuring: bool = False,
) -> None:
    """Trains from ``state``'s step to the last epoch, and saves; see :func:`engine_tokenbridge.train_one_epoch`.

    Args:
        args: epochs, save_last_freq, eval_freq, max_bad_steps, dry_run, and what ``train_one_epoch`` takes.
        log_dir: where the main process's TensorBoard log and ``args.json`` go.
        measure: is called every ``eval_freq`` epochs, and after the last, with its number, the log and the signals that
            end it. A run that is resumed there, where it may have been interrupted, calls it first.
        save_before_measuring: save in these epochs, too, since measuring takes long or may fail.

    Raises:
        UserError, Preempted: see :func:`engine_tokenbridge.train_one_epoch`; or ``measure`` raised it.
    """
    batch = args.batch_size * args.accum_iter  # of a step, in each process
    peak = misc.matmul_flops(state.device, args.precision)
    misc.log.info("whole batch %d, matrix products at %.2f TFLOP/s", batch * misc.get_world_size(), peak / 1e12)
    tell_rates(args, state.steps_per_epoch)
    if args.dry_run:
        dry_run(state, loader, vae, latent_factor, args)
        return
    if state.epoch >= args.epochs:
        misc.log.info("all %d epochs are done: nothing to train", args.epochs)
    misc.by_main_process(lambda: write_args(log_dir, args))
    writer = SummaryWriter(str(log_dir)) if misc.is_main_process() else None
    bad_steps = BadSteps(args.max_bad_steps, args.output_dir)
    total = args.epochs * state.steps_per_epoch
    bar = misc.progress(total=total, initial=state.steps_done, unit="step", desc="training")

    def due(epoch: int) -> bool:
        return epoch + 1 == args.epochs or (epoch + 1) % args.eval_freq == 0

    def measure_after(epoch: int) -> None:
        try:
            measure(epoch, writer, stop_signals)
        except Preempted as stopped:
            misc.by_main_process(state.saver.finish)
            raise Preempted(
                f"{stopped} while measuring after epoch {epoch}; start the same command with --resume "
                f"{args.output_dir} to continue"
            ) from stopped

    with bar, misc.StopSignals(state.device) as stop_signals, state.saver:
        if state.step == 0 and state.epoch > args.start_epoch and due(state.epoch - 1):
            measure_after(state.epoch - 1)
        for epoch in range(state.epoch, args.epochs):
            loader.sampler.set_epoch(epoch)
            loader.sampler.start = state.step * batch
            loader.dataset.set_draws(args.seed, epoch)
            train_one_epoch(state, loader, vae, latent_factor, args, stop_signals, bad_steps, bar, writer, peak)
            if isinstance(loader.dataset, ImageFolder) and loader.dataset.bad_images is not None:
                loader.dataset.bad_images.count()
            last = epoch + 1 == args.epochs
            if last or (epoch + 1) % args.save_last_freq == 0 or (save_before_measuring and due(epoch)):
                state.save(args)
            if due(epoch):
                measure_after(epoch)
        misc.by_main_process(state.saver.finish)  # all end together, and with its error if there is one
    if writer is not None:
        writer.close()
    misc.log.info("%d epochs are trained: %s", args.epochs, Path(args.output_dir) / state.name)


def dry_run(
    state: TrainingState, loader: DataLoader, vae: AutoencoderKL | None, latent_factor: float | None, args: Namespace
) -> None:
    """Takes two steps and logs what a run needs: seconds, hours, memory, the size of a checkpoint. Writes nothing."""
    batches = list(islice(loader, args.accum_iter))
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        loss = backward(state, batches, vae, latent_factor, args.precision)
        state.take_step(loss, args.lr)
        state.settle()
    seconds, loss = time.perf_counter() - start, misc.all_reduce_mean(loss).item()
    steps = args.epochs * state.steps_per_epoch - state.steps_done + 2
    hours = seconds * steps / 3600
    learned = sum(parameter.numel() for parameter in state.model.parameters() if parameter.requires_grad)
    stored = 2 * sum(value.numel() for value in state.model.state_dict().values()) + 2 * learned
    memory, file = misc.memory_in_use(state.device), stored * 4 / 2**30  # float32
    misc.log.info("dry run: loss %.4f, %.3g s a step, %.3g hours for %d steps", loss, seconds, hours, steps)
    misc.log.info("dry run: %.1f GiB of memory in a process, %.2f GiB a checkpoint; nothing was written", memory, file)
