"""The loops: training, generation for evaluation, and caching of latents."""

import json
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL, DiagonalGaussianDistribution
from util import misc
from util.errors import UserError
from util.files import write_json, written_whole
from util.images import confidence_maps, save_grid, save_png, to_uint8
from util.loader import cached_file
from util.lr_sched import adjust_learning_rate
from util.metrics import PlainImages
from util.rng import numbered_draws

LOG_EVERY = 20  # steps between two looks at the device's numbers

# --------------------------------------------------------------------------------------------------------------------
# Training.


def latents_from(batch: Tensor, vae: AutoencoderKL | None, latent_factor: float) -> Tensor:
    """Scaled posterior samples ``[B, C, h, w]`` from images, or from cached moments where ``vae`` is None."""
    with torch.no_grad():
        posterior = DiagonalGaussianDistribution(batch) if vae is None else vae.encode(batch)
        return posterior.sample() * latent_factor


def backward(
    model: nn.Module,
    batches: list,
    to_latents: Callable[[Tensor], Tensor],
    scaler,
    device: torch.device,
    precision: str,
) -> Tensor:
    """Gradients of the mean loss over ``batches`` (one accumulated step), and that loss, detached."""
    total = torch.zeros((), device=device)
    for i, (batch, labels) in enumerate(batches):
        model_core(model).check_labels(labels)  # while they are on the host
        latents = to_latents(batch.to(device, non_blocking=True))
        labels = labels.to(device, non_blocking=True)
        # Processes exchange gradients once a step, with the last part of the batch.
        waits = isinstance(model, DistributedDataParallel) and i < len(batches) - 1
        with model.no_sync() if waits else nullcontext():
            with misc.autocast(device, precision):
                loss = model(latents, labels) / len(batches)
            scaler.scale(loss).backward()
        total += loss.detach()
    return total


def model_core(model: nn.Module) -> TokenBridge:
    """The model inside its DDP wrapper, if it has one."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def steps_per_epoch(loader: DataLoader, accum_iter: int) -> int:
    """Optimizer steps of an epoch; batches left over after the last whole one are dropped."""
    return len(loader) // accum_iter


class Meter:
    """Losses and gradient norms since they were last looked at; looking waits for the device.

    Args:
        images: of one step, over all processes.
        flops: of one step, on this device.
        peak_flops: of a matrix product here, what utilization is measured against.
    """

    def __init__(self, images: int, flops: float, peak_flops: float, device: torch.device):
        self.images, self.flops, self.peak_flops, self.device = images, flops, peak_flops, device
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.started = time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """One step's."""
        self.losses.append(loss)
        self.norms.append(norm)

    def read(self) -> dict[str, float]:
        """Means by TensorBoard tag; starts anew. Empty if no step was taken."""
        if not self.losses:
            return {}
        loss = misc.all_reduce_mean(torch.stack(self.losses).mean()).item()
        norms = torch.stack(self.norms)
        seconds = (time.perf_counter() - self.started) / len(self.losses)
        self.losses, self.norms, self.started = [], [], time.perf_counter()
        return {
            "train/loss": loss,
            "train/grad_norm": norms[norms.isfinite()].mean().item(),  # fp16 skips steps whose gradients overflow
            "speed/images_per_second": self.images / seconds,
            "speed/model_flops_utilization": self.flops / seconds / self.peak_flops,
            "speed/memory_gib": misc.memory_in_use(self.device),
        }


class BadSteps:
    """Counts the steps that were not taken because loss or gradient was not finite, and writes down their batches.

    Args:
        limit: how many a run may have.
        folder: where ``bad_steps-rank<n>.jsonl`` goes.
    """

    def __init__(self, limit: int, folder: str | Path):
        self.limit, self.count, self.rank = limit, 0, misc.get_rank()
        self.path = Path(folder) / f"bad_steps-rank{self.rank}.jsonl"

    def add(self, loss: Tensor, norm: Tensor, lr: float, epoch: int, step: int, files: list[str]) -> None:
        """One such step.

        Raises:
            UserError: there have been more than the limit.
        """
        self.count += 1
        figures = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr, "epoch": epoch, "step": step}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps({**figures, "rank": self.rank, "files": files}) + "\n")
        what = f"loss {loss.item():.4g}, gradient norm {norm.item():.4g} at epoch {epoch}, step {step}: not finite"
        if self.count > self.limit:
            raise UserError(
                f"{what}, the step was not taken (learning rate {lr:.3g}, process {self.rank}, bad steps so far "
                f"{self.count}); its images are listed in {self.path}; lower the learning rate, check the data, or "
                "allow more with --max_bad_steps"
            )
        misc.log.warning("%s, the step is left out (%d of %d allowed)", what, self.count, self.limit)


def take_step(
    loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, grad_clip: float
) -> tuple[Tensor, Tensor]:
    """Clips the gradients and takes the optimizer's step, unless loss or gradient is not finite.

    Nothing is waited for: the fused optimizer looks at the flag on the device.

    Returns:
        the gradient norm before clipping, and whether loss and gradient were finite, on the device; the same on all
        processes.
    """
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    # After DDP's exchange every process sees the same norm. With fp16 an overflowing gradient is the scaler's
    # business: it leaves the step out by itself and lowers the scale.
    finite = torch.isfinite(misc.all_reduce_mean(loss) if scaler.is_enabled() else norm)
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif optimizer.defaults.get("fused"):
        optimizer.found_inf, optimizer.grad_scale = (~finite).float(), None  # as a gradient scaler would tell it
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale
    elif finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


class LastStep:
    """What follows a step once it is known to be finite: asked for a step later, when the device has long answered.

    So neither weights' average nor figures see a bad step, and the device never waits for the host.
    """

    def __init__(self, model: nn.Module, ema: ModelEmaV3, meter: Meter, bad_steps: BadSteps):
        self.model, self.ema, self.meter, self.bad_steps = model, ema, meter, bad_steps
        self.pending: tuple | None = None

    def put(self, loss: Tensor, norm: Tensor, finite: Tensor, about: Callable[[], dict]) -> None:
        """Remembers a step; ``about`` tells what is to be written down of a bad one."""
        answer, event = finite, None
        if finite.is_cuda:
            answer = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending = loss, norm, answer, event, about

    def settle(self) -> None:
        """Updates the average and the figures by the step that is pending, if any, or counts it as bad.

        Raises:
            UserError: see :class:`BadSteps`.
        """
        if self.pending is None:
            return
        (loss, norm, answer, event, about), self.pending = self.pending, None
        if event is not None:
            event.synchronize()
        if answer:
            self.ema.update(model_core(self.model))
            self.meter.add(loss, norm)
        else:
            self.bad_steps.add(loss, norm, **about())


def files_of_step(loader: DataLoader, step: int, images: int) -> list[str]:
    """The files of a step's ``images``, counted from the first batch that ``loader`` gave this epoch."""
    indices = list(loader.sampler)[step * images : (step + 1) * images]
    return [loader.dataset.samples[index][0] for index in indices]


def train_one_epoch(
    model: nn.Module,
    ema: ModelEmaV3,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loader: DataLoader,
    epoch: int,
    to_latents: Callable[[Tensor], Tensor],
    device: torch.device,
    args: Namespace,
    bar: tqdm | None = None,
    writer: SummaryWriter | None = None,
    peak_flops: float = math.inf,
    bad_steps: BadSteps | None = None,
    start_step: int = 0,
    after_step: Callable[[int, Callable[[], None]], None] | None = None,
) -> dict[str, float]:
    """One pass over ``loader``.

    Everything random in a step follows from ``args.seed``, the process, the epoch and the step: a run that starts in
    the middle of an epoch draws what an unbroken one would have drawn there.

    Args:
        model: a TokenBridge, or one wrapped in DistributedDataParallel.
        ema: updated after every step.
        scaler: enabled for fp16 only.
        loader: gives batches of images or moments, and labels.
        epoch: from 0.
        to_latents: images or moments to scaled latents.
        args: seed, accum_iter, grad_clip, precision, batch_size, output_dir and the learning rate's (util.lr_sched).
        bar, writer: shown and written to every :data:`LOG_EVERY` steps and at the end.
        peak_flops: of a matrix product here, what utilization is measured against.
        bad_steps: counts steps whose loss or gradient is not finite; by default the first one ends the run.
        start_step: the first step to take; ``loader`` starts with its batches.
        after_step: called after each step with the number of the epoch's steps taken so far, and what to call before
            weights and average are read.

    Returns:
        the last figures written, by tag.

    Raises:
        UserError: see :class:`BadSteps`.
    """
    model.train()
    bad_steps = bad_steps or BadSteps(0, args.output_dir)
    steps, images = steps_per_epoch(loader, args.accum_iter), args.batch_size * args.accum_iter
    flops = model_core(model).training_flops() * images
    meter = Meter(images * misc.get_world_size(), flops, peak_flops, device)
    last = LastStep(model, ema, meter, bad_steps)
    iterator, figures = iter(loader), {}
    for step in range(start_step, steps):
        lr = adjust_learning_rate(optimizer, epoch + step / steps, args)
        batches = list(islice(iterator, args.accum_iter))
        misc.seed_everything(args.seed, misc.get_rank(), epoch, step)
        loss = backward(model, batches, to_latents, scaler, device, args.precision)
        last.settle()  # before the weights move on
        norm, finite = take_step(loss, optimizer, scaler, args.grad_clip)

        def about(lr: float = lr, step: int = step) -> dict:
            files = files_of_step(loader, step - start_step, images)
            return {"lr": lr, "epoch": epoch, "step": step, "files": files}

        last.put(loss, norm, finite, about)
        if bar is not None:
            bar.update()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            last.settle()
            figures = meter.read() or figures
            figures["train/lr"] = lr
            if bar is not None and "train/loss" in figures:
                bar.set_postfix_str(
                    f"epoch {epoch} loss {figures['train/loss']:.4f} lr {lr:.2e} "
                    f"{figures['speed/images_per_second']:.1f} img/s MFU {figures['speed/model_flops_utilization']:.0%}"
                )
            if writer is not None:
                for tag, value in figures.items():
                    writer.add_scalar(tag, value, epoch * steps + step + 1)
        if after_step is not None:
            after_step(step + 1, last.settle)
    return figures


# --------------------------------------------------------------------------------------------------------------------
# Generation for evaluation.


@dataclass(frozen=True)
class Sampling:
    """How images are sampled for evaluation; two runs of equal settings and weights make equal images."""

    num_images: int
    eval_bsz: int
    num_iter: int
    cfg: float
    cfg_schedule: str
    temperature: float
    gen_seed: int
    precision: str
    order: str = "random"
    confidence_noise: float = 0.0
    save_confidence: bool = False
    vae_precision: str | None = None  # by default that of the model


def image_seeds(gen_seed: int, numbers: Iterable[int]) -> list[int]:
    """One seed for each image number: no two images of a run share one."""
    base = int(np.random.SeedSequence(gen_seed).generate_state(1)[0])
    return [(base + number) % 2**32 for number in numbers]


def image_path(folder: Path, number: int) -> Path:
    """Where image ``number`` of a run lies."""
    return folder / f"{number:05d}.png"


def confidence_folder(folder: Path) -> Path:
    """Where the maps of confidence of a run's images lie."""
    return folder.with_name(folder.name + "-confidence")


def results_path(folder: Path) -> Path:
    """Beside sampled images: the settings and weights they were made with, and their metrics once there are any."""
    return folder.with_name(folder.name + ".json")


def read_results(folder: Path) -> dict:
    """What :func:`results_path` holds; empty where there is nothing to read."""
    try:
        return json.loads(results_path(folder).read_text())
    except (OSError, ValueError):
        return {}


def remove_images(folder: Path) -> int:
    """Removes the numbered images of ``folder`` and their maps of confidence; how many images there were.

    Folders in which nothing else lies are removed, too.
    """
    for part in (confidence_folder(folder), folder):
        images = [path for path in part.glob("*.png") if path.stem.isdigit()]
        for path in images:
            path.unlink()
        if part.is_dir() and not any(part.iterdir()):
            part.rmdir()
    return len(images)


def same_run(before: dict, about: dict[str, dict]) -> bool:
    """Whether results read back are of a run with the settings and weights ``about`` tells."""
    return all(before.get(name) == value for name, value in json.loads(json.dumps(about)).items())  # as it reads back


def prepare_folder(folder: Path, about: dict[str, dict]) -> None:
    """Keeps the images that an interrupted run with the same description left in ``folder``, removes others."""
    if misc.is_main_process():
        before = read_results(folder)
        if not same_run(before, about):
            if remove_images(folder):
                misc.log.info("replacing the images of another run in %s: %s", folder, changes(before, about))
            write_json(results_path(folder), about)
    misc.barrier()


def changes(before: dict[str, dict], now: dict[str, dict]) -> str:
    """What differs between two runs' descriptions, for people."""
    entries = [(key, (before.get(part) or {}).get(key), value) for part in now for key, value in now[part].items()]
    return ", ".join(f"{key} {old} then, {value} now" for key, old, value in entries if old != value)


@torch.no_grad()
def evaluate(
    model: TokenBridge,
    vae: AutoencoderKL,
    latent_factor: float,
    folder: str | Path,
    settings: Sampling,
    device: torch.device,
    weights: dict,
) -> Path:
    """Samples ``settings.num_images``, the same number of each class, into ``folder/NNNNN.png``.

    Image n shows class ``n // (num_images / class_num)`` and has its own seed. Chunks of ``eval_bsz`` consecutive
    images are dealt to the processes whole, so that their number never changes an image. A run that was interrupted
    continues where it stopped.

    Args:
        weights: what identifies the weights; images sampled from others are not taken for this run's.

    Returns:
        the folder.

    Raises:
        UserError: ``num_images`` is not a multiple of the number of classes.
    """
    check_num_images(settings.num_images, model.class_num)
    folder = Path(folder)
    prepare_folder(folder, {"settings": asdict(settings), "weights": weights})
    per_class, total, size = settings.num_images // model.class_num, settings.num_images, settings.eval_bsz
    chunks = [range(i, min(i + size, total)) for i in range(0, total, size)]
    rank, world = misc.get_rank(), misc.get_world_size()
    if len(chunks) < world and rank == 0:
        misc.log.warning("%d chunks of %d images for %d processes: some have nothing to do", len(chunks), size, world)
    # What is missing is dealt anew, so that a process whose images were lost has no more to do than others.
    folders = [folder, confidence_folder(folder)] if settings.save_confidence else [folder]
    missing = [chunk for chunk in chunks if not all(image_path(f, n).exists() for f in folders for n in chunk)]
    missing = misc.from_main_process(missing)
    with misc.progress(total=total, unit="img", desc=f"sampling, guidance {settings.cfg:g}") as bar:
        bar.update(total - sum(map(len, missing)))
        for chunk in missing[rank::world]:
            labels = torch.tensor([number // per_class for number in chunk])
            how = (settings.num_iter, settings.cfg, settings.cfg_schedule, labels, settings.temperature)
            more = {
                "order": settings.order,
                "confidence_noise": settings.confidence_noise,
                "seeds": image_seeds(settings.gen_seed, chunk),
            }
            with misc.autocast(device, settings.precision):
                latents, confidence = model.sample_tokens(len(chunk), *how, **more, return_confidence=True)
            images = decode_images(vae, latents / latent_factor, settings.vae_precision or settings.precision)
            for number, image in zip(chunk, images, strict=True):
                save_png(image, image_path(folder, number))
            if settings.save_confidence:
                maps = confidence_maps(confidence.unflatten(1, (model.grid_size, -1)).cpu(), images.shape[-1])
                for number, picture in zip(chunk, maps, strict=True):
                    save_png(picture, image_path(confidence_folder(folder), number))
            bar.update(min(len(chunk) * world, total - bar.n))
    misc.barrier()
    return folder


#: Pixels decoded at once, by device.
DECODING_BUDGET = {"cpu": 2**19, "cuda": 2**22}


@torch.no_grad()
def decode_images(vae: AutoencoderKL, latents: Tensor, precision: str) -> Tensor:
    """Unscaled latents ``[N, C, h, w]`` to images as bytes ``[N, 3, H, W]`` on the CPU, in parts that fit memory."""
    pixels = latents.shape[2] * latents.shape[3] * vae.stride**2
    size = max(1, DECODING_BUDGET.get(latents.device.type, 2**22) // pixels)
    parts = []
    for part in latents.float().split(size):
        with misc.autocast(latents.device, precision):
            parts.append(to_uint8(vae.decode(part.contiguous(memory_format=torch.channels_last))))
    return torch.cat([part.cpu() for part in parts])  # the host waits once


def check_num_images(num_images: int, class_num: int) -> None:
    """Raises UserError unless every class can have the same number of images."""
    if num_images <= 0 or num_images % class_num:
        near = max(class_num, round(num_images / class_num) * class_num)
        raise UserError(
            f"--num_images {num_images} cannot be shared evenly by {class_num} classes; use a multiple, such as {near}"
        )


def sampled_images(folder: Path, num_images: int) -> PlainImages:
    """The numbered images of ``folder``, in order.

    Raises:
        UserError: some are missing.
    """
    images = PlainImages(folder)
    if len(images) != num_images:
        raise UserError(f"{folder} holds {len(images)} images, not {num_images}; run the same command again")
    return images


def samples_grid(images: PlainImages, path: str | Path, limit: int = 100) -> None:
    """A picture of up to ``limit`` of the images, evenly spaced, ten in a row."""
    count = min(limit, len(images))
    save_grid(torch.stack([images[i * len(images) // count] for i in range(count)]), path, columns=10)


def export_npz(images: PlainImages, path: str | Path) -> None:
    """Writes all images as ``arr_0``, uint8 ``[N, H, W, 3]``, as ADM's evaluator reads them."""
    with written_whole(path) as file:
        np.savez(file, arr_0=np.stack([image.permute(1, 2, 0).numpy() for image in images]))


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
) -> dict[str, float]:
    """Cross-entropy a latent dimension over held-out images, at fixed masks and posterior samples.

    Each image is measured at :data:`LIKELIHOOD_MASKS` mask ratios, quantiles of training's distribution. Its masks and
    posterior sample follow from ``seed`` and its number, so results do not depend on batch size or processes.

    Args:
        loader: batches of images, or of moments where ``vae`` is None, sampled by :class:`util.args.RankSampler`.

    Returns:
        ``nats_per_dim``, ``bits_per_dim`` and ``images``.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # cross-entropy, images
    rank, world, done = misc.get_rank(), misc.get_world_size(), 0
    counts = [model.num_masked_at((i + 0.5) / LIKELIHOOD_MASKS) for i in range(LIKELIHOOD_MASKS)]
    for batch, labels in loader:
        numbers = [rank + world * (done + i) for i in range(len(batch))]
        done += len(batch)
        batch = batch.to(device, non_blocking=True)
        posterior = DiagonalGaussianDistribution(batch) if vae is None else vae.encode(batch)
        draws = numbered_draws(seed, numbers)
        latents = posterior.sample(draws.normal(*posterior.mean.shape[1:]).to(device)) * latent_factor
        orders = draws.uniform(LIKELIHOOD_MASKS, model.seq_len).argsort(dim=-1)  # [B, masks, L]
        for i, count in enumerate(counts):
            mask = torch.zeros(len(batch), model.seq_len).scatter(1, orders[:, i, :count], 1.0).to(device)
            with misc.autocast(device, precision):
                sums[0] += model(latents, labels.to(device), mask) * len(batch) / len(counts)
        sums[1] += len(batch)
    model.train(training)
    sums[0] /= model.head.channels_per_group  # a group's cross-entropy is that of all its channels
    total, images = (misc.all_reduce_mean(sums) * world).tolist()
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

    Of the posteriors themselves, nothing is drawn: a channel's variance is that of its means plus the mean of its
    variances.

    Args:
        loader: gives tuples that start with images, or with moments where ``vae`` is None.
    """
    sums = torch.zeros(3, channels, dtype=torch.float64, device=device)  # count, mean, mean square
    for batch, *_ in loader:
        batch = batch.to(device, non_blocking=True)
        with misc.autocast(device, precision):
            posterior = DiagonalGaussianDistribution(batch) if vae is None else vae.encode(batch)
        mean, deviation = posterior.mean.double(), posterior.std.double()
        first, second = mean.mean(dim=(0, 2, 3)), (mean**2 + deviation**2).mean(dim=(0, 2, 3))
        sums += len(batch) * torch.stack([torch.ones_like(first), first, second])
    count, first, second = misc.all_reduce_mean(sums)
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
        loader: gives images ``[B, 3, H, W]``, labels, and ``class/file`` names, or None for a batch with nothing to do.

    Returns:
        the number of files written, and of those replaced, by all processes.

    Raises:
        UserError: a name leads out of ``cached_path``, or a file cannot be written.
    """
    counts = torch.zeros(2, device=device)  # written, replaced
    with misc.progress(loader, unit="batch", desc="caching") as batches:
        for batch in batches:
            if batch is None:
                continue
            images, _, names = batch
            images = images.to(device, non_blocking=True)
            with misc.autocast(device, precision):
                moments = [vae.encode(view).parameters.float().cpu().numpy() for view in (images, images.flip(3))]
            for name, plain, flipped in zip(names, *moments, strict=True):
                path = cached_file(cached_path, name)
                counts += torch.tensor([1.0, float(path.exists())], device=device)
                with written_whole(path) as file:
                    np.savez(file, moments=plain, moments_flip=flipped)
    written, replaced = (misc.all_reduce_mean(counts) * misc.get_world_size()).round().int().tolist()
    return written, replaced
