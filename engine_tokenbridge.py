"""The loops: training, generation for evaluation, and caching of latents."""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import nullcontext
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
from util.files import written_whole
from util.images import empty_of_images, save_grid, save_png, to_uint8
from util.loader import read_image, to_pixels
from util.lr_sched import adjust_learning_rate

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


def train_one_epoch(
    model: nn.Module,
    ema: ModelEmaV3,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loader: Iterable,
    epoch: int,
    to_latents: Callable[[Tensor], Tensor],
    device: torch.device,
    args: Namespace,
    bar: tqdm | None = None,
    writer: SummaryWriter | None = None,
    peak_flops: float = math.inf,
) -> dict[str, float]:
    """One pass over ``loader``.

    Args:
        model: a TokenBridge, or one wrapped in DistributedDataParallel.
        ema: updated after every step.
        scaler: enabled for fp16 only.
        loader: gives batches of images or moments, and labels.
        epoch: from 0.
        to_latents: images or moments to scaled latents.
        args: accum_iter, grad_clip, precision, batch_size and the learning rate's (util.lr_sched).
        peak_flops: of a matrix product here, what utilization is measured against.

    Returns:
        means over the epoch: loss, grad_norm; lr at its end; images_per_second.

    Raises:
        UserError: a loss or gradient is not finite. The step is not taken.
    """
    model.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    steps = steps_per_epoch(loader, args.accum_iter)
    world = misc.get_world_size()
    flops = model_core(model).training_flops() * args.batch_size * args.accum_iter
    losses, norms = [], []
    iterator, started, logged = iter(loader), time.perf_counter(), 0
    for step in range(steps):
        lr = adjust_learning_rate(optimizer, epoch + step / steps, args)
        loss = backward(model, list(islice(iterator, args.accum_iter)), to_latents, scaler, device, args.precision)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)
        # After DDP's exchange every process sees the same norm, so all of them stop at the same step. With fp16 an
        # overflowing gradient is the scaler's business.
        watched = loss if scaler.is_enabled() else norm
        if not torch.isfinite(watched):
            raise UserError(
                f"loss {loss.item():.4g}, gradient norm {norm.item():.4g} at epoch {epoch}, step {step}: not finite, "
                f"training stopped before the step was taken; lower the learning rate ({lr:.3g}) or check the data"
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model_core(model))
        losses.append(loss)
        norms.append(norm)
        if bar is not None:
            bar.update()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            mean = misc.all_reduce_mean(torch.stack(losses[logged:]).mean()).item()  # waits for the device
            now = time.perf_counter()
            rate = (step + 1 - logged) * args.batch_size * args.accum_iter * world / (now - started)
            utilization = flops * (step + 1 - logged) / (now - started) / peak_flops
            started, logged = now, step + 1
            if bar is not None:
                bar.set_postfix_str(f"epoch {epoch} loss {mean:.4f} lr {lr:.2e} {rate:.1f} img/s MFU {utilization:.0%}")
            if writer is not None:
                figures = {
                    "train/loss": mean,
                    "train/lr": lr,
                    "train/grad_norm": torch.stack(norms).mean().item(),
                    "speed/images_per_second": rate,
                    "speed/model_flops_utilization": utilization,
                    "speed/memory_gib": misc.memory_in_use(device),
                }
                for tag, value in figures.items():
                    writer.add_scalar(tag, value, epoch * steps + step + 1)
    loss = misc.all_reduce_mean(torch.stack(losses).mean()).item()
    return {"loss": loss, "grad_norm": torch.stack(norms).mean().item(), "lr": lr, "images_per_second": rate}


# --------------------------------------------------------------------------------------------------------------------
# Generation for evaluation.


def image_seeds(gen_seed: int, numbers: Iterable[int]) -> list[int]:
    """One seed for each image number: no two images of a run share one."""
    base = int(np.random.SeedSequence(gen_seed).generate_state(1)[0])
    return [(base + number) % 2**32 for number in numbers]


@torch.no_grad()
def evaluate(
    model: TokenBridge,
    vae: AutoencoderKL,
    latent_factor: float,
    folder: str | Path,
    num_images: int,
    eval_bsz: int,
    num_iter: int,
    cfg: float,
    cfg_schedule: str,
    temperature: float,
    gen_seed: int,
    device: torch.device,
    precision: str,
) -> Path:
    """Samples ``num_images``, the same number of each class, into ``folder/NNNNN.png``.

    Image n shows class ``n // (num_images / class_num)`` and has its own seed. Chunks of ``eval_bsz`` consecutive
    images are dealt to the processes whole. Returns the folder.

    Raises:
        UserError: ``num_images`` is not a multiple of the number of classes.
    """
    check_num_images(num_images, model.class_num)
    folder = Path(folder)
    per_class = num_images // model.class_num
    empty_of_images(folder)
    chunks = [range(i, min(i + eval_bsz, num_images)) for i in range(0, num_images, eval_bsz)]
    with misc.progress(total=num_images, unit="img", desc=f"sampling, guidance {cfg:g}") as bar:
        for chunk in chunks[misc.get_rank() :: misc.get_world_size()]:
            labels = torch.tensor([number // per_class for number in chunk])
            with misc.autocast(device, precision):
                latents = model.sample_tokens(
                    len(chunk), num_iter, cfg, cfg_schedule, labels, temperature, seeds=image_seeds(gen_seed, chunk)
                )
                images = to_uint8(vae.decode(latents / latent_factor)).cpu()
            for number, image in zip(chunk, images, strict=True):
                save_png(image, folder / f"{number:05d}.png")
            bar.update(min(len(chunk) * misc.get_world_size(), num_images - bar.n))
    misc.barrier()
    return folder


def check_num_images(num_images: int, class_num: int) -> None:
    """Raises UserError unless every class can have the same number of images."""
    if num_images <= 0 or num_images % class_num:
        near = max(class_num, round(num_images / class_num) * class_num)
        raise UserError(
            f"--num_images {num_images} cannot be shared evenly by {class_num} classes; use a multiple, such as {near}"
        )


def samples_grid(folder: str | Path, path: str | Path, num_images: int, limit: int = 100) -> None:
    """A picture of up to ``limit`` images of ``folder``, evenly spaced, ten in a row."""
    numbers = [i * num_images // min(limit, num_images) for i in range(min(limit, num_images))]
    images = [to_uint8(to_pixels(read_image(str(Path(folder) / f"{number:05d}.png")))) for number in numbers]
    save_grid(torch.stack(images), path, columns=10)


# --------------------------------------------------------------------------------------------------------------------
# Caching.


@torch.no_grad()
def cache_latents(
    vae: AutoencoderKL, loader: Iterable, cached_path: str | Path, device: torch.device, precision: str = "fp32"
) -> int:
    """Writes each image's posterior moments, and its mirror image's, to ``cached_path/<class>/<file name>.npz``.

    Args:
        loader: gives images ``[B, 3, H, W]``, labels, and ``class/file`` names.

    Returns:
        the number of files written by this process.
    """
    written = 0
    with misc.progress(loader, unit="batch", desc="caching") as batches:
        for images, _, names in batches:
            images = images.to(device, non_blocking=True)
            with misc.autocast(device, precision):
                moments = [vae.encode(view).parameters.float().cpu().numpy() for view in (images, images.flip(3))]
            for name, plain, flipped in zip(names, *moments, strict=True):
                with written_whole(Path(cached_path) / f"{name}.npz") as file:
                    np.savez(file, moments=plain, moments_flip=flipped)
                written += 1
    misc.barrier()
    return written
