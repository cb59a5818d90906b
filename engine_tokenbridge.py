"""The loops: training, generation for evaluation, and caching of latents."""

import math
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models.pipeline import decode_images
from models.sampling import SamplingOptions
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL, DiagonalGaussianDistribution
from util import misc
from util.errors import Preempted, UserError
from util.files import flush_all, written_whole
from util.images import confidence_maps
from util.loader import IMAGE_HASH, cached_file
from util.lr_sched import adjust_learning_rate
from util.meters import BadSteps, Meter
from util.rng import image_seeds, numbered_draws, seed_everything
from util.sample_folder import SampleFolder
from util.training_state import TrainingState

LOG_EVERY = 20  # steps between two looks at the device's numbers

# --------------------------------------------------------------------------------------------------------------------
# Training.


def backward(
    state: TrainingState, batches: Sequence, vae: AutoencoderKL | None, latent_factor: float | None, precision: str
) -> Tensor:
    """Computes the gradients of one step, and its mean loss over ``batches``, which it returns, detached.

    Batches are images ``[B, 3, H, W]``, or moments ``[B, 2C, h, w]`` where ``vae`` is None, and labels ``[B]``. Without
    a ``latent_factor`` the model takes them as they are.
    """
    total = torch.zeros((), device=state.device)
    for i, (batch, labels) in enumerate(batches):
        if latent_factor is not None:
            state.model.check_labels(labels)  # while they are on the host
        batch, labels = (x.to(state.device, non_blocking=True) for x in (batch, labels))
        if latent_factor is not None:
            with torch.no_grad():
                posterior = DiagonalGaussianDistribution(batch) if vae is None else vae.encode(batch)
                batch = posterior.sample() * latent_factor
        # Processes exchange gradients once a step, with its last batch.
        waits = isinstance(state.wrapped, DistributedDataParallel) and i < len(batches) - 1
        with state.wrapped.no_sync() if waits else nullcontext():
            with misc.autocast(state.device, precision):
                loss = state.wrapped(batch, labels) / len(batches)
            state.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def order_gradients(state: TrainingState, shape: Sequence[int], precision: str) -> None:
    """Computes gradients of a batch of zeros of ``shape``, and forgets them.

    DDP lays gradients out anew by the order in which the first ones come. The place of a gradient decides in which
    order those of more than two processes are added. A run that is resumed so adds them as an unbroken one does, from
    its first step on.
    """
    with misc.autocast(state.device, precision):
        labels = torch.zeros(shape[0], dtype=torch.long, device=state.device)
        loss = state.wrapped(torch.zeros(*shape, device=state.device), labels)
    loss.backward()
    state.optimizer.zero_grad(set_to_none=True)


def files_of_step(loader: DataLoader, step: int, images: int) -> list[str]:
    """The files of a step's images, ``images`` of them; steps count from this epoch's first batch of ``loader``."""
    indices = list(loader.sampler)[step * images : (step + 1) * images]
    dataset: Any = loader.dataset
    return [dataset.samples[index][0] for index in indices]


def train_one_epoch(
    state: TrainingState,
    loader: DataLoader,
    vae: AutoencoderKL | None,
    latent_factor: float | None,
    args: Namespace,
    stop_signals: misc.StopSignals,
    bad_steps: BadSteps,
    bar: tqdm,
    writer: SummaryWriter | None = None,
    peak_flops: float = math.inf,
) -> dict[str, float]:
    """Trains from ``state``'s step to the end of the epoch, and saves as often as ``--save_every_steps`` says.

    Everything random in a step follows from ``args.seed``, the process, the epoch and the step: a run that starts in
    the middle of an epoch draws what an unbroken one would have drawn there.

    Args:
        loader: gives batches of images, or of moments where ``vae`` is None, and labels; from ``state``'s step on.
        args: seed, accum_iter, precision, batch_size, save_every_steps, the learning rate's (:mod:`util.lr_sched`),
            and what :meth:`util.training_state.TrainingState.save` takes.
        stop_signals: end the run after the step in which a process received one.
        bad_steps: counts steps whose loss or gradient is not finite.
        bar, writer: show the figures every :data:`LOG_EVERY` steps and at the end; a writer on the main process only.
        peak_flops: operations a second of a large matrix product here, what utilization is measured against.

    Returns:
        the last figures written, by tag.

    Raises:
        UserError: too many steps were not finite, ranks differ in their weights, a checkpoint cannot be written after
            a signal, or the data ended too early.
        Preempted: a signal was received; the run has been saved.
    """
    state.wrapped.train()
    epoch, first, steps = state.epoch, state.step, state.steps_per_epoch
    images = args.batch_size * args.accum_iter  # of a step, in this process
    meter = Meter(images * misc.get_world_size(), state.model.training_flops() * images, peak_flops, state.device)
    iterator, figures = iter(loader), {}
    while state.epoch == epoch:  # each step advances the state
        step = state.step
        lr = adjust_learning_rate(state.optimizer, epoch + step / steps, args)
        batches = list(islice(iterator, args.accum_iter))
        if len(batches) < args.accum_iter:  # a step without a gradient would count as taken
            raise UserError(
                f"the data of epoch {epoch} ended at step {step} of {steps}: it must not change during a run"
            )
        seed_everything(args.seed, misc.get_rank(), epoch, step)
        # Processes begin an epoch at different times.
        with misc.patience(misc.STEP_PATIENCE if step > first else misc.PATIENCE):
            loss = backward(state, batches, vae, latent_factor, args.precision)
            settle(state, meter, bad_steps, loader, first)  # the step before, while its weights are still there
            state.take_step(loss, lr)
            bar.update()
            stop = stop_signals.agreed()
        due = args.save_every_steps and state.steps_done % args.save_every_steps == 0
        log = (step + 1) % LOG_EVERY == 0 or step + 1 == steps
        if log or stop or due:
            settle(state, meter, bad_steps, loader, first)
        if log:
            figures = {**(meter.read() or figures), "train/lr": lr}
            show(figures, bar, writer, epoch, state.steps_done)
        if stop or due:
            state.save(args)
            misc.barrier()  # with more patience than the next step has
        if stop:
            state.finish()
            raise Preempted(
                f"by {stop_signals.heard or 'another process'}, saved at epoch {state.epoch}, step {state.step}; "
                f"start the same command with --resume {args.output_dir} to continue"
            )
    return figures


def settle(state: TrainingState, meter: Meter, bad_steps: BadSteps, loader: DataLoader, first: int) -> None:
    """Ends the step that was started last, and counts it in the figures if it was taken, else as bad.

    Args:
        first: the epoch's first step that ``loader`` gave batches for.

    Raises:
        UserError: there are too many bad steps.
    """
    last = state.settle()
    if last is not None and last.finite:
        meter.add(last)
    elif last is not None:
        images = meter.images // misc.get_world_size()
        bad_steps.add(last, files_of_step(loader, last.step - first, images))


def show(figures: dict[str, float], bar: tqdm, writer: SummaryWriter | None, epoch: int, steps_done: int) -> None:
    """Writes figures of training beside the progress bar and, where there is a writer, into TensorBoard."""
    if "train/loss" in figures:
        bar.set_postfix_str(
            f"epoch {epoch} loss {figures['train/loss']:.4f} lr {figures['train/lr']:.2e} "
            f"{figures['speed/images_per_second']:.1f} img/s MFU {figures['speed/model_flops_utilization']:.0%}"
        )
    if writer is not None:
        for tag, value in figures.items():
            writer.add_scalar(tag, value, steps_done)


# --------------------------------------------------------------------------------------------------------------------
# Generation for evaluation.


@dataclass(frozen=True, kw_only=True)
class SampleSettings(SamplingOptions):
    """How images are sampled for evaluation; two runs of equal settings and weights make equal images."""

    num_images: int
    eval_bsz: int
    gen_seed: int
    precision: str
    save_confidence: bool = False
    vae_precision: str | None = None  # by default that of the model


@torch.no_grad()
def evaluate(
    model: TokenBridge,
    vae: AutoencoderKL,
    latent_factor: float,
    folder: str | Path,
    settings: SampleSettings,
    device: torch.device,
    weights: dict,
    stop_signals: misc.StopSignals | None = None,
) -> SampleFolder:
    """Samples ``settings.num_images``, as many of each class as of others, to within one, into ``folder/NNNNN.png``.

    Image n shows class ``n * class_num // num_images`` and has its own seed. Chunks of ``eval_bsz`` consecutive
    images are dealt to the processes whole, so that the number of processes never changes an image. A run that was
    interrupted continues where it stopped.

    Args:
        folder: on a disk that all processes share (:func:`util.files.check_shared`).
        weights: what identifies the weights; images sampled from others are not taken for this run's.
        stop_signals: end sampling after the chunk in which a process received one.

    Raises:
        UserError: the folder cannot be written or holds images of something else; NotFinite if model or tokenizer
            overflow. All processes end with it after the same chunk.
        Preempted: a signal was received.
    """
    folder = SampleFolder(folder)
    misc.by_main_process(lambda: folder.prepare({"settings": asdict(settings), "weights": weights}))
    total, size, rank, world = settings.num_images, settings.eval_bsz, misc.get_rank(), misc.get_world_size()
    chunks = [range(i, min(i + size, total)) for i in range(0, total, size)]
    if len(chunks) < world:
        misc.warn("%d chunks of %d images for %d processes: some have nothing to do", len(chunks), size, world)

    def find_missing() -> list[range]:
        there = folder.numbers()
        if settings.save_confidence:
            there &= folder.confidence.numbers()
        return [chunk for chunk in chunks if not there.issuperset(chunk)]

    def make(own: Sequence[range]) -> None:
        for chunk in own:
            images, confidence = sample_chunk(model, vae, latent_factor, chunk, settings, device)
            folder.save(images, chunk)
            if settings.save_confidence:
                folder.confidence.save(confidence_maps(confidence, images.shape[-1]), chunk)

    # All processes share what is missing, so that one whose images were lost has no more to do than others.
    missing = misc.by_main_process(find_missing)
    with misc.progress(total=total, unit="img", desc=f"sampling, guidance {settings.cfg:g}") as bar:
        bar.update(total - sum(map(len, missing)))
        for first in range(0, len(missing), world):
            turn = missing[first : first + world]  # a chunk for each process; the last turn may have fewer
            misc.in_all_processes(partial(make, turn[rank : rank + 1]))
            bar.update(sum(map(len, turn)))
            if stop_signals is not None:
                stop_signals.check()
    return folder


def sample_chunk(
    model: TokenBridge,
    vae: AutoencoderKL,
    latent_factor: float,
    numbers: Sequence[int],
    settings: SampleSettings,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The images of these numbers as bytes ``[N, 3, H, W]``, and the confidence of their tokens ``[N, h, w]``.

    Raises:
        NotFinite: the transformer or the tokenizer's decoder overflows.
    """
    labels = torch.tensor([number * model.class_num // settings.num_images for number in numbers])
    options = {name: getattr(settings, name) for name in SamplingOptions.__dataclass_fields__}
    options |= {"seeds": image_seeds(settings.gen_seed, numbers), "return_confidence": True}
    with misc.autocast(device, settings.precision):
        latents, confidence = model.sample_tokens(len(numbers), labels=labels, **options)
    precision = settings.vae_precision or settings.precision
    images, confidence = decode_images(vae, latents / latent_factor, precision, "--vae_precision"), confidence.cpu()
    misc.check_finite(confidence, "the transformer", settings.precision)  # sampled levels are finite in any case
    return images, confidence.unflatten(1, (model.grid_size, -1))


def check_num_images(num_images: int, class_num: int) -> None:
    """Raises UserError unless every class can have the same number of images, as metrics want them."""
    if num_images <= 0 or num_images % class_num:
        near = max(class_num, round(num_images / class_num) * class_num)
        raise UserError(
            f"--num_images {num_images} cannot be shared evenly by {class_num} classes; use a multiple, such as "
            f"{near}, or --no_metrics for pictures alone"
        )


# --------------------------------------------------------------------------------------------------------------------
# Held-out likelihood.

LIKELIHOOD_MASKS = 4  # mask ratios an image is measured at


@torch.no_grad()
def held_out_likelihood(
    model: TokenBridge,
    vae: AutoencoderKL | None,
    latent_factor: float,
    loader: DataLoader,
    device: torch.device,
    precision: str,
    seed: int = 0,
    head_options: Mapping[str, Any] | None = None,
    stop_signals: misc.StopSignals | None = None,
) -> dict[str, float]:
    """Cross-entropy a latent dimension over held-out images, at fixed masks and posterior samples.

    Each image is measured at :data:`LIKELIHOOD_MASKS` mask ratios, quantiles of training's distribution. Its masks and
    posterior sample follow from ``seed`` and its number, so results do not depend on batch size or processes. So do
    the random numbers that the head's loss takes, if any.

    Args:
        loader: batches of images, or of moments where ``vae`` is None, dealt by :class:`util.loader.RankSampler`.
        head_options: arguments of the head's ``loss``.
        stop_signals: end measuring after the batch in which a process received one.

    Returns:
        ``nats_per_dim``, ``bits_per_dim`` and ``images``.

    Raises:
        NotFinite: the tokenizer's encoder or the transformer overflows.
        Preempted: a signal was received.
    """
    training = model.training
    model.eval()
    sums, limits = (misc.double(torch.zeros(2, device=device)) for _ in range(2))  # cross-entropy, images; see extremes
    rank, world, done = misc.get_rank(), misc.get_world_size(), 0
    counts = [model.num_masked_at((i + 0.5) / LIKELIHOOD_MASKS) for i in range(LIKELIHOOD_MASKS)]
    for batch, labels in misc.until_stopped(loader, stop_signals):
        numbers = [rank + world * (done + i) for i in range(len(batch))]
        done += len(batch)
        batch, labels = (x.to(device, non_blocking=True) for x in (batch, labels))
        posterior = DiagonalGaussianDistribution(batch) if vae is None else vae.encode(batch)
        draws = numbered_draws(seed, numbers)
        latents = posterior.sample(misc.to_device(draws.normal(*posterior.mean.shape[1:]), device)) * latent_factor
        limits += misc.extremes(latents)
        orders = draws.uniform(LIKELIHOOD_MASKS, model.seq_len).argsort(dim=-1)  # [B, masks, L]
        head_numbers: list[tuple[Tensor, ...]] = [()] * LIKELIHOOD_MASKS
        if model.head.loss_numbers:
            uniform = draws.uniform(LIKELIHOOD_MASKS, model.seq_len, model.head.loss_numbers)
            head_numbers = [(numbers,) for numbers in misc.to_device(uniform, device).unbind(1)]
        for i, count in enumerate(counts):
            mask = torch.zeros(len(batch), model.seq_len).scatter(1, orders[:, i, :count], 1.0)
            with misc.autocast(device, precision):
                nats = model(latents, labels, mask, *head_numbers[i], **(head_options or {}))
            sums[0] += misc.double(nats * len(batch) / len(counts))
        sums[1] += len(batch)
    model.train(training)
    sums[0] /= model.head.channels_per_group  # a group's cross-entropy is that of all its channels
    found = (misc.all_reduce_mean(torch.cat([sums, limits])) * world).cpu()

    def check() -> None:
        misc.check_finite(found[2:], "the tokenizer's encoder", "fp32")  # without autocast
        misc.check_finite(found, "the transformer's likelihood", precision)

    misc.by_main_process(check)
    total, images = found[:2].tolist()
    return {"nats_per_dim": total / images, "bits_per_dim": total / images / math.log(2), "images": round(images)}


# --------------------------------------------------------------------------------------------------------------------
# Latents by channel.


@torch.no_grad()
def channel_statistics(
    vae: AutoencoderKL | None,
    loader: Iterable,
    channels: int,
    latent_factor: float,
    device: torch.device,
    precision: str,
) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel's scaled latents, over images and positions, and over all processes.

    They are of the posteriors themselves, without a draw: a channel's variance is that of its means plus the mean of
    its variances.

    Args:
        loader: gives tuples that start with images, or with moments where ``vae`` is None.

    Raises:
        NotFinite: the tokenizer's encoder overflows.
    """
    sums = misc.double(torch.zeros(3, channels, device=device))  # count, mean, mean square
    for batch, *_ in loader:
        batch = batch.to(device, non_blocking=True)
        with misc.autocast(device, precision):
            posterior = DiagonalGaussianDistribution(batch) if vae is None else vae.encode(batch)
        mean, deviation = misc.double(posterior.mean), misc.double(posterior.std)
        first, second = mean.mean(dim=(0, 2, 3)), (mean**2 + deviation**2).mean(dim=(0, 2, 3))
        sums += len(batch) * torch.stack([torch.ones_like(first), first, second])
    sums = misc.all_reduce_mean(sums)
    misc.by_main_process(lambda: misc.check_finite(sums, "the tokenizer's encoder", precision))
    count, first, second = sums
    mean = first / count
    deviation = (second / count - mean**2).clamp(min=0).sqrt()
    return (mean * latent_factor).tolist(), (deviation * latent_factor).tolist()


# --------------------------------------------------------------------------------------------------------------------
# Caching.


@torch.no_grad()
def cache_latents(
    vae: AutoencoderKL, loader: Iterable, cached_path: str | Path, device: torch.device, precision: str = "fp32"
) -> tuple[int, int]:
    """Writes each image's posterior moments, and its mirror image's, to ``cached_path/<class>/<file name>.npz``.

    Args:
        loader: gives images ``[B, 3, H, W]``, labels, ``class/file`` names, and hashes of the images' files (uint8
            ``[B, 32]``), or None for a batch with nothing to do.

    Returns:
        the number of files written, and of those replaced, by all processes.

    Raises:
        UserError: a name leads out of ``cached_path``, or a file cannot be written; NotFinite if the encoder overflows.
    """
    counts = torch.zeros(2)  # written, replaced
    with misc.progress(loader, unit="batch", desc="caching") as batches:
        for batch in batches:
            if batch is None:
                continue
            images, _, names, hashes = batch
            images = images.to(device, non_blocking=True)
            with misc.autocast(device, precision):
                moments = [vae.encode(view).parameters.float().cpu() for view in (images, images.flip(3))]
            misc.check_finite(torch.cat(moments), "the tokenizer's encoder", precision)
            views = (view.numpy() for view in moments)
            for name, plain, flipped, digest in zip(names, *views, hashes.numpy(), strict=True):
                path = cached_file(cached_path, name)
                counts += torch.tensor([1.0, float(path.exists())])
                with written_whole(path, flush=False) as file:
                    np.savez(file, moments=plain, moments_flip=flipped, **{IMAGE_HASH: digest})
    flush_all()  # what was not flushed file by file, before the counts tell other processes that all is there
    written, replaced = (misc.all_reduce_mean(counts.to(device)) * misc.get_world_size()).round().int().tolist()
    return written, replaced
