"""The epochs of a training run, of a TokenBridge or a tokenizer: each trained, saved and measured in turn."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from engine_tokenbridge import train_one_epoch
from models.vae import AutoencoderKL
from util import misc
from util.loader import ImageFolder
from util.meters import BadSteps
from util.training_state import TrainingState


def train_epochs(
    state: TrainingState,
    loader: DataLoader,
    vae: AutoencoderKL | None,
    latent_factor: float | None,
    args: Namespace,
    log_dir: str | Path,
    measure: Callable[[int, SummaryWriter | None], None],
) -> None:
    """Trains from ``state``'s step to the last epoch, and saves; see :func:`engine_tokenbridge.train_one_epoch`.

    Args:
        args: epochs, save_last_freq, eval_freq, max_bad_steps, and what ``train_one_epoch`` takes.
        log_dir: where the main process's TensorBoard log goes.
        measure: is called every ``eval_freq`` epochs, and after the last, with its number and the log.
    """
    batch = args.batch_size * args.accum_iter  # of a step, in each process
    peak = misc.matmul_flops(state.device, args.precision)
    told = batch * misc.get_world_size(), args.lr, peak / 1e12
    misc.log.info("whole batch %d, learning rate %.3g, matrix products at %.2f TFLOP/s", *told)
    if state.epoch >= args.epochs:
        misc.log.info("all %d epochs are done: nothing to train", args.epochs)
    writer = SummaryWriter(str(log_dir)) if misc.is_main_process() else None
    bad_steps = BadSteps(args.max_bad_steps, args.output_dir)
    total = args.epochs * state.steps_per_epoch
    bar = misc.progress(total=total, initial=state.steps_done, unit="step", desc="training")
    with bar, misc.StopSignals(state.device) as stop_signals, state.saver:
        for epoch in range(state.epoch, args.epochs):
            loader.sampler.set_epoch(epoch)
            loader.sampler.start = state.step * batch
            loader.dataset.set_draws(args.seed, epoch)
            train_one_epoch(state, loader, vae, latent_factor, args, stop_signals, bad_steps, bar, writer, peak)
            if isinstance(loader.dataset, ImageFolder) and loader.dataset.bad_images is not None:
                loader.dataset.bad_images.count()
            last = epoch + 1 == args.epochs
            if last or (epoch + 1) % args.save_last_freq == 0:
                state.save(args)
            if last or (epoch + 1) % args.eval_freq == 0:
                measure(epoch, writer)
        misc.by_main_process(state.saver.finish)  # all end together, and with its error if there is one
    if writer is not None:
        writer.close()
