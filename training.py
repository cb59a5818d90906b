"""The epochs of a training run, of a TokenBridge or a tokenizer: each trained, saved and measured in turn."""

import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from engine_tokenbridge import backward, train_one_epoch
from models.vae import AutoencoderKL
from util import distributed, launcher
from util.devices import matmul_flops, memory_in_use
from util.errors import Preempted
from util.log import log, progress_bar
from util.lr_sched import tell_rates
from util.meters import BadSteps, RunLog
from util.provenance import write_args
from util.signals import StopSignals
from util.training_state import TrainingState


def train_epochs(
    state: TrainingState,
    loader: DataLoader,
    vae: AutoencoderKL | None,
    latent_factor: float | None,
    args: Namespace,
    log_dir: str | Path,
    measure: Callable[[int, SummaryWriter | None, StopSignals], None],
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
    peak = matmul_flops(state.device, args.precision)
    log.info(
        "whole batch %d, matrix products at %.2f TFLOP/s",
        batch * distributed.get_world_size(),
        peak / 1e12,
    )
    tell_rates(args, state.steps_per_epoch)
    if args.dry_run:
        dry_run(state, loader, vae, latent_factor, args)
        return
    check_start(state, args)
    if state.epoch < args.epochs:
        distributed.on_rank_0(lambda: write_args(log_dir, args))
    bad_steps = BadSteps(args.max_bad_steps, args.output_dir)
    total = args.epochs * state.steps_per_epoch
    bar = progress_bar(total=total, initial=state.steps_done, unit="step", desc="training")

    def due(epoch: int) -> bool:
        return epoch + 1 == args.epochs or (epoch + 1) % args.eval_freq == 0

    def measure_after(epoch: int) -> None:
        try:
            measure(epoch, writer, stop_signals)
        except Preempted as stopped:
            state.finish()
            raise Preempted(
                f"{stopped} while measuring after epoch {epoch}; start the same command with --resume "
                f"{args.output_dir} to continue"
            ) from stopped

    board = RunLog(log_dir, state.steps_done) if distributed.is_main_process() else nullcontext()
    with bar, StopSignals(state.device) as stop_signals, state.saver, board as writer:
        if state.step == 0 and state.epoch > args.start_epoch and due(state.epoch - 1):
            measure_after(state.epoch - 1)
        while (epoch := state.epoch) < args.epochs:
            loader.sampler.set_epoch(epoch)
            loader.sampler.start = state.step * batch
            loader.dataset.set_draws(args.seed, epoch)
            train_one_epoch(
                state, loader, vae, latent_factor, args, stop_signals, bad_steps, bar, writer, peak
            )
            if loader.dataset.bad_images is not None:
                loader.dataset.bad_images.count()
            last = epoch + 1 == args.epochs
            if (
                last
                or (epoch + 1) % args.save_last_freq == 0
                or (save_before_measuring and due(epoch))
            ):
                state.save(args)
            if due(epoch):
                measure_after(epoch)
        state.save(args)  # a run that had nothing to train may go to a folder of its own
        state.finish()  # all end together, and with its error if there is one
    log.info("%d epochs are trained: %s", state.epoch, Path(args.output_dir) / state.name)


def check_start(state: TrainingState, args: Namespace) -> None:
    """Log what a run that does not begin at its first step, or begins there once more, is about to do.

    Raises:
        UserError: it begins from scratch although it has saved before, or after its last epoch; on all ranks.
    """
    saved = [
        path for path in distributed.gather_objects(launcher.saved_before()) if path is not None
    ]
    if saved and not state.resumed:
        distributed.raise_on_all_ranks(
            f"this run was restarted and begins from scratch, but it had written {saved[0]}: pass --resume "
            f"{args.output_dir}, and put --output_dir on a disk that all machines share"
        )
    if launcher.restarts() and not state.resumed:
        log.info("restarted before the first checkpoint: the run begins from scratch")
    if state.epoch >= args.epochs and not state.resumed:
        distributed.raise_on_all_ranks(
            f"--start_epoch {state.epoch} with --epochs {args.epochs}: there is nothing to train"
        )
    if state.epoch >= args.epochs:
        log.info("%d epochs are done, --epochs is %d: nothing to train", state.epoch, args.epochs)


def dry_run(
    state: TrainingState,
    loader: DataLoader,
    vae: AutoencoderKL | None,
    latent_factor: float | None,
    args: Namespace,
) -> None:
    """Takes two steps and logs what a run needs: seconds, hours, memory, the size of a checkpoint. Writes nothing."""
    batches = list(islice(loader, args.accum_iter))
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        loss = backward(state, batches, vae, latent_factor, args.precision)
        state.take_step(loss, args.lr)
        taken = state.settle()
    seconds, loss = time.perf_counter() - start, distributed.all_reduce_mean(loss).item()
    if not taken.finite:
        distributed.raise_on_all_ranks(
            f"dry run: loss {loss:.4g}, gradient norm {taken.norm.item():.4g}: not finite, a run would end"
        )
    steps = max(0, args.epochs * state.steps_per_epoch - state.steps_done + 2)
    hours = seconds * steps / 3600
    learned = sum(
        parameter.numel() for parameter in state.model.parameters() if parameter.requires_grad
    )
    stored = 2 * sum(value.numel() for value in state.model.state_dict().values()) + 2 * learned
    memory, file = memory_in_use(state.device), stored * 4 / 2**30  # float32
    text = "dry run: loss %.4f, %.3g s a step, %.3g hours for %d steps, without loading data and measuring"
    log.info(text, loss, seconds, hours, steps)
    log.info(
        "dry run: %.1f GiB of memory in a process, %.2f GiB a checkpoint; nothing was written",
        memory,
        file,
    )
